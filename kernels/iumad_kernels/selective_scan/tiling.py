"""Layout and padding of the Mosaic kernels' arrays."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

TILE = 8  # number of positions that are loaded into shared memory together
WARPS = 4  # number of warps in a warpgroup


class Tiling(NamedTuple):
    """Layout of arrays for the kernels.

    Arrays with channels have the shape (..., blocks, WARPS, width), states have (..., blocks, WARPS, states, width).
    Each block of threads processes one block of channels, each of its warps `width` channels.
    """

    length: int
    channels: int
    groups: int
    states: int

    @property
    def tiles(self) -> int:
        """Number of tiles of positions."""
        return -(-self.length // TILE)

    @property
    def padded_states(self) -> int:
        """Number of states, padded to a multiple of four because four threads share the states of a channel."""
        return self.states + -self.states % 4

    @property
    def width(self) -> int:
        """Channels per warp, so that a thread holds at most 16 elements of a state, or 32 for more than 64 states."""
        return 32 if self.states <= 16 else 16 if self.states <= 32 else 8

    @property
    def blocks_per_group(self) -> int:
        """Number of blocks of channels per group."""
        return -(-self.channels // self.groups // (WARPS * self.width))

    def pad_positions(self, array: Array) -> Array:
        """Pad (batch, length, ...) to whole tiles of positions."""
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, self.tiles * TILE - self.length)
        return jnp.pad(array, padding)

    def split_channels(self, array: Array) -> Array:
        """Pad and reshape (..., channels) to (..., blocks, WARPS, width)."""
        array = array.reshape(*array.shape[:-1], self.groups, self.channels // self.groups)
        padding = self.blocks_per_group * WARPS * self.width - array.shape[-1]
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, padding)))
        return array.reshape(*array.shape[:-2], self.groups * self.blocks_per_group, WARPS, self.width)

    def merge_channels(self, array: Array) -> Array:
        """Invert `split_channels`."""
        array = array.reshape(*array.shape[:-3], self.groups, -1)[..., : self.channels // self.groups]
        return array.reshape(*array.shape[:-2], self.channels)

    def tile_sequence(self, array: Array) -> Array:
        """Pad and reshape (batch, length, channels) to (batch, tiles * TILE, blocks, WARPS, width)."""
        return self.split_channels(self.pad_positions(array))

    def untile_sequence(self, array: Array) -> Array:
        """Invert `tile_sequence`."""
        return self.merge_channels(array)[:, : self.length]

    def tile_state(self, array: Array) -> Array:
        """Convert (..., channels, states) to (..., blocks, WARPS, states, width) in float32."""
        array = array.astype(jnp.float32).swapaxes(-1, -2)
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, self.padded_states - self.states), (0, 0)))
        return jnp.moveaxis(self.split_channels(array), -4, -2)

    def untile_state(self, array: Array) -> Array:
        """Invert `tile_state`."""
        return self.merge_channels(jnp.moveaxis(array, -2, -4)).swapaxes(-1, -2)[..., : self.states]

    def pad_projection(self, array: Array) -> Array:
        """Pad B or C, (batch, length, groups, states), and convert it to float32."""
        padding = ((0, 0), (0, 0), (0, 0), (0, self.padded_states - self.states))
        return self.pad_positions(jnp.pad(array.astype(jnp.float32), padding))

    def sum_projection(self, partial_sums: Array) -> Array:
        """Compute the gradient of B or C from its partial sums, (batch, positions, blocks, WARPS, states)."""
        batch, positions, *_, states = partial_sums.shape
        return partial_sums.reshape(batch, positions, self.groups, -1, states).sum(3)[
            :, : self.length, :, : self.states
        ]
