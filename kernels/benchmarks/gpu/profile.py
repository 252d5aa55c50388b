"""Kernels that take most of the time of an update, from a profile."""

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

UPDATES, HOTTEST = 5, 5  # numbers of profiled updates and of reported kernels


def cases(options: Options) -> Cases:
    """Yield one row, for the update as used in training."""
    config = update.settings(options)
    scan = "xla" if options.rehearse else ""  # another part has compiled "xla"; "" is the default of the device
    yield f"{scan or 'default'}, TF32", functools.partial(profile, config, scan)


def profile(config: ConfigDict, scan: str) -> Row:
    """Measure the kernels that take most of the device's time."""
    compiled_update = update.compile_update(config, scan, "TF32")
    compiled_update.run().block_until_ready()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(UPDATES):
                compiled_update.run().block_until_ready()
        (file,) = Path(folder).rglob("*.xplane.pb")
        data = ProfileData.from_file(str(file))
    times: dict[str, list[float]] = defaultdict(list)
    for name, nanoseconds in _operations(data):
        times[name].append(nanoseconds)
    total = sum(map(sum, times.values()))
    hottest = sorted(times, key=lambda name: -sum(times[name]))[:HOTTEST]
    if not hottest:
        lines = [f"{plane.name} {line.name}" for plane in data.planes for line in plane.lines]
        raise ValueError(f"the profile contains no operation of the device, only {', '.join(lines)}")
    return {
        "ms of all": total / UPDATES / 1e6,
        "kernels": len(times),
        "hottest": [
            {
                "kernel": name,
                "ms an update": sum(times[name]) / UPDATES / 1e6,
                "share": sum(times[name]) / total,
                "calls an update": len(times[name]) / UPDATES,
            }
            for name in hottest
        ],
    }


def _operations(data: ProfileData) -> Iterator[tuple[str, float]]:
    """Yield names and nanoseconds of the operations in a GPU's streams, or in the threads that run XLA on a CPU."""
    for plane in data.planes:
        for line in plane.lines:
            on_gpu = plane.name.startswith("/device:GPU") and line.name.startswith("Stream")
            on_cpu = plane.name == "/host:CPU" and "XLA" in line.name
            if on_gpu or on_cpu:
                yield from ((event.name, event.duration_ns) for event in line.events)
