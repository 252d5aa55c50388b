"""`model.dtype=bfloat16`: nearly the same losses and gradients, computed in bfloat16, with float32 weights."""

import re

import jax
import numpy as np
import pytest

from iumad_jax import methods
from iumad_jax.config import small
from iumad_jax.errors import UserError
from iumad_jax.shapes import Batch
from tests import sentences
from tests.methods.test_diffusion import CHANNELS as LITE0
from tests.methods.test_diffusion import GRID, config_of

pytestmark = pytest.mark.usefixtures("compile_quickly")

OBJECTS, IMAGES, TOKENS, CHANNELS, SIZE = 3, 2, 9, 12, 32


def build(name, dtype):
    config = small("2-1")
    config.method, config.model.dtype = name, dtype
    config.model.update(width=16, heads=2, hidden=24, class_grid=8, states=4, dropout=0.1)
    return methods.build(name, config)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    return Batch(
        {m: rng.normal(0, 2, (IMAGES, TOKENS, CHANNELS)).astype(np.float32) for m in ("rgb", "depth")},
        {m: rng.uniform(0, 255, (IMAGES, SIZE, SIZE, 3)).astype(np.float32) for m in ("rgb", "depth")},
        np.arange(IMAGES, dtype=np.int32),
    )


@pytest.fixture(scope="module", params=["ib_iumad", "iuf"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def variables(name, batch):
    method, rng = build(name, "float32"), np.random.default_rng(1)
    variables = method.grow(jax.jit(method.init)(jax.random.key(0), batch), OBJECTS, jax.random.key(0))
    variables = method.observe(variables, batch, 0)
    noise = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), variables["params"])
    return variables | {"params": noise}


def loss(method, variables, batch):
    keys = jax.random.split(jax.random.key(2), IMAGES)
    return lambda params: method.loss(variables | {"params": params}, batch, keys).total


def test_losses_and_gradients_are_nearly_those_of_float32(name, variables, batch):
    results = {}
    for dtype in ("float32", "bfloat16"):
        value, gradients = jax.jit(jax.value_and_grad(loss(build(name, dtype), variables, batch)))(variables["params"])
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
        results[dtype] = value, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)])
    (exact, exact_gradient), (rounded, gradient) = results.values()
    assert 0 < abs(exact - rounded) < 0.02 * exact
    cosine = exact_gradient @ gradient / np.linalg.norm(exact_gradient) / np.linalg.norm(gradient)
    assert 0.9 < cosine < 1 - 1e-6


def test_matrix_products_are_computed_in_bfloat16(name, variables, batch):
    """All of the forward pass but those of IUF's stem, which uses exact statistics of the colours."""
    program = str(jax.make_jaxpr(loss(build(name, "bfloat16"), variables, batch))(variables["params"]))
    dtypes = re.findall(r":(\w+)\[[^\]]*\] = (?:dot_general|conv_general_dilated)", program)
    assert dtypes.count("bf16") > 20
    assert dtypes.count("f32") == (6 if name == "iuf" else 0)
    assert set(re.findall(r":(\w+)\[[^\]]*\] = (?:exp|reduce_max)", program)) == {"f32"}  # of softmaxes


def test_an_error_map_is_float32(name, variables, batch):
    exact, rounded = (jax.jit(build(name, dtype).predict)(variables, batch).maps for dtype in ("float32", "bfloat16"))
    for m in ("rgb", "depth"):
        assert rounded[m].dtype == np.float32
        assert 0 < np.abs(exact[m] - rounded[m]).max() < 0.05 * exact[m].max()


def test_an_unknown_dtype_is_refused(name):
    with pytest.raises(UserError, match=re.escape(sentences.UNKNOWN_DTYPE.format("float8"))):
        build(name, "float8")


def diffusion(name, dtype):
    config = config_of(name, "rgb", attending="1", steps=2)
    config.model.dtype = dtype
    return methods.build(name, config)


@pytest.fixture(scope="module")
def latents_batch():
    features = np.random.default_rng(0).normal(0, 2, (IMAGES, GRID**2, LITE0)).astype(np.float32)
    images = np.zeros((IMAGES, SIZE, SIZE, 3), np.float32)
    return Batch({"rgb": features}, {"rgb": images}, np.zeros(IMAGES, np.int32))


def test_diffusion_is_nearly_that_of_float32(latents_batch):
    """Losses, gradients and error maps."""
    rng, methods_ = np.random.default_rng(1), [diffusion("cdad", dtype) for dtype in ("float32", "bfloat16")]
    variables = jax.jit(methods_[0].init)(jax.random.key(0), latents_batch)
    variables = methods_[0].observe(variables, latents_batch, 0)
    drawn = jax.tree.map(lambda p: p + 0.1 * rng.standard_normal(p.shape, np.float32), variables["params"])
    variables |= {"params": drawn}
    results = []
    for method in methods_:
        value, gradients = jax.jit(jax.value_and_grad(loss(method, variables, latents_batch)))(drawn)
        assert {leaf.dtype for leaf in jax.tree.leaves(gradients)} == {np.dtype("float32")}
        maps = jax.jit(method.predict)(variables, latents_batch).maps["rgb"]
        results.append((value, np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradients)]), maps))
    (exact, exact_gradient, exact_maps), (rounded, gradient, maps) = results
    assert 0 < abs(exact - rounded) < 0.02 * exact
    cosine = exact_gradient @ gradient / np.linalg.norm(exact_gradient) / np.linalg.norm(gradient)
    assert 0.9 < cosine < 1 - 1e-6
    assert maps.dtype == np.float32
    assert 0 < np.abs(maps - exact_maps).max() < 0.05 * exact_maps.max()


@pytest.mark.parametrize("name", ["diad", "cdad"])
def test_unet_and_guide_compute_in_bfloat16(latents_batch, name):
    method = diffusion(name, "bfloat16")
    variables = jax.eval_shape(method.init, jax.random.key(0), latents_batch)
    program = str(
        jax.make_jaxpr(lambda v: method.loss(v, latents_batch, jax.random.split(jax.random.key(2), IMAGES)))(variables)
    )
    dtypes = re.findall(r":(\w+)\[[^\]]*\] = (?:dot_general|conv_general_dilated)", program)
    assert dtypes.count("bf16") > 20
    assert dtypes.count("f32") == 1  # of the latents
    assert set(re.findall(r":(\w+)\[[^\]]*\] = (?:exp|reduce_max)", program)) == {"f32"}  # of softmaxes


@pytest.mark.parametrize("name", ["diad", "cdad"])
def test_diffusion_refuses_an_unknown_dtype(name):
    with pytest.raises(UserError, match=re.escape(sentences.UNKNOWN_DTYPE.format("float8"))):
        diffusion(name, "float8")
