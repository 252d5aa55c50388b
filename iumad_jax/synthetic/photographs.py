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
    found = files(folder)
    chosen = np.random.default_rng(seed).permutation(len(found))[:count]
    return np.stack([_read(found[number], size) for number in sorted(chosen)])


def files(folder: Path) -> list[Path]:
    """List the photographs in a folder and its subfolders, sorted.

    Raises:
        UserError: If there are none.
    """
    if found := sorted(file for file in folder.rglob("*") if file.suffix.lower() in _SUFFIXES):
        return found
    raise UserError(
        f'config.destseg.textures is "{folder}", where no .jpg, .jpeg or .png is; name a folder of textures.'
    )


def _read(file: Path, size: int) -> UInt8[np.ndarray, "s s 3"]:
    try:
        with Image.open(file) as image:
            return np.array(image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"the texture {file} cannot be read ({error}); remove it.") from error
