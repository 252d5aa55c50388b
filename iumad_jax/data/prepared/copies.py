"""Altered copies of training images, prepared as two further splits.

`degraded`: training images with one mild fault each. Only their mean tokens are stored, which show how features move
when the camera is slightly worse. `varied`: copies that help to set the thresholds of objects with few training images
and no calibration images.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from iumad_jax.data.degradation import degrade, vary
from iumad_jax.data.formats import retry
from iumad_jax.data.sample import Reader, Sample, Split

PreparedSplit = Split | Literal["degraded", "varied"]
ALTERED: tuple[PreparedSplit, ...] = ("degraded", "varied")

FEW = 20  # with fewer training images, no image is held out to set thresholds
_COPIES = 20  # number of copies when originals are repeated
_DEGRADED = 50  # largest number of degraded training images per object


def ids(reader: Reader, object: str, split: PreparedSplit) -> tuple[str, ...]:
    """Return the image ids of an object and split; the id of a copy is its number and the id of its original."""
    if split != "degraded" and split != "varied":
        return reader.ids(object, split)
    originals = reader.ids(object, "train")
    count = len(originals)
    repeated = np.arange(_COPIES) % count
    if split == "degraded":
        evenly_spaced = np.unique(np.linspace(0, count - 1, _DEGRADED).round().astype(int))
        rows = evenly_spaced if len(evenly_spaced) >= 5 else repeated  # fewer than 5 images are copied several times
    else:
        rows = repeated[:0] if count >= FEW or reader.ids(object, "calibration") else repeated
    return tuple(f"{number} {originals[row]}" for number, row in enumerate(rows))


def files(reader: Reader, object: str, split: PreparedSplit, id: str) -> tuple[Path, ...]:
    """Return the source files of an image or of a copy's original."""
    if split != "degraded" and split != "varied":
        return reader.files(object, split, id)
    return reader.files(object, "train", original_id(id))


def read(
    reader: Reader, object: str, split: PreparedSplit, id: str, extent: Callable[[Sample], tuple[float, float]]
) -> Sample:
    """Read an image, or read a copy's original and alter it.

    Args:
        reader: Reader of the images.
        object: Name of the object.
        split: Split of the image.
        id: Id of the image or copy.
        extent: Returns the shares of an image's height and width that are seen, of which shifts are a part.

    Raises:
        UserError: If a source file is missing or unusable.
    """
    if split != "degraded" and split != "varied":
        return retry.after_system_error(reader.read, object, split, id)
    sample = retry.after_system_error(reader.read, object, "train", original_id(id))
    number = int(id.partition(" ")[0])
    if split == "degraded":
        altered = degrade(sample, number, reader.object_height)
    else:
        altered = vary(sample, number, reader.object_height, extent(sample))
    return dataclasses.replace(altered, id=id)


def original_id(id: str) -> str:
    """Return the id of the training image that a copy was made from."""
    return id.partition(" ")[2]
