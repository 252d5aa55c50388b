"""A detector in formats that other programs read.

The exported function takes images as `Detector.prepare` makes them, for each modality in turn: float32 values 0 to 255
of shape (batch, size, size, 3). It returns the fields of `detector.Outputs`, by name. Thresholds and weights are part
of it; the batch size is fixed.
"""

import json
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import jax
import numpy as np

from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detector, Outputs
from iumad_jax.inference.recognition import RECOGNISE

SCANS = {"stablehlo": "xla", "onnx": "reference"}  # how the selective scan is best told, by format
_TOLERANCE = 1e-4  # of the largest value
_PLATFORMS = ("cpu", "cuda")


def export(detector: Detector, format_: str, batch: int) -> bytes:
    """The file's content.

    Args:
        detector: loaded with the format's way of scanning (`SCANS`) as config key model.scan.
        format_: stablehlo (for `jax.export.deserialize`) or onnx.
        batch: images per call.

    Raises:
        UserError: a package is missing (`pip install iumad-jax[export]`).
    """
    function, inputs = flat(detector, batch), input_specs(detector, batch)
    try:
        if format_ == "stablehlo":
            by_name = jax.jit(lambda *images: function(*images)._asdict())
            return bytes(jax.export.export(by_name, platforms=_PLATFORMS)(*inputs.values()).serialize())
        from iumad_jax.export import onnx_converter
    except ImportError as error:
        raise UserError(
            f"--format={format_} needs the package {error.name}; pip install 'iumad-jax[export]'."
        ) from error
    model = onnx_converter.convert(function, inputs, Outputs._fields)
    for key, value in describe(detector, batch).items():
        entry = model.metadata_props.add()
        entry.key, entry.value = key, json.dumps(value)
    return model.SerializeToString()


def describe(detector: Detector, batch: int) -> dict[str, Any]:
    """What a program must know to use the file, as JSON."""
    return {
        "version": version("iumad-jax"),
        "step": detector.step,
        "inputs": {name: list(spec.shape) for name, spec in input_specs(detector, batch).items()},
        "depth_encoding": detector.processing.depth_encoding if "depth" in detector.processing.modalities else None,
        "outputs": list(Outputs._fields),
        "objects": list(detector.objects),
    }


def flat(detector: Detector, batch: int) -> Callable[..., Outputs]:
    """The detector's function of one array per modality; objects are recognised."""
    modalities, given = detector.processing.modalities, np.full(batch, RECOGNISE, np.int32)

    def function(*images: Any) -> Outputs:
        return detector.function(detector.state, dict(zip(modalities, images, strict=True)), given)

    return function


def input_specs(detector: Detector, batch: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and types of the inputs, by modality."""
    side = detector.processing.size
    return {m: jax.ShapeDtypeStruct((batch, side, side, 3), np.float32) for m in detector.processing.modalities}


def runner(content: bytes, format_: str) -> Callable[..., Outputs]:
    """A function that runs an exported file, as a program without this package would."""
    if format_ == "stablehlo":
        exported = jax.export.deserialize(bytearray(content))
        call = jax.jit(exported.call)
        return lambda *images: Outputs(**call(*images))
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]
    return lambda *images: Outputs(*session.run(None, dict(zip(names, images, strict=True))))


def check(detector: Detector, content: bytes, format_: str, batch: int) -> float:
    """The largest difference of maps of noise from those of the detector itself, as a share of the largest value.

    Raises:
        UserError: it is more than it may be.
    """
    rng = np.random.default_rng(0)
    specs = input_specs(detector, batch).values()
    images = [rng.integers(0, 256, spec.shape).astype(np.float32) for spec in specs]
    found = runner(content, format_)(*images).map
    expected = np.asarray(flat(detector, batch)(*images).map)
    difference = float(np.abs(found - expected).max() / np.abs(expected).max())
    if not difference <= _TOLERANCE:
        raise UserError(f"the exported model's maps differ by {difference:.1e} from JAX's; please report this.")
    return difference
