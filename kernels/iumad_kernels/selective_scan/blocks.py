"""Division of the chunked scan into blocks of sequences and channels, and of their positions into chunks."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

CHUNK = 16  # largest number of positions in a chunk
LANES = 8  # partial sums that a sum over channels is divided into on CPU, for vector units
WIDTH = 512  # largest number of channels in a part on CPU
CACHED_ELEMENTS = 2**12  # largest size of the state of a part on CPU, so that a chunk's states stay in the cache
SHARED_ELEMENTS = 2**16  # size of the states that the forward pass updates together on CPU: XLA shares them among cores

Index = Array | np.uint32  # unsigned, because XLA needs extra code for indices that may be negative
ZERO = np.uint32(0)


class Layout(NamedTuple):
    """Sizes of the scan's arrays. Channels are the innermost axis, for vector units.

    Length and channels include padding, to whole chunks and to parts of equal width:

        arrays with channels    (batch, length, channels)
        B and C                 (batch, length, groups, states)
        A                       (groups, parts, states, width)
        states                  (batch, groups, parts, states, width)
    """

    batch: int
    length: int
    groups: int
    parts: int  # parts that the channels of a group are divided into
    width: int  # channels per part
    states: int
    positions: int  # positions per chunk
    on_cpu: bool

    @classmethod
    def for_arrays(cls, x: Array, B: Array) -> "Layout":
        """Choose parts that fit in the cache on CPU, otherwise one part per group."""
        batch, length, channels = x.shape
        groups, states = B.shape[2:]
        on_cpu, channels = jax.default_backend() == "cpu", channels // groups
        parts = -(-channels // max(min(WIDTH, CACHED_ELEMENTS // states), LANES)) if on_cpu else 1
        width = -(-channels // parts)
        width += -width % LANES if on_cpu else 0
        divisors = [n for n in range(CHUNK // 3, CHUNK + 1) if length % n == 0]
        positions = divisors[-1] if divisors else -(-length // -(-length // CHUNK))
        return cls(batch, length + -length % positions, groups, parts, width, states, positions, on_cpu)

    @property
    def chunks(self) -> int:
        """Number of chunks per sequence."""
        return self.length // self.positions

    @property
    def sequences(self) -> int:
        """Number of sequences in a block with all channels: the largest divisor of the batch that is small enough."""
        limit = max(1, SHARED_ELEMENTS // (self.groups * self.parts * self.states * self.width))
        return max(n for n in range(1, self.batch + 1) if self.batch % n == 0 and (n <= limit or not self.on_cpu))

    def pad_positions(self, array: Array) -> Array:
        """Pad (batch, length, ...). Positions whose step size is 0 change no state."""
        return jnp.pad(array, ((0, 0), (0, self.length - array.shape[1]), *[(0, 0)] * (array.ndim - 2)))

    def pad_sequence(self, array: Array) -> Array:
        """Pad (batch, length, channels)."""
        return self.pad_positions(self._pad_channels(array))

    def unpad_sequence(self, array: Array, shape: tuple[int, ...]) -> Array:
        """Invert `pad_sequence`, for an array that had this shape."""
        array = array[:, : shape[1]].reshape(*shape[:2], self.groups, -1)
        return array[..., : shape[2] // self.groups].reshape(shape)

    def split_state(self, array: Array) -> Array:
        """Pad and reshape (..., channels, states) to (..., groups, parts, states, width)."""
        array = self._pad_channels(array.swapaxes(-1, -2))
        array = array.reshape(*array.shape[:-1], self.groups, self.parts, self.width)
        return jnp.moveaxis(array, -4, -2)

    def merge_state(self, array: Array, channels: int) -> Array:
        """Invert `split_state`."""
        array = jnp.moveaxis(array, -2, -4)
        array = array.reshape(*array.shape[:-3], self.groups, -1)[..., : channels // self.groups]
        return array.reshape(*array.shape[:-2], channels).swapaxes(-1, -2)

    def _pad_channels(self, array: Array) -> Array:
        """Pad the channels of each group in (..., channels)."""
        array = array.reshape(*array.shape[:-1], self.groups, -1)
        padding = self.parts * self.width - array.shape[-1]
        array = jnp.pad(array, (*[(0, 0)] * (array.ndim - 1), (0, padding)))
        return array.reshape(*array.shape[:-2], -1)

    def walk_sequences(self, walk: Callable[["Block", Any], Any], carry: Any) -> Any:
        """Apply walk(block, carry) to blocks of `sequences` sequences with all their channels, one after another."""
        sizes = self.sequences, self.groups, self.parts

        def step(i: Array, carry: Any) -> Any:
            return walk(Block(self, (i * self.sequences, ZERO, ZERO), sizes), carry)

        return loop(self.batch // self.sequences, step, carry)

    def walk_parts(self, walk: Callable[["Block", Any], Any], carry: Any) -> Any:
        """Apply walk(block, carry) to each part of each sequence on CPU, elsewhere to a single block with all."""
        if not self.on_cpu:
            return self.walk_sequences(walk, carry)

        def step(i: Array, carry: Any) -> Any:
            first = i // (self.groups * self.parts), i // self.parts % self.groups, i % self.parts
            return walk(Block(self, first, (1, 1, 1)), carry)

        return loop(self.batch * self.groups * self.parts, step, carry)


class Block(NamedTuple):
    """Place of one block in the arrays: its first sequence, group and part, and the number of each."""

    layout: Layout
    first: tuple[Index, Index, Index]
    sizes: tuple[int, int, int]

    def read(self, array: Array, t: Index) -> Array:
        """Read position t of (batch, length, ...) as (sequences, groups, parts or 1, width or states)."""
        return self.read_positions(array, t, 1)[0]

    def read_positions(self, array: Array, t: Index, positions: int) -> Array:
        """Read positions of (batch, length, ...) as (positions, sequences, groups, parts or 1, ...)."""
        sequences, groups, parts = self.sizes
        has_groups, width = array.ndim > 3, self.layout.width
        sizes = (groups, *array.shape[3:]) if has_groups else (groups * parts * width,)
        array = lax.dynamic_slice(array, self._start(array, t), (sequences, positions, *sizes))
        return array.reshape(sequences, positions, groups, -1, *(array.shape[3:] or (width,))).swapaxes(0, 1)

    def write_positions(self, array: Array, values: Array, t: Index) -> Array:
        """Return the array with the values, in the shape of `read_positions`, from position t on."""
        sequences, positions = values.shape[1], values.shape[0]
        sizes = (values.shape[2], *array.shape[3:]) if array.ndim > 3 else (-1,)
        values = values.swapaxes(0, 1).reshape(sequences, positions, *sizes)
        return lax.dynamic_update_slice(array, values, self._start(array, t))

    def _start(self, array: Array, t: Index) -> tuple[Index, ...]:
        sequence, group, part = self.first
        if array.ndim > 3:
            return sequence, t, group, *[ZERO] * (array.ndim - 3)
        return sequence, t, (group * self.layout.parts + part) * self.layout.width

    def read_parameter(self, array: Array) -> Array:
        """Read the block of (groups, parts, states, width) as (1, groups, parts, states, width)."""
        return lax.dynamic_slice(array, (*self.first[1:], ZERO, ZERO), (*self.sizes[1:], *array.shape[2:]))[None]

    def read_state(self, array: Array) -> Array:
        """Read the block of (batch, groups, parts, states, width)."""
        return lax.dynamic_slice(array, (*self.first, ZERO, ZERO), (*self.sizes, *array.shape[3:]))

    def write_state(self, array: Array, state: Array) -> Array:
        """Return the array with the state of the block replaced."""
        return lax.dynamic_update_slice(array, state, (*self.first, ZERO, ZERO))

    def read_start(self, array: Array, c: Index) -> Array:
        """Read the state before chunk c from (batch, chunks, groups, parts, states, width)."""
        sizes = (self.sizes[0], 1, *self.sizes[1:], *array.shape[4:])
        return lax.dynamic_slice(array, self._start_of_chunk(c), sizes)[:, 0]

    def write_start(self, array: Array, state: Array, c: Index) -> Array:
        """Return the array with the state before chunk c replaced."""
        return lax.dynamic_update_slice(array, state[:, None], self._start_of_chunk(c))

    def _start_of_chunk(self, c: Index) -> tuple[Index, ...]:
        return self.first[0], c, *self.first[1:], ZERO, ZERO


def loop(stop: int, body: Callable[[Array, Any], Any], carry: Any) -> Any:
    """Compute `fori_loop` from 0 with unsigned indices."""
    return lax.fori_loop(jnp.uint32(0), jnp.uint32(stop), body, carry)
