"""Frozen ResNet feature extractors for inference (He et al. 2016; Wide ResNet: Zagoruyko & Komodakis 2016).

The stride is that of the 3 x 3 convolution, as in torchvision. pretrained.py folds every batch norm into the preceding
convolution when it loads weights. Only the layers 1 to 3 exist.
"""

from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from flax import linen as nn
from jaxtyping import Array, Float

STEM = 64  # channels


class Block(NamedTuple):
    """A residual block; its hidden channels are those between the 1 x 1 convolutions of a bottleneck."""

    layer: int  # torchvision counts from 1
    position: int  # index within the layer
    stride: int
    hidden: int
    channels: int


@dataclass(frozen=True)
class Architecture:
    """A ResNet variant: repeats, hidden and output channels of its layers; without bottlenecks, both are equal."""

    bottleneck: bool
    repeats: tuple[int, int, int]
    hidden: tuple[int, int, int]
    channels: tuple[int, int, int]

    levels: ClassVar = (4, 8, 16)  # strides of the layers 1 to 3
    default_levels: ClassVar = (8, 16)  # as in PatchCore (Roth et al., CVPR 2022)

    @property
    def channels_of_levels(self) -> tuple[int, ...]:
        """Number of feature channels of each level."""
        return self.channels

    @property
    def blocks(self) -> tuple[Block, ...]:
        """All blocks in order."""
        layers = zip(self.repeats, self.hidden, self.channels, strict=True)
        return tuple(
            Block(layer, i, 2 if layer > 1 and i == 0 else 1, hidden, channels)
            for layer, (repeats, hidden, channels) in enumerate(layers, 1)
            for i in range(repeats)
        )

    @property
    def kernel_shapes(self) -> dict[tuple[str, ...], tuple[int, ...]]:
        """Shape of the kernel of every layer of `ResNet`, by the layer's path."""
        shapes: dict[tuple[str, ...], tuple[int, ...]] = {("conv1",): (7, 7, 3, STEM)}
        channels = STEM
        for block in self.blocks:
            name, hidden = f"layer{block.layer}_{block.position}", block.hidden
            if self.bottleneck:
                kernels = [(channels, hidden), (3, 3, hidden, hidden), (hidden, block.channels)]
            else:
                kernels = [(3, 3, channels, hidden), (3, 3, hidden, block.channels)]
            shapes |= {(name, f"conv{i}"): kernel for i, kernel in enumerate(kernels, 1)}
            if channels != block.channels:
                shapes[name, "downsample"] = channels, block.channels
            channels = block.channels
        return shapes


def _conv3x3(channels: int, stride: int, name: str) -> nn.Conv:
    return nn.Conv(channels, (3, 3), stride, padding=((1, 1), (1, 1)), name=name)


class Residual(nn.Module):
    """Two 3 x 3 convolutions or a bottleneck, added to the input or, if the shapes differ, to its projection."""

    block: Block
    bottleneck: bool

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Apply the block."""
        _, _, stride, hidden, channels = self.block
        if self.bottleneck:
            y = nn.relu(nn.Dense(hidden, name="conv1")(x))
            y = nn.relu(_conv3x3(hidden, stride, "conv2")(y))
            y = nn.Dense(channels, name="conv3")(y)
        else:
            y = nn.relu(_conv3x3(hidden, stride, "conv1")(x))
            y = _conv3x3(channels, 1, "conv2")(y)
        if y.shape != x.shape:
            x = nn.Dense(channels, name="downsample")(x[:, ::stride, ::stride])
        return nn.relu(x + y)


class ResNet(nn.Module):
    """The network up to the last of the levels, for normalised images."""

    architecture: Architecture
    levels: tuple[int, ...]

    @nn.compact
    def __call__(self, images: Float[Array, "b h w 3"]) -> list[Float[Array, "b i j c"]]:
        """Return the outputs of the layers with the strides `levels`."""
        x = nn.relu(nn.Conv(STEM, (7, 7), 2, padding=((3, 3), (3, 3)), name="conv1")(images))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        outputs = {}
        for block in self.architecture.blocks:
            stride = 2 ** (block.layer + 1)
            if stride <= max(self.levels):
                x = Residual(block, self.architecture.bottleneck, name=f"layer{block.layer}_{block.position}")(x)
                outputs[stride] = x
        return [outputs[level] for level in self.levels]
