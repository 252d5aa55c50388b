"""A survey of a dataset: everything is prepared, counted, and drawn on contact sheets."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import get_args

import numpy as np
from tabulate import tabulate

from iumad_jax.data.prepared import copies
from iumad_jax.data.prepared.copies import PreparedSplit
from iumad_jax.data.prepared.records import Manifest
from iumad_jax.data.prepared.store import Store
from iumad_jax.data.sample import Split
from iumad_jax.errors import UserError
from iumad_jax.report import contact_sheet, figures

_ON_SHEET: dict[Split, int] = {"train": 4, "calibration": 1, "test": 10}  # images of a contact sheet, at most


def survey(store: Store, sheets: Path) -> str:
    """Prepares every image of every object and split, and draws a contact sheet of each object.

    Returns:
        A table of what the dataset holds.

    Raises:
        UserError: an image is unusable, or something cannot be written.
    """
    try:
        sheets.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{sheets} cannot be made ({error.strerror}); choose another --workdir.") from error
    rows = []
    for object_ in store.reader.objects:
        manifests = {
            split: store.prepare(object_, split)
            for split in (*get_args(Split), *copies.ALTERED)
            if copies.ids(store.reader, object_, split)
        }
        rows += [
            [object_, split, *_summary(found)] for split, found in manifests.items() if split not in copies.ALTERED
        ]
        title = f"{object_}: RGB, height, depth as encoded, defect"
        contact_sheet.save(sheets / f"{object_}.jpg", title, _panels(store, object_, manifests))
    headers = ["object", "split", "images", "defects", "pixels", "no depth", "mask area: median, 5 to 95 %"]
    return tabulate(rows, headers, "simple_outline", disable_numparse=True)


def _summary(manifest: Manifest) -> list[str]:
    """The cells of a row, for one object and split."""
    images = manifest["images"]
    defects = Counter(image["defect"] for image in images)
    sizes = Counter("x".join(map(str, reversed(image["size"]))) for image in images)
    invalid = [image["invalid_depth"] for image in images if image["invalid_depth"] is not None]
    areas = [image["mask_area"] for image in images if image["mask_area"]]
    quantiles = [f"{100 * value:.2g} %" for value in np.quantile(areas, [0.5, 0.05, 0.95])] if areas else None
    return [
        str(len(images)),
        ", ".join(
            f"{count} {name}" for name, count in sorted(defects.items(), key=lambda item: (item[0] != "good", item))
        ),
        ", ".join(sizes),
        f"{100 * np.mean(invalid):.1f} %" if invalid else "-",
        f"{quantiles[0]}, {quantiles[1]} to {quantiles[2]}" if quantiles else "-",
    ]


def _panels(store: Store, object_: str, manifests: Mapping[PreparedSplit, Manifest]) -> list[contact_sheet.Panels]:
    """Some images of each kind and split, as they are processed."""
    panels = []
    for split, most in _ON_SHEET.items():
        images = manifests[split]["images"] if split in manifests else []
        for row in figures.choose([image["defect"] for image in images], most):
            sample = store.reader.read(object_, split, images[row]["id"])
            label = f"{split} {sample.id}: {sample.defect}"
            panels.append(contact_sheet.Panels(label, store.processing(sample), sample.mask is not None))
    return panels
