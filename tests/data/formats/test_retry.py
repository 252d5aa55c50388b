"""Threads that parse literals at a time raise SystemError on Python 3.11 (python/cpython#106905)."""

import gc
import sys
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest

from iumad_jax.data.formats.depth_files import read_depth
from iumad_jax.data.prepared import copies
from iumad_jax.data.sample import DepthFormat


@pytest.fixture
def racing_threads():
    """Make threads take turns, and the garbage collector call Python, as often as possible; JAX has such a callback."""
    interval, threshold = sys.getswitchinterval(), gc.get_threshold()

    def run_python(phase, info):
        list(map(str, range(50)))

    gc.callbacks.append(run_python)
    gc.set_threshold(20)
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)
    gc.set_threshold(*threshold)
    gc.callbacks.remove(run_python)


@pytest.mark.usefixtures("racing_threads")
@pytest.mark.parametrize("way", ["depth file", "reader"])
def test_arrays_are_read_by_several_threads(way, tmp_path):
    file = tmp_path / "depth.npy"
    np.save(file, np.full((2, 3), 1.5, np.float32))
    reader = SimpleNamespace(read=lambda object, split, id: np.load(file))

    def read(_):
        if way == "reader":
            return copies.read(reader, "bolt", "train", "000", lambda _: (1, 1))
        return read_depth(file, DepthFormat(), None, "")[0]

    with ThreadPoolExecutor(4) as pool:
        for array in pool.map(read, range(2500)):
            np.testing.assert_array_equal(array, np.full((2, 3), 1.5, np.float32))
