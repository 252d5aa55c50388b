"""The Mamba decoder compared with loops in float64, written from the equations of the paper and of Mamba."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from iumad_kernels.selective_scan import pallas_mosaic
from jax.experimental.pallas import mosaic_gpu
from scipy.stats import kstest

from iumad_jax.models.layers import pool_to_grid
from iumad_jax.models.mamba import (
    ES2D,
    ESSM,
    ChannelAttention,
    MambaBlock,
    MambaDecoder,
    merge_by_parity,
    patches,
    split_by_parity,
)
from iumad_jax.models.object_head import grow_heads


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def selective_scan(x, w_x, w_dt, b_dt, a_log, d_skip):
    """Run S6 on a sequence (l, e), one time step and one channel at a time."""
    rank, states = len(w_dt), a_log.shape[1]
    y = np.zeros_like(x)
    state = np.zeros((x.shape[1], states))
    for t in range(len(x)):
        projected = x[t] @ w_x
        dt, b, c = projected[:rank], projected[rank : rank + states], projected[rank + states :]
        delta = np.log1p(np.exp(dt @ w_dt + b_dt))
        for e in range(x.shape[1]):
            state[e] = np.exp(delta[e] * -np.exp(a_log[e])) * state[e] + delta[e] * b * x[t, e]
            y[t, e] = c @ state[e] + d_skip[e] * x[t, e]
    return y


def es2d(p, grid):
    h, w, _ = grid.shape
    out = np.zeros_like(grid)
    for q, (row_parity, column_parity) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        rows, columns = range(row_parity, h + h % 2, 2), range(column_parity, w + w % 2, 2)
        by_rows, by_columns = [(i, j) for i in rows for j in columns], [(i, j) for j in columns for i in rows]
        path = by_rows if row_parity == 0 else by_columns
        x = np.stack([grid[i, j] if i < h and j < w else np.zeros(grid.shape[2]) for i, j in path])
        y = selective_scan(x, *(p[name][q] for name in ("x_proj", "dt_proj", "dt_bias", "A_log", "D")))
        for (i, j), value in zip(path, y, strict=True):
            if i < h and j < w:
                out[i, j] = value
    return out


def depthwise(p, x):
    """Convolve depthwise with a 3 x 3 kernel and zero padding."""
    out = np.zeros_like(x) + p["bias"]
    for i, j in np.ndindex(x.shape[:2]):
        for di, dj in np.ndindex(3, 3):
            y, z = i + di - 1, j + dj - 1
            if 0 <= y < x.shape[0] and 0 <= z < x.shape[1]:
                out[i, j] += p["kernel"][di, dj] * x[y, z]
    return out


def essm(naive, p, u):
    gate = silu(naive.dense(p["gate"], u))
    s = silu(depthwise(p["conv"], naive.dense(p["expand"], u)))
    s = naive.layer_norm(p["norm"], es2d(p["scan"], s))
    return naive.dense(p["contract"], s * gate)


def channel_attention(p, x):
    mean, kernel = x.mean((0, 1)), p["conv"]["kernel"].ravel()
    out = np.zeros_like(x)
    for c in range(len(mean)):
        before = mean[c - 1] if c > 0 else 0
        after = mean[c + 1] if c + 1 < len(mean) else 0
        out[..., c] = x[..., c] * sigmoid(kernel @ [before, mean[c], after])
    return out


def mamba_block(naive, p, x):
    h = x + essm(naive, p["mixer"], naive.layer_norm(p["norm_in"], x))
    normed = naive.layer_norm(p["norm_out"], h)
    return normed + channel_attention(p["attention"], normed) + depthwise(p["conv"], h)


def pool(x, g):
    """Pool like PyTorch's AdaptiveAvgPool2d."""
    cells = []
    for i, j in np.ndindex(g, g):
        top, left = i * x.shape[0] // g, j * x.shape[1] // g
        bottom, right = int(np.ceil((i + 1) * x.shape[0] / g)), int(np.ceil((j + 1) * x.shape[1] / g))
        cells.append(x[top:bottom, left:right].mean((0, 1)))
    return np.stack(cells)


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def check_module(module, naive_function, naive, x):
    params, exact = naive.parameters(module, x)
    actual = jax.jit(module.apply)({"params": params}, x)
    np.testing.assert_allclose(actual, naive_function(exact, x.astype(np.float64)), rtol=1e-4, atol=1e-4)


def test_split_reads_two_parities_by_rows_and_two_by_columns():
    grid = jnp.arange(16).reshape(4, 4, 1)
    np.testing.assert_array_equal(
        split_by_parity(grid)[..., 0], [[0, 2, 8, 10], [1, 3, 9, 11], [4, 12, 6, 14], [5, 13, 7, 15]]
    )


def test_split_pads_odd_sides_with_zeros():
    grid = jnp.arange(1, 10).reshape(3, 3, 1)
    np.testing.assert_array_equal(
        split_by_parity(grid)[..., 0], [[1, 3, 7, 9], [2, 0, 8, 0], [4, 0, 6, 0], [5, 0, 0, 0]]
    )


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 9), st.integers(1, 9))
def test_merge_is_the_inverse_of_split(h, w):
    grid = random(h, w, 2)
    np.testing.assert_array_equal(jax.jit(lambda x: merge_by_parity(split_by_parity(x), h, w))(grid), grid)


def test_a_dense_layer_on_patches_is_a_convolution_with_stride():
    image, kernel = random(7, 9, 3), random(2, 2, 3, 5)
    expected = jax.lax.conv_general_dilated(
        image[None], kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(patches(image, 2) @ kernel.reshape(12, 5), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("h", "w"), [(4, 4), (5, 3), (2, 5)])
def test_es2d_scans_each_parity_with_separate_parameters(naive, h, w):
    check_module(ES2D(states=3, rank=2), es2d, naive, random(h, w, 6))


def test_essm(naive):
    x = random(3, 4, 18)
    check_module(ESSM(states=2), lambda p, x: essm(naive, p, x), naive, x)
    params, _ = naive.parameters(ESSM(states=2), x)
    assert params["scan"]["dt_proj"].shape == (4, 2, 36)  # rank ceil(18 / 16), width 2 * 18


def test_channel_attention(naive):
    check_module(ChannelAttention(), channel_attention, naive, random(3, 4, 5))


def test_mamba_block(naive):
    check_module(MambaBlock(states=2), lambda p, x: mamba_block(naive, p, x), naive, random(5, 4, 6))


@pytest.mark.parametrize(("h", "w", "g"), [(8, 8, 4), (7, 5, 3), (28, 28, 14), (3, 3, 3), (2, 3, 4)])
def test_pooling_averages_the_pixels_that_each_token_covers(h, w, g):
    x = random(h, w, 2)
    np.testing.assert_allclose(pool_to_grid(jnp.asarray(x), g), pool(x.astype(np.float64), g), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_decoder(naive):
    decoder = MambaDecoder(grid=3, width=6, patch_size=4, blocks=2, states=2)
    image = np.random.default_rng(0).integers(0, 256, (20, 20, 3)).astype(np.float32)
    params, p = naive.parameters(decoder, image)
    condition, logits = jax.jit(decoder.apply)({"params": params, "statistics": {"head": {"objects": 3}}}, image)

    scaled = image.astype(np.float64) / 127.5 - 1
    patches = scaled.reshape(5, 4, 5, 4, 3).transpose(0, 2, 1, 3, 4).reshape(5, 5, 48)
    x = patches @ p["stem"]["kernel"] + p["stem"]["bias"]
    x = naive.layer_norm(p["stem_norm"], x)
    for i in range(2):
        x = mamba_block(naive, p[f"block_{i}"], x)
        np.testing.assert_allclose(condition[i], pool(x, 3), rtol=1e-3, atol=1e-3)
    hidden = np.maximum(naive.dense(p["head_hidden"], x.mean((0, 1))), 0)
    np.testing.assert_allclose(logits[:3], naive.dense(p["head"], hidden)[:3], rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(jax.nn.softmax(logits)[3:], 0)


@pytest.mark.parametrize(("size", "patch_size", "grid"), [(224, 4, 14), (224, 8, 14), (224, 16, 14), (448, 8, 28)])
def test_decoder_fits_the_papers_sizes(size, patch_size, grid):
    decoder = MambaDecoder(grid=grid, patch_size=patch_size)
    image = jax.ShapeDtypeStruct((size, size, 3), jnp.float32)
    (condition, logits), _ = jax.eval_shape(decoder.init_with_output, jax.random.key(0), image)
    assert [c.shape for c in condition] == [(grid * grid, 256)] * 4
    assert logits.shape == (8,)  # before any object is learned


def test_decoder_with_the_gpus_kernels(monkeypatch):
    """Interpreted GPU kernels under vmap give the same logits and gradients."""
    if not hasattr(mosaic_gpu, "InterpretGPUParams"):
        pytest.skip(f"jax {jax.__version__} does not export the Mosaic interpreter, InterpretGPUParams")
    decoder = MambaDecoder(grid=2, width=4, patch_size=4, blocks=1, states=2)
    images = 50 * random(2, 12, 12, 3)
    variables = grow_heads(decoder.init(jax.random.key(0), images[0]), 2, jax.random.key(0))
    params = variables["params"]

    def logits(params):
        return jax.vmap(lambda image: decoder.apply(variables | {"params": params}, image)[1])(images)

    def logits_and_gradients(params):
        outputs, vjp = jax.vjp(logits, params)
        return outputs, vjp(outputs)

    expected = logits_and_gradients(params)
    monkeypatch.setattr(pallas_mosaic, "interpret", mosaic_gpu.InterpretGPUParams(detect_races=True))
    assert "mpmd_map" in str(jax.make_jaxpr(logits)(params)), "no Pallas kernel"
    actual = logits_and_gradients(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), actual, expected)


def test_scan_parameters_are_initialised_as_in_mamba():
    """Initial step sizes are log-uniform between 0.001 and 0.1, and the decay rates of the states are 1 to N."""
    params = jax.jit(ES2D(states=5, rank=16).init)(jax.random.key(0), jnp.zeros((2, 2, 512)))["params"]
    step = np.log1p(np.exp(np.asarray(params["dt_bias"], np.float64)))
    assert kstest(np.log10(step).ravel(), "uniform", (-3, 2)).pvalue > 0.01
    assert step.min() >= 1e-3 * (1 - 1e-4)
    assert 0.099 <= step.max() <= 1e-1 * (1 + 1e-4)
    assert kstest(np.ravel(params["dt_proj"]), "uniform", (-0.25, 0.5)).pvalue > 0.01
    assert np.abs(params["dt_proj"]).max() <= 0.25
    np.testing.assert_allclose(np.exp(params["A_log"]), np.broadcast_to(np.arange(1, 6), (4, 512, 5)), rtol=1e-6)
    np.testing.assert_array_equal(params["D"], np.ones((4, 512)))
