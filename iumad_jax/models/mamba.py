"""The Mamba decoder (IB-IUMAD, section 3), which recognises the object and conditions the reconstruction on it.

Modules process one image; use `jax.vmap` for batches.
"""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from iumad_kernels import selective_scan
from jaxtyping import Array, Float

from iumad_jax.models.layers import DepthwiseConv, pool_to_grid
from iumad_jax.models.object_head import ObjectHead
from iumad_jax.shapes import Condition, Image, Logits


def split_by_parity(grid: Float[Array, "h w e"]) -> Float[Array, "4 l e"]:
    """Split a grid by the parity of rows and columns into four sequences (EfficientVMamba's ES2D).

    The sub-grids (even, even) and (even, odd) are read row by row, (odd, even) and (odd, odd) column by column. Odd
    sides are padded with zeros.
    """
    h, w, e = grid.shape
    padded = jnp.pad(grid, ((0, h % 2), (0, w % 2), (0, 0)))
    quarters = padded.reshape((h + 1) // 2, 2, (w + 1) // 2, 2, e).transpose(1, 3, 0, 2, 4)
    rows = quarters[0].reshape(2, -1, e)
    columns = quarters[1].swapaxes(1, 2).reshape(2, -1, e)
    return jnp.concatenate([rows, columns])


def merge_by_parity(sequences: Float[Array, "4 l e"], h: int, w: int) -> Float[Array, "h w e"]:
    """Invert `split_by_parity` for a grid of h x w."""
    e = sequences.shape[-1]
    half_h, half_w = (h + 1) // 2, (w + 1) // 2
    rows = sequences[:2].reshape(2, half_h, half_w, e)
    columns = sequences[2:].reshape(2, half_w, half_h, e).swapaxes(1, 2)
    quarters = jnp.stack([rows, columns])
    return quarters.transpose(2, 0, 3, 1, 4).reshape(2 * half_h, 2 * half_w, e)[:h, :w]


def patches(image: Float[Array, "h w c"], size: int) -> Float[Array, "i j patch"]:
    """Cut an image into patches of `size` x `size` pixels; remaining rows and columns are dropped.

    A dense layer on patches equals a convolution with kernel size and stride `size`, which takes up to twice as long on
    CPU with its gradient.
    """
    rows, columns = (side // size for side in image.shape[:2])
    cut = image[: rows * size, : columns * size].reshape(rows, size, columns, size, -1)
    return cut.swapaxes(1, 2).reshape(rows, columns, -1)


def _uniform(bound: float) -> nn.initializers.Initializer:
    return lambda key, shape: jax.random.uniform(key, shape, minval=-bound, maxval=bound)


def _step_size_bias(key: Array, shape: tuple[int, ...]) -> Array:
    """Draw biases b such that softplus(b) is log-uniform in [1e-3, 1e-1] (Mamba)."""
    step = jnp.exp(jax.random.uniform(key, shape, minval=math.log(1e-3), maxval=math.log(1e-1)))
    return jnp.log(jnp.expm1(step))


class ES2D(nn.Module):
    """Efficient 2-D scan: one selective scan (Mamba-1, S6) per parity sub-grid, each with its own parameters."""

    states: int
    rank: int
    implementation: str | None = None

    @nn.compact
    def __call__(self, grid: Float[Array, "h w e"]) -> Float[Array, "h w e"]:
        """Scan a grid of features."""
        h, w, e = grid.shape
        n, r = self.states, self.rank
        project = self.param("x_proj", nn.initializers.lecun_normal(batch_axis=0), (4, e, r + 2 * n))
        expand = self.param("dt_proj", _uniform(r**-0.5), (4, r, e))
        step_bias = self.param("dt_bias", _step_size_bias, (4, e))
        a_log = self.param("A_log", lambda _: jnp.tile(jnp.log(jnp.arange(1.0, n + 1)), (4, e, 1)))
        skip = self.param("D", nn.initializers.ones, (4, e))

        x = split_by_parity(grid)
        dt, b, c = jnp.split(jnp.einsum("qle,qem->qlm", x, project), [r, r + n], axis=-1)
        delta = jnp.einsum("qlr,qre->qle", dt, expand)

        def as_groups(sequences: Float[Array, "4 l c"]) -> Float[Array, "1 l 4 c"]:
            return sequences.swapaxes(0, 1)[None]

        length = x.shape[1]
        y = selective_scan(
            as_groups(x).reshape(1, length, 4 * e),
            as_groups(delta).reshape(1, length, 4 * e),
            -jnp.exp(a_log).reshape(4 * e, n),
            as_groups(b),
            as_groups(c),
            D=skip.reshape(4 * e),
            delta_bias=step_bias.reshape(4 * e),
            delta_softplus=True,
            implementation=self.implementation,
        )
        return merge_by_parity(y.reshape(length, 4, e).swapaxes(0, 1), h, w)


class ESSM(nn.Module):
    """The gated state-space mixer of a Mamba block."""

    states: int
    implementation: str | None = None

    @nn.compact
    def __call__(self, u: Float[Array, "h w d"]) -> Float[Array, "h w d"]:
        """Mix positions."""
        d = u.shape[-1]
        gate = nn.silu(nn.Dense(2 * d, name="gate")(u))
        s = nn.Dense(2 * d, name="expand")(u)
        s = nn.silu(DepthwiseConv(name="conv")(s))
        scan = ES2D(self.states, math.ceil(d / 16), self.implementation, name="scan")
        s = nn.LayerNorm(epsilon=1e-5, name="norm")(scan(s))
        return nn.Dense(d, name="contract")(s * gate)


class ChannelAttention(nn.Module):
    """Efficient channel attention (ECA): scales each channel by a function of the means of three adjacent channels."""

    @nn.compact
    def __call__(self, x: Float[Array, "h w d"]) -> Float[Array, "h w d"]:
        """Scale channels."""
        mean = x.mean((0, 1))
        weight = nn.Conv(1, (3,), use_bias=False, name="conv")(mean[:, None])[:, 0]
        return x * nn.sigmoid(weight)[None, None]


class MambaBlock(nn.Module):
    """h = x + ESSM(LN(x)); y = LN(h) + ChannelAttention(LN(h)) + DWConv3x3(h)."""

    states: int
    implementation: str | None = None

    @nn.compact
    def __call__(self, x: Float[Array, "h w d"]) -> Float[Array, "h w d"]:
        """Apply the block."""
        h = x + ESSM(self.states, self.implementation, name="mixer")(nn.LayerNorm(epsilon=1e-5, name="norm_in")(x))
        normed = nn.LayerNorm(epsilon=1e-5, name="norm_out")(h)
        return normed + ChannelAttention(name="attention")(normed) + DepthwiseConv(name="conv")(h)


class MambaDecoder(nn.Module):
    """Classifier of the object; the outputs of its blocks condition the reconstruction."""

    grid: int
    width: int = 256
    patch_size: int = 8
    blocks: int = 4
    states: int = 16
    implementation: str | None = None  # implementation of the selective scan, see `iumad_kernels`

    @nn.compact
    def __call__(self, image: Image) -> tuple[Condition, Logits]:
        """Return one condition of grid * grid tokens per block, and the object logits, of an image (0..255)."""
        x = nn.Dense(self.width, name="stem")(patches(image / 127.5 - 1, self.patch_size))
        x = nn.LayerNorm(epsilon=1e-5, name="stem_norm")(x)
        condition = []
        for i in range(self.blocks):
            x = MambaBlock(self.states, self.implementation, name=f"block_{i}")(x)
            condition.append(pool_to_grid(x, self.grid))
        hidden = nn.relu(nn.Dense(self.width, name="head_hidden")(x.mean((0, 1))))
        return tuple(condition), ObjectHead(name="head")(hidden)
