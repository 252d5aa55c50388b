"""Photographs of textures from a folder of the user, such as DTD (Cimpoi et al., CVPR 2014)."""

from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from iumad_jax.errors import UserError

_SUFFIXES = {".jpg", ".jpeg", ".png"}


def load(folder: Path, count: int, size: int, seed: int) -> UInt8[np.ndarray, "n s s 3"]:
    """Load at most `count` photographs of a folder and its subfolders, chosen by the seed, as squares of `size` pixels.

    Raises:
        UserError: If there are none, or one cannot be read.
    """
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise UserError(
            f'config.destseg.textures is "{folder}", where no .jpg, .jpeg or .png is; name a folder of textures.'
        )
    chosen = np.random.default_rng(seed).permutation(len(files))[:count]
    return np.stack([_read(files[number], size) for number in sorted(chosen)])


def _read(file: Path, size: int) -> UInt8[np.ndarray, "s s 3"]:
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the texture {file} cannot be read ({error}); remove it.") from error
