"""Prepares a dataset before its first run: python -m iumad_jax.prepare --config=configs/mvtec3d.py.

Every image of every object and split is read, processed and encoded once; a run does the same with what it needs and
finds what is there. Prints what the dataset holds and draws a contact sheet of every object.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np
from absl import flags

from iumad_jax import cli
from iumad_jax.errors import UserError

if TYPE_CHECKING:
    from iumad_jax.data.prepared.records import Manifest
    from iumad_jax.data.prepared.store import Store
    from iumad_jax.data.sample import Split

_ON_SHEET: "dict[Split, int]" = {"train": 4, "calibration": 1, "test": 10}  # images of a contact sheet, at most


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code."""
    return cli.execute(str(__doc__), arguments, _define, _prepare, resumable=True)


def _define(values: flags.FlagValues) -> None:
    cli.define_config(values)
    cli.define_workdir(values)
    flags.DEFINE_string(
        "archive", None, "A .tar, .tar.gz, .tar.xz or .zip to unpack into dataset.root first.", flag_values=values
    )
    flags.DEFINE_float("archive_gb", 100, "How large it may become, GB.", lower_bound=0, flag_values=values)
    flags.DEFINE_integer("archive_entries", 10**6, "How many files it may hold.", lower_bound=1, flag_values=values)


def _prepare(values: flags.FlagValues) -> str:
    config, workdir = cli.given_config(values)
    from iumad_jax import config as configs  # after the flags: a typo is told at once, before JAX is loaded
    from iumad_jax.data import readers
    from iumad_jax.data.formats import archives
    from iumad_jax.data.prepared import inputs

    configs.check(config)
    if values.archive:
        root, limits = Path(config.dataset.root), archives.Limits(int(values.archive_gb * 1e9), values.archive_entries)
        print(f"{values.archive}: SHA-256 {archives.unpack(Path(values.archive), root, limits)}, unpacked to {root}")
    readers.render(config)
    store = inputs.open_store(config, readers.open_reader(config), workdir)
    return "\n".join(_lines(store))


def _lines(store: "Store") -> Iterator[str]:
    """Prepares everything; a table of it in the end, and where the contact sheets are."""
    from tabulate import tabulate

    from iumad_jax.data.sample import Split

    headers = ["object", "split", "images", "defects", "pixels", "no depth", "mask area: median, 5 to 95 %"]
    rows = []
    sheets = store.folder / "contact_sheets"
    for object_ in store.reader.objects:
        splits: tuple[Split, ...] = get_args(Split)
        manifests = {split: store.prepare(object_, split) for split in splits if store.reader.ids(object_, split)}
        rows += [[object_, split, *_summary(manifest)] for split, manifest in manifests.items()]
        _draw(store, object_, manifests, sheets)
    yield tabulate(rows, headers, "simple_outline", disable_numparse=True)
    yield f"Contact sheets are in {sheets}."


def _summary(manifest: "Manifest") -> list[str]:
    """Of one object and split: the cells of its row."""
    images = manifest["images"]
    defects = Counter(image["defect"] for image in images)
    sizes = Counter("x".join(map(str, reversed(image["size"]))) for image in images)
    invalid = [image["invalid_depth"] for image in images if image["invalid_depth"] is not None]
    areas = [image["mask_area"] for image in images if image["mask_area"]]
    quantiles = [f"{100 * value:.2g} %" for value in np.quantile(areas, [0.5, 0.05, 0.95])] if areas else None
    return [
        str(len(images)),
        ", ".join(
            f"{count} {name}" for name, count in sorted(defects.items(), key=lambda one: (one[0] != "good", one))
        ),
        ", ".join(sizes),
        f"{100 * np.mean(invalid):.1f} %" if invalid else "-",
        f"{quantiles[0]}, {quantiles[1]} to {quantiles[2]}" if quantiles else "-",
    ]


def _draw(store: "Store", object_: str, manifests: "dict[Split, Manifest]", sheets: Path) -> None:
    """The contact sheet of an object, each kind of image in turn."""
    from iumad_jax.data import depth
    from iumad_jax.data.prepared import contact_sheet
    from iumad_jax.report import figures

    panels = []
    for split, most in _ON_SHEET.items():
        images = manifests[split]["images"] if split in manifests else []
        for row in figures.choose([image["defect"] for image in images], most):
            sample = store.reader.read(object_, split, images[row]["id"])
            label = f"{split} {sample.id}: {sample.defect}"
            height, normals, top = None, None, 1.0
            if sample.depth is not None and sample.camera is not None:
                surface = depth.measure(sample.depth, sample.camera, store.processing.normals_window)
                height = np.where(surface.valid, surface.height, np.float32(np.nan))
                normals = surface.normals
                above = depth.object_mask(surface.height, store.processing.object_height)
                piece = surface.height[depth.free_standing(above)]  # not what the image cuts off, which may be higher
                top = float(np.percentile(piece if piece.size else surface.height, 99))
            panels.append(contact_sheet.Panels(label, sample.rgb, height, normals, sample.mask, max(top, 1e-6)))
    try:
        sheets.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{sheets} cannot be made ({error.strerror}); choose another --workdir.") from error
    title = f"{object_}: RGB, height, normals, defect"
    contact_sheet.save(sheets / f"{object_}.jpg", title, panels)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
