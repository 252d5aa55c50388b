"""Frozen EfficientNet feature extractors for inference (Tan & Le 2019; Lite has ReLU6 and no squeeze-excite).

pretrained.py folds every batch norm into the preceding convolution when it loads weights, so each layer here is a
convolution with a bias. Only the blocks up to the last endpoint exist.
"""

import itertools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from flax import linen as nn
from jaxtyping import Array, Float

from iumad_jax.models.layers import DepthwiseConv


class Stage(NamedTuple):
    """A sequence of blocks, the first of which has the stride."""

    repeats: int
    size: int  # side of the depthwise kernel
    stride: int
    expansion: int
    channels: int


class Block(NamedTuple):
    """An inverted bottleneck (MBConv)."""

    stage: int
    position: int  # index within the stage
    size: int
    stride: int
    padding: tuple[int, int]
    expansion: int
    channels: int


@dataclass(frozen=True)
class Architecture:
    """An EfficientNet variant, up to its last endpoint.

    Padding is TensorFlow's SAME for images of `native_size`, and is not adapted to images of other sizes.
    """

    native_size: int
    activation: Callable[[Array], Array]
    squeeze: int | None  # squeeze-excite has (input channels of the block / squeeze) units; None: no squeeze-excite
    stem: int
    stages: tuple[Stage, ...]

    levels: ClassVar = (2, 4, 8, 16)  # strides of the endpoints
    default_levels: ClassVar = levels

    @property
    def endpoints(self) -> dict[int, int]:
        """Index of the last block of each stride, whose output is the level's features."""
        strides = itertools.accumulate((block.stride for block in self.blocks), operator.mul, initial=2)
        return {stride: i for i, stride in enumerate(itertools.islice(strides, 1, None))}

    @property
    def channels_of_levels(self) -> tuple[int, ...]:
        """Number of feature channels of each level."""
        return tuple(self.blocks[self.endpoints[level]].channels for level in self.levels)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order."""
        blocks = []
        side = -(-self.native_size // 2)
        for s, (repeats, size, first_stride, expansion, channels) in enumerate(self.stages):
            for i in range(repeats):
                stride = first_stride if i == 0 else 1
                padding = same_padding(side, size, stride)
                blocks.append(Block(s, i, size, stride, padding, expansion, channels))
                side = -(-side // stride)
        return tuple(blocks)

    @property
    def kernel_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """Shape of the kernel of every layer of `EfficientNet`, by the layer's path."""
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {("stem",): (3, 3, 3, self.stem)}
        channels = self.stem
        for i, block in enumerate(self.blocks):
            name, hidden = f"block_{i}", channels * block.expansion
            if block.expansion > 1:
                shapes[name, "expand"] = channels, hidden
            shapes[name, "depthwise"] = block.size, block.size, hidden
            if self.squeeze:
                shapes[name, "squeeze"] = hidden, channels // self.squeeze
                shapes[name, "excite"] = channels // self.squeeze, hidden
            shapes[name, "project"] = hidden, block.channels
            channels = block.channels
        return shapes


def same_padding(side: int, size: int, stride: int) -> tuple[int, int]:
    """Compute TensorFlow's SAME padding (before, after) of an axis of `side` pixels."""
    total = max((-(-side // stride) - 1) * stride + size - side, 0)
    return total // 2, total - total // 2


def lite(native_size: int, width: float, depth: float) -> Architecture:
    """Return EfficientNet-Lite with scaled channels and repeats; the stem and the first stage's repeat are fixed."""
    stages = ((1, 3, 1, 1, 16), (2, 3, 2, 6, 24), (2, 5, 2, 6, 40), (3, 3, 2, 6, 80), (3, 5, 1, 6, 112))
    return Architecture(
        native_size,
        nn.relu6,
        squeeze=None,
        stem=32,
        stages=tuple(
            Stage(
                math.ceil(repeats * depth) if repeats > 1 else 1,
                size,
                stride,
                expansion,
                int(channels * width + 4) // 8 * 8,  # the nearest multiple of 8
            )
            for repeats, size, stride, expansion, channels in stages
        ),
    )


B4 = Architecture(
    native_size=380,
    activation=nn.silu,
    squeeze=4,
    stem=48,
    stages=(
        Stage(2, 3, 1, 1, 24),
        Stage(4, 3, 2, 6, 32),
        Stage(4, 5, 2, 6, 56),
        Stage(6, 3, 2, 6, 112),
        Stage(6, 5, 1, 6, 160),
    ),
)


class MBConv(nn.Module):
    """Inverted bottleneck: expand, depthwise convolution, squeeze-excite, project, and a skip if the shapes agree."""

    block: Block
    activation: Callable[[Array], Array]
    squeeze: int | None

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Apply the block."""
        block, channels = self.block, x.shape[-1]
        y = x
        if block.expansion > 1:
            y = self.activation(nn.Dense(channels * block.expansion, name="expand")(y))
        y = self.activation(DepthwiseConv(block.size, block.stride, block.padding, name="depthwise")(y))
        if self.squeeze:
            units = self.activation(nn.Dense(channels // self.squeeze, name="squeeze")(y.mean((1, 2), keepdims=True)))
            y = y * nn.sigmoid(nn.Dense(y.shape[-1], name="excite")(units))
        y = nn.Dense(block.channels, name="project")(y)
        return x + y if y.shape == x.shape else y


class EfficientNet(nn.Module):
    """The network up to the last of the levels, for normalised images."""

    architecture: Architecture
    levels: tuple[int, ...]

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b i j c"]]:
        """Return the outputs at the endpoints of the levels."""
        a = self.architecture
        endpoints = [a.endpoints[level] for level in self.levels]
        padding = same_padding(a.native_size, 3, 2)
        x = a.activation(nn.Conv(a.stem, (3, 3), strides=2, padding=(padding, padding), name="stem")(images))
        outputs = []
        for i, block in enumerate(a.blocks[: max(endpoints) + 1]):
            x = MBConv(block, a.activation, a.squeeze, name=f"block_{i}")(x)
            outputs.append(x)
        return [outputs[i] for i in endpoints]
