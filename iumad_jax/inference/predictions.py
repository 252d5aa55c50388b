"""What a detector says about many images, written as predictions.csv, predictions.json, masks and heatmaps."""

import csv
import io
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from iumad_jax.data.formats.depth_files import WrongUnit
from iumad_jax.data.readers.unlabelled import Shot
from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detection, Detector
from iumad_jax.report import figures, tables
from iumad_jax.runtime.storage import as_json, write_whole


class Predicted(NamedTuple):
    """What was found."""

    rows: list[dict[str, Any]]  # of predictions.csv
    damaged: list[dict[str, str]]  # images that could not be used, and why


def predict(detector: Detector, workdir: str, shots: Sequence[Shot], object_: str | None, output: Path) -> Predicted:
    """Looks at images and writes what is found; images that cannot be used are told and left out.

    Args:
        detector: a trained model.
        workdir: where it is kept, for the record.
        shots: the images.
        object_: which all of them show; recognised if None.
        output: a new folder, or an empty one.

    Raises:
        UserError: no image's depth is in the unit that was given, or something cannot be written.
    """
    make_folder(output)
    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    try:
        for shot in tqdm(shots, unit="image", disable=None, leave=False):
            try:
                rgb, depth, camera = shot.read()
                detection = detector(rgb, depth, camera, object_)
            except UserError as error:
                if isinstance(error, WrongUnit) and not rows:  # which is that of all images
                    raise
                tqdm.write(f"iumad_jax: {error}", file=sys.stderr)
                damaged.append({"image": shot.name, "reason": str(error)})
                continue
            _write_image(output / "masks" / f"{shot.name}.png", _full_size(detection.mask, rgb))
            heatmap = figures.overlay(rgb, detection.map, float(detection.pixel_threshold))
            _write_image(output / "heatmaps" / f"{shot.name}.png", heatmap)
            rows.append(_row(shot.name, detection))
    finally:
        if rows:  # also of what was done before the disk was full
            content = {"workdir": workdir, "step": detector.step, "images": rows, "damaged": damaged}
            write_whole(output / "predictions.csv", _csv(rows).encode())
            write_whole(output / "predictions.json", (json.dumps(as_json(content), indent=1) + "\n").encode())
    return Predicted(rows, damaged)


def check_output(output: Path, given: str | None) -> None:
    """Raises UserError unless results go to a place of their own."""
    if given and output.resolve().is_relative_to(Path(given).resolve()):
        raise UserError(f"--output={output} lies within --input={given}; choose a folder outside of it.")
    with suppress(OSError):  # which is told when it is made
        if any(output.iterdir()):
            raise UserError(f"--output={output} holds something already; choose a new folder, or empty it.")


def _row(name: str, detection: Detection) -> dict[str, Any]:
    return {
        "image": name,
        "decision": str(detection.decision),
        "object": str(detection.object),
        "probability": float(detection.probability),
        "score": float(detection.score),
        "threshold": float(detection.image_threshold),
        "distance": float(detection.distance),
        "unknown_threshold": float(detection.unknown_threshold),
        "defective_share": float(detection.mask.mean()),
        "mask": f"masks/{name}.png",
        "heatmap": f"heatmaps/{name}.png",
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: tables.spreadsheet_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _full_size(mask: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    size = rgb.shape[1], rgb.shape[0]
    return np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.Resampling.NEAREST))


def _write_image(path: Path, pixels: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    make_folder(path.parent)
    write_whole(path, content.getvalue())


def make_folder(folder: Path) -> None:
    """Makes the folder of the results.

    Raises:
        UserError: it is not writable.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: not a writable folder ({error.strerror}); choose another --output.") from error
