"""Networks of DeSTSeg (Zhang et al., CVPR 2023): a student of a frozen teacher, and a segmentation network.

They take whole batches, since batch norm averages over images.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float

EPSILON = 1e-5  # added to variances
MOMENTUM = 0.1  # weight of a batch in the running mean and variance
DILATIONS = 6, 12, 18
_GROUPS, _IN_GROUP = 32, 8  # of group norm: most groups, and fewest channels of a group if there are more groups

_kaiming = nn.initializers.variance_scaling(2, "fan_out", "normal")
_torch_default = nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform")  # within 1 / sqrt(fan-in)


class AllImages(NamedTuple):
    """The images of all devices, which batch norm normalises together in training."""

    mean: Callable[[Float[Array, "b c"]], Float[Array, " c"]]  # of one vector per image of this device
    count: Any  # number of images of all devices


class Norm(nn.Module):
    """Batch norm with running statistics, or group norm with up to 32 groups, which has none.

    Attributes:
        kind: "batch" or "group".
        scale: Initial scale of every channel.
    """

    kind: str
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], training: AllImages | None) -> Float[Array, "b h w c"]:
        """Normalise; batch norm uses the running mean and variance if `training` is None, and else updates them."""
        b, h, w, c = x.shape
        scale = self.param("scale", nn.initializers.constant(self.scale), (c,))
        bias = self.param("bias", nn.initializers.zeros, (c,))
        if self.kind == "group":
            groups = math.gcd(_GROUPS, max(c // _IN_GROUP, 1))
            grouped = x.reshape(b, h, w, groups, c // groups)
            centred = grouped - grouped.mean((1, 2, 4), keepdims=True)
            variance = jnp.square(centred).mean((1, 2, 4), keepdims=True)
            normalised = (centred / jnp.sqrt(variance + EPSILON)).reshape(x.shape)
            return normalised * _along_channels(scale) + _along_channels(bias)
        running_mean = self.variable("statistics", "mean", jnp.zeros, (c,))
        running_variance = self.variable("statistics", "variance", jnp.ones, (c,))
        if training is None:
            mean, variance = running_mean.value, running_variance.value
        else:
            mean = training.mean(x.mean((1, 2)))
            variance = training.mean(jnp.square(x - _along_channels(mean)).mean((1, 2)))
            values = training.count * h * w
            unbiased = variance * values / jnp.maximum(values - 1, 1)
            running_mean.value += MOMENTUM * (mean - running_mean.value)
            running_variance.value += MOMENTUM * (unbiased - running_variance.value)
        factor = scale / jnp.sqrt(variance + EPSILON)
        return (x - _along_channels(mean)) * _along_channels(factor) + _along_channels(bias)


def _along_channels(values: Float[Array, " c"]) -> Float[Array, "1 1 1 c"]:
    return values[None, None, None]


class Conv(nn.Module):
    """A convolution without bias, padded so that stride 1 keeps the size.

    Attributes:
        channels: Number of output channels.
        size: Side of the kernel, odd.
        stride: Stride along both axes.
        init: Initialiser of the kernel.
        watched: Whether the mean output over pixels is stored as `mean` in the collection `activations`.
    """

    channels: int
    size: int = 3
    stride: int = 1
    init: Any = _kaiming
    watched: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b i j d"]:
        """Convolve."""
        kernel = self.param("kernel", self.init, (self.size, self.size, x.shape[-1], self.channels))
        y = conv(x, kernel, self.stride)
        if self.watched:
            self.sow("activations", "mean", y.mean((1, 2)), reduce_fn=lambda _, new: new)
        return y


def _convolve(x: Array, kernel: Array, stride: int, padding: Any, dilation: int = 1) -> Array:
    strides, dilations, numbers = (stride, stride), (dilation, dilation), ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, rhs_dilation=dilations, dimension_numbers=numbers)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def conv(x: Float[Array, "b h w c"], kernel: Float[Array, "k k c d"], stride: int) -> Float[Array, "b i j d"]:
    """Convolve with a kernel of odd size, padded so that stride 1 keeps the size.

    The gradients are convolutions with the usual order of axes, because within a `cond` XLA's CPU backend computes
    others without its fast kernels: those that JAX derives take 30 times as long there on 2 CPU cores.
    """
    return _convolve(x, kernel, stride, [(len(kernel) // 2, len(kernel) // 2)] * 2)


def _forward(x: Array, kernel: Array, stride: int) -> tuple[Array, tuple[Array, Array]]:
    return conv(x, kernel, stride), (x, kernel)


def _backward(stride: int, saved: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    x, kernel = saved
    half = len(kernel) // 2
    spans = [(m - 1) * stride for m in g.shape[1:3]]  # from the first to the last position of the kernel
    margins = [(half, n - span - 1 + half, stride - 1) for n, span in zip(x.shape[1:3], spans, strict=True)]
    spread = lax.pad(g, jnp.zeros((), g.dtype), [(0, 0, 0), *margins, (0, 0, 0)])
    dx = _convolve(spread, kernel[::-1, ::-1].swapaxes(2, 3), 1, "VALID")
    edges = [(half, span + half + 1 - n) for n, span in zip(x.shape[1:3], spans, strict=True)]  # may cut pixels off
    by_channel, positions = x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3)
    dkernel = _convolve(by_channel, positions, 1, edges, dilation=stride).transpose(1, 2, 0, 3)
    return dx, dkernel


conv.defvjp(_forward, _backward)


class DilatedConv(nn.Module):
    """A dilated 3 x 3 convolution without bias, which keeps the size."""

    channels: int
    dilation: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w d"]:
        """Convolve."""
        return dilated_conv(x, self.param("kernel", _torch_default, (3, 3, x.shape[-1], self.channels)), self.dilation)


def dilated_conv(x: Float[Array, "b h w c"], kernel: Float[Array, "3 3 c d"], dilation: int) -> Float[Array, "b h w d"]:
    """Convolve with a dilated 3 x 3 kernel and padding that keeps the size.

    The result is a sum of nine shifted products, since GPUs are reported to compute dilated kernels slowly
    (openxla/xla, pull request 32231). Those that would see padding alone are left out.
    """
    h, w = x.shape[1:3]
    padded = jnp.pad(x, [(0, 0), (dilation, dilation), (dilation, dilation), (0, 0)])
    total: Any = None
    for i, j in itertools.product(range(3), repeat=2):
        if (i == 1 or dilation < h) and (j == 1 or dilation < w):
            shifted = padded[:, i * dilation : i * dilation + h, j * dilation : j * dilation + w]
            product = shifted @ kernel[i, j]
            total = product if total is None else total + product
    return total


class Block(nn.Module):
    """A residual block of two 3 x 3 convolutions (He et al., 2016).

    Attributes:
        channels: Number of output channels.
        norm: Kind of `Norm`.
        stride: Stride of the first convolution.
        last_scale: Initial scale of the second norm.
        watched: Whether the mean output of the second convolution is stored, see `Conv`.
    """

    channels: int
    norm: str
    stride: int = 1
    last_scale: float = 1.0
    watched: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], training: AllImages | None) -> Float[Array, "b i j d"]:
        """Apply the block."""
        y = Conv(self.channels, stride=self.stride, name="conv1")(x)
        y = nn.relu(Norm(self.norm, name="norm1")(y, training))
        y = Conv(self.channels, watched=self.watched, name="conv2")(y)
        y = Norm(self.norm, self.last_scale, name="norm2")(y, training)
        if y.shape != x.shape:
            x = Conv(self.channels, size=1, stride=self.stride, name="shortcut")(x)
            x = Norm(self.norm, name="shortcut_norm")(x, training)
        return nn.relu(x + y)


class Student(nn.Module):
    """A ResNet18 as encoder, and a decoder that returns to its stride 4; both learn from scratch.

    Attributes:
        width: Channels of the stem; the published 64 are those of ResNet18.
        norm: Kind of `Norm`.
        projected: Channels to which the outputs are projected, from the stride 4 to 16; None returns them as they are.
    """

    width: int
    norm: str
    projected: tuple[int, int, int] | None

    @nn.compact
    def __call__(
        self, images: Float[Array, "b h w 3"], sizes: Sequence[tuple[int, int]], training: AllImages | None
    ) -> list[Float[Array, "b i j c"]]:
        """Imitate the teacher's features of normalised images.

        Args:
            images: Normalised images.
            sizes: Rows and columns of the outputs at the strides 4, 8 and 16.
            training: See `Norm`.
        """
        x = Conv(self.width, size=7, stride=2, name="stem")(images)
        x = nn.relu(Norm(self.norm, name="stem_norm")(x, training))
        x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        for stage, number in itertools.product(range(4), range(2)):
            stride = 2 if stage and not number else 1
            name = f"encoder{stage + 1}_{number}"
            x = Block(self.width * 2**stage, self.norm, stride, last_scale=0.0, name=name)(x, training)
        outputs = []
        for stage in (4, 3, 2, 1):
            if stage < 4:
                x = resize(x, sizes[stage - 1])
            for number in range(2):
                channels, name = self.width * 2 ** (stage - 1), f"decoder{stage}_{number}"
                x = Block(channels, self.norm, watched=number == 1, name=name)(x, training)
            outputs.append(x)
        levels = outputs[:0:-1]
        if self.projected is None:
            return levels
        return [
            nn.Dense(c, name=f"project{i}")(y) for i, (c, y) in enumerate(zip(self.projected, levels, strict=True), 1)
        ]


class Residual(nn.Module):
    """The first part of the segmentation network: two residual blocks."""

    width: int
    norm: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], training: AllImages | None) -> Float[Array, "b h w d"]:
        """Apply the blocks."""
        x = Block(self.width, self.norm, name="block0")(x, training)
        return Block(self.width, self.norm, name="block1")(x, training)


class Head(nn.Module):
    """The rest of the segmentation network: atrous spatial pyramid pooling (Chen et al., 2017) and a classifier."""

    width: int
    norm: str

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"], training: AllImages | None) -> Float[Array, "b h w"]:
        """Compute the logit of a defect at every pixel."""

        def normalised(y: Float[Array, "b h w d"], name: str) -> Float[Array, "b h w d"]:
            return nn.relu(Norm(self.norm, name=f"{name}_norm")(y, training))

        def layer_of(y: Float[Array, "b h w c"], name: str, size: int = 3) -> Float[Array, "b h w d"]:
            layer = Conv(self.width, size, init=_torch_default, watched=name == "conv", name=name)
            return normalised(layer(y), name)

        pooled = layer_of(x.mean((1, 2), keepdims=True), "pooled", size=1)
        branches = [jnp.broadcast_to(pooled, (*x.shape[:3], self.width))]
        for dilation in DILATIONS:
            name = f"dilated{dilation}"
            branches.append(normalised(DilatedConv(self.width, dilation, name=name)(x), name))
        x = layer_of(layer_of(jnp.concatenate(branches, axis=-1), "joined"), "conv")
        limit = self.width**-0.5

        def bias_init(key: Any, shape: tuple[int, ...], dtype: Any = jnp.float32) -> Array:
            return jax.random.uniform(key, shape, dtype, -limit, limit)

        return nn.Dense(1, kernel_init=_torch_default, bias_init=bias_init, name="classifier")(x)[..., 0]


def resize(x: Float[Array, "b h w c"], size: tuple[int, int]) -> Float[Array, "b i j c"]:
    """Resize bilinearly, with half-pixel centres and without antialiasing."""
    return jax.image.resize(x, (len(x), *size, x.shape[-1]), "bilinear", antialias=False)


def unit(x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
    """Divide vectors by their lengths; those of length zero stay, and have a finite gradient."""
    square = jnp.square(x).sum(-1, keepdims=True)
    return x / jnp.sqrt(jnp.where(square > 0, square, 1))


def products(
    teacher: Sequence[Float[Array, "b i j c"]], student: Sequence[Float[Array, "b i j c"]]
) -> Float[Array, "b h w d"]:
    """Return the input of the segmentation network: products of normalised features, in the size of the first level.

    Their sum over the channels of a level is minus the cosine of teacher and student.
    """
    rows, columns = teacher[0].shape[1:3]
    levels = [resize(-unit(t) * unit(b), (rows, columns)) for t, b in zip(teacher, student, strict=True)]
    return jnp.concatenate(levels, axis=-1)


def distances(
    teacher: Sequence[Float[Array, "b i j c"]], student: Sequence[Float[Array, "b i j c"]]
) -> list[Float[Array, "b i j"]]:
    """Compute 1 - the cosine of teacher and student at every pixel of every level."""
    return [1 - (unit(t) * unit(b)).sum(-1) for t, b in zip(teacher, student, strict=True)]


def focal_loss(logits: Float[Array, "b h w"], mask: Float[Array, "b h w"], gamma: float) -> Float[Array, " b"]:
    """Compute the mean of (1 - p)^gamma (-ln p) over pixels, p = probability of the truth (Lin et al., ICCV 2017)."""
    surprise = nn.softplus(jnp.where(mask > 0.5, -logits, logits))  # -ln p
    complement = nn.softplus(jnp.where(mask > 0.5, logits, -logits))  # -ln (1 - p)
    return (jnp.exp(-gamma * complement) * surprise).mean((1, 2))
