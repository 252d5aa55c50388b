"""Sizes: images, masks and regions as the networks and the metrics see them."""

import numpy as np
from jaxtyping import Bool, Shaped
from PIL import Image
from scipy import ndimage


def resize_image(image: Shaped[np.ndarray, "h w c"], size: int) -> Shaped[np.ndarray, "s s c"]:
    """An image at `size` x `size` pixels, uint8 or float32 as it was: Pillow's bilinear filter, antialiased."""
    channels = [Image.fromarray(np.ascontiguousarray(channel)) for channel in np.moveaxis(image, -1, 0)]
    resized = [np.asarray(channel.resize((size, size), Image.Resampling.BILINEAR)) for channel in channels]
    return np.stack(resized, axis=-1)


def resize_nearest(image: Shaped[np.ndarray, "h w"], size: int) -> Shaped[np.ndarray, "s s"]:
    """The nearest pixel's value at `size` x `size` pixels.

    Pixel i of the result takes the pixel in which its centre lies, floor((i + 1/2) h / size).
    """
    rows, columns = ((2 * np.arange(size) + 1) * side // (2 * size) for side in image.shape)
    return image[rows[:, None], columns]


def resize_mask(mask: Shaped[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "s s"]:
    """A mask at `size` x `size` pixels by `resize_nearest`, positive if > 0."""
    return resize_nearest(mask, size) > 0


def dilate(mask: Bool[np.ndarray, "h w"], pixels: int = 3) -> Bool[np.ndarray, "h w"]:
    """All pixels within a distance of `pixels` of the mask."""
    if not mask.any():
        return mask
    return ndimage.distance_transform_edt(~mask) <= pixels


def region(mask: Bool[np.ndarray, "h w"], size: int) -> Bool[np.ndarray, "s s"]:
    """Where object-only metrics take their negatives: a mask at `size` x `size` pixels and a rim of 3 pixels."""
    return dilate(resize_mask(mask, size))
