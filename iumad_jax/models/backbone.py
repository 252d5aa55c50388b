"""Frozen feature extractors by name; `pretrained.load` loads their variables."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.models import efficientnet, resnet, vit
from iumad_jax.models.layers import resize_aligned

_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)


class Backbone(NamedTuple):
    """A network, and the mean and standard deviation by which it normalises images (0..255), as in its training.

    The architecture has `levels`, whose outputs may be features, and `default_levels`: strides, or numbers of blocks.
    """

    network: Any  # constructor (architecture, levels, name) of a module
    architecture: Any
    mean: tuple[float, float, float] = _IMAGENET[0]
    std: tuple[float, float, float] = _IMAGENET[1]


def _lite(native_size: int, width: float, depth: float) -> Backbone:
    architecture = efficientnet.lite(native_size, width, depth)
    return Backbone(efficientnet.EfficientNet, architecture, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))


_RESNET18 = resnet.Architecture(False, (2, 2, 2), (64, 128, 256), (64, 128, 256))
_RESNET50 = resnet.Architecture(True, (3, 4, 6), (64, 128, 256), (256, 512, 1024))
_WIDE_RESNET50_2 = resnet.Architecture(True, (3, 4, 6), (128, 256, 512), (256, 512, 1024))

BACKBONES = {  # and the number of feature channels at the default levels
    "efficientnet_lite0": _lite(224, 1.0, 1.0),  # 192
    "efficientnet_lite1": _lite(240, 1.0, 1.1),  # 192
    "efficientnet_lite2": _lite(260, 1.1, 1.2),  # 208
    "efficientnet_b4": Backbone(efficientnet.EfficientNet, efficientnet.B4),  # 272
    "resnet18": Backbone(resnet.ResNet, _RESNET18),  # 384
    "resnet50": Backbone(resnet.ResNet, _RESNET50),  # 1536
    "wide_resnet50_2": Backbone(resnet.ResNet, _WIDE_RESNET50_2),  # 1536
    "dinov2_vits14": Backbone(vit.VisionTransformer, vit.Architecture(384, 6)),  # 1536
    "dinov2_vitb14": Backbone(vit.VisionTransformer, vit.Architecture(768, 12)),  # 3072
}


def named(backbone: str) -> Backbone:
    """Return the backbone of a name.

    Raises:
        UserError: If the name is unknown.
    """
    if backbone not in BACKBONES:
        raise UserError(f'config.backbone.name is "{backbone}"; use one of {", ".join(BACKBONES)}.')
    return BACKBONES[backbone]


def chosen_levels(backbone: str, levels: str) -> tuple[int, ...]:
    """Return the numbers in `levels`, which are separated by commas; those of the backbone's own if it is empty.

    Raises:
        UserError: If the name is unknown, or `levels` is not a rising selection of the backbone's levels.
    """
    architecture = named(backbone).architecture
    if not levels:
        return architecture.default_levels
    names = levels.split(",")
    chosen = tuple(level for level in architecture.levels if str(level) in names)
    if list(map(str, chosen)) != names:
        raise UserError(
            f'config.backbone.levels is "{levels}"; use some of {",".join(map(str, architecture.levels))} in this order'
            f' for {backbone}, or "" for {",".join(map(str, architecture.default_levels))}.'
        )
    return chosen


def channels_of(backbone: ConfigDict, levels: str, key: str) -> Int[np.ndarray, " c"]:
    """Return which channels of the features of `config.backbone` belong to some of its levels.

    Raises:
        UserError: If `levels`, the value of config.`key`, is not a rising selection of the config's levels.
    """
    architecture = named(backbone.name).architecture
    channels = dict(zip(architecture.levels, architecture.channels_of_levels, strict=True))
    stored = chosen_levels(backbone.name, backbone.levels)
    chosen = [level for level in stored if str(level) in levels.split(",")]
    if list(map(str, chosen)) != levels.split(","):
        raise UserError(
            f'config.{key} is "{levels}"; use some of {",".join(map(str, stored))} in this order, the levels of'
            f" config.backbone.levels for {backbone.name}."
        )
    is_chosen = [np.full(channels[level], level in chosen) for level in stored]
    return np.flatnonzero(np.concatenate(is_chosen)).astype(np.int32)


class FeatureExtractor(nn.Module):
    """Extractor of grid x grid features from images (0..255): the concatenated outputs at the chosen levels.

    `backbone` is a key of BACKBONES; for `levels` see `chosen_levels`.
    """

    backbone: str
    grid: int
    levels: str = ""

    def __post_init__(self) -> None:
        """Check the levels.

        Raises:
            UserError: As in `chosen_levels`.
        """
        chosen_levels(self.backbone, self.levels)
        super().__post_init__()

    def __call__(self, images: Float[Array, "b h w 3"]) -> Float[Array, "b g g f"]:
        """Extract features."""
        return jnp.concatenate([resize_aligned(x, self.grid) for x in self.outputs(images)], axis=-1)

    @nn.compact
    def outputs(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b i j c"]]:
        """Return the outputs at the chosen levels, each in its own size."""
        network, architecture, *_ = BACKBONES[self.backbone]
        with jax.default_matmul_precision("float32"):  # GPUs would otherwise use TF32, with three digits
            levels = chosen_levels(self.backbone, self.levels)
            return network(architecture, levels, name="backbone")(normalise(images, self.backbone))


def normalise(images: Float[Array, "b h w 3"], backbone: str) -> Float[Array, "b h w 3"]:
    """Normalise images (0..255) as in the training of a backbone, a key of BACKBONES."""
    _, _, mean, std = BACKBONES[backbone]
    return (images - jnp.array(mean).reshape(1, 1, 1, 3)) / jnp.array(std).reshape(1, 1, 1, 3)
