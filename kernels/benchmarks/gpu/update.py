"""An update of configs/eyecandies.py's training: time, share of the device's peak, memory."""

import functools
import statistics
import time

import jax
import numpy as np
from iumad_kernels.selective_scan import pallas_mosaic
from ml_collections import ConfigDict

from configs import eyecandies
from kernels.benchmarks import machine, training_step
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

PRECISIONS = {"TF32": "default", "float32": "highest"}  # what JAX calls them on a GPU that has TF32
MVTEC3D, EPOCHS = 2_950, 800  # images to train on, and how often
SECONDS, LEAST = 5.0, 5  # of measuring, and how many updates


def cases(options: Options) -> Cases:
    """A row for each implementation of the scan and precision of matrix products."""
    config = settings(options)
    obstacle = pallas_mosaic.obstacle(np.float32, config.model.states)
    if obstacle:
        yield "mosaic", functools.partial(dict, left_out=obstacle)
    for precision in ["TF32"] if options.rehearse else PRECISIONS:
        for scan in ["xla"] if obstacle else ["mosaic", "xla"]:
            seconds = 0.0 if options.rehearse else SECONDS
            yield f"{scan}, {precision}", functools.partial(measure, config, scan, precision, seconds)


def settings(options: Options) -> ConfigDict:
    """The paper's, or so small that a rehearsal is short."""
    config = eyecandies.get_config()
    if options.rehearse:
        config.update_from_flattened_dict(training_step.SMALL)
    return config


def prepared(config: ConfigDict, scan: str, precision: str) -> training_step.Update:
    """The compiled update."""
    config = config.copy_and_resolve_references()
    config.model.scan = scan
    with jax.default_matmul_precision(PRECISIONS[precision]):
        return training_step.compiled(config)


def measure(config: ConfigDict, scan: str, precision: str, seconds: float) -> Row:
    """Operations are XLA's count: of a loop only one turn, and nothing of a kernel's."""
    update = prepared(config, scan, precision)
    update.run().block_until_ready()
    taken: list[float] = []
    end = time.monotonic() + seconds
    while len(taken) < LEAST or time.monotonic() < end:
        began = time.perf_counter()
        update.run().block_until_ready()
        taken.append(time.perf_counter() - began)
    median = statistics.median(taken)
    images_per_second = config.train.batch_size / median
    peak = machine.peak(precision)
    return {
        "compile_seconds": update.compile_seconds,
        "ms": 1e3 * median,
        "images/s": images_per_second,
        "GFLOP": update.flops / 1e9,
        "share of peak": update.flops / median / peak if peak else "unknown",
        "peak MiB": update.memory_bytes / 2**20,
        "days for MVTec 3D-AD": MVTEC3D * EPOCHS / images_per_second / 86400,
    }
