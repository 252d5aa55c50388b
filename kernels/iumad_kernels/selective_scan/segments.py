"""Sequences cut into segments that are scanned at the same time, for where there are too few sequences for a GPU.

A first pass scans every segment from a state of zeros. What a segment makes of the state before it is the product of
its decays, exp(A sum d), times that state, plus the state that the first pass has found; so the states before all
segments follow, and a second pass scans the segments from them. Backward it is the same with the gradients of states,
from the last segment to the first.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from iumad_kernels.selective_scan.softplus import softplus


def in_segments(
    forward: Callable, backward: Callable, number: Callable[[Array, Array], int], *, delta_softplus: bool, reverse: bool
) -> tuple[Callable, Callable]:
    """An implementation's two passes, as `differentiable` takes them, over number(x, B) segments of each sequence.

    Its residual "d" must have the batch axis first.
    """
    options: dict[str, Any] = {"delta_softplus": delta_softplus, "reverse": reverse}

    def forward_in_segments(sequences: dict, parameters: dict, *, differentiated: bool) -> tuple[tuple, dict]:
        x, h = sequences["x"], sequences["initial_state"]
        segments = number(x, sequences["B"])
        if segments == 1:
            return forward(sequences, parameters, differentiated=differentiated, **options)
        cut = _cut(sequences, segments)
        (_, found), _ = forward(cut | {"z": None}, parameters, differentiated=False, **options)
        h = jnp.zeros((len(x), *found.shape[1:]), found.dtype) if h is None else h.astype(found.dtype)
        starts, last = _chain(h, found, _decays(cut, parameters, delta_softplus), reverse)
        (y, _), residuals = forward(
            cut | {"initial_state": starts}, parameters, differentiated=differentiated, **options
        )
        return (y.reshape(x.shape), last), residuals

    def backward_in_segments(
        sequences: dict, parameters: dict, residuals: dict, cotangents: tuple
    ) -> tuple[dict, dict]:
        segments = len(residuals["d"]) // len(sequences["x"])  # number() may have seen another batch, under vmap
        if segments == 1:
            return backward(sequences, parameters, residuals, cotangents, **options)
        dy, dh = cotangents
        cut = _cut(sequences | {"dy": dy}, segments)
        dy, decays = cut.pop("dy"), _decays(cut, parameters, delta_softplus)
        cut["initial_state"] = zeros = jnp.zeros_like(decays)  # only for it to have a gradient
        found = backward(cut, parameters, residuals, (dy, zeros), **options)[0]["initial_state"]
        ends, first = _chain(dh, found, decays, not reverse)
        of_segments, by_segment = backward(cut, parameters, residuals, (dy, ends), **options)
        of_segments["initial_state"] = None if sequences["initial_state"] is None else first
        of_sequences = jax.tree.map(lambda g, of: g.reshape(of.shape).astype(of.dtype), of_segments, sequences)
        return of_sequences, jax.tree.map(lambda g: g.reshape(len(dh), segments, *g.shape[1:]).sum(1), by_segment)

    return forward_in_segments, backward_in_segments


def _cut(sequences: dict, segments: int) -> dict:
    """(batch, length, ...) as (batch * segments, length / segments, ...), without an initial state."""
    length = sequences["x"].shape[1] // segments
    return jax.tree.map(lambda array: array.reshape(-1, length, *array.shape[2:]), sequences | {"initial_state": None})


def _decays(sequences: dict, parameters: dict, delta_softplus: bool) -> Array:
    """What each sequence multiplies a state by, (batch, channels, states)."""
    d = sequences["delta"].astype(jnp.float32)
    if parameters["delta_bias"] is not None:
        d += parameters["delta_bias"].astype(jnp.float32)[None, None]
    d = softplus(d) if delta_softplus else d
    return jnp.exp(d.sum(1)[..., None] * parameters["A"].astype(jnp.float32)[None])


def _chain(state: Array, added: Array, decays: Array, reverse: bool) -> tuple[Array, Array]:
    """The states before the segments, (batch * segments, channels, states), and the one after the last of them.

    Written out, for XLA to make one kernel of it.
    """
    added, decays = (array.reshape(len(state), -1, *state.shape[1:]) for array in (added, decays))
    before = {}
    for segment in range(added.shape[1])[:: -1 if reverse else 1]:
        before[segment] = state
        state = decays[:, segment] * state + added[:, segment]
    return jnp.stack([before[s] for s in sorted(before)], 1).reshape(-1, *state.shape[1:]), state
