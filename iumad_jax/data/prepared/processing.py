"""Conversion of a dataset sample into the arrays that the backbone, the metrics and the figures use."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.data import depth, transforms
from iumad_jax.data.sample import Reader, Sample
from iumad_jax.errors import UserError
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
    """

    modalities: tuple[Modality, ...]
    size: int
    depth_encoding: str
    height_range: float
    object_height: float
    normals_window: int = 3
    bits: int | None = None

    def __post_init__(self) -> None:
        depth.check_encoding(self.depth_encoding)

    @classmethod
    def of(cls, config: ConfigDict, reader: Reader) -> "Processing":
        """Return the processing of a run with this config, for the images of this reader."""
        first = next((name for name in reader.objects if reader.ids(name, "train")), None)
        return cls(
            configs.modalities(config),
            config.input.size,
            config.input.depth_encoding,
            reader.height_range,
            reader.object_height,
            reader.normals_window,
            reader.read(first, "train", reader.ids(first, "train")[0]).bits if first else None,
        )

    @classmethod
    def recorded(cls, inputs: Mapping[str, Any]) -> "Processing":
        """Return the processing that `Store.describe` recorded."""
        processing = inputs["processing"]
        return cls(**processing | {"modalities": tuple(processing["modalities"])})

    @property
    def height_scale(self) -> float:
        """Height above the background plane that figures show in middle grey, in metres."""
        return 5 * self.object_height

    def __call__(self, sample: Sample) -> dict[str, np.ndarray]:
        """Convert a sample.

        Returns:
            Arrays by name: `images_<modality>` (h w 3) for the backbone, and the fields of `GroundTruth`.

        Raises:
            UserError: If the sample has unusable depth, lacks depth or official normals that the encoding needs, or has
                other bits.
        """
        if self.bits and sample.bits not in (None, self.bits):
            raise UserError(
                f"{sample.object}'s photographs are scaled from {sample.bits} bits, but the run began with {self.bits};"
                f" write bits: {self.bits} to dataset.yaml."
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
        }
        if "rgb" in self.modalities:
            same = self.size == MAP_SIZE  # resizing a large photograph once more would take most of the time
            arrays["images_rgb"] = arrays["thumbnail"] if same else transforms.resize_image(sample.rgb, self.size)
        if sample.depth is None or sample.camera is None:
            if "depth" in self.modalities:
                raise UserError(f"{sample.object} {sample.id} has no depth; use --config.modality=rgb.")
            return arrays
        try:
            surface = depth.measure(sample.depth, sample.camera, self.normals_window)
        except UserError as error:
            raise UserError(f"{sample.object} {sample.id}: {error}") from error
        object_mask = depth.object_mask(surface.height, self.object_height)
        height = np.where(surface.valid, surface.height, np.nan).astype(np.float32)
        arrays["height"] = transforms.resize_nearest(height, MAP_SIZE)
        arrays["object"] = transforms.region(object_mask, MAP_SIZE)
        arrays["workpiece"] = transforms.region(depth.free_standing(object_mask), MAP_SIZE)
        if "depth" in self.modalities:
            if self.depth_encoding == "normals_official":
                if sample.normals is None:
                    raise UserError(
                        f"{sample.object} {sample.id} has no official normals; choose another"
                        " config.input.depth_encoding."
                    )
                surface = depth.with_normals(surface, sample.normals)
            encoded = depth.encode(surface, self.depth_encoding, self.height_range)
            arrays["images_depth"] = transforms.resize_image(encoded, self.size).astype(np.float16)
        return arrays
