"""Rendering of the candies and of procedural sweets to disk, in the Eyecandies layout."""

import colorsys
import json
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from PIL import Image
from tqdm import tqdm

from iumad_jax.data.candies import draw, procedural
from iumad_jax.data.candies.defects import EDGE, KINDS, NO_DEFECTS, Defects, profile
from iumad_jax.data.candies.scene import POSE, TILES, Surface, compile_geometry_pass, lighting_pass
from iumad_jax.data.candies.sweets import SWEETS, Look, Material
from iumad_jax.errors import UserError
from iumad_jax.runtime import preemption
from iumad_jax.runtime.storage import write_whole

OBJECTS = tuple(SWEETS)
KNOWN = *OBJECTS, *procedural.names(procedural.MOST)
SPLITS = {"train": 3, "val": 2, "test_public": 2}  # number of digits in a sample id, by split
LIMITS = {
    "seed": (0, 2**32 - 1),
    "train": (1, 1000),
    "val": (1, 100),
    "test": (1, 100),
    "size": (64, 1024),
    "objects": (1, procedural.MOST),
}
MANIFEST = "candies.json"
MASK_LIMITS = 0.0005, 0.03  # smallest and largest fraction of the image that defects cover


def render(
    root: str | Path,
    *,
    seed: int = 0,
    train: int = 24,
    val: int = 4,
    test: int = 16,
    size: int = 256,
    version: int = 1,
    lamp: float = 0.0,
    objects: str | int = "all",
    progress: bool = True,
) -> Path:
    """Render the embedded dataset in the Eyecandies layout.

    A sample depends only on (version, seed, lamp, object, split, index, size). Files are written to `<root>.partial`,
    which is renamed to `root` when the dataset is complete. Interrupted rendering is resumed; a complete dataset is
    left unchanged.

    Args:
        root: Folder to create.
        seed: Random seed.
        train: Number of good samples per object in `train`.
        val: Number of good samples per object in `val`.
        test: Number of samples per object in `test_public`; every second one has a defect.
        size: Side of the square images in pixels.
        version: Version of the renderer, a key of `draw.VERSIONS`. In version 2, RGB hardly shows bumps and dents, and
            depth adds more than in version 1.
        lamp: Change of the lamps from 0 to 1, where they are warm, dim and at another side; depth and masks stay.
        objects: "all" of the ten candies, object names separated by commas, or the number of procedural sweets.
        progress: Whether to show a progress bar.

    Returns:
        The absolute path of the root.

    Raises:
        UserError: If a setting is out of range, if the root holds other files or was rendered with other settings, or
            if files cannot be written.
    """
    root = Path(root).absolute()
    settings: dict[str, int] = {"seed": seed, "train": train, "val": val, "test": test, "size": size}
    sweets = {"objects": int(objects)} if str(objects).isdecimal() else {}
    for key, value in (settings | sweets).items():
        low, high = LIMITS[key]
        if not low <= value <= high:
            raise UserError(f"{key} is {value}; choose a whole number from {low} to {high}.")
    if not 0 <= lamp <= 1:
        raise UserError(f"lamp is {lamp}; choose a number from 0 to 1.")
    names = OBJECTS if objects == "all" else tuple(sorted(set(str(objects).split(","))))
    if sweets:
        names = procedural.names(sweets["objects"])
    if unknown := [name for name in names if name not in KNOWN]:
        raise UserError(
            f"--objects: candies has no {unknown[0]!r}; choose from {', '.join(OBJECTS)}, {KNOWN[len(OBJECTS)]} to"
            f" {KNOWN[-1]}, or 'all'."
        )
    if version not in draw.VERSIONS:
        raise UserError(f"version is {version}; choose one of {', '.join(map(str, draw.VERSIONS))}.")
    manifest = {**settings, "objects": list(names), "renderer": version, "lamp": float(lamp)}
    if not set(names) <= set(OBJECTS):
        manifest["recipes"] = procedural.VERSION

    unfinished = root.with_name(root.name + ".partial")
    try:
        if root.exists() and any(root.iterdir()):
            check_manifest(root, manifest)
            return root
        if unfinished.exists():
            check_manifest(unfinished, manifest)
        unfinished.mkdir(parents=True, exist_ok=True)
        write_whole(unfinished / MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())
        counts = dict(zip(SPLITS, (train, val, test), strict=True))
        jobs = [(name, split, i) for split in SPLITS for i in range(counts[split]) for name in names]
        write = partial(write_sample, unfinished, version, seed, size, lamp=lamp)
        with tqdm(total=len(jobs), desc="candies", unit="sample", disable=None if progress else True) as bar:
            pool = ThreadPoolExecutor(os.cpu_count())
            try:
                for _ in pool.map(write, *zip(*jobs, strict=True)):
                    bar.update()
                    preemption.check()
            finally:
                pool.shutdown(cancel_futures=True)
        unfinished.replace(root)
    except OSError as error:
        raise UserError(
            f"{error.filename or root} cannot be written ({error.strerror}); make room or choose another root."
        ) from error
    return root


def check_manifest(directory: Path, expected: dict) -> None:
    """Raise UserError unless a directory holds the dataset rendered with the expected settings."""
    try:
        # Datasets that were rendered before lamps could change do not record them.
        manifest = {"lamp": 0.0} | json.loads((directory / MANIFEST).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        raise UserError(f"{directory} holds files but no candies dataset; choose another root.") from None
    if differing := [key for key in expected if manifest.get(key) != expected[key]]:
        raise UserError(
            f"{directory} was rendered with other settings ({', '.join(differing)}); delete it or choose another root."
        )


# ---- one sample ----------------------------------------------------------------------------------------------------


def defect_kinds(name: str, split: str, index: int) -> tuple[str, ...]:
    """Return the defects of a sample: no kind, a single kind or all kinds."""
    if split != "test_public" or index % 2 == 0:
        return ()
    # Each object starts with a different kind, so that even small test sets contain every kind.
    position = (index // 2 + KNOWN.index(name)) % 5
    return (KINDS[position],) if position < 4 else KINDS


@jax.jit
def patch_masks(points: jax.Array, defects: Defects) -> jax.Array:
    """Return which points (3, n) in the sweet's frame lie in each of the four patches, as a boolean array (4, n)."""
    return jnp.stack([profile(points, defects, slot) for slot in range(4)]) > EDGE


def draw_sample(
    version: int, seed: int, size: int, name: str, split: str, index: int, lamp: float = 0.0
) -> tuple[Surface, dict[str, np.ndarray], Look]:
    """Draw a sample; defects are redrawn until their visible sizes are within MASK_LIMITS.

    Returns:
        The visible surface, a boolean mask (n,) by kind of defect, and the look of the sweet.
    """
    constants = draw.VERSIONS[version]
    rng = np.random.default_rng((seed, KNOWN.index(name), list(SPLITS).index(split), index))
    look = draw.instance(procedural.sweet(name), constants, rng, lamp)
    geometry_pass = compile_geometry_pass(name, size)
    good = geometry_pass(look, NO_DEFECTS)
    kinds = defect_kinds(name, split, index)
    if not kinds:
        return good, {kind: np.zeros(size * size, bool) for kind in KINDS}, look
    while True:
        defects = draw.defects(kinds, good, size, constants, rng)
        bad = geometry_pass(look, defects)
        patches = (patch_masks(good.local_point, defects) & good.hit[None]) | (
            patch_masks(bad.local_point, defects) & bad.hit[None]
        )
        masks = dict(zip(KINDS, np.asarray(patches), strict=True))
        low, high = MASK_LIMITS
        if all(masks[kind].mean() >= low / len(kinds) for kind in kinds) and low <= patches.any(0).mean() <= high:
            return bad, masks, look


def material(version: int, name: str) -> Material:
    """Return the material of a sweet."""
    usual = procedural.sweet(name).material
    return usual._replace(gloss=usual.gloss * draw.VERSIONS[version].gloss)


def write_sample(
    root: Path, version: int, seed: int, size: int, name: str, split: str, index: int, lamp: float = 0.0
) -> None:
    """Write the 17 files of a sample. The metadata is written last, so that it marks a complete sample."""
    directory = root / name / split / "data"
    directory.mkdir(parents=True, exist_ok=True)
    prefix = f"{index:0{SPLITS[split]}d}_"
    if (directory / f"{prefix}metadata.yaml").exists():
        return
    surface, masks, look = draw_sample(version, seed, size, name, split, index, lamp)
    images, normals = lighting_pass(surface, material(version, name), look, size)

    def save(file: str, pixels: np.ndarray) -> None:
        Image.fromarray(pixels.reshape(size, size, *pixels.shape[2:])).save(
            directory / f"{prefix}{file}.png", compress_level=1
        )

    for light, image in enumerate(np.asarray(images)):
        save(f"image_{light}", image)
    depth = np.asarray(surface.depth, np.float64)
    low, high = np.min(depth), np.max(depth)
    save("depth", np.round((depth - low) / (high - low) * 65535).astype(np.uint16))
    save("normals", np.round((np.asarray(normals) + 1) * 127.5).astype(np.uint8))
    for kind, mask in masks.items():
        save(f"{kind}_mask", mask.astype(np.uint8) * 255)
    save("mask", np.any(list(masks.values()), axis=0).astype(np.uint8) * 255)

    def write(file: str, content: dict) -> None:
        write_whole(directory / f"{prefix}{file}.yaml", yaml.safe_dump(content, sort_keys=False, encoding="utf-8"))

    np.savetxt(directory / f"{prefix}pose.txt", POSE)
    write("info_depth", {"normalization": {"max": float(high), "min": float(low)}})
    write("object_params", object_parameters(look, seed))
    kinds = {f"anomalous_{kind}": int(mask.any()) for kind, mask in masks.items()}
    write("metadata", {"anomalous": int(any(kinds.values())), **kinds})


def object_parameters(look: Look, seed: int) -> dict:
    """Return the varying parameters of a sample, named as in Eyecandies where possible, in metres and radians."""
    x, y = map(float, look.position)
    shift = float(look.belt_shift)
    hues = [colorsys.rgb_to_hsv(*map(float, colour))[0] for colour in look.palette]
    return {
        "scene": {"Count": TILES, "GeomOffset": shift, "Seed": seed, "ShadingOffset": shift, "Y": y, "Z": 0.0},
        "object": {
            "Angle": 2 * math.pi * float(look.phase),
            "Hue1": hues[0],
            "Hue2": hues[1],
            "RotationZ": float(look.rotation),
            "Scale": float(look.scale),
            "Shape": [float(v) for v in look.shape],
            "X": x,
        },
    }
