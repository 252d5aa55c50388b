"""Sequences cut into segments that are scanned at the same time, for where there are too few sequences for a GPU.

A first pass scans every segment from a state of zeros. What a segment makes of the state before it is the product of
its decays, exp(A sum d), times that state, plus the state that the first pass has found; so the states before all
segments follow, and a second pass scans the segments from them. Backward it is the same with the gradients of states,
from the last segment to the first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences
from iumad_kernels.selective_scan.softplus import softplus


def in_segments(
    forward: Callable, backward: Callable, number: Callable[[Array, Array], int], options: Options
) -> tuple[Callable, Callable]:
    """An implementation's two passes, as `differentiable` takes them, over number(x, B) segments of each sequence.

    Its residual "d" must have the batch axis first.
    """
    forward, backward = (functools.partial(function, options=options) for function in (forward, backward))

    def forward_in_segments(
        sequences: Sequences, parameters: Parameters, *, differentiated: bool
    ) -> tuple[tuple, dict]:
        x, h = sequences.x, sequences.initial_state
        segments = number(x, sequences.B)
        if segments == 1:
            return forward(sequences, parameters, differentiated=differentiated)
        cut = _cut(sequences._replace(initial_state=None), segments)
        (_, found), _ = forward(cut._replace(z=None), parameters, differentiated=False)
        h = jnp.zeros((len(x), *found.shape[1:]), found.dtype) if h is None else h.astype(found.dtype)
        starts, last = _chain(h, found, _decays(cut, parameters, options), options.reverse)
        (y, _), residuals = forward(cut._replace(initial_state=starts), parameters, differentiated=differentiated)
        return (y.reshape(x.shape), last), residuals

    def backward_in_segments(
        sequences: Sequences, parameters: Parameters, residuals: dict, cotangents: tuple
    ) -> tuple[Sequences, Parameters]:
        segments = len(residuals["d"]) // len(sequences.x)  # number() may have seen another batch, under vmap
        if segments == 1:
            return backward(sequences, parameters, residuals, cotangents)
        dy, dh = cotangents
        cut, dy = _cut((sequences._replace(initial_state=None), dy), segments)
        decays = _decays(cut, parameters, options)
        zeros = jnp.zeros_like(decays)
        cut = cut._replace(initial_state=zeros)  # only for it to have a gradient
        found = backward(cut, parameters, residuals, (dy, zeros))[0].initial_state
        ends, first = _chain(dh, found, decays, not options.reverse)
        of_segments, by_segment = backward(cut, parameters, residuals, (dy, ends))
        of_segments = of_segments._replace(initial_state=None if sequences.initial_state is None else first)
        of_sequences = jax.tree.map(lambda g, of: g.reshape(of.shape).astype(of.dtype), of_segments, sequences)
        return of_sequences, jax.tree.map(lambda g: g.reshape(len(dh), segments, *g.shape[1:]).sum(1), by_segment)

    return forward_in_segments, backward_in_segments


def _cut(arrays: Any, segments: int) -> Any:
    """(batch, length, ...) as (batch * segments, length / segments, ...)."""
    return jax.tree.map(lambda array: array.reshape(-1, array.shape[1] // segments, *array.shape[2:]), arrays)


def _decays(sequences: Sequences, parameters: Parameters, options: Options) -> Array:
    """What each sequence multiplies a state by, (batch, channels, states)."""
    d = sequences.delta.astype(jnp.float32)
    if parameters.delta_bias is not None:
        d += parameters.delta_bias.astype(jnp.float32)[None, None]
    d = softplus(d) if options.delta_softplus else d
    return jnp.exp(d.sum(1)[..., None] * parameters.A.astype(jnp.float32)[None])


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
