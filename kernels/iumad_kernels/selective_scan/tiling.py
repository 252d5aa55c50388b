"""How the Mosaic kernels' arrays are laid out and padded."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

TILE = 8  # positions that are in shared memory at once
WARPS = 4  # in a warpgroup


class Tiling(NamedTuple):
    """How arrays are laid out for the kernels.

    What has channels is (..., blocks, WARPS, width), a state (..., blocks, WARPS, states, width): a block of channels
    for each block of threads, a width of them for each warp.
    """

    length: int
    channels: int
    groups: int
    states: int

    @property
    def tiles(self) -> int:
        """Of positions."""
        return -(-self.length // TILE)

    @property
    def padded_states(self) -> int:
        """A multiple of four, as four threads share a channel's states."""
        return self.states + -self.states % 4

    @property
    def width(self) -> int:
        """So many that a thread has at most 16 elements of a state, or 32 if there are more than 64 states."""
        return 32 if self.states <= 16 else 16 if self.states <= 32 else 8

    @property
    def blocks_of_group(self) -> int:
        """How many blocks a group's channels make."""
        return -(-self.channels // self.groups // (WARPS * self.width))

    def of_positions(self, array: Array) -> Array:
        """(batch, length, ...) padded to whole tiles."""
        padding = [(0, 0)] * array.ndim
        padding[1] = (0, self.tiles * TILE - self.length)
        return jnp.pad(array, padding)

    def of_channels(self, array: Array) -> Array:
        """(..., channels) as (..., blocks, WARPS, width)."""
        array = array.reshape(*array.shape[:-1], self.groups, self.channels // self.groups)
        missing = self.blocks_of_group * WARPS * self.width - array.shape[-1]
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, missing)))
        return array.reshape(*array.shape[:-2], self.groups * self.blocks_of_group, WARPS, self.width)

    def to_channels(self, array: Array) -> Array:
        """The inverse of `of_channels`."""
        array = array.reshape(*array.shape[:-3], self.groups, -1)[..., : self.channels // self.groups]
        return array.reshape(*array.shape[:-2], self.channels)

    def of_sequence(self, array: Array) -> Array:
        """(batch, length, channels) as (batch, positions of all tiles, blocks, WARPS, width)."""
        return self.of_channels(self.of_positions(array))

    def to_sequence(self, array: Array) -> Array:
        """The inverse of `of_sequence`."""
        return self.to_channels(array)[:, : self.length]

    def of_state(self, array: Array) -> Array:
        """(..., channels, states) as (..., blocks, WARPS, states, width), float32."""
        array = array.astype(jnp.float32).swapaxes(-1, -2)
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 2), (0, self.padded_states - self.states), (0, 0)))
        return jnp.moveaxis(self.of_channels(array), -4, -2)

    def to_state(self, array: Array) -> Array:
        """The inverse of `of_state`."""
        return self.to_channels(jnp.moveaxis(array, -2, -4)).swapaxes(-1, -2)[..., : self.states]

    def of_projection(self, array: Array) -> Array:
        """B or C, (batch, length, groups, states), padded, float32."""
        padding = ((0, 0), (0, 0), (0, 0), (0, self.padded_states - self.states))
        return self.of_positions(jnp.pad(array.astype(jnp.float32), padding))

    def to_projection(self, partial_sums: Array) -> Array:
        """The gradient of B or C from (batch, positions, blocks, WARPS, states)."""
        batch, positions, *_, states = partial_sums.shape
        return partial_sums.reshape(batch, positions, self.groups, -1, states).sum(3)[
            :, : self.length, :, : self.states
        ]
