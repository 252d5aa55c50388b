"""Resizing of images, masks and regions to the sizes that networks and metrics use."""

from typing import TypeVar

import numpy as np
from jaxtyping import Array, Bool, Shaped
from PIL import Image

_Array = TypeVar("_Array", np.ndarray, Array)


def resize_image(image: Shaped[np.ndarray, "h w c"], size: int) -> Shaped[np.ndarray, "s s c"]:
    """Resize a uint8 or float32 image to `size` x `size` pixels with Pillow's antialiased bilinear filter."""
    if image.dtype == np.uint8 and image.shape[-1] == 3:  # Pillow resizes these channels together, which is faster
        return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(image, -1, 0)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR)) for channel in channels]
    return np.stack(resized, axis=-1)


def resize_nearest(image: Shaped[_Array, "h w"], size: int) -> Shaped[_Array, "s s"]:
    """Resize an image to `size` x `size` pixels without interpolation.

    Pixel i of the result is the source pixel that contains its centre, floor((i + 1/2) h / size).
    """
    rows, columns = ((2 * np.arange(size) + 1) * side // (2 * size) for side in image.shape)
    return image[rows[:, None], columns]


def resize_mask(mask: Shaped[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "s s"]:
    """Resize a mask to `size` x `size` pixels by `resize_nearest`; values above 0 are positive."""
    return resize_nearest(mask, size) > 0


def dilate(mask: Bool[np.ndarray, "h w"], pixels: int = 3) -> Bool[np.ndarray, "h w"]:
    """Extend a mask to all pixels at a distance of at most `pixels`."""
    h, w = mask.shape  # for a few pixels, shifts take less time than a distance transform
    padded, dilated = np.pad(mask, pixels), np.zeros_like(mask)
    for row, column in np.argwhere(np.hypot(*np.ogrid[-pixels : pixels + 1, -pixels : pixels + 1]) <= pixels):
        dilated |= padded[row : row + h, column : column + w]
    return dilated


def erode(mask: Bool[np.ndarray, "h w"], pixels: int = 3) -> Bool[np.ndarray, "h w"]:
    """Reduce a mask to the pixels whose distance from the pixels outside of it exceeds `pixels`."""
    return ~dilate(~mask, pixels)


def region(mask: Bool[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "s s"]:
    """Resize an object mask to `size` x `size` pixels and dilate it by 3: the region of the object-only metrics."""
    return dilate(resize_mask(mask, size))


def foreground(workpiece: Bool[np.ndarray, "h w"]) -> Bool[np.ndarray, "h w"]:
    """Return where synthetic defects may lie: on `GroundTruth.workpiece` without its rim; if it is empty, anywhere."""
    return erode(workpiece) if workpiece.any() else ~workpiece
