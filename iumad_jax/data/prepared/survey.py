"""Survey of a dataset: a table of its images, and a contact sheet per object."""

import dataclasses
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

_ON_SHEET: dict[Split, int] = {"train": 4, "calibration": 1, "test": 10}  # largest number of images per contact sheet


def survey(store: Store, sheets: Path) -> str:
    """Prepare every image of every object and split, and draw one contact sheet per object.

    Args:
        store: Store that prepares the images.
        sheets: Folder for the contact sheets.

    Returns:
        A table with one row per object and split.

    Raises:
        UserError: If an image is unusable, or a file cannot be written.
    """
    try:
        sheets.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{sheets} cannot be created ({error.strerror}); choose another --workdir.") from error
    rows = []
    for object_ in store.reader.objects:
        manifests = {
            split: store.prepare(object_, split)
            for split in (*get_args(Split), *copies.ALTERED)
            if copies.ids(store.reader, object_, split)
        }
        rows += [
            [object_, split, *_summary(manifest)]
            for split, manifest in manifests.items()
            if split not in copies.ALTERED
        ]
        title = f"{object_}: RGB, height, depth as encoded, defect"
        contact_sheet.save(sheets / f"{object_}.jpg", title, _panels(store, object_, manifests))
    headers = ["object", "split", "images", "defects", "pixels", "no depth", "mask area: median, 5 to 95 %"]
    return tabulate(rows, headers, "simple_outline", disable_numparse=True)


def _summary(manifest: Manifest) -> list[str]:
    """Format the table cells of one object and split."""
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
    """Process a few images of each defect and split for the contact sheet."""
    panels, processing = [], dataclasses.replace(store.processing, tiles="1x1")
    for split, count in _ON_SHEET.items():
        images = manifests[split]["images"] if split in manifests else []
        for row in figures.choose([image["defect"] for image in images], count):
            sample = store.reader.read(object_, split, images[row]["id"])
            label = f"{split} {sample.id}: {sample.defect}"
            panels.append(contact_sheet.describe(label, processing(sample), sample.mask is not None))
    return panels
