"""Looks at images with a trained model: python -m iumad_jax.predict --workdir=FOLDER --input=PATH --output=FOLDER.

--input is an image or a folder of images, with subfolders; without it, the test images of the run's dataset, or of
the one that --config.dataset.KEY=VALUE names, are looked at. No labels are needed. Written are predictions.csv,
predictions.json, and for every image a mask and a heatmap. Images that cannot be read are told and left out, and the
exit code is then 2. The probability of an object holds for images that show one of those learned; whether it does, the
distance tells, which is above its threshold where the decision is unknown.
"""

import csv
import io
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from absl import flags
from PIL import Image
from tqdm import tqdm

from iumad_jax import cli
from iumad_jax.data import readers
from iumad_jax.data.formats.depth_files import DEPTH_IMAGES, WrongUnit, read_depth
from iumad_jax.data.formats.images import PHOTOGRAPHS, check_same_size, read_photograph
from iumad_jax.data.sample import Camera
from iumad_jax.errors import UserError
from iumad_jax.inference.detector import Detection, Detector
from iumad_jax.report import figures, tables
from iumad_jax.runtime.storage import as_json, write_whole


class Shot(NamedTuple):
    """An image to look at."""

    name: str  # of its files in the output, with their subfolders
    read: Callable[[], tuple[np.ndarray, np.ndarray | None, Camera | None]]  # RGB, depth, camera


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _predict, dataset=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_trained(values)
    for name, help_ in {
        "input": "An image (PNG, JPEG, TIFF, BMP) or a folder of images.",
        "depth": "The image's depth (16-bit PNG, TIFF, NPY, PLY, PCD), or a folder with files of the images' names.",
        "output": "The folder to write to, new or empty.",
        "object": "The object that all images show; recognised if not given.",
    }.items():
        flags.DEFINE_string(name, None, help_, flag_values=values)
    splits = ["test", "unlabelled", "calibration", "train"]
    flags.DEFINE_enum("split", splits[0], splits, "Which images of the dataset, without --input.", flag_values=values)
    help_ = "Metres per unit of the depth files, such as 0.001; needed where they hold whole numbers."
    flags.DEFINE_float("depth_unit", None, help_, flag_values=values)
    help_ = "fx,fy,cx,cy of the depth images, in pixels; that of the training images if not given."
    flags.DEFINE_list("camera", None, help_, flag_values=values)


def _predict(values: flags.FlagValues) -> str:
    output = cli.path(values, "output")
    _check_output(output, values.input)
    detector = Detector.load(cli.path(values, "workdir"), values.step)
    detector.number(values.object)
    shots = list(_files(values, detector) if values.input else _dataset(values))
    _make_folder(output)
    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    try:
        for shot in tqdm(shots, unit="image", disable=None, leave=False):
            try:
                rgb, depth, camera = shot.read()
                detection = detector(rgb, depth, camera, values.object)
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
            content = {"workdir": str(values.workdir), "step": detector.step, "images": rows, "damaged": damaged}
            write_whole(output / "predictions.csv", _csv(rows).encode())
            write_whole(output / "predictions.json", (json.dumps(as_json(content), indent=1) + "\n").encode())
    if damaged:
        rest = f"the others are in {output}" if rows else "correct them"
        raise UserError(f"{len(damaged)} of {len(shots)} images could not be used; {rest}.")
    counts = {name: sum(row["decision"] == name for row in rows) for name in ("good", "anomalous", "unknown")}
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    return f"{len(rows)} images: {told}. Scores, masks and heatmaps are in {output}."


def _check_output(output: Path, given: str | None) -> None:
    """Raises UserError unless results go to a place of their own."""
    if given and output.resolve().is_relative_to(Path(given).resolve()):
        raise UserError(f"--output={output} lies within --input={given}; choose a folder outside of it.")
    with suppress(OSError):  # which is told when it is made
        if any(output.iterdir()):
            raise UserError(f"--output={output} holds something already; choose a new folder, or empty it.")


def _files(values: flags.FlagValues, detector: Detector) -> Iterator[Shot]:
    """The images that --input names, with the depth that --depth has of them."""
    root = Path(values.input)
    if not root.exists():
        raise UserError(f"--input is {root}, which does not exist; name an image or a folder of images.")
    images = [root] if root.is_file() else _photographs(root)
    if not images or images[0].suffix.lower() not in PHOTOGRAPHS:
        raise UserError(f"--input is {root}, which is or holds no image; give files ending in {' '.join(PHOTOGRAPHS)}.")
    needs_depth = "depth" in detector.processing.modalities
    if needs_depth:
        _check_depth(values, root)
    camera = _camera(values.camera) if values.camera else None
    names: dict[str, Path] = {}
    for file in images:
        name = str(file.relative_to(root).with_suffix("")) if root.is_dir() else file.stem
        if name in names:
            raise UserError(f"{file} and {names[name].name} have one name; rename or remove either.")
        names[name] = file

        def read(file: Path = file, name: str = name) -> tuple[np.ndarray, np.ndarray | None, Camera | None]:
            rgb = read_photograph(file)
            if not needs_depth:
                return rgb, None, None
            depth_file = _depth_file(Path(values.depth), name)
            remedy = "give --depth_unit=METRES, such as 0.001 for millimetres"
            depth, own = read_depth(depth_file, values.depth_unit, rgb.shape[:2], remedy)
            check_same_size(depth_file, depth, file, rgb)
            return rgb, depth, camera or own

        yield Shot(name, read)


def _check_depth(values: flags.FlagValues, root: Path) -> None:
    """Raises UserError unless there is depth where --depth says, for one image or for many as --input has."""
    if not values.depth:
        raise UserError("--depth is missing; this model was trained with depth.")
    place = Path(values.depth)
    if not place.exists():
        raise UserError(f"--depth is {place}, which does not exist; name a file or a folder of depth images.")
    if root.is_dir() and not place.is_dir():
        raise UserError(f"--depth is {place}, one file for all of {root}; name a folder of depth images.")
    if values.depth_unit is not None and not 0 < values.depth_unit < math.inf:
        raise UserError(f"--depth_unit is {values.depth_unit:g}; give metres per unit, such as 0.001 for millimetres.")


def _photographs(root: Path) -> list[Path]:
    images = sorted(file for file in root.rglob("*") if file.suffix.lower() in PHOTOGRAPHS and file.is_file())
    for file in images:
        if not str(file).isprintable():
            raise UserError(f"{file} has a name that cannot be printed; rename it.")
    return images


def _depth_file(place: Path, name: str) -> Path:
    if place.is_file():
        return place
    found = [file for ending in DEPTH_IMAGES if (file := place / f"{name}{ending}").is_file()]
    if len(found) != 1:
        endings = " ".join(DEPTH_IMAGES)
        raise UserError(f"{place} has {len(found)} depth files named {name}; put one there, ending in {endings}.")
    return found[0]


def _camera(given: list[str]) -> Camera:
    try:
        fx, fy, cx, cy = map(float, given)
        return Camera(fx, fy, cx, cy)
    except (ValueError, UserError) as error:
        raise UserError(f"--camera is {','.join(given)}; give fx,fy,cx,cy in pixels, fx and fy above 0.") from error


def _dataset(values: flags.FlagValues) -> Iterator[Shot]:
    """The images of a split of the dataset."""
    reader, split = readers.open_reader(values.config), values.split
    ids = [(name, id_) for name in reader.objects for id_ in reader.ids(name, split)]
    if not ids:
        raise UserError(f"the dataset has no {split} images; choose another --split.")
    for name, id_ in ids:

        def read(name: str = name, id_: str = id_) -> tuple[np.ndarray, np.ndarray | None, Camera | None]:
            sample = reader.read(name, split, id_)
            return sample.rgb, sample.depth, sample.camera

        yield Shot(f"{name}/{id_}", read)


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
    _make_folder(path.parent)
    write_whole(path, content.getvalue())


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: not a writable folder ({error.strerror}); choose another --output.") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv))
