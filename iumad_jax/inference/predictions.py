"""Detections for many images, written as predictions.csv, predictions.json, masks and heatmaps."""

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
from iumad_jax.data.readers.unlabelled import InputImage
from iumad_jax.errors import UserError
from iumad_jax.inference import unknown_images
from iumad_jax.inference.detector import Detection, Detector
from iumad_jax.inference.unknown_images import Group
from iumad_jax.report import figures, result_files
from iumad_jax.runtime.storage import as_json, make_folder, write_whole


class Predictions(NamedTuple):
    """Results of `predict`."""

    rows: list[dict[str, Any]]  # rows of predictions.csv
    damaged: list[dict[str, str]]  # name of each unusable image and the reason
    groups: list[Group]  # unknown images, grouped by likeness


def predict(
    detector: Detector, workdir: str, images: Sequence[InputImage], object_: str | None, output: Path
) -> Predictions:
    """Detect anomalies in images and write the results. Unusable images are reported and left out.

    Args:
        detector: Trained model.
        workdir: Workdir of the model, noted in predictions.json.
        images: Images to predict.
        object_: Name of the object that all images show; None to recognise it per image.
        output: New or empty folder for the results.

    Raises:
        UserError: If the depth unit is wrong and no image was predicted yet, or if a file cannot be written.
    """
    make_folder(output)
    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    unknown: list[tuple[InputImage, np.ndarray]] = []
    groups: list[Group] = []
    try:
        for image in tqdm(images, unit="image", disable=None, leave=False):
            try:
                rgb, depth, camera = image.read()
                detection = detector(rgb, depth, camera, object_)
            except UserError as error:
                if isinstance(error, WrongUnit) and not rows:  # all images share one unit
                    raise
                tqdm.write(f"iumad_jax: {error}", file=sys.stderr)
                damaged.append({"image": image.name, "reason": str(error)})
                continue
            _write_image(output / "masks" / f"{image.name}.png", _full_size(detection.mask, rgb))
            heatmap = figures.overlay(rgb, detection.map, float(detection.pixel_threshold))
            _write_image(output / "heatmaps" / f"{image.name}.png", heatmap)
            rows.append(_row(image.name, detection))
            if detection.unknown:
                unknown.append((image, detection.embedding))
        if unknown:
            members, embeddings = zip(*unknown, strict=True)
            groups = unknown_images.write(detector, members, np.stack(embeddings), output / "unknown")
            names = {image.name: group.name for group in groups for image in group.images}
            rows = [row | {"group": names.get(row["image"], "")} for row in rows]
    finally:
        if rows:  # also lists the images predicted before an error such as a full disk
            content = {"workdir": workdir, "step": detector.step, "images": rows, "damaged": damaged}
            write_whole(output / "predictions.csv", _csv(rows).encode())
            write_whole(output / "predictions.json", (json.dumps(as_json(content), indent=1) + "\n").encode())
    return Predictions(rows, damaged, groups)


def check_output(output: Path, input_: str | None) -> None:
    """Check that the output folder is new or empty and outside of the input.

    Raises:
        UserError: If it is not.
    """
    if input_ and output.resolve().is_relative_to(Path(input_).resolve()):
        raise UserError(f"--output={output} lies within --input={input_}; choose a folder outside of it.")
    with suppress(OSError):  # `make_folder` reports it
        if any(output.iterdir()):
            raise UserError(f"--output={output} is not empty; empty it or choose a new folder.")


def _row(name: str, detection: Detection) -> dict[str, Any]:
    return {
        "image": name,
        "decision": str(detection.decision),
        "object": str(detection.object),
        "probability": float(detection.probability),
        "score": float(detection.score),
        "relative_score": float(detection.relative_score),
        "threshold": float(detection.image_threshold),
        "distance": float(detection.distance),
        "unknown_threshold": float(detection.unknown_threshold),
        "group": "",
        "defective_share": float(detection.mask.mean()),
        "mask": f"masks/{name}.png",
        "heatmap": f"heatmaps/{name}.png",
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: result_files.spreadsheet_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _full_size(mask: np.ndarray, rgb: np.ndarray) -> np.ndarray:
    size = rgb.shape[1], rgb.shape[0]
    return np.asarray(Image.fromarray(mask).convert("L").resize(size, Image.Resampling.NEAREST))


def _write_image(path: Path, pixels: np.ndarray) -> None:
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")
    make_folder(path.parent)
    write_whole(path, content.getvalue())
