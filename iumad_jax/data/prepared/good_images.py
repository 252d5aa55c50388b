"""Good images of an object: images to learn from, calibration images, and warnings about suspicious ones."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from iumad_jax.data.prepared import copies, records
from iumad_jax.data.prepared.inventory import SPLIT_NAMES
from iumad_jax.data.prepared.store import PreparedSet, Store, mean_tokens
from iumad_jax.data.sample import Reader, Split
from iumad_jax.data.tiles import rows_of
from iumad_jax.shapes import Batch, Modality

_SILHOUETTE, _SMALLEST_KIND = 0.35, 4  # of two kinds of images, and the number of images of the smaller one
_GREY_LEVELS = 3  # an image with at most this range is constant


class CalibrationImages(NamedTuple):
    """Good images of an object that set its thresholds and scales."""

    images: Batch
    trained: Bool[np.ndarray, " n"]  # whether the method is also trained on an image
    few: bool = False  # whether no image can be held out; most are then altered copies


def calibration_images(images: Batch, trained: bool, few: bool = False) -> CalibrationImages:
    """Return calibration images, on all or none of which the method is trained."""
    images = images._replace(foreground=None)  # which training images alone may have
    return CalibrationImages(images, np.full(len(images.object_id), trained), few)


class GoodImages(NamedTuple):
    """Good images of an object, divided by their use."""

    learned: Batch  # images that recognition of the object is learned from
    calibrating: CalibrationImages


def good_images(store: Store, name: str) -> GoodImages:
    """Divide an object's good images into images to learn from and calibration images.

    If the dataset has no calibration images, every fifth training image is used for calibration. With fewer than 20
    training images, all of them and their `varied` copies are used, because most other good images would exceed a
    threshold set by a handful of images.
    """
    training = store.get(name, "train").batch._replace(foreground=None)
    if store.reader.ids(name, "calibration"):
        return GoodImages(training, calibration_images(store.get(name, "calibration").batch, trained=False))
    tiles = store.processing.tiling.count
    count = len(training.object_id) // tiles
    if count < copies.FEW:
        varied = store.get(name, "varied").batch
        with_copies = jax.tree.map(lambda *arrays: np.concatenate(arrays), training, varied)
        return GoodImages(training, calibration_images(with_copies, trained=True, few=True))
    fifth = (np.arange(count) + 1) % 5 == 0
    fifth = np.repeat(fifth, tiles)
    learned, calibrating = (jax.tree.map(lambda array, rows=rows: array[rows], training) for rows in (~fifth, fifth))
    return GoodImages(learned, calibration_images(calibrating, trained=True))


def quality_shifts(store: Store, name: str) -> dict[Modality, np.ndarray]:
    """Compute how mean tokens move when the camera is slightly worse.

    Returns:
        Differences between the mean tokens of an object's degraded copies and of their originals, (n, f) by modality.
    """
    features = store.get(name, "train").batch.features
    degraded, ids = store.mean_tokens(name), store.reader.ids(name, "train")
    originals = [ids.index(copies.original_id(copy)) for copy in copies.ids(store.reader, name, "degraded")]
    rows = rows_of(np.array(originals), store.processing.tiling.count)
    return {m: tokens - mean_tokens(features[m][rows]) for m, tokens in degraded.items()}


def suspicious_images(store: Store, name: str) -> Iterator[str]:
    """Yield warnings about an object's good images, and about test images that are among them."""
    splits: tuple[Split, ...] = ("train", "calibration")
    for split in splits:
        if store.reader.ids(name, split):
            yield from odd_images(store.get(name, split), name, SPLIT_NAMES[split])
    yield from reused_images(store.reader, name)


def odd_images(images: PreparedSet, name: str, kind: str) -> Iterator[str]:
    """Yield one warning per kind of suspicious image: black, saturated, constant or duplicate.

    Args:
        images: Good images of an object.
        name: Name of the object.
        kind: Kind of the images for the message, such as "training".
    """
    oddities = ("black", "saturated", "of a single colour", "constant in depth", "duplicates")
    ids_by_oddity: dict[str, list[str]] = {oddity: [] for oddity in oddities}
    seen = set()
    count = len(images.ids)  # the tiles of an image are looked at together, since one may well show nothing
    arrays: dict[Modality, Any] = {m: x.reshape(count, -1, *x.shape[2:]) for m, x in images.batch.images.items()}
    for row, id_ in enumerate(images.ids):
        image = {modality: np.asarray(array[row], np.float32) for modality, array in arrays.items()}
        content = hashlib.sha256(b"".join(pixels.tobytes() for pixels in image.values())).digest()
        if "rgb" in image and np.ptp(image["rgb"]) <= _GREY_LEVELS:
            darkest, brightest = image["rgb"].min(), image["rgb"].max()
            colour = "saturated" if darkest >= 255 - _GREY_LEVELS else "of a single colour"
            ids_by_oddity["black" if brightest <= _GREY_LEVELS else colour].append(id_)
        elif "depth" in image and not np.ptp(image["depth"], axis=(0, 1)).any():
            ids_by_oddity["constant in depth"].append(id_)
        elif content in seen:
            ids_by_oddity["duplicates"].append(id_)
        seen.add(content)
    for oddity, ids in ids_by_oddity.items():
        if ids:
            yield f"{len(ids)} of {name}'s {len(images.ids)} {kind} images are {oddity} ({_first(ids)}); check them."


def reused_images(reader: Reader, name: str) -> Iterator[str]:
    """Yield a warning for validation images, and one for test images, that are training images as well.

    Images are the same if their first files are, which are photographs if there are any; a mask makes no difference.
    """

    def digests(split: Split) -> dict[str, str]:
        first = {id_: reader.files(name, split, id_)[0] for id_ in reader.ids(name, split)}
        return {id_: records.hash_file(file, None)["sha256"] for id_, file in first.items()}

    training = set(digests("train").values())
    splits: dict[Split, str] = {"calibration": "its thresholds will be too low", "test": "its results will be too good"}
    for split, effect in splits.items():
        ids = [id_ for id_, digest in digests(split).items() if digest in training]
        if ids:
            images = f"{name}'s {SPLIT_NAMES[split]} images are training images too ({_first(ids)})"
            yield f"{len(ids)} of {images}: {effect}; remove them."


def _first(ids: Sequence[str]) -> str:
    """Join the first five ids."""
    return ", ".join(ids[:5]) + (" and others" if len(ids) > 5 else "")


def several_kinds(images: PreparedSet, name: str) -> str | None:
    """Return a warning if the images of an object are of two kinds; None if they are not.

    They are if two clusters of their mean tokens are far apart by their mean silhouette (Rousseeuw, 1987), which is 0.2
    to 0.3 for images of one of the rendered candies, and 0.4 to 0.5 for images of two.
    """
    rows = np.concatenate([mean_tokens(array) for _, array in sorted(images.batch.features.items())], axis=-1)
    tokens = rows.reshape(len(images.ids), -1, rows.shape[-1]).mean(1)  # over tiles, which may differ
    if len(tokens) < 2 * _SMALLEST_KIND or not np.ptp(tokens, axis=0).any() or not np.isfinite(tokens).all():
        return None
    from sklearn.cluster import KMeans  # loads slowly, and few commands need it
    from sklearn.metrics import silhouette_score

    standardised = (tokens - tokens.mean(0)) / np.maximum(tokens.std(0), 1e-6)
    kinds = KMeans(2, n_init=3, random_state=0).fit_predict(standardised)
    counts = np.bincount(kinds, minlength=2)
    if counts.min() < _SMALLEST_KIND or silhouette_score(standardised, kinds) < _SILHOUETTE:
        return None
    described = (f"{count} like {images.ids[int(np.argmax(kinds == kind))]}" for kind, count in enumerate(counts))
    return (
        f"{name}'s training images are of two kinds ({', '.join(described)}); if they show two objects, put them into"
        " two folders."
    )
