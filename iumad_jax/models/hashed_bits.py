"""Random numbers for dropout and jitter from a hash of their index, which XLA fuses into the code that uses them.

JAX's default generator, Threefry, takes longer on CPU than the network that its numbers are for. This one computes a
32-bit number in 14 operations. It is made for noise in training, not for initialisation or cryptography.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import random as jax_random
from jaxtyping import Array, Key, PRNGKeyArray, UInt32


def hashed_keys(keys: Key[Array, "*shape"]) -> Key[Array, "*shape"]:
    """Convert keys of any of JAX's generators to keys of this one. All functions of `jax.random` accept them."""
    words = jax.random.key_data(keys)[..., :2]  # keys of "rbg" have four, of which the first two are a Threefry key
    return jax.random.wrap_key_data(words, impl=_IMPLEMENTATION)


def _mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Permute the 32-bit numbers so that each output bit depends on each input bit (Wellons, "lowbias32", 2018)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)


def _hash(key: UInt32[Array, " 2"], index: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    return _mix(_mix(index + key[0]) + key[1])


def _bits(key: UInt32[Array, " 2"], width: int, shape: tuple[int, ...]) -> Array:
    """Return unsigned integers of `width` bits."""
    size = math.prod(shape)
    if width == 64:
        high, low = _bits(key, 32, (2, *shape)).astype(jnp.uint64)
        return high << 32 | low
    index = jax.lax.iota(jnp.uint32, size).reshape(shape)
    return (_hash(key, index) >> (32 - width)).astype(f"uint{width}")


def _split(key: UInt32[Array, " 2"], shape: tuple[int, ...]) -> UInt32[Array, "*shape 2"]:
    return _bits(jnp.stack([_mix(~key[1]), _mix(~key[0])]), 32, (*shape, 2))


def _fold_in(key: UInt32[Array, " 2"], data: Any) -> UInt32[Array, " 2"]:
    return jnp.stack([_hash(key, data), _hash(key[::-1], ~data)])


def _seed(seed: Array) -> PRNGKeyArray:
    return _fold_in(jnp.zeros(2, jnp.uint32), seed.astype(jnp.uint32))


_IMPLEMENTATION = jax_random.define_prng_impl(
    key_shape=(2,), seed=_seed, split=_split, random_bits=_bits, fold_in=_fold_in, name="hashed_bits", tag="hash"
)
