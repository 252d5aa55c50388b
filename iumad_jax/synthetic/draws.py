"""Random numbers of several shapes, drawn at once: every random call takes XLA up to a second to compile."""

import math
from itertools import accumulate

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def uniform(key: Key[Array, ""], *shapes: tuple[int, ...]) -> list[Array]:
    """Draw numbers from 0 to below 1, as one array per shape."""
    sizes = [math.prod(shape) for shape in shapes]
    numbers = jnp.split(jax.random.uniform(key, (sum(sizes),)), list(accumulate(sizes))[:-1])
    return [part.reshape(shape) for part, shape in zip(numbers, shapes, strict=True)]


def between(u: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """Map uniform numbers below 1 to uniform ones between two bounds."""
    return low + (high - low) * u


def log_between(u: Float[Array, "*n"], low: float, high: float) -> Float[Array, "*n"]:
    """Map uniform numbers below 1 to numbers between two bounds whose logarithm is uniform."""
    return jnp.exp(between(u, math.log(low), math.log(high)))


def below(u: Float[Array, "*n"], end: int) -> Int[Array, "*n"]:
    """Map uniform numbers below 1 to the whole numbers below `end`, all equally likely."""
    return jnp.floor(end * u).astype(jnp.int32)
