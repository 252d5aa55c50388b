"""Description of the machine that a benchmark runs on, and its peak rates."""

import datetime
import importlib.metadata
import os
import platform
import statistics
import subprocess
import time
from typing import Any

import jax
import jax.numpy as jnp

PACKAGES = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda12-plugin", "flax")
# Special-function units per processor, compute capability 7.0 to 10.0: CUDA C++ Programming Guide, throughputs.
SPECIAL_FUNCTION_UNITS = 16
# Operations per second on dense matrices, from NVIDIA's data sheets, by the beginning of the device's name.
PEAKS = {
    "NVIDIA H200": {"float32": 67e12, "TF32": 494.5e12},
    "NVIDIA H100 80GB HBM3": {"float32": 67e12, "TF32": 494.5e12},  # SXM
    "NVIDIA A100": {"float32": 19.5e12, "TF32": 156e12},
    "NVIDIA L4": {"float32": 30.3e12, "TF32": 60e12},
    "Tesla T4": {"float32": 8.1e12},
}


def describe() -> dict[str, Any]:
    """Return the date, the device, its driver and the versions of Python and packages."""
    device = jax.devices()[0]
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": device.device_kind
        if device.platform == "gpu"
        else f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "driver": nvidia_smi("driver_version"),
        "versions": versions,
    }


def nvidia_smi(field: str) -> str | None:
    """Query a property of the first GPU; None without an NVIDIA GPU."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def peak(precision: str) -> float | None:
    """Return the peak rate of this device on dense matrices, in operations per second; None if unknown."""
    kind = jax.devices()[0].device_kind
    return next((rates.get(precision) for name, rates in PEAKS.items() if kind.startswith(name)), None)


def rates() -> dict[str, float | None]:
    """Measure the memory bandwidth of a GPU and compute its peak rate of special functions; None if unknown.

    The bandwidth is that of a copy of 1 GiB, in bytes read and written per second. The rate of special functions, per
    second, assumes the highest clock of the processors.
    """
    device, clock = jax.devices()[0], nvidia_smi("clocks.max.sm")
    processors = getattr(device, "core_count", None)
    is_known = device.platform == "gpu" and processors and clock
    return {
        "bytes_per_second": _bandwidth() if device.platform == "gpu" else None,
        "special_functions_per_second": processors * SPECIAL_FUNCTION_UNITS * 1e6 * float(clock) if is_known else None,
    }


def matrix_rate(size: int = 2048) -> float:
    """Measure the rate of a float32 matrix product, in operations per second."""
    matrix = jnp.ones((size, size), jnp.float32)
    jax.block_until_ready(matrix @ matrix)
    start = time.perf_counter()
    jax.block_until_ready(matrix @ matrix)
    return 2 * size**3 / (time.perf_counter() - start)


def _bandwidth() -> float:
    array = jnp.zeros(2**28, jnp.float32)
    copy = jax.jit(lambda array: array + 1)
    jax.block_until_ready(copy(array))
    times = []
    for _ in range(10):
        start = time.perf_counter()
        jax.block_until_ready(copy(array))
        times.append(time.perf_counter() - start)
    return 2 * array.nbytes / statistics.median(times)
