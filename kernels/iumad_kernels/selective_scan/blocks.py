"""How the chunked scan cuts its arrays: into blocks of channels, and those into chunks of positions."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.lax import dynamic_slice, dynamic_update_slice

CHUNK = 8
CACHED = 8192  # elements of a state that are walked together on CPU, so that what a chunk needs stays in cache


class Blocks(NamedTuple):
    """How the work is cut: blocks of channels are walked one after another, each of them chunk by chunk.

    Channels are innermost, for vector units. In blocks, what has channels is (batch, chunks, positions of a chunk,
    groups * parts, width), B and C are (batch, chunks, positions of a chunk, groups, states), A is (groups * parts,
    states, width) and a state is (batch, groups * parts, states, width).
    """

    batch: int  # sequences in a block
    groups: int  # groups in a block
    parts: int  # blocks that a group's channels are cut into
    width: int  # channels of a group in a block
    all_groups: int
    chunks: int
    positions: int  # in a chunk

    @classmethod
    def of(cls, x: Array, B: Array) -> "Blocks":
        """Everything at once, but on CPU what fits in cache."""
        batch, length, channels = x.shape
        groups, states = B.shape[2:]
        width, chunks = channels // groups, -(-length // CHUNK)
        positions = -(-length // chunks)
        if jax.default_backend() != "cpu":
            return cls(batch, groups, 1, width, groups, chunks, positions)
        parts = -(-width * states // CACHED)
        return cls(1, 1, parts, -(-width // parts), groups, chunks, positions)

    def of_positions(self, array: Array) -> Array:
        """(batch, length, ...) as (batch, chunks, positions, ...); the padding has step size 0: no change."""
        batch, length, *rest = array.shape
        missing = self.chunks * self.positions - length
        array = jnp.pad(array, ((0, 0), (0, missing), *[(0, 0)] * len(rest)))
        return array.reshape(batch, self.chunks, self.positions, *rest)

    def to_positions(self, array: Array, length: int) -> Array:
        """The inverse of `of_positions`."""
        return array.reshape(array.shape[0], -1, *array.shape[3:])[:, :length]

    def of_channels(self, array: Array) -> Array:
        """(..., channels) as (..., groups * parts, width)."""
        array = array.reshape(*array.shape[:-1], self.all_groups, array.shape[-1] // self.all_groups)
        missing = self.parts * self.width - array.shape[-1]
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, missing)))
        return array.reshape(*array.shape[:-2], self.all_groups * self.parts, self.width)

    def to_channels(self, array: Array, channels: int) -> Array:
        """The inverse of `of_channels`."""
        array = array.reshape(*array.shape[:-2], self.all_groups, self.parts * self.width)
        return array[..., : channels // self.all_groups].reshape(*array.shape[:-2], channels)

    def of_state(self, array: Array) -> Array:
        """(..., channels, states) as (..., groups * parts, states, width)."""
        return self.of_channels(array.swapaxes(-1, -2)).swapaxes(-2, -3)

    def to_state(self, array: Array, channels: int) -> Array:
        """The inverse of `of_state`."""
        return self.to_channels(array.swapaxes(-2, -3), channels).swapaxes(-1, -2)

    def block(self, number: Array, first: int) -> "Block":
        """One of the blocks of the sequences from `first` on."""
        in_sequence = self.all_groups * self.parts // self.groups
        return Block(self, first, number // in_sequence * self.batch, number % in_sequence * self.groups)

    def number(self, batch: int) -> int:
        """How many blocks there are."""
        return batch // self.batch * (self.all_groups * self.parts // self.groups)


class Block(NamedTuple):
    """The place of one block in the arrays: those read have all sequences, those written have them from `first` on."""

    blocks: Blocks
    first: int  # sequence in the arrays written
    b: Array  # its first sequence, counted from `first`
    g: Array  # its first part of a group

    def read(self, array: Array, c: Array) -> Array:
        """Chunk c of what is (batch, chunks, ...): (positions, batch, groups, width or states)."""
        sizes = (self.blocks.batch, 1, self.blocks.positions, self.blocks.groups, array.shape[4])
        return dynamic_slice(array, self._start(array, c, self.first), sizes)[:, 0].swapaxes(0, 1)

    def write(self, array: Array, values: dict[int, Array], c: Array) -> Array:
        """The array with these values, by position, as its chunk c."""
        stacked = jnp.stack([values[t] for t in range(self.blocks.positions)], axis=1)[:, None]
        return dynamic_update_slice(array, stacked, self._start(array, c))

    def add(self, array: Array, values: dict[int, Array], c: Array) -> Array:
        """The array with these values, by position, added to its chunk c."""
        old = self._replace(first=0).read(array, c)
        return self.write(array, {t: old[t] + value for t, value in values.items()}, c)

    def _start(self, array: Array, c: Array, first: int = 0) -> tuple[Array | int, ...]:
        of_groups = array.shape[3] == self.blocks.all_groups
        return first + self.b, c, 0, self.g // self.blocks.parts if of_groups else self.g, 0

    def read_parameter(self, array: Array) -> Array:
        """(groups * parts, states, width) here."""
        return dynamic_slice(array, (self.g, 0, 0), (self.blocks.groups, *array.shape[1:]))

    def read_state(self, array: Array) -> Array:
        """(batch, groups * parts, states, width) here."""
        return dynamic_slice(
            array, (self.first + self.b, self.g, 0, 0), (self.blocks.batch, self.blocks.groups, *array.shape[2:])
        )

    def write_state(self, array: Array, state: Array) -> Array:
        """The array with this state here."""
        return dynamic_update_slice(array, state, (self.b, self.g, 0, 0))

    def read_start(self, array: Array, c: Array) -> Array:
        """The state before chunk c, from (batch, chunks, groups * parts, states, width)."""
        sizes = (self.blocks.batch, 1, self.blocks.groups, *array.shape[3:])
        return dynamic_slice(array, (self.first + self.b, c, self.g, 0, 0), sizes)[:, 0]

    def write_start(self, array: Array, state: Array, c: Array) -> Array:
        """The array with this state as the one before chunk c."""
        return dynamic_update_slice(array, state[:, None], (self.b, c, self.g, 0, 0))
