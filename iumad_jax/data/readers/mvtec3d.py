"""MVTec 3D-AD (Bergmann et al., VISAPP 2022) in its official layout."""

from collections.abc import Sequence
from pathlib import Path

from iumad_jax.data.formats.files import opening, select
from iumad_jax.data.readers.layout import Item, good_items, labelled_items, read_item
from iumad_jax.data.sample import Sample, Split
from iumad_jax.errors import UserError

OBJECTS = ("bagel", "cable_gland", "carrot", "cookie", "dowel", "foam", "peach", "potato", "rope", "tire")

_KINDS = {"rgb": (".png",), "xyz": (".tiff",), "gt": (".png",)}


class MVTec3D:
    """Reads `<root>/<object>/{train,validation,test}/<good or defect>/{rgb/000.png,xyz/000.tiff,gt/000.png}`.

    xyz are organised clouds in metres, zero where missing; depth is z, and the camera follows from x/z and y/z. Without
    xyz folders there is no depth. Only images with defects need gt, which is positive on the defect.

    Args:
        root: the folder that holds one folder per object.
        objects: "all", or names, also separated by commas in one text, in the order in which they are learned.
        validation: what the validation images are for: "train", as in the benchmark's protocol (their ids are then
            "validation/000" and so on), or "calibration".
        needs_depth: whether images without xyz are refused.

    Raises:
        UserError: a folder or file is missing or empty, leads out of the root, or an object is unknown.
    """

    object_height = 0.005
    height_range = 0.1
    normals_window = 11  # by `depth.window_for`, for noise of 0.25 mm in pixels 0.37 mm apart

    def __init__(
        self,
        root: str | Path,
        objects: str | Sequence[str] = "all",
        validation: str = "train",
        needs_depth: bool = False,
    ) -> None:
        if validation not in ("train", "calibration"):
            raise UserError(f'config.dataset.validation is "{validation}"; use train or calibration.')
        self.root = Path(root)
        self.objects = select(objects, OBJECTS)
        needed = ("xyz", "gt") if needs_depth else ("gt",)
        good = ("xyz",) if needs_depth else ()
        self._items: dict[tuple[str, Split], dict[str, Item]] = {}
        with opening(self.root):
            for name in self.objects:
                folder = self.root / name
                train, kept = (good_items(folder / split, self.root, _KINDS, good) for split in ("train", "validation"))
                if validation == "train":
                    train, kept = train | {f"validation/{id_}": item for id_, item in kept.items()}, {}
                self._items[name, "train"], self._items[name, "calibration"] = train, kept
                self._items[name, "test"] = labelled_items(folder / "test", self.root, _KINDS, needed)

    def __repr__(self) -> str:
        return f"MVTec3D({str(self.root)!r})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """The samples of one object and split, by name, those of a test set by defect first."""
        return tuple(self._items.get((object, split), ()))

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """RGB, xyz and gt, as far as there are."""
        return self._items[object, split][id].files

    def read(self, object: str, split: Split, id: str) -> Sample:
        """One sample.

        Raises:
            UserError: one of its files is unusable, or they do not fit together.
        """
        item = self._items[object, split][id]
        return read_item(object, id, item, unit=1.0, remedy="give xyz in metres", two_values=False, needs_cloud=True)
