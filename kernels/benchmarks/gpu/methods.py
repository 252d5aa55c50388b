"""Time and memory of an update and time of a prediction of every trained method, in the sizes of the small configs."""

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from ml_collections import ConfigDict

from configs import folder
from iumad_jax import methods
from kernels.benchmarks import training_step
from kernels.benchmarks.gpu.results import Row
from kernels.benchmarks.gpu.worker import Cases, Options

METHODS = ("ib_iumad", "uniad", "iuf", "simplenet", "destseg", "diad", "cdad")
SECONDS, MIN_RUNS = 2.0, 5
TINY = {
    "input.size": 32,
    "backbone.grid": 8,
    "model.width": 8,
    "model.heads": 2,
    "model.hidden": 8,
    "model.states": 1,
    "destseg.student_width": 2,
    "destseg.segmentation_width": 4,
    "diffusion.latent": 4,
    "diffusion.channels": "8,16",
    "diffusion.attending": "",
    "diffusion.heads": 2,
    "diffusion.groups": 4,
    "diffusion.steps": 2,
    "diffusion.masked.layers": 1,
    "diffusion.masked.hidden": 8,
    "train.batch_size": 2,
}


def cases(options: Options) -> Cases:
    """Yield one row per method; a rehearsal has two of them."""
    for name in METHODS[3::3] if options.rehearse else METHODS:
        config = folder.get_config()
        config.update_from_flattened_dict(TINY if options.rehearse else {})
        config.method = name
        config.backbone.weights = "random"  # which take as long as others
        yield name, functools.partial(measure, config, 0.0 if options.rehearse else SECONDS)


def measure(config: ConfigDict, seconds: float) -> Row:
    """Measure an update of a batch, and a prediction of one image, before anything is fitted to an object."""
    update = training_step.compile_update(config)
    update.run().block_until_ready()
    ms = _median_ms(lambda: update.run().block_until_ready(), seconds)
    method, batch = methods.build(config.method, config), training_step.random_batch(config)
    variables = training_step.random_variables(method, batch)
    image = jax.device_put(jax.tree.map(lambda array: array[:1], batch))
    predict, variables = jax.jit(method.predict), jax.device_put(method.arrange(variables))
    jax.block_until_ready(predict(variables, image))
    return {
        "compile_seconds": update.compile_seconds,
        "images per update": config.train.batch_size,
        "ms per update": ms,
        "GFLOP": update.flops / 1e9,
        "peak MiB": update.memory_bytes / 2**20,
        "ms per prediction": _median_ms(lambda: jax.block_until_ready(predict(variables, image)), seconds),
    }


def _median_ms(run: Callable[[], Any], seconds: float) -> float:
    times: list[float] = []
    end = time.monotonic() + seconds
    while len(times) < MIN_RUNS or time.monotonic() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)
