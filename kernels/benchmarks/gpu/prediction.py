"""Time of predicting with a trained model, from prepared images to decisions."""

import functools
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from iumad_jax.inference.detector import Detector
from iumad_jax.inference.recognition import RECOGNISE
from kernels.benchmarks.gpu import training
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

BATCHES, REPETITIONS = (1, 16), 20


def cases(options: Options) -> Cases:
    """Yield one row per batch size."""
    for batch in BATCHES[:1] if options.rehearse else BATCHES:
        yield f"batch {batch}", functools.partial(predict, options, batch)


def predict(options: Options, batch: int) -> Row:
    """Measure predictions of the model that the part `training` saved or, without one, of an untrained model."""
    workdir = training.workdir(options)
    if not (workdir / "results.json").exists():
        workdir = Path(options.scratch) / "untrained"
        training.train(options, workdir, epochs=0)
    detector = Detector.load(workdir)
    size = detector.processing.size
    noise = np.random.default_rng(0).uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    images, objects = dict.fromkeys(detector.processing.modalities, noise), np.full(batch, RECOGNISE, np.int32)
    arguments = detector.state, images, objects
    start = time.perf_counter()
    compiled = detector.function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - start
    seconds = []
    for _ in range(1 + (3 if options.rehearse else REPETITIONS)):
        start = time.perf_counter()
        jax.tree.map(np.asarray, compiled(*arguments))
        seconds.append(time.perf_counter() - start)
    milliseconds = 1e3 * statistics.median(seconds[1:])
    return {"compile_seconds": compile_seconds, "ms": milliseconds, "ms an image": milliseconds / batch}
