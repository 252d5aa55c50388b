"""Parallel scan of the segments of a sequence, for batches with too few sequences to occupy a GPU.

A first pass scans every segment from a state of zeros. The state after a segment is the state before it times the
product of the segment's decays, exp(A sum d), plus the final state of the first pass. This gives the states before all
segments, from which a second pass scans them. The backward pass does the same with the gradients of the states, from
the last segment to the first.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from iumad_kernels.selective_scan.arguments import Options, Parameters, Sequences
from iumad_kernels.selective_scan.softplus import softplus


def segmented_passes(
    forward: Callable, backward: Callable, number: Callable[[Array, Array], int], options: Options
) -> tuple[Callable, Callable]:
    """Return the passes of an implementation for `differentiable`, over number(x, B) segments of each sequence.

    The residual "d" of the forward pass must have a leading batch axis.
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
        (_, added), _ = forward(cut._replace(z=None), parameters, differentiated=False)
        h = jnp.zeros((len(x), *added.shape[1:]), added.dtype) if h is None else h.astype(added.dtype)
        starts, last = _chain(h, added, _decays(cut, parameters, options), options.reverse)
        (y, _), residuals = forward(cut._replace(initial_state=starts), parameters, differentiated=differentiated)
        return (y.reshape(x.shape), last), residuals

    def backward_in_segments(
        sequences: Sequences, parameters: Parameters, residuals: dict, cotangents: tuple
    ) -> tuple[Sequences, Parameters]:
        segments = len(residuals["d"]) // len(sequences.x)  # under vmap, number() may have had another batch size
        if segments == 1:
            return backward(sequences, parameters, residuals, cotangents)
        dy, dh = cotangents
        cut, dy = _cut((sequences._replace(initial_state=None), dy), segments)
        decays = _decays(cut, parameters, options)
        zeros = jnp.zeros_like(decays)
        cut = cut._replace(initial_state=zeros)  # an initial state whose gradient is needed
        added = backward(cut, parameters, residuals, (dy, zeros))[0].initial_state
        ends, first = _chain(dh, added, decays, not options.reverse)
        dsegments, dparameters = backward(cut, parameters, residuals, (dy, ends))
        dsegments = dsegments._replace(initial_state=None if sequences.initial_state is None else first)
        dsequences = jax.tree.map(lambda g, array: g.reshape(array.shape).astype(array.dtype), dsegments, sequences)
        return dsequences, jax.tree.map(lambda g: g.reshape(len(dh), segments, *g.shape[1:]).sum(1), dparameters)

    return forward_in_segments, backward_in_segments


def _cut(arrays: Any, segments: int) -> Any:
    """Reshape (batch, length, ...) to (batch * segments, length / segments, ...)."""
    return jax.tree.map(lambda array: array.reshape(-1, array.shape[1] // segments, *array.shape[2:]), arrays)


def _decays(sequences: Sequences, parameters: Parameters, options: Options) -> Array:
    """Compute the product of the decays over each sequence, (batch, channels, states)."""
    d = sequences.delta.astype(jnp.float32)
    if parameters.delta_bias is not None:
        d += parameters.delta_bias.astype(jnp.float32)[None, None]
    d = softplus(d) if options.delta_softplus else d
    return jnp.exp(d.sum(1)[..., None] * parameters.A.astype(jnp.float32)[None])


def _chain(state: Array, added: Array, decays: Array, reverse: bool) -> tuple[Array, Array]:
    """Compute the states before the segments, (batch * segments, channels, states), and the state after the last one.

    The loop is unrolled, so that XLA makes one kernel of it.
    """
    added, decays = (array.reshape(len(state), -1, *state.shape[1:]) for array in (added, decays))
    before = {}
    for segment in range(added.shape[1])[:: -1 if reverse else 1]:
        before[segment] = state
        state = decays[:, segment] * state + added[:, segment]
    return jnp.stack([before[s] for s in sorted(before)], 1).reshape(-1, *state.shape[1:]), state
