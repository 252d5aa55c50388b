"""Conversion of a dataset sample into the arrays that the backbone, the metrics and the figures use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.data import depth, transforms
from iumad_jax.data.region import WORKPIECE, cut, fixed_box, workpiece_box
from iumad_jax.data.sample import Reader, Sample
from iumad_jax.data.tiles import Tiling
from iumad_jax.errors import UserError, tell_once
from iumad_jax.shapes import MAP_SIZE, Modality


@dataclass(frozen=True)
class Processing:
    """Callable that prepares samples, with the settings of a run's inputs.

    Attributes:
        modalities: Modalities that the backbone encodes.
        size: Side of the backbone's input in pixels.
        depth_encoding: One of `depth.ENCODINGS`.
        height_range: Height above the background plane that the `height` encoding spans, in metres.
        object_height: Height above the background plane from which a pixel belongs to the object, in metres.
        normals_window: Side of the window in which normals are fitted, in pixels.
        bits: Bits that photographs of 16 bits per channel use; None if the first one has 8 bits per channel.
        region: Part of an image that is seen, as in `config.input.region`.
        tiles: Tiles of this part, as in `config.input.tiles`.
        overlap: Their overlap, as in `config.input.overlap`.
    """

    modalities: tuple[Modality, ...]
    size: int
    depth_encoding: str
    height_range: float
    object_height: float
    normals_window: int = 3
    bits: int | None = None
    region: str = ""
    tiles: str = "1x1"
    overlap: float = 0.0

    def __post_init__(self) -> None:
        depth.check_encoding(self.depth_encoding)

    @classmethod
    def of(cls, config: ConfigDict, reader: Reader) -> "Processing":
        """Return the processing of a run with this config, for the images of this reader.

        Raises:
            UserError: If the first training image is unusable, or smaller than the region.
        """
        first = next((name for name in reader.objects if reader.ids(name, "train")), None)
        sample = reader.read(first, "train", reader.ids(first, "train")[0]) if first else None
        if sample:
            fixed_box(config.input.region, sample)
        return cls(
            configs.modalities(config),
            config.input.size,
            config.input.depth_encoding,
            reader.height_range,
            reader.object_height,
            reader.normals_window,
            sample.bits if sample else None,
            config.input.region,
            config.input.tiles,
            config.input.overlap,
        )

    @classmethod
    def recorded(cls, inputs: Mapping[str, Any]) -> "Processing":
        """Return the processing that `Store.describe` recorded."""
        processing = inputs["processing"]
        return cls(**processing | {"modalities": tuple(processing["modalities"])})

    @property
    def tiling(self) -> Tiling:
        """Tiles of an image."""
        return Tiling.of(self.tiles, self.overlap)

    @property
    def height_scale(self) -> float:
        """Height above the background plane that figures show in middle grey, in metres."""
        return 5 * self.object_height

    def extent(self, sample: Sample) -> tuple[float, float]:
        """Return the shares of a sample's height and width that are seen; 0 if the part seen follows the workpiece."""
        if self.region == WORKPIECE:
            return 0.0, 0.0
        left, top, right, bottom = fixed_box(self.region, sample)
        return bottom - top, right - left

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Convert the part of a sample that is seen.

        A box is cut out before anything is measured, so that nothing outside has any influence. The workpiece is found
        by its height above the background plane, which the whole image shows best, and cut out afterwards.

        Returns:
            Arrays by name: `images_<modality>` (h w 3) for the backbone, or (t h w 3) of several tiles, the fields of
            `GroundTruth`, and `box`, the numbers of the `Box` that is seen.

        Raises:
            UserError: If the sample has unusable depth, lacks depth or official normals that the encoding needs, has
                other bits, or is smaller than the region.
        """
        if self.bits and sample.bits not in (None, self.bits):
            raise UserError(
                f"{sample.object}'s photographs are scaled from {sample.bits} bits, but the run began with {self.bits};"
                f" write bits: {self.bits} to dataset.yaml."
            )
        box = fixed_box(self.region, sample)
        sample = cut(sample, box)
        geometry = self._measure(sample)
        if self.region == WORKPIECE:
            box = workpiece_box(geometry["workpiece"])
            if not geometry["workpiece"].any():
                tell_once(
                    (WORKPIECE, sample.object),
                    f"{sample.object} {sample.id} shows no workpiece that stands {1000 * self.object_height:g} mm above"
                    " its background and clear of the image's edge, so the whole image is used; correct object_height"
                    " in dataset.yaml, or name a box as config.input.region.",
                )
            sample = cut(sample, box)
            geometry = {name: array[box.slices(array.shape)] for name, array in geometry.items()}
        if sample.anomalous and sample.mask is not None and not sample.mask.any():
            tell_once(
                ("outside", sample.object),
                f"{sample.object} {sample.id} is anomalous, but its defect lies outside of config.input.region; it"
                " counts as one that is not found. Name a larger region.",
            )
        shape = sample.rgb.shape[:2]
        masked = sample.mask is not None or sample.defect == "good"
        arrays = {
            "mask": transforms.resize_mask(np.zeros(shape, bool) if sample.mask is None else sample.mask, MAP_SIZE),
            "masked": np.array(masked),
            "anomalous": np.array(sample.anomalous),
            "thumbnail": transforms.resize_image(sample.rgb, MAP_SIZE),
            "height": np.full((MAP_SIZE, MAP_SIZE), np.nan, np.float32),
            "object": np.zeros((MAP_SIZE, MAP_SIZE), bool),
            "workpiece": np.zeros((MAP_SIZE, MAP_SIZE), bool),
            "box": np.array(box),
        }
        if "rgb" in self.modalities:
            same = self.size == MAP_SIZE and self.tiling.count == 1  # resizing again would take most of the time
            arrays["images_rgb"] = arrays["thumbnail"] if same else self._resized(sample.rgb)
        if geometry:
            arrays["height"] = transforms.resize_nearest(geometry["height"], MAP_SIZE)
            arrays |= {name: transforms.region(geometry[name], MAP_SIZE) for name in ("object", "workpiece")}
        if "depth" in self.modalities:
            arrays["images_depth"] = self._resized(geometry["encoded"]).astype(np.float16)
        return arrays

    def _resized(self, image: np.ndarray) -> np.ndarray:
        """Resize an image, or each of its tiles if there are several."""
        if self.tiling.count == 1:
            return transforms.resize_image(image, self.size)
        parts = [image[box.slices(image.shape)] for box in self.tiling.boxes]
        return np.stack([transforms.resize_image(part, self.size) for part in parts])

    def _measure(self, sample: Sample) -> dict[str, np.ndarray]:
        """Measure a sample's depth: `height`, NaN where missing, masks `object` and `workpiece`, and `encoded` depth.

        Returns:
            Arrays (h w) and (h w 3) by name; none without depth.
        """
        if sample.depth is None or sample.camera is None:
            if "depth" in self.modalities:
                raise UserError(f"{sample.object} {sample.id} has no depth; use --config.modality=rgb.")
            return {}
        try:
            surface = depth.measure(sample.depth, sample.camera, self.normals_window)
        except UserError as error:
            raise UserError(f"{sample.object} {sample.id}: {error}") from error
        object_mask = depth.object_mask(surface.height, self.object_height)
        geometry = {
            "height": np.where(surface.valid, surface.height, np.nan).astype(np.float32),
            "object": object_mask,
            "workpiece": depth.free_standing(object_mask),
        }
        if "depth" in self.modalities:
            if self.depth_encoding == "normals_official":
                if sample.normals is None:
                    raise UserError(
                        f"{sample.object} {sample.id} has no official normals; choose another"
                        " config.input.depth_encoding."
                    )
                surface = depth.with_normals(surface, sample.normals)
            geometry["encoded"] = depth.encode(surface, self.depth_encoding, self.height_range)
        return geometry
