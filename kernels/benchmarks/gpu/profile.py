"""The hottest kernels of an update, from a profile."""

import functools
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.profiler import ProfileData
from ml_collections import ConfigDict

from kernels.benchmarks.gpu import update
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

UPDATES, SHOWN = 5, 5


def cases(options: Options) -> Cases:
    """One row: of the update as it is trained with."""
    config = update.settings(options)
    scan = "xla" if options.rehearse else ""  # the program of another part, or what the device does best
    yield f"{scan or 'default'}, TF32", functools.partial(profile, config, scan)


def profile(config: ConfigDict, scan: str) -> Row:
    """What takes most of the device's time, and how much."""
    compiled = update.prepared(config, scan, "TF32")
    compiled.run().block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(UPDATES):
                compiled.run().block_until_ready()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(file))
    taken: dict[str, list[float]] = defaultdict(list)
    for name, nanoseconds in _operations(data):
        taken[name].append(nanoseconds)
    total = sum(map(sum, taken.values()))
    hottest = sorted(taken, key=lambda name: -sum(taken[name]))[:SHOWN]
    if not hottest:
        lines = [f"{plane.name} {line.name}" for plane in data.planes for line in plane.lines]
        raise ValueError(f"the profile holds no operation of the device, only {', '.join(lines)}")
    return {
        "ms of all": total / UPDATES / 1e6,
        "kernels": len(taken),
        "hottest": [
            {
                "kernel": name,
                "ms an update": sum(taken[name]) / UPDATES / 1e6,
                "share": sum(taken[name]) / total,
                "calls an update": len(taken[name]) / UPDATES,
            }
            for name in hottest
        ],
    }


def _operations(data: ProfileData) -> Iterator[tuple[str, float]]:
    """Names and nanoseconds: of a GPU's streams, or of the threads that run XLA's programs on a CPU."""
    for plane in data.planes:
        for line in plane.lines:
            on_gpu = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
            on_cpu = plane.name == "/host:CPU" and "XLA" in line.name
            if on_gpu or on_cpu:
                yield from ((event.name, event.duration_ns) for event in line.events)
