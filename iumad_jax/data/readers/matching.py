"""Says which files belong together by their names, such as 000_rgb.png, 000_depth.png and 000_mask.png."""

from collections.abc import Collection, Sequence
from pathlib import Path

from iumad_jax.data.formats.files import tell

DEPTH, MASK = ("_depth", "_Depth"), ("_mask",)  # endings of names

_RGB = ("_rgb", "_RGB", "_color", "_Color")


def bare(name: str, endings: Sequence[str]) -> str:
    """Return a name without the ending that it has of these, if any."""
    return next((name.removesuffix(ending) for ending in endings if name.endswith(ending)), name)


def tell_likeness(file: Path) -> None:
    """Tell once that a file belongs to a photograph of another name."""
    tell("files whose names differ only in _rgb, _color, _depth or _mask belong together", file)


def depth_names(name: str) -> list[str]:
    """List the names that the depth of a photograph may have, first its own."""
    return [name, *(bare(name, _RGB) + ending for ending in ("", *DEPTH))]


def beside(names: Collection[str], endings: Sequence[str]) -> list[str]:
    """Find the names of depth images or masks, which have these endings, among those of their photographs."""
    photographs = Photographs(names)
    ending = [name for name in names if name.endswith(tuple(endings))]
    return [name for name in ending if set(photographs.of(bare(name, endings), endings)) - {name}]


class Photographs:
    """Photographs, or depth in their place, by their names, to which depth and masks belong."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = set(names)
        self._by_bare: dict[str, list[str]] = {}
        for name in names:
            self._by_bare.setdefault(bare(name, (*_RGB, *DEPTH)), []).append(name)

    def of(self, name: str, endings: Sequence[str]) -> list[str]:
        """Find the photograph of a depth image or mask: that of its name or of its bare name, else all like these."""
        like = name, bare(name, endings)
        same = next(([photograph] for photograph in like if photograph in self._names), None)
        return same or self._by_bare.get(like[1], [])
