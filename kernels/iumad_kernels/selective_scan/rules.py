"""Differentiation and batching of implementations that have a hand-written backward pass."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_batching import custom_vmap


def differentiable(forward: Callable, backward: Callable, definition: Callable) -> Callable:
    """Return the function (sequences, parameters) -> outputs with the given backward pass.

    `sequences` contains the arrays with a leading batch axis, `parameters` those without. Under `vmap`, the new axis
    joins the batch axis; if the parameters differ along the new axis, its elements are computed one after another.
    Second and higher derivatives are those of the definition.

    Args:
        forward: Function (sequences, parameters, differentiated=) -> (outputs, residuals). All results have a leading
            batch axis; the residuals are needed only if differentiated.
        backward: Function (sequences, parameters, residuals, cotangents of outputs) -> (gradients of sequences,
            gradients of parameters for each sequence, with a leading batch axis).
        definition: Function (sequences, parameters) -> outputs that JAX can differentiate.
    """
    outputs_only = _join_batches(lambda *arguments: forward(*arguments, differentiated=False)[0])
    outputs_and_residuals = _join_batches(functools.partial(forward, differentiated=True))
    gradients_by_sequence = _join_batches(lambda saved, parameters: backward(saved[0], parameters, *saved[1:]))

    @jax.custom_vjp
    def gradients(sequences: Any, parameters: Any, residuals: Any, cotangents: Any) -> Any:
        dsequences, dparameters = gradients_by_sequence((sequences, residuals, cotangents), parameters)
        return dsequences, jax.tree.map(lambda gradient, p: gradient.sum(0).astype(p.dtype), dparameters, parameters)

    def gradients_forward(sequences: Any, parameters: Any, residuals: Any, cotangents: Any) -> Any:
        return gradients(sequences, parameters, residuals, cotangents), (sequences, parameters, residuals, cotangents)

    def gradients_backward(saved: Any, second_cotangents: Any) -> Any:
        sequences, parameters, residuals, cotangents = saved

        def gradients_of_definition(sequences: Any, parameters: Any, cotangents: Any) -> Any:
            return jax.vjp(definition, sequences, parameters)[1](cotangents)

        _, vjp = jax.vjp(gradients_of_definition, sequences, parameters, cotangents)
        dsequences, dparameters, dcotangents = vjp(second_cotangents)
        return dsequences, dparameters, jax.tree.map(jnp.zeros_like, residuals), dcotangents

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


def _join_batches(function: Callable) -> Callable:
    """Return `function(sequences, parameters)` with a `vmap` rule that merges the new axis into the batch axis."""
    batched = custom_vmap(function)

    @batched.def_vmap
    def rule(axis_size: int, in_batched: Any, sequences: Any, parameters: Any) -> Any:
        sequences_batched, parameters_batched = in_batched

        def with_axis(array: jax.Array, has_axis: bool) -> jax.Array:
            return array if has_axis else jnp.broadcast_to(array, (axis_size, *array.shape))

        sequences = jax.tree.map(with_axis, sequences, sequences_batched)
        if any(jax.tree.leaves(parameters_batched)):
            parameters = jax.tree.map(with_axis, parameters, parameters_batched)
            outputs = jax.lax.map(lambda arguments: batched(*arguments), (sequences, parameters))
        else:
            joined = jax.tree.map(lambda array: array.reshape(-1, *array.shape[2:]), sequences)
            outputs = batched(joined, parameters)
            outputs = jax.tree.map(lambda array: array.reshape(axis_size, -1, *array.shape[1:]), outputs)
        return outputs, jax.tree.map(lambda _: True, outputs)

    return batched
