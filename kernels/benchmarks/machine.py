"""What a figure was measured on, and how fast that is at best."""

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
SPECIAL_FUNCTION_UNITS = 16  # per processor, compute capability 7.0 to 10.0: CUDA C++ Programming Guide, throughputs
# Operations a second on dense matrices, from NVIDIA's data sheets, by what the device's name begins with.
PEAKS = {
    "NVIDIA H200": {"float32": 67e12, "TF32": 494.5e12},
    "NVIDIA H100 80GB HBM3": {"float32": 67e12, "TF32": 494.5e12},  # SXM
    "NVIDIA A100": {"float32": 19.5e12, "TF32": 156e12},
    "NVIDIA L4": {"float32": 30.3e12, "TF32": 60e12},
    "Tesla T4": {"float32": 8.1e12},
}


def describe() -> dict[str, Any]:
    """The day, the device, its driver and the versions of what runs on it."""
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
    """One property of the first GPU; None where there is none to ask."""
    command = ["nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader,nounits"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


def peak(precision: str) -> float | None:
    """Operations a second of this device's matrix units; None where they are not known."""
    kind = jax.devices()[0].device_kind
    return next((rates.get(precision) for name, rates in PEAKS.items() if kind.startswith(name)), None)


def rates() -> dict[str, float | None]:
    """Bytes a second that a copy of 1 GiB reads and writes on a GPU, and special functions a second; None if unknown.

    The latter are those of its processors at their highest clock.
    """
    device, clock = jax.devices()[0], nvidia_smi("clocks.max.sm")
    processors = getattr(device, "core_count", None)
    known = device.platform == "gpu" and processors and clock
    return {
        "bytes_per_second": _bandwidth() if device.platform == "gpu" else None,
        "special_functions_per_second": processors * SPECIAL_FUNCTION_UNITS * 1e6 * float(clock) if known else None,
    }


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
