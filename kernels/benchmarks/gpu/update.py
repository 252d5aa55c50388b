"""Time, share of the device's peak rate and memory of a training update of configs/eyecandies.py."""

import functools
import statistics
import time
from typing import Any

import jax
import numpy as np
from iumad_kernels.selective_scan import pallas_mosaic
from ml_collections import ConfigDict

from configs import eyecandies
from kernels.benchmarks import machine, training_step
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

PRECISIONS = {"TF32": "default", "float32": "highest"}  # JAX's names of the precisions on a GPU with TF32
AUTOTUNED = {"xla_gpu_experimental_enable_fusion_autotuner": True}  # XLA's default, which `scheduler` changes
MVTEC3D_IMAGES, EPOCHS = 2_950, 800  # training images of MVTec 3D-AD, and epochs of a step
SECONDS, MIN_UPDATES = 5.0, 5  # time of a measurement, and smallest number of updates


def cases(options: Options) -> Cases:
    """Yield one row per implementation of the scan and precision of matrix products, and one with tuned fusions."""
    config = settings(options)
    seconds = 0.0 if options.rehearse else SECONDS
    obstacle = pallas_mosaic.obstacle(np.float32, config.model.states)
    if obstacle:
        yield "mosaic", functools.partial(dict, left_out=obstacle)
    for scan in ["xla"] if obstacle else ["mosaic", "xla"]:
        yield f"{scan}, TF32", functools.partial(measure, config, scan, "TF32", seconds)
    if not options.rehearse:
        scan = "xla" if obstacle else "mosaic"
        yield f"{scan}, float32", functools.partial(measure, config, scan, "float32", seconds)
        yield f"{scan}, autotuned fusions", functools.partial(measure, config, scan, "TF32", seconds, AUTOTUNED)


def settings(options: Options) -> ConfigDict:
    """Return the paper's config, or a tiny config for a rehearsal."""
    config = eyecandies.get_config()
    if options.rehearse:
        config.update_from_flattened_dict(training_step.SMALL)
    return config


def compile_update(
    config: ConfigDict, scan: str, precision: str, compiler_options: dict[str, Any] | None = None
) -> training_step.Update:
    """Compile the update with an implementation of the scan, a precision of matrix products and options of XLA."""
    config = config.copy_and_resolve_references()
    config.model.scan = scan
    with jax.default_matmul_precision(PRECISIONS[precision]):
        return training_step.compile_update(config, compiler_options)


def measure(
    config: ConfigDict, scan: str, precision: str, seconds: float, compiler_options: dict[str, Any] | None = None
) -> Row:
    """Measure an update. GFLOP is as counted by XLA: the body of a loop once, and kernels as nothing."""
    update = compile_update(config, scan, precision, compiler_options)
    update.run().block_until_ready()
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < MIN_UPDATES or time.monotonic() < end:
        start = time.perf_counter()
        update.run().block_until_ready()
        times.append(time.perf_counter() - start)
    median = statistics.median(times)
    images_per_second = config.train.batch_size / median
    peak = machine.peak(precision)
    return {
        "compile_seconds": update.compile_seconds,
        "ms": 1e3 * median,
        "images/s": images_per_second,
        "GFLOP": update.flops / 1e9,
        "share of peak": update.flops / median / peak if peak else "unknown",
        "peak MiB": update.memory_bytes / 2**20,
        "days for MVTec 3D-AD": MVTEC3D_IMAGES * EPOCHS / images_per_second / 86400,
    }
