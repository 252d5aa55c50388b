"""Detections for many images, written as predictions.csv, predictions.json, predictions.html, masks and heatmaps.

Threads read the next images and write the last results while the model judges an image.
"""

import csv
import io
import json
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from iumad_jax.data.formats.depth_files import WrongUnit
from iumad_jax.data.readers import watching
from iumad_jax.data.readers.unlabelled import InputImage
from iumad_jax.errors import UserError, counted
from iumad_jax.inference import unknown_images
from iumad_jax.inference.detection import Detection, Processed
from iumad_jax.inference.detector import Detector
from iumad_jax.inference.unknown_images import Group
from iumad_jax.report import figures, predictions_page, result_files
from iumad_jax.runtime import preemption
from iumad_jax.runtime.storage import as_json, make_folder, write_whole

HEATMAPS = {"none": 0, "small": 640, "full": None}  # pixels of the longer side at most
_THREADS = min(4, os.cpu_count() or 1)  # more would hold more large photographs in memory
_QUICKLY = 1  # level of PNG compression, which at the default of 6 takes four times as long

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Predictions(NamedTuple):
    """Results of `predict`."""

    rows: list[dict[str, Any]]  # rows of predictions.csv
    damaged: list[dict[str, str]]  # name of each unusable image and the reason
    groups: list[Group]  # unknown images, grouped by likeness


class _Ready(NamedTuple):
    """An image that was read."""

    processed: Processed
    size: tuple[int, int]  # width and height of the photograph
    picture: UInt8[np.ndarray, "h w 3"]  # the photograph in the size of its heatmap, or of its thumbnail


class _Judged(NamedTuple):
    """An image that was judged."""

    image: InputImage
    ready: _Ready
    detection: Detection


def predict(
    detector: Detector,
    images: Iterable[InputImage | None],
    workdir: str,
    object_: str | None,
    output: Path,
    heatmaps: str = "small",
    tell: Callable[[dict[str, Any]], None] | None = None,
) -> Predictions:
    """Detect anomalies in images and write the results in their order. Unusable images are reported and left out.

    Args:
        detector: Trained model.
        images: Images to predict; None where no further image is known yet, so that the results so far are finished.
        workdir: Workdir of the model, noted in predictions.json.
        object_: Name of the object that all images show; None to recognise it per image.
        output: New or empty folder for the results; a new one is removed if no image can be used.
        heatmaps: Key of `HEATMAPS`.
        tell: Called with the row of each image when its files are written, and with the name and reason of each
            unusable one, in place of messages. Unknown images, which may be gone by then, are not grouped.

    Raises:
        UserError: If the depth unit is wrong and no image was predicted yet, or if a file cannot be written.
    """
    is_new = not output.exists()
    make_folder(output)
    rows: list[dict[str, Any]] = []
    damaged: list[dict[str, str]] = []
    unknown: list[tuple[InputImage, np.ndarray]] = []
    groups: list[Group] = []
    page = predictions_page.Page()
    units_fit = False
    side = HEATMAPS[heatmaps] if heatmaps != "none" else predictions_page.SIDE

    def read(image: InputImage) -> _Ready:
        rgb, depth, camera = image.read()
        height, width = rgb.shape[:2]
        return _Ready(detector.process(rgb, depth, camera), (width, height), _reduced(rgb, side))

    def judge(readings: Iterable[tuple[InputImage, Future[_Ready]] | None]) -> Iterator[_Judged | None]:
        nonlocal units_fit
        for reading in readings:
            if reading is None:
                yield None
                continue
            image, future = reading
            try:
                ready = future.result()
                detection = ready.processed.place(detector.judge(ready.processed.images, object_))
            except UserError as error:
                if isinstance(error, WrongUnit) and not units_fit:  # all images share one unit
                    raise
                damaged.append({"image": image.name, "reason": str(error)})
                if tell:
                    tell(damaged[-1])
                else:
                    tqdm.write(f"iumad_jax: {error}", file=sys.stderr)
                continue
            units_fit = True
            yield _Judged(image, ready, Detection(*(field[0] for field in detection)))

    def write(judged: _Judged) -> tuple[dict[str, Any], UInt8[np.ndarray, "h w 3"]]:
        name, detection = judged.image.name, judged.detection
        row = _row(name, detection, heatmaps != "none")
        _write_image(output / row["mask"], _full_size(detection.mask, judged.ready.size))
        heatmap = figures.overlay(judged.ready.picture, detection.map, float(detection.pixel_threshold))
        if row["heatmap"]:
            _write_image(output / row["heatmap"], Image.fromarray(heatmap))
        return row, heatmap

    pool = ThreadPoolExecutor(_THREADS)
    try:
        shown = tqdm(images, unit="image", disable=None, leave=False)
        for writing in _in_threads(pool, write, judge(_in_threads(pool, read, shown))):
            if writing is None:
                continue
            judged, future = writing
            row, heatmap = future.result()
            rows.append(row)
            page.add(row, heatmap)
            if tell:
                tell(row)
            elif judged.detection.unknown:
                unknown.append((judged.image, judged.detection.embedding))
        if unknown:
            members, embeddings = zip(*unknown, strict=True)
            groups = unknown_images.write(detector, members, np.stack(embeddings), output / "unknown")
            names = {image.name: group.name for group in groups for image in group.images}
            rows = [row | {"group": names.get(row["image"], "")} for row in rows]
    finally:
        pool.shutdown(cancel_futures=True)
        if rows:  # also lists the images predicted before an error such as a full disk
            content = {"workdir": workdir, "step": detector.step, "images": rows, "damaged": damaged}
            write_whole(output / "predictions.csv", _csv(rows).encode())
            write_whole(output / "predictions.json", (json.dumps(as_json(content), indent=1) + "\n").encode())
            summary = {"workdir": workdir, "step": detector.step, "count": len(rows), "damaged": damaged}
            page.write(output / "predictions.html", summary)
        elif is_new:
            with suppress(OSError):  # of a folder in which something is written
                output.rmdir()
    return Predictions(rows, damaged, groups)


def watch(
    detector: Detector,
    look: Callable[[], Iterable[InputImage]],
    workdir: str,
    object_: str | None,
    output: Path,
    heatmaps: str,
) -> list[dict[str, Any]]:
    """Predict the images of a folder as they arrive, until a signal asks to stop. Results are printed as lines of JSON.

    Args:
        detector: Trained model.
        look: Lists the images that are there now.
        workdir: Workdir of the model, noted in predictions.json.
        object_: Name of the object that all images show; None to recognise it per image.
        output: New or empty folder for the results.
        heatmaps: Key of `HEATMAPS`.

    Returns:
        Rows of predictions.csv.

    Raises:
        UserError: If the folder cannot be used or a file cannot be written.
    """

    def tell(row: dict[str, Any]) -> None:
        print(json.dumps(as_json(row)), flush=True)

    list(look())  # reports wrong flags before the model is compiled
    with preemption.stop_on_signals() as stopped:
        detector.compile()
        print("iumad_jax: watching the folder; Ctrl-C or SIGTERM stops.", file=sys.stderr, flush=True)
        return predict(detector, watching.watch(look, stopped), workdir, object_, output, heatmaps, tell).rows


def summary(rows: Iterable[dict[str, Any]]) -> str:
    """Count the images and their decisions."""
    decisions = [row["decision"] for row in rows]
    counts = ", ".join(f"{decisions.count(name)} {name}" for name in ("good", "anomalous", "unknown"))
    return f"{counted(len(decisions), 'images')}: {counts}"


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


def _in_threads(
    pool: ThreadPoolExecutor, function: Callable[[_Item], _Result], items: Iterable[_Item | None]
) -> Iterator[tuple[_Item, Future[_Result]] | None]:
    """Apply a function to items, some items ahead, and yield items and futures in order.

    None among the items is yielded after all that came before it.
    """
    begun: deque[tuple[_Item, Future[_Result]]] = deque()
    for item in items:
        if item is not None:
            begun.append((item, pool.submit(function, item)))
        while begun and (item is None or len(begun) > _THREADS):
            yield begun.popleft()
        if item is None:
            yield None
    yield from begun


def _row(name: str, detection: Detection, has_heatmap: bool) -> dict[str, Any]:
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
        "heatmap": f"heatmaps/{name}.png" if has_heatmap else "",
    }


def _csv(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: result_files.spreadsheet_text(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _reduced(rgb: np.ndarray, side: int | None) -> np.ndarray:
    """Reduce an image so that its longer side has at most `side` pixels."""
    if side is None or max(rgb.shape[:2]) <= side:
        return rgb
    picture = Image.fromarray(rgb)
    picture.thumbnail((side, side), Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _full_size(mask: np.ndarray, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(mask).convert("L").resize(size, Image.Resampling.NEAREST)


def _write_image(path: Path, image: Image.Image) -> None:
    content = io.BytesIO()
    image.save(content, "PNG", compress_level=_QUICKLY)
    make_folder(path.parent)
    write_whole(path, content.getvalue())
