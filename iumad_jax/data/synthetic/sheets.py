"""Contact sheets of synthetic defects."""

from pathlib import Path

import jax
import numpy as np

from iumad_jax.data import transforms
from iumad_jax.data.prepared.processing import Processing
from iumad_jax.data.sample import Reader, Split
from iumad_jax.data.synthetic import paste
from iumad_jax.report import contact_sheet
from iumad_jax.shapes import MAP_SIZE


def save(
    folder: Path, reader: Reader, processing: Processing, name: str, count: int, seed: int, confined: bool
) -> None:
    """Paste synthetic defects into good images of an object and save them as a contact sheet `<name>.jpg`.

    Args:
        folder: Existing folder for the contact sheet.
        reader: Reader of the dataset.
        processing: Conversion of samples to arrays.
        name: Name of the object.
        count: Number of defects; images are repeated if the object has fewer.
        seed: Random seed.
        confined: See `paste`.

    Raises:
        UserError: If an image is unusable, the depth encoding cannot show defects, or the file cannot be written.
    """
    split: Split = "calibration" if reader.ids(name, "calibration") else "train"
    ids = reader.ids(name, split)
    arrays = {id_: processing(reader.read(name, split, id_)) for id_ in ids[:count]}
    rows = [arrays[ids[i % len(ids)]] for i in range(count)]
    images = {m: np.stack([row[f"images_{m}"] for row in rows]).astype(np.float32) for m in processing.modalities}
    foreground = np.stack([transforms.foreground(row["workpiece"]) for row in rows])
    keys = jax.random.split(jax.random.key(seed), count)
    pasted = jax.jit(paste, static_argnums=(3, 4))(keys, images, foreground, processing.depth_encoding, confined)
    panels = []
    for i, mask in enumerate(np.asarray(pasted.mask)):
        pictures = [array for m in images for array in (images[m][i], np.asarray(pasted.images[m][i]))]
        pictures = [transforms.resize_image(picture.astype(np.float32), MAP_SIZE) for picture in pictures]
        pictures.append(np.repeat(mask[..., None], 3, axis=-1) * np.float32(255))
        shown = " and ".join(m for m in images if pasted.shown[m][i])
        label = f"{ids[i % len(ids)]}: {f'defect in {shown}, {mask.mean():.2%}' if shown else 'stayed good'}"
        pixels = np.rint(np.concatenate(pictures, axis=1)).clip(0, 255).astype(np.uint8)
        panels.append(contact_sheet.Panels(label, pixels))
    titles = [f"{m}, {m} with defect" for m in images]
    contact_sheet.save(folder / f"{name}.jpg", f"{name}: {', '.join(titles)}, mask", panels)
