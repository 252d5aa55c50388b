"""One prediction of a trained model, from prepared images to decisions."""

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
    """A row for each batch size."""
    for batch in BATCHES[:1] if options.rehearse else BATCHES:
        yield f"batch {batch}", functools.partial(predict, options, batch)


def predict(options: Options, batch: int) -> Row:
    """Of the model that the part `training` left, or one that was never trained."""
    folder = training.workdir(options)
    if not (folder / "results.json").exists():
        folder = Path(options.scratch) / "untrained"
        training.train(options, folder, epochs=0)
    detector = Detector.load(folder)
    size = detector.processing.size
    noise = np.random.default_rng(0).uniform(0, 255, (batch, size, size, 3)).astype(np.float32)
    images, objects = dict.fromkeys(detector.processing.modalities, noise), np.full(batch, RECOGNISE, np.int32)
    arguments = detector.state, images, objects
    began = time.perf_counter()
    compiled = detector.function.lower(*arguments).compile()
    compile_seconds = time.perf_counter() - began
    taken = []
    for _ in range(1 + (3 if options.rehearse else REPETITIONS)):
        began = time.perf_counter()
        jax.tree.map(np.asarray, compiled(*arguments))
        taken.append(time.perf_counter() - began)
    milliseconds = 1e3 * statistics.median(taken[1:])
    return {"compile_seconds": compile_seconds, "ms": milliseconds, "ms an image": milliseconds / batch}
