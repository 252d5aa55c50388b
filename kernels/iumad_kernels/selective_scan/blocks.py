"""Layout of the chunked scan: arrays are divided into blocks of channels, and these into chunks of positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice, dynamic_update_slice

CHUNK = 8  # largest number of positions in a chunk
CACHED_ELEMENTS = 8192  # largest size of a block's state on CPU, so that the data of a chunk stays in the cache


class Blocks(NamedTuple):
    """Division of a scan into blocks of channels, which are processed one after another, each chunk by chunk.

    Channels are the innermost axis, for vector units. Shapes in this layout:

        arrays with channels    (batch, chunks, positions, all_groups * parts, width)
        B and C                 (batch, chunks, positions, all_groups, states)
        A                       (all_groups * parts, states, width)
        states                  (batch, all_groups * parts, states, width)
    """

    batch: int  # sequences per block
    groups: int  # groups per block
    parts: int  # blocks that the channels of a group are divided into
    width: int  # channels per group in a block
    all_groups: int  # groups of the scan
    chunks: int  # chunks per sequence
    positions: int  # positions per chunk

    @classmethod
    def for_arrays(cls, x: Array, B: Array) -> "Blocks":
        """Choose blocks that fit in the cache on CPU, otherwise a single block for all sequences and channels."""
        batch, length, channels = x.shape
        groups, states = B.shape[2:]
        width, chunks = channels // groups, -(-length // CHUNK)
        positions = -(-length // chunks)
        if jax.default_backend() != "cpu":
            return cls(batch, groups, 1, width, groups, chunks, positions)
        parts = -(-width * states // CACHED_ELEMENTS)
        return cls(1, 1, parts, -(-width // parts), groups, chunks, positions)

    def split_positions(self, array: Array) -> Array:
        """Pad and reshape (batch, length, ...) to (batch, chunks, positions, ...). Step sizes of 0 change no state."""
        batch, length, *other_axes = array.shape
        padding = self.chunks * self.positions - length
        array = jnp.pad(array, ((0, 0), (0, padding), *[(0, 0)] * len(other_axes)))
        return array.reshape(batch, self.chunks, self.positions, *other_axes)

    def merge_positions(self, array: Array, length: int) -> Array:
        """Invert `split_positions`."""
        return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]

    def split_channels(self, array: Array) -> Array:
        """Pad and reshape (..., channels) to (..., all_groups * parts, width)."""
        array = array.reshape(*array.shape[:-1], self.all_groups, array.shape[-1] // self.all_groups)
        padding = self.parts * self.width - array.shape[-1]
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, padding)))
        return array.reshape(*array.shape[:-2], self.all_groups * self.parts, self.width)

    def merge_channels(self, array: Array, channels: int) -> Array:
        """Invert `split_channels`."""
        array = array.reshape(*array.shape[:-2], self.all_groups, self.parts * self.width)
        return array[..., : channels // self.all_groups].reshape(*array.shape[:-2], channels)

    def split_state(self, array: Array) -> Array:
        """Pad and reshape (..., channels, states) to (..., all_groups * parts, states, width)."""
        return self.split_channels(array.swapaxes(-1, -2)).swapaxes(-2, -3)

    def merge_state(self, array: Array, channels: int) -> Array:
        """Invert `split_state`."""
        return self.merge_channels(array.swapaxes(-2, -3), channels).swapaxes(-1, -2)

    def block(self, number: Array, first: int) -> "Block":
        """Return the block with this number, where block 0 starts at the sequence `first`."""
        per_sequence = self.all_groups * self.parts // self.groups
        return Block(self, first, number // per_sequence * self.batch, number % per_sequence * self.groups)

    def number_of_blocks(self, batch: int) -> int:
        """Return the number of blocks for a number of sequences."""
        return batch // self.batch * (self.all_groups * self.parts // self.groups)


class Block(NamedTuple):
    """Place of one block in arrays to read, with all sequences, and arrays to write, with those from `first` on."""

    blocks: Blocks
    first: int  # index of the first sequence that the arrays to write contain
    b: Array  # first sequence of the block, counted from `first`
    g: Array  # first index of the block on the axis all_groups * parts

    def read(self, array: Array, c: Array) -> Array:
        """Read chunk c of an array (batch, chunks, ...) as (positions, batch, groups, width or states)."""
        sizes = (self.blocks.batch, 1, self.blocks.positions, self.blocks.groups, array.shape[4])
        return dynamic_slice(array, self._chunk_start(array, c, self.first), sizes)[:, 0].swapaxes(0, 1)

    def write(self, array: Array, values: dict[int, Array], c: Array) -> Array:
        """Return the array with chunk c replaced by the values of its positions."""
        stacked = jnp.stack([values[t] for t in range(self.blocks.positions)], axis=1)[:, None]
        return dynamic_update_slice(array, stacked, self._chunk_start(array, c))

    def add(self, array: Array, values: dict[int, Array], c: Array) -> Array:
        """Return the array with the values of the positions of chunk c added."""
        old = self._replace(first=0).read(array, c)
        return self.write(array, {t: old[t] + value for t, value in values.items()}, c)

    def _chunk_start(self, array: Array, c: Array, first: int = 0) -> tuple[Array | int, ...]:
        has_groups = array.shape[3] == self.blocks.all_groups  # as opposed to all_groups * parts
        return first + self.b, c, 0, self.g // self.blocks.parts if has_groups else self.g, 0

    def read_parameter(self, array: Array) -> Array:
        """Read the block of a parameter (all_groups * parts, states, width)."""
        return dynamic_slice(array, (self.g, 0, 0), (self.blocks.groups, *array.shape[1:]))

    def read_state(self, array: Array) -> Array:
        """Read the block of a state (batch, all_groups * parts, states, width)."""
        return dynamic_slice(
            array, (self.first + self.b, self.g, 0, 0), (self.blocks.batch, self.blocks.groups, *array.shape[2:])
        )

    def write_state(self, array: Array, state: Array) -> Array:
        """Return the array with the state of the block replaced."""
        return dynamic_update_slice(array, state, (self.b, self.g, 0, 0))

    def read_start(self, array: Array, c: Array) -> Array:
        """Read the state before chunk c from an array (batch, chunks, all_groups * parts, states, width)."""
        sizes = (self.blocks.batch, 1, self.blocks.groups, *array.shape[3:])
        return dynamic_slice(array, (self.first + self.b, c, self.g, 0, 0), sizes)[:, 0]

    def write_start(self, array: Array, state: Array, c: Array) -> Array:
        """Return the array with the state before chunk c replaced."""
        return dynamic_update_slice(array, state[:, None], (self.b, c, self.g, 0, 0))
