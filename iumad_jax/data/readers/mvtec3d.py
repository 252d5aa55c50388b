"""Reader of MVTec 3D-AD (Bergmann et al., VISAPP 2022) in its official layout."""

from collections.abc import Sequence
from pathlib import Path

from iumad_jax.data.formats.files import opening, select
from iumad_jax.data.readers.arrangements import object_folders
from iumad_jax.data.readers.layout import Item, list_good_items, list_labelled_items, read_item
from iumad_jax.data.sample import DepthFormat, Sample, Split
from iumad_jax.errors import UserError

_KINDS = {"rgb": (".png",), "xyz": (".tiff",), "gt": (".png",)}


class MVTec3D:
    """Reader of `<root>/<object>/{train,validation,test}/<good or defect>/{rgb/000.png,xyz/000.tiff,gt/000.png}`.

    xyz are organised clouds in metres, zero where missing: depth is z, and the camera is estimated from x/z and y/z.
    Without xyz folders, samples have no depth. Objects may have any names. Only images with defects need gt, which is
    positive on the defect.

    Args:
        root: Folder with one subfolder per object.
        objects: "all", names separated by commas, or a sequence of names, in the order of learning.
        validation: Split to which the validation images are added: "train", as in the benchmark's protocol (with ids
            such as "validation/000"), or "calibration".
        needs_depth: Whether to refuse images without xyz.
        trusted: Folders that links may lead into, besides the root.

    Raises:
        UserError: If a folder or file is missing or empty or leads elsewhere, or an object is unknown.
    """

    object_height = 0.005
    height_range = 0.1
    normals_window = 11  # from `depth.choose_window`, for noise of 0.25 mm and pixels 0.37 mm apart
    depth_format = DepthFormat(unit=1.0)

    def __init__(
        self,
        root: str | Path,
        objects: str | Sequence[str] = "all",
        validation: str = "train",
        needs_depth: bool = False,
        trusted: Sequence[Path] = (),
    ) -> None:
        if validation not in ("train", "calibration"):
            raise UserError(f'config.dataset.validation is "{validation}"; use train or calibration.')
        self.root = Path(root)
        within = (self.root, *trusted)
        by_name = object_folders(self.root, trusted)
        self.objects = select(objects, tuple(by_name))
        needed_good = ("rgb", "xyz") if needs_depth else ("rgb",)
        needed_test = (*needed_good, "gt")
        self._items: dict[tuple[str, Split], dict[str, Item]] = {}
        with opening(self.root):
            for name in self.objects:
                folder = by_name[name]
                if (folder / "ground_truth").is_dir():
                    raise UserError(
                        f"{folder} is of MVTec AD, not of MVTec 3D-AD; use --config=folder and --config.modality=rgb."
                    )
                train = list_good_items(folder / "train", within, _KINDS, needed_good)
                calibration = list_good_items(folder / "validation", within, _KINDS, needed_good)
                if validation == "train":
                    train |= {f"validation/{id_}": item for id_, item in calibration.items()}
                    calibration = {}
                self._items[name, "train"], self._items[name, "calibration"] = train, calibration
                self._items[name, "test"] = list_labelled_items(folder / "test", within, _KINDS, needed_test)

    def __repr__(self) -> str:
        return f"MVTec3D({str(self.root)!r})"

    def ids(self, object: str, split: Split) -> tuple[str, ...]:
        """List the ids of one object and split, sorted by name; test images by defect first."""
        return tuple(self._items.get((object, split), ()))

    def files(self, object: str, split: Split, id: str) -> tuple[Path, ...]:
        """List the files of RGB, xyz and gt that exist."""
        return self._items[object, split][id].files

    def read(self, object: str, split: Split, id: str) -> Sample:
        """Read one sample.

        Raises:
            UserError: If one of its files is unusable or they contradict each other.
        """
        item = self._items[object, split][id]
        return read_item(object, id, item, self.depth_format, remedy="save xyz in metres", needs_cloud=True)
