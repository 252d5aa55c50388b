"""How long a prediction takes, part by part and engine by engine."""

import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from iumad_jax.data import readers
from iumad_jax.export import formats
from iumad_jax.inference.anomaly_map import combine
from iumad_jax.inference.detector import Detector
from iumad_jax.inference.recognition import RECOGNISE
from iumad_jax.methods.error_maps import upsample_errors
from iumad_jax.models.efficientnet import FeatureExtractor

_BATCHES = (1, 16)


def measure(config: ConfigDict, workdir: Path, step: int | None, repetitions: int) -> str:
    """Tables of the parts of a prediction and of engines, for the first test image of the dataset.

    Args:
        config: of the run, or with another dataset.
        workdir: of the run.
        step: after which; the last one done if None.
        repetitions: of every measurement, after a first call.

    Raises:
        UserError: the dataset or the workdir is at fault.
    """
    reader = readers.open_reader(config)
    name = reader.objects[0]
    id_ = reader.ids(name, "test")[0]
    sample = reader.read(name, "test", id_)
    depth = None if sample.depth is None else sample.depth[None]
    detector = Detector.load(workdir, step)
    prepared = detector.prepare(sample.rgb[None], depth, sample.camera)

    def milliseconds(function: Callable[[], Any]) -> float:
        function()
        taken = []
        for _ in range(repetitions):
            began = time.perf_counter()
            jax.block_until_ready(function())
            taken.append(time.perf_counter() - began)
        return float(np.median(taken)) * 1e3

    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid)
    encode = jax.jit(lambda weights, images: [extractor.apply(weights, x) for x in images.values()])
    draw = jax.jit(lambda errors: combine(upsample_errors({"all": errors})))
    errors = np.zeros((1, config.backbone.grid**2), np.float32)
    device = milliseconds(lambda: detector.function(detector.state, prepared, np.array([RECOGNISE])))
    features = milliseconds(lambda: encode(detector.state.backbone, prepared))
    maps = milliseconds(lambda: draw(errors))
    read = milliseconds(lambda: reader.read(name, "test", id_))
    process = milliseconds(lambda: detector.prepare(sample.rgb[None], depth, sample.camera))
    parts = {
        "decoding the files": read,
        "processing": process,
        "backbone": features,
        "model and decisions": device - features - maps,
        "map and score": maps,
    }
    total = sum(parts.values())
    shares = [[part, f"{taken:.1f}", f"{taken / total:.0%}"] for part, taken in parts.items()]
    engines = [
        [engine, *(f"{milliseconds(call(batch)) / batch:.1f}" for batch in _BATCHES)]
        for engine, call in _engines(workdir, step, prepared).items()
    ]
    return "\n\n".join(
        [
            tabulate([*shares, ["all", f"{total:.1f}", ""]], ["one image", "ms", "share"], "github"),
            "From prepared images to decisions, ms per image:",
            tabulate(engines, ["", *(f"batch {batch}" for batch in _BATCHES)], "github"),
        ]
    )


def _engines(workdir: Path, step: int | None, prepared: dict[str, np.ndarray]) -> dict[str, Callable[[int], Any]]:
    """What can run the model: from the batch size to a function that runs it once."""

    def loaded(batch: int, format_: str) -> Callable[[], Any]:
        images = [np.repeat(array, batch, axis=0) for array in prepared.values()]
        detector = Detector.load(workdir, step, **{"model.scan": formats.SCANS[format_]})
        run: Callable[..., Any]
        if format_ == "stablehlo":
            run = jax.jit(formats.flat(detector, batch))
        else:
            run = formats.runner(formats.export(detector, format_, batch), format_)
        return lambda: run(*images)

    engines = {f"JAX on {jax.devices()[0].device_kind}": lambda batch: loaded(batch, "stablehlo")}
    if find_spec("onnx") and find_spec("onnxruntime"):
        engines["onnxruntime on CPU"] = lambda batch: loaded(batch, "onnx")
    return engines
