"""Altered copies of training images, prepared as two further splits.

`degraded`: each of some images with a mild fault, of which only mean tokens are kept: how features move where a camera
does somewhat worse. `varied`: of an object with few images and none to set thresholds, copies that stand in for others.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import numpy as np

from iumad_jax.data.degradation import degrade, vary
from iumad_jax.data.sample import Reader, Sample, Split

PreparedSplit = Split | Literal["degraded", "varied"]
ALTERED: tuple[PreparedSplit, ...] = ("degraded", "varied")

FEW = 20  # training images below which none is kept back to set thresholds
_COPIES = 20  # of few images
_DEGRADED = 50  # training images of an object, at most, that are degraded
_ALTER = {"degraded": degrade, "varied": vary}


def ids(reader: Reader, object: str, split: PreparedSplit) -> tuple[str, ...]:
    """The images of an object and split; a copy is named after its number and its original."""
    if split != "degraded" and split != "varied":
        return reader.ids(object, split)
    originals = reader.ids(object, "train")
    count = len(originals)
    repeated = np.arange(_COPIES) % count
    if split == "degraded":
        spread = np.unique(np.linspace(0, count - 1, _DEGRADED).round().astype(int))
        rows = spread if len(spread) >= 5 else repeated  # each of very few images several times
    else:
        rows = repeated[:0] if count >= FEW or reader.ids(object, "calibration") else repeated
    return tuple(f"{number} {originals[row]}" for number, row in enumerate(rows))


def files(reader: Reader, object: str, split: PreparedSplit, id: str) -> tuple[Path, ...]:
    """The files that an image, or a copy's original, is read from."""
    if split != "degraded" and split != "varied":
        return reader.files(object, split, id)
    return reader.files(object, "train", original(id))


def read(reader: Reader, object: str, split: PreparedSplit, id: str) -> Sample:
    """One image or copy.

    Raises:
        UserError: one of its files is missing or unusable.
    """
    if split != "degraded" and split != "varied":
        return reader.read(object, split, id)
    sample = reader.read(object, "train", original(id))
    return dataclasses.replace(_ALTER[split](sample, int(id.partition(" ")[0]), reader.object_height), id=id)


def original(id: str) -> str:
    """The training image of which this is a copy."""
    return id.partition(" ")[2]
