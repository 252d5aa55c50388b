"""Tiles of large images, see `config.input.tiles`, and how their anomaly maps become one."""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float32, Int
from PIL import Image

from iumad_jax import config as configs
from iumad_jax.data.region import Box
from iumad_jax.data.transforms import resize_nearest
from iumad_jax.shapes import MAP_SIZE


@dataclass(frozen=True)
class Tiling:
    """Tiles of equal size, which overlap by a share of their sides and cover an image exactly."""

    rows: int
    columns: int
    overlap: float

    @classmethod
    def of(cls, tiles: str, overlap: float) -> "Tiling":
        """Return the tiling of `config.input.tiles` and `config.input.overlap`."""
        return cls(*configs.tile_numbers(tiles), overlap)

    @property
    def count(self) -> int:
        """Number of tiles of an image."""
        return self.rows * self.columns

    @property
    def share(self) -> tuple[float, float]:
        """Height and width of a tile in shares of those of the image."""
        return 1 / (self.rows - (self.rows - 1) * self.overlap), 1 / (self.columns - (self.columns - 1) * self.overlap)

    @property
    def boxes(self) -> list[Box]:
        """The tiles, row by row."""
        height, width = self.share
        down, across = (_intervals(*along, self.overlap) for along in ((self.rows, height), (self.columns, width)))
        return [Box(left, top, right, bottom) for top, bottom in down for left, right in across]

    def cut(self, mask: Bool[np.ndarray, "m m"]) -> Bool[np.ndarray, "*t m m"]:
        """Return a mask of an image if it has one tile, and else those of its tiles, each in the mask's size."""
        if self.count == 1:
            return mask
        return np.stack([resize_nearest(mask[box.slices(mask.shape)], len(mask)) for box in self.boxes])


def _intervals(number: int, length: float, overlap: float) -> list[tuple[float, float]]:
    """Return the ends of intervals; without overlap, each begins with the very number at which another ends."""
    step = length * (1 - overlap)
    return [(step * i, step * (i + 1) + length * overlap) for i in range(number)]


def rows_of(images: Int[np.ndarray, " n"], tiles: int) -> Int[np.ndarray, " r"]:
    """Return the rows of the tiles of images, where every image has equally many rows after each other."""
    return (images[:, None] * tiles + np.arange(tiles)).ravel()


def stitch(maps: Float32[np.ndarray, "t m m"], tiling: Tiling, size: tuple[int, int]) -> Float32[np.ndarray, "h w"]:
    """Join the maps of an image's tiles to one of `size` (rows, columns).

    Where tiles overlap, the weight of each falls linearly towards its edge, where it knows the least of its
    surroundings; so there are no seams, and no value is larger than that of a tile.
    """
    total, weights = np.zeros(size, np.float32), np.zeros(size, np.float32)
    for number, (tile, box) in enumerate(zip(maps, tiling.boxes, strict=True)):
        row, column = divmod(number, tiling.columns)
        down, right = box.slices(size)
        height, width = down.stop - down.start, right.stop - right.start
        shown = np.asarray(Image.fromarray(tile).resize((width, height), Image.Resampling.BILINEAR))
        weight = np.outer(
            _ramps(height, tiling.overlap, row > 0, row < tiling.rows - 1),
            _ramps(width, tiling.overlap, column > 0, column < tiling.columns - 1),
        )
        total[down, right] += weight * shown
        weights[down, right] += weight
    return total / weights


def _ramps(length: int, overlap: float, begins: bool, ends: bool) -> Float32[np.ndarray, " length"]:
    """Return weights along a side: 1, but rising over the overlap with the tile before, falling over that after."""
    from_start = (np.arange(length, dtype=np.float32) + 0.5) / max(overlap * length, 1)
    weights = np.ones(length, np.float32)
    weights = np.minimum(weights, from_start) if begins else weights
    return np.minimum(weights, from_start[::-1]) if ends else weights


def stitch_for_metrics(maps: Float32[np.ndarray, "t m m"], tiling: Tiling) -> Float32[np.ndarray, "m m"]:
    """Join the maps of an image's tiles in their own resolution, and reduce the result to 224 x 224 by area."""
    height, width = (round(MAP_SIZE / share) for share in tiling.share)
    whole = Image.fromarray(stitch(maps, tiling, (height, width)))
    return np.asarray(whole.resize((MAP_SIZE, MAP_SIZE), Image.Resampling.BOX))
