"""Every translated primitive has the same results in onnxruntime and in JAX."""

import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from jax import lax

from iumad_jax.export.onnx_converter import ANY, convert
from iumad_jax.models.layers import depthwise_conv
from tests import sentences

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 6, 6, 4)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 3, 2, 6)).astype(np.float32)
MATRIX = RNG.normal(size=(4, 5)).astype(np.float32)


def compiled_twice(x):
    return jax.jit(lambda y: y * 2)(x) + jax.jit(lambda y: y * 2)(x.swapaxes(1, 2))


def scanned(x, reverse=False):
    """Scan over rows, with a weight from outside the loop, a state that starts at a constant, and a counter."""
    weight = jnp.exp(x.mean((1, 2)))

    def step(carry, row):
        state, counter = carry
        state = jnp.tanh(state * weight[:, None] + row)
        return (state, counter + 1.0), (state.sum(-1), row * MATRIX[None, None, :, 0])

    start = (jnp.zeros((2, 6, 4)), jnp.float32(0))
    (last, count), (sums, rows) = lax.scan(step, start, x.swapaxes(0, 1), reverse=reverse)
    return last.sum() + count + sums.mean() + rows


FUNCTIONS = {
    "arithmetic": lambda x: (x + 1) * x / (jnp.abs(x) + 2) - x**3 + jnp.square(x),
    "functions": lambda x: (
        jnp.exp(-x)
        + jnp.log1p(jnp.exp(x))
        + jnp.expm1(x)
        + jnp.tanh(x)
        + lax.erf(x)
        - lax.erfc(2 * x)
        + jnp.cos(x)
        - jnp.sin(2 * x)
    ),
    "mask": lambda x: jnp.exp(jnp.where(x > 0, x, -jnp.inf)),
    "roots": lambda x: (
        lax.rsqrt(jnp.abs(x) + 1) + jnp.sqrt(jnp.abs(x)) + jnp.log(jnp.abs(x) + 1) + x**2.5 * 0 + jnp.sign(x)
    ),
    "rounding": lambda x: jnp.floor(x) + jnp.ceil(3 * x) + jnp.clip(x, -0.5, 0.5),
    "activations": lambda x: jax.nn.silu(x) + jax.nn.relu6(4 * x) + jax.nn.softplus(9 * x) + jax.nn.softmax(x, -1),
    "comparisons": lambda x: jnp.where((x > 0) & (x < 1) | ~(x >= -1) | (x == 2) | (x != x), x, -x) * (x <= 0.3),
    "extremes": lambda x: jnp.maximum(x, 0.2) + jnp.minimum(x, x[:, :1]) + x.max((1, 2), keepdims=True) - x.min(),
    "largest": lambda x: sum(lax.top_k(x, 3)),
    "places": lambda x: x.argmax(-1) + 10 * x.argmin(1).sum(),
    "sums": lambda x: x.sum((0, 2)) + x.mean(),
    "shapes": lambda x: x.transpose(3, 0, 2, 1).reshape(8, 36)[:, None, ::5].squeeze(1),
    "pieces": lambda x: jnp.concatenate(
        [*jnp.split(x, [1, 3], axis=-1), x[:, 2:5].mean(1, keepdims=True).repeat(6, 1)], -1
    ),
    "stack": lambda x: jnp.stack([x[0], x[1] * 2], axis=1),
    "padding": lambda x: jnp.pad(x, ((0, 0), (1, 2), (0, 0), (3, 0)), constant_values=2.0),
    "take": lambda x: jnp.take(x, np.array([[0, 2], [5, 2]]), axis=1) * 2,
    "clipped take": lambda x: jnp.take(MATRIX, (9 * x[0, 0]).astype(int), axis=0, mode="clip"),
    "product": lambda x: x @ MATRIX,
    "products": lambda x: (
        jnp.einsum("bijc,bkjd->bkijcd", x, x).sum((1, 2, 3)) * jnp.einsum("bijc,bijd->cd", x, x)[None]
    ),
    "attention": lambda x: jnp.einsum("bijc,bkjc->bjik", x, x),
    "convolution": lambda x: lax.conv_general_dilated(
        x, KERNEL, (2, 1), ((1, 0), (2, 1)), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=2
    ),
    "depthwise convolution": lambda x: depthwise_conv(x, np.ones((3, 3, 4), np.float32) * MATRIX[None, :3, :4], 1),
    "depthwise with stride": lambda x: jax.vmap(lambda y: depthwise_conv(y[:5], KERNEL[..., 0, :4], 2))(x),
    "windows": lambda x: lax.reduce_window(x, 0.0, lax.add, (1, 3, 2, 1), (1, 1, 2, 1), "VALID"),
    "largest in windows": lambda x: lax.reduce_window(
        x, -jnp.inf, lax.max, (1, 3, 2, 1), (1, 2, 2, 1), ((0, 0), (1, 1), (0, 1), (0, 0))
    ),
    "padded windows": lambda x: lax.reduce_window(
        x, 0.0, lax.add, (1, 3, 2, 1), (1, 1, 2, 1), ((0, 0), (2, 1), (0, 1), (0, 0))
    ),
    "broadcasting": lambda x: (
        jnp.broadcast_to(x.mean(1, keepdims=True), x.shape)[:, 2:4].sum(1) + jnp.ones((6, 4))[None]
    ),
    "whole numbers": lambda x: (x * 10).astype(jnp.int32) * 3 + jnp.arange(4)[None, None, None],
    "calls": compiled_twice,
    "constants": lambda x: x + jnp.linspace(0, 1, 4).reshape(1, 1, 1, 4) @ jnp.eye(4),
    "scan": scanned,
    "scan from the end": lambda x: scanned(x, reverse=True),
    "barrier": lambda x: lax.optimization_barrier((x, x + 1))[1] + lax.stop_gradient(x),
}


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_translation(function):
    model = convert(lambda x: (function(x),), {"x": jax.ShapeDtypeStruct(X.shape, X.dtype)}, ["y"])
    (actual,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": X})
    expected = np.asarray(function(jnp.asarray(X)))
    assert (actual.shape, actual.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


OF_EACH_IMAGE = {  # functions whose result for an image does not depend on the other images of its batch
    "constant": lambda x: jnp.zeros(x.shape[:1]) + x[:, 0, 0, 0] * jnp.linspace(1, 2, 3).sum(),
    "expanded": lambda x: jnp.concatenate([x, jnp.broadcast_to(MATRIX[:, 1:], (len(x), 6, 4, 4))], 2),
    "tokens": lambda x: jnp.tanh(x.reshape(-1, 4) @ MATRIX).reshape(len(x), 36, 5).max(1),
    "attention": lambda x: jnp.einsum("bijc,bkjc->bjik", x, x),
    "affinity": lambda x: jnp.einsum("bic,kc->bik", x[:, 2], MATRIX.T),
    "every second": lambda x: x[:, 1::2, ::3],
    "largest": lambda x: lax.top_k(x.reshape(len(x), -1), 3)[0],
    "choice": lambda x: jnp.take(MATRIX, x.mean((1, 2)).argmax(-1), axis=0, mode="clip"),
    "depthwise convolution": FUNCTIONS["depthwise with stride"],
    "windows": FUNCTIONS["windows"],
    "scan": lambda x: (
        lax.scan(
            lambda state, row: (jnp.tanh(state + row), state.sum((1, 2))), jnp.ones((len(x), 6, 4)), x.swapaxes(0, 1)
        )[1].T
    ),
}


@pytest.mark.parametrize("function", OF_EACH_IMAGE.values(), ids=OF_EACH_IMAGE)
def test_batches_of_any_size(function):
    """The expected results are computed image by image."""
    specs = {"x": jax.ShapeDtypeStruct((ANY, *X.shape[1:]), X.dtype)}
    session = onnxruntime.InferenceSession(convert(lambda x: (function(x),), specs, ["y"]).SerializeToString())
    assert session.get_inputs()[0].shape == ["batch", 6, 6, 4]
    for count in (1, 3, 16):
        images = RNG.normal(size=(count, *X.shape[1:])).astype(np.float32)
        (actual,) = session.run(None, {"x": images})
        expected = np.concatenate([function(images[i : i + 1]) for i in range(count)])
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_untranslated_operations_are_named():
    with pytest.raises(NotImplementedError, match=sentences.PRIMITIVE_NOT_TRANSLATED.format("sort")):
        convert(lambda x: (jnp.sort(x),), {"x": jax.ShapeDtypeStruct(X.shape, X.dtype)}, ["y"])
    with pytest.raises(NotImplementedError, match=sentences.NOT_TRANSLATED):
        convert(
            lambda x: (lax.dynamic_index_in_dim(x[0], x[0, 0, 0].argmax(), keepdims=False),),
            {"x": jax.ShapeDtypeStruct(X.shape, X.dtype)},
            ["y"],
        )
