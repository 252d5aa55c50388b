"""Prediction time by part and by engine."""

import math
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tabulate import tabulate

from iumad_jax import config as configs
from iumad_jax.export import formats
from iumad_jax.inference.anomaly_map import combine, make_rule
from iumad_jax.inference.detector import Detector
from iumad_jax.inference.recognition import RECOGNISE
from iumad_jax.methods.error_maps import upsample_errors
from iumad_jax.models.backbone import FeatureExtractor

_BATCHES = (1, 16)
_SIZE = 480, 640  # pixels


def measure(config: ConfigDict, workdir: Path, step: int | None, repetitions: int) -> str:
    """Measure the prediction time for an image of 640 x 480 pixels: noise on a tilted plane.

    Args:
        config: Config of the run.
        workdir: Workdir of the run.
        step: Step whose snapshot is loaded; the last finished step if None.
        repetitions: Number of timed runs per measurement, after a first untimed run.

    Returns:
        Two Markdown tables: median time of each part of a prediction, and median time per image of each engine.

    Raises:
        UserError: If the workdir cannot be used, or its run divides images into tiles.
    """
    configs.refuse_tiles(config, "latency measures predictions")
    rng = np.random.default_rng(0)
    _, _, right, bottom = configs.region_numbers(config.input.region) or (0, 0, 0, 0)  # may be shares
    height, width = max(_SIZE[0], math.ceil(bottom)), max(_SIZE[1], math.ceil(right))
    rgb = rng.integers(0, 256, (1, height, width, 3), np.uint8)
    depth = 0.5 + np.linspace(0, 0.05, height)[:, None] + rng.normal(scale=1e-4, size=(1, height, width))
    as_exported: dict[str, Any] = {"model.dtype": "float32"}
    detector = Detector.load(workdir, step, **as_exported)
    prepared = detector.prepare(rgb, depth)

    def milliseconds(function: Callable[[], Any]) -> float:
        function()
        seconds = []
        for _ in range(repetitions):
            start = time.perf_counter()
            jax.block_until_ready(function())
            seconds.append(time.perf_counter() - start)
        return float(np.median(seconds)) * 1e3

    extractor = FeatureExtractor(config.backbone.name, config.backbone.grid, config.backbone.levels)
    encode = jax.jit(lambda weights, images: [extractor.apply(weights, x) for x in images.values()])
    rule, scales = make_rule(config), detector.state.scales
    errors = {m: np.zeros((1, config.backbone.grid**2), np.float32) for m in scales}
    make_map = jax.jit(lambda errors: combine(upsample_errors(errors), scales, np.zeros(1, np.int32), rule))
    device_ms = milliseconds(lambda: detector.function(detector.state, prepared, np.array([RECOGNISE])))
    backbone_ms = milliseconds(lambda: encode(detector.state.backbone, prepared))
    map_ms = milliseconds(lambda: make_map(errors))
    processing_ms = milliseconds(lambda: detector.prepare(rgb, depth))
    parts = {
        "processing": processing_ms,
        "backbone": backbone_ms,
        "model and decisions": device_ms - backbone_ms - map_ms,
        "map and score": map_ms,
    }
    total = sum(parts.values())
    part_rows = [[part, f"{part_ms:.1f}", f"{part_ms / total:.0%}"] for part, part_ms in parts.items()]
    engine_rows = [
        [engine, *(f"{milliseconds(make_call(batch)) / batch:.1f}" for batch in _BATCHES)]
        for engine, make_call in _engines(workdir, step, prepared).items()
    ]
    return "\n\n".join(
        [
            tabulate([*part_rows, ["all", f"{total:.1f}", ""]], ["one image", "ms", "share"], "github"),
            "From prepared images to decisions, ms per image:",
            tabulate(engine_rows, ["", *(f"batch {batch}" for batch in _BATCHES)], "github"),
        ]
    )


def _engines(
    workdir: Path, step: int | None, prepared: dict[str, np.ndarray]
) -> dict[str, Callable[[int], Callable[[], Any]]]:
    """Return the available engines by name, each as a function from a batch size to a call of the model."""

    def load_call(batch: int, format_: str) -> Callable[[], Any]:
        images = [np.repeat(array, batch, axis=0) for array in prepared.values()]
        scan: dict[str, Any] = {"model.scan": formats.SCANS[format_]}
        detector = Detector.load(workdir, step, **scan)
        run: Callable[..., Any]
        if format_ == "stablehlo":
            run = jax.jit(formats.positional_function(detector))
        else:
            run = formats.load_function(formats.export(detector, format_, batch), format_)
        return lambda: run(*images)

    engines = {f"JAX on {jax.devices()[0].device_kind}": lambda batch: load_call(batch, "stablehlo")}
    if find_spec("onnx") and find_spec("onnxruntime"):
        engines["onnxruntime on CPU"] = lambda batch: load_call(batch, "onnx")
    return engines
