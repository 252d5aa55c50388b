"""How an implementation is differentiated and batched: the same for all that have a backward pass of their own."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def differentiable(forward: Callable, backward: Callable, definition: Callable) -> Callable:
    """The function (sequences, parameters) -> outputs with a backward pass of its own.

    `sequences` holds the arrays with a leading batch axis, `parameters` those without. Under `vmap` the new axis joins
    the batch axis; where parameters differ along it, its elements are computed one after another. Second and higher
    derivatives are those of the definition.

    Args:
        forward: (sequences, parameters, differentiated=) -> (outputs, residuals), all with a leading batch axis; the
            residuals are needed only if differentiated.
        backward: (sequences, parameters, residuals, cotangents of outputs) -> (gradients of sequences, gradients of
            parameters by sequence, with a leading batch axis).
        definition: (sequences, parameters) -> outputs, differentiable by JAX.
    """
    outputs_only = _joining_batches(lambda *arguments: forward(*arguments, differentiated=False)[0])
    outputs_and_residuals = _joining_batches(functools.partial(forward, differentiated=True))
    gradients_by_sequence = _joining_batches(lambda saved, parameters: backward(saved[0], parameters, *saved[1:]))

    @jax.custom_vjp
    def gradients(sequences: Any, parameters: Any, residuals: Any, cotangents: Any) -> Any:
        of_sequences, by_sequence = gradients_by_sequence((sequences, residuals, cotangents), parameters)
        return of_sequences, jax.tree.map(lambda each, of: each.sum(0).astype(of.dtype), by_sequence, parameters)

    def gradients_forward(sequences: Any, parameters: Any, residuals: Any, cotangents: Any) -> Any:
        return gradients(sequences, parameters, residuals, cotangents), (sequences, parameters, residuals, cotangents)

    def gradients_backward(saved: Any, second: Any) -> Any:
        sequences, parameters, residuals, cotangents = saved

        def defined(sequences: Any, parameters: Any, cotangents: Any) -> Any:
            return jax.vjp(definition, sequences, parameters)[1](cotangents)

        of_sequences, of_parameters, of_cotangents = jax.vjp(defined, sequences, parameters, cotangents)[1](second)
        return of_sequences, of_parameters, jax.tree.map(jnp.zeros_like, residuals), of_cotangents

    gradients.defvjp(gradients_forward, gradients_backward)

    @jax.custom_vjp
    def with_residuals(sequences: Any, parameters: Any) -> Any:
        return outputs_and_residuals(sequences, parameters)

    def with_residuals_forward(sequences: Any, parameters: Any) -> Any:
        outputs, residuals = with_residuals(sequences, parameters)
        return (outputs, residuals), (sequences, parameters, residuals)

    with_residuals.defvjp(with_residuals_forward, lambda saved, cotangents: gradients(*saved, cotangents[0]))

    @jax.custom_vjp
    def scan(sequences: Any, parameters: Any) -> Any:
        return outputs_only(sequences, parameters)

    def scan_forward(sequences: Any, parameters: Any) -> Any:
        (outputs, _), saved = with_residuals_forward(sequences, parameters)
        return outputs, saved

    scan.defvjp(scan_forward, lambda saved, cotangents: gradients(*saved, cotangents))
    return scan


def _joining_batches(function: Callable) -> Callable:
    """`function(sequences, parameters)`, with the axes that `vmap` adds made part of its batch axis."""
    batched = custom_vmap(function)

    @batched.def_vmap
    def rule(axis_size: int, in_batched: Any, sequences: Any, parameters: Any) -> Any:
        sequences_batched, parameters_batched = in_batched

        def along(array: jax.Array, has_axis: bool) -> jax.Array:
            return array if has_axis else jnp.broadcast_to(array, (axis_size, *array.shape))

        sequences = jax.tree.map(along, sequences, sequences_batched)
        if any(jax.tree.leaves(parameters_batched)):
            parameters = jax.tree.map(along, parameters, parameters_batched)
            outputs = jax.lax.map(lambda one: batched(*one), (sequences, parameters))
        else:
            joined = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), sequences)
            outputs = batched(joined, parameters)
            outputs = jax.tree.map(lambda array: array.reshape(axis_size, -1, *array.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return batched
