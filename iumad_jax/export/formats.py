"""Export of a detector to StableHLO and ONNX.

The exported function takes one batch of images per modality as `Detector.prepare` returns them: float32 values from 0
to 255, shape (batch, size, size, 3). It returns the fields of `detector.Outputs` by name. Weights and thresholds are
part of the file. ONNX takes batches of any size, unless it is fixed; StableHLO those of one size.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detector, Outputs
from iumad_jax.inference.recognition import RECOGNISE

SCANS = {"stablehlo": "xla", "onnx": "reference"}  # best implementation of the selective scan for each format
_TOLERANCE = 1e-4  # largest accepted difference of anomaly maps, relative to the largest value
_PLATFORMS = ("cpu", "cuda")


def export(detector: Detector, format_: str, batch: int | None) -> bytes:
    """Serialize a detector.

    Args:
        detector: Detector that was loaded with `SCANS[format_]` as the config key model.scan.
        format_: "stablehlo" (for `jax.export.deserialize`) or "onnx".
        batch: Number of images per call; None for any number, which only "onnx" offers.

    Returns:
        Content of the file.

    Raises:
        UserError: If the run divides images into tiles, a package is missing (`pip install iumad-jax[export]`), or the
            method has an operation that is not translated to ONNX.
    """
    if detector.processing.tiling.count > 1:
        raise UserError(
            f"config.input.tiles of this run is {detector.processing.tiles}, but export writes a file that judges whole"
            " images; use predict or Detector, which join tiles."
        )
    function = positional_function(detector)
    try:
        if format_ == "stablehlo":
            assert batch is not None
            inputs = input_specs(detector, batch)
            by_name = jax.jit(lambda *images: function(*images)._asdict())
            return bytes(jax.export.export(by_name, platforms=_PLATFORMS)(*inputs.values()).serialize())
        from iumad_jax.export import onnx_converter
    except ImportError as error:
        raise UserError(
            f"--format={format_} needs the package {error.name}; run pip install 'iumad-jax[export]'."
        ) from error
    inputs = input_specs(detector, onnx_converter.ANY if batch is None else batch)
    try:
        model = onnx_converter.convert(function, inputs, Outputs._fields)
    except NotImplementedError as error:
        problem, _, _ = str(error).partition(":")  # an equation follows
        raise UserError(f"this run cannot be exported to ONNX, because {problem}; use --format=stablehlo.") from error
    for key, value in describe(detector, batch).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    return model.SerializeToString()


def describe(detector: Detector, batch: int | None) -> dict[str, Any]:
    """Describe an exported file, in JSON types, for the programs that use it."""
    size = detector.processing.size
    return {
        "version": version("iumad-jax"),
        "step": detector.step,
        "inputs": {name: [batch or "batch", size, size, 3] for name in detector.processing.modalities},
        "region": detector.processing.region,
        "depth_encoding": detector.processing.depth_encoding if "depth" in detector.processing.modalities else None,
        "outputs": list(Outputs._fields),
        "objects": list(detector.objects),
    }


def positional_function(detector: Detector) -> Callable[..., Outputs]:
    """Return the detector's function with one positional argument per modality. Objects are recognised."""

    def function(*images: Any) -> Outputs:
        objects = jnp.full(images[0].shape[:1], RECOGNISE, jnp.int32)
        by_modality = dict(zip(detector.processing.modalities, images, strict=True))
        return detector.function(detector.state, by_modality, objects)

    return function


def input_specs(detector: Detector, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the shape and dtype of each input, by modality."""
    size = detector.processing.size
    return {
        modality: jax.ShapeDtypeStruct((batch, size, size, 3), np.float32)
        for modality in detector.processing.modalities
    }


def load_function(content: bytes, format_: str) -> Callable[..., Outputs]:
    """Load an exported file as a function, like a program without this package would."""
    if format_ == "stablehlo":
        exported = jax.export.deserialize(bytearray(content))
        call = jax.jit(exported.call)
        return lambda *images: Outputs(**call(*images))
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]
    return lambda *images: Outputs(*session.run(None, dict(zip(names, images, strict=True))))


def check(detector: Detector, content: bytes, format_: str, batch: int | None) -> float:
    """Compare the anomaly maps of an exported file and of its detector on images of random noise.

    Without a batch size, three images are used.

    Returns:
        Largest difference, relative to the largest value of the detector's maps.

    Raises:
        UserError: If the difference exceeds the tolerance.
    """
    rng = np.random.default_rng(0)
    specs = input_specs(detector, batch or 3).values()
    images = [rng.integers(0, 256, spec.shape).astype(np.float32) for spec in specs]
    exported_map = load_function(content, format_)(*images).map
    expected_map = np.asarray(positional_function(detector)(*images).map)
    difference = float(np.abs(exported_map - expected_map).max() / np.abs(expected_map).max())
    if not difference <= _TOLERANCE:
        raise UserError(
            f"the exported model's anomaly maps differ from JAX's by {difference:.1e} of the maximum;"
            " please report this."
        )
    return difference
