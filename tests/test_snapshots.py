"""Snapshots: everything comes back as it was, and what went wrong on disk is told and costs no more than it must."""

import gc
import logging
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from iumad_jax.errors import UserError
from iumad_jax.snapshots import Position, Snapshot, Snapshots


def variables(seed=0, size=3):
    rng = np.random.default_rng(seed)
    return {
        "ib_iumad": {
            "params": {"mamba": {"kernel": rng.normal(size=(2, size)).astype(np.float32)}, "count": np.int32(seed)},
            "statistics": {},
        },
        "floor": {
            "params": {},
            "statistics": {"rgb": {"memory": rng.normal(size=(4, 2)).astype(ml_dtypes.bfloat16), "scale": np.ones(())}},
        },
    }


def snapshot(step, epochs, finished=False, seed=0, size=3):
    record = {"ledger_lines": 10 * step + epochs, "matrices": {"f": {"aupro": [[0.1, float("nan")]]}}, "seconds": 0.3}
    return Snapshot(
        Position(step, epochs, finished),
        variables(seed, size),
        [],
        record,
        {"old": {"kernel": np.full(2, seed, np.float32)}},
    )


@contextmanager
def opened(workdir):
    snapshots = Snapshots(workdir)
    yield snapshots
    snapshots.close()


def assert_same(found, expected):
    """Structure, types and bits."""
    assert found.position == expected.position
    np.testing.assert_equal(found.record, expected.record)
    for one, other in [
        (found.variables, expected.variables),
        (found.optimizer, expected.optimizer),
        (found.memory, expected.memory),
    ]:
        assert jax.tree.structure(one) == jax.tree.structure(other)
        for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
            assert (a.dtype, a.shape, np.asarray(a).tobytes()) == (b.dtype, b.shape, np.asarray(b).tobytes())


def test_everything_comes_back_as_it_was(tmp_path):
    """Empty branches, scalars, bfloat16 and JAX's arrays too."""
    optimizer = optax.scale_by_adam().init(variables()["ib_iumad"]["params"]["mamba"])
    saved = snapshot(1, 7)._replace(optimizer=[*jax.tree.leaves(optimizer), jnp.full(2, jnp.nan, jnp.bfloat16)])
    with opened(tmp_path) as snapshots:
        assert snapshots.latest() is None
        snapshots.save(saved)
        assert_same(snapshots.latest(), saved)
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), saved)


def test_the_furthest_position_is_the_latest(tmp_path):
    """The story of a run, opened anew after every snapshot."""
    positions = [(0, 1), (0, 3), (0, 0, True), (1, 2), (1, 12), (1, 0, True), (2, 0, True)]
    for seed, position in enumerate(positions):
        with opened(tmp_path) as snapshots:
            snapshots.save(snapshot(*position, seed=seed))
        with opened(tmp_path) as snapshots:
            assert_same(snapshots.latest(), snapshot(*position, seed=seed))
    # A finished step's snapshot stays; of those within steps, the newest.
    assert sorted(p.name for p in (tmp_path / "snapshots").iterdir()) == ["0", "1", "2"]
    assert len(list((tmp_path / "snapshots_within_step").iterdir())) == 1


@pytest.fixture
def after_an_error(monkeypatch):
    """Tests go on after an error that ends a run and silences what Orbax's threads would still print."""
    for holder, name in [
        (threading, "excepthook"),
        (sys, "unraisablehook"),
        (logging.getLogger("absl"), "level"),
        (logging.getLogger("asyncio"), "level"),
    ]:
        monkeypatch.setattr(holder, name, getattr(holder, name))
    yield
    gc.collect()
    time.sleep(0.1)


@pytest.mark.usefixtures("after_an_error")
@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("room", [0, 10_000])  # for not even the names; for all but the arrays
def test_a_full_disk_is_told_and_the_snapshot_before_is_intact(tmp_path, capfd, files_no_larger_than, room, finished):
    before, after = snapshot(0, 1), snapshot(0, 2, finished, seed=1, size=10_000)
    with opened(tmp_path) as snapshots:
        snapshots.save(before)
        with files_no_larger_than(room), pytest.raises(UserError) as error:
            snapshots.save(after)
        folder = tmp_path / ("snapshots" if finished else "snapshots_within_step")
        assert str(error.value) == (
            f"{folder}: the snapshot could not be saved (File too large); the one before it is intact,"
            " so make room and run the same command again."
        )
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), before)
        snapshots.save(after)  # with room again
        assert_same(snapshots.latest(), after)
    assert all(path.name.isdigit() for path in folder.iterdir())  # what was half written is gone
    assert capfd.readouterr().err == ""


KILLED = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from iumad_jax.snapshots import Position, Snapshot, Snapshots

snapshots = Snapshots(Path(sys.argv[1]))
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # the system kills the process that makes a file larger than this
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
snapshots.save(Snapshot(Position(1, 2), {"a": np.random.rand(10_000)}, [], {}, {}))
"""


def test_a_killed_save_is_ignored_and_cleared_away(tmp_path):
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(1, 1))
    killed = subprocess.run([sys.executable, "-c", KILLED, tmp_path])
    assert killed.returncode == -signal.SIGXFSZ
    folder = tmp_path / "snapshots_within_step"
    kept, unfinished = sorted(p.name for p in folder.iterdir())
    assert kept == "1000001"
    assert unfinished.startswith("1000002.")
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), snapshot(1, 1))
        snapshots.save(snapshot(1, 3))
    assert [p.name for p in folder.iterdir()] == ["1000003"]


def damage(folder):
    """Every way to spoil one of the files that a snapshot is read from, one after the other."""
    files = [*folder.glob("arrays/d/*"), *folder.glob("arrays/_METADATA"), *folder.glob("record/metadata")]
    files += folder.glob("arrays/manifest.ocdbt")
    assert len(files) >= 4
    for file in files:
        content = file.read_bytes()
        for spoiled in (content[: len(content) // 2], b"", None):
            file.unlink() if spoiled is None else file.write_bytes(spoiled)
            yield
            file.write_bytes(content)


@pytest.mark.usefixtures("after_an_error")
def test_a_damaged_snapshot_is_named_and_the_one_before_is_used_once_it_is_removed(tmp_path, capfd):
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(0, 0, finished=True))
        snapshots.save(snapshot(1, 0, finished=True, seed=1))
    folder = tmp_path / "snapshots" / "1"
    for _ in damage(folder):
        with opened(tmp_path) as snapshots, pytest.raises(UserError) as error:
            snapshots.latest()
        assert str(error.value).startswith(f"{folder}: the snapshot cannot be read (")
        assert str(error.value).endswith("); remove this folder to go on from the one before.")
        assert len(str(error.value)) < 400
        assert "\n" not in str(error.value)
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), snapshot(1, 0, finished=True, seed=1))
    shutil.rmtree(folder)
    with opened(tmp_path) as snapshots:
        assert_same(snapshots.latest(), snapshot(0, 0, finished=True))
    assert capfd.readouterr().err == ""


def test_a_flipped_bit_is_noticed_or_harmless(tmp_path):
    """Orbax alone restores most of them silently."""
    with opened(tmp_path) as snapshots:
        snapshots.save(snapshot(0, 0, finished=True, size=2000))
    arrays = tmp_path / "snapshots" / "0" / "arrays"
    largest = max((path for path in arrays.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    content = largest.read_bytes()
    rng, told = np.random.default_rng(0), []
    for _ in range(10):
        damaged = bytearray(content)
        damaged[rng.integers(len(content))] ^= 1 << rng.integers(8)
        largest.write_bytes(damaged)
        with opened(tmp_path) as snapshots:
            try:
                assert_same(snapshots.latest(), snapshot(0, 0, finished=True, size=2000))
            except UserError as error:
                told.append(str(error))
    assert told
    assert all("the snapshot cannot be read" in sentence for sentence in told)
