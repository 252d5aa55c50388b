"""Properties of the diffusion's parts: the sampler is exact, the guide begins without effect and learns, masks hide."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from iumad_jax.models.autoencoder_kl import AutoencoderKL
from iumad_jax.models.diffusion import (
    KEPT,
    AnomalyMasked,
    LatentHint,
    PixelHint,
    SemanticGuide,
    Sizes,
    UNet,
    add_noise,
    ddim,
    sampling_levels,
    target,
)
from iumad_jax.models.text_encoder import EMPTY_PROMPT, TextEncoder
from tests.oracle import inputs
from tests.oracle.inputs import normal

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZES = Sizes((8, 16), blocks=1, attending=(1,), heads=2, groups=4, latent=4)
CLEAN, NOISE = normal("clean", 6, 6, 4), normal("noise", 6, 6, 4)


def test_published_sizes_have_the_published_numbers_of_parameters():
    """The UNet's, autoencoder's and text encoder's are Stable Diffusion 1.5's; the masked network's is CDAD's.

    DiAD's guide is a ControlNet without the outputs of its six finest skips, which DiAD does not use, and with nine
    convolutions of SFF.
    """
    latent, image, level = jnp.zeros((32, 32, 4)), jnp.zeros((256, 256, 3)), jnp.int32(0)
    context, channels = jnp.zeros((77, 768)), Sizes().channels
    masked = AnomalyMasked(PixelHint(channels[0], False, bias=False))

    def count(module, *inputs, **keys):
        params = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs, **keys)["params"])
        return sum(math.prod(x.shape) for x in jax.tree.leaves(params))

    unused = 4 * (320**2 + 320) + 2 * (640**2 + 640)
    fusion = 9 * 1280 * (3 * 640 + 6 * 1280)  # 3 x 3, from one output of 640 channels and two of 1280
    guide = SemanticGuide(Sizes(), PixelHint(channels[0], True))
    assert count(UNet(Sizes()), latent, level, context) == 859_520_964
    assert count(guide, latent, level, context, image) == 361_279_120 - unused + fusion
    assert count(masked, image, deterministic=True) == pytest.approx(9.64e6, abs=5e3)
    assert count(AutoencoderKL(), image) == 83_653_863
    assert count(TextEncoder(), EMPTY_PROMPT) == 123_060_480


@pytest.mark.parametrize("kind", ["noise", "v"])
@pytest.mark.parametrize("steps", [1, 4, 10])
def test_with_the_exact_noise_every_step_predicts_the_clean_latent(kind, steps):
    levels = sampling_levels(steps, 999)
    outputs = []

    def exact(z, level):
        kept = jnp.asarray(KEPT, jnp.float32)[level]
        noise = (z - jnp.sqrt(kept) * CLEAN) / jnp.sqrt(1 - kept)
        return target(CLEAN, noise, level, kind)

    start = add_noise(CLEAN, NOISE, levels[0])
    with jax.disable_jit():  # shows what each step predicts
        result, received = ddim(lambda z, level: outputs.append(exact(z, level)) or outputs[-1], start, levels, kind)
    assert len(outputs) == steps
    np.testing.assert_allclose(received[0], start)
    for z, level in zip(received, levels, strict=True):
        np.testing.assert_allclose(z, add_noise(CLEAN, NOISE, int(level)), atol=1e-4)
    np.testing.assert_allclose(result, add_noise(CLEAN, NOISE, 0), atol=1e-4)


def test_levels_of_sampling():
    np.testing.assert_array_equal(sampling_levels(10, 999), np.arange(901, 0, -100))
    np.testing.assert_array_equal(sampling_levels(5, 401), [401, 301, 201, 101, 1])


def test_noise_grows_from_almost_none_to_almost_all():
    published = {0: 0.999150, 1: 0.998296, 101: 0.892980, 501: 0.274999, 901: 0.014005, 999: 0.004660}
    np.testing.assert_allclose(KEPT[list(published)], list(published.values()), atol=5e-7)
    for level in (0, 500, 999):
        noisy = add_noise(CLEAN, NOISE, level)
        np.testing.assert_allclose(noisy, KEPT[level] ** 0.5 * CLEAN + (1 - KEPT[level]) ** 0.5 * NOISE, atol=1e-6)


@pytest.fixture(scope="module")
def unet_params(compile_quickly):
    """Return parameters none of which is zero, as after training."""
    shapes = jax.eval_shape(UNet(SIZES).init, jax.random.key(0), CLEAN, 0)["params"]
    return inputs.normal_tree("unet", shapes)


GUIDE = SemanticGuide(SIZES, LatentHint(8, zero=True))


def guided_noise(unet_params, guide_params, z, level, image):
    guidance = GUIDE.apply({"params": guide_params}, z, level, None, image)
    return UNet(SIZES).apply({"params": unet_params}, z, level, None, guidance)


def test_a_new_guide_changes_nothing_and_all_its_parts_learn(unet_params):
    params = GUIDE.init(jax.random.key(1), CLEAN, 0, None, CLEAN)["params"]
    z = add_noise(CLEAN, NOISE, 901)
    guidance = jax.jit(lambda params: GUIDE.apply({"params": params}, z, 901, None, CLEAN))(params)
    assert len(jax.tree.leaves(guidance)) == 3
    assert not any(np.any(x) for x in jax.tree.leaves(guidance))

    optimizer = optax.adamw(1e-3)

    @jax.jit
    def update(params, state):
        def loss(params):
            return jnp.mean(jnp.square(NOISE - guided_noise(unet_params, params, z, 901, CLEAN)))

        value, gradients = jax.value_and_grad(loss)(params)
        changes, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, changes), state, value, gradients

    state, values = optimizer.init(params), []
    for _ in range(5):
        params, state, value, gradients = update(params, state)
        values.append(value)
    assert values[-1] < values[0]
    parts = {path[0] for path in flatten_dict(params)}
    fusion = {f"fusion_{j}_{k}" for j in range(2) for k in range(2)}
    assert fusion | {"hint", "controlnet_mid_block"} | {f"controlnet_down_blocks_{i}" for i in range(4)} <= parts
    still = [path for path, g in flatten_dict(gradients).items() if not np.abs(g).max() > 0]
    assert not still
    guided, other = (
        jax.jit(guided_noise)(unet_params, params, z, 901, image) for image in (CLEAN, normal("other", 6, 6, 4))
    )
    assert np.abs(other - guided).max() > 1e-6


def test_recomputation_changes_neither_output_nor_gradient(unet_params):
    z = add_noise(CLEAN, NOISE, 501)

    def loss(params, sizes):
        return jnp.mean(jnp.square(NOISE - UNet(sizes).apply({"params": params}, z, 501)))

    plain, again = (
        jax.jit(jax.value_and_grad(loss), static_argnums=1)(unet_params, sizes)
        for sizes in (SIZES, SIZES._replace(remat=True))
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), plain, again)


class Identity(nn.Module):
    """A hint that shows the network's tokens."""

    @nn.compact
    def __call__(self, x):
        return x


def test_a_token_does_not_see_its_neighbourhood():
    grid, side = 6, 3
    network = AnomalyMasked(Identity(), layers=1, heads=2, hidden=5, neighbourhood=side)
    tokens = normal("tokens", grid, grid, 8)
    params = inputs.normal_tree("amn", network.init(jax.random.key(0), tokens, deterministic=True)["params"])
    jacobian = jax.jit(
        jax.jacrev(lambda x: network.apply({"params": params}, x, deterministic=True)[0].reshape(-1, 8))
    )(tokens)
    influence = np.abs(jacobian).max((1, -1)).reshape(grid, grid, grid, grid)
    row, column = np.mgrid[:grid, :grid]
    for i in range(grid):
        for j in range(grid):
            distance = np.maximum(np.abs(row - i), np.abs(column - j))
            assert influence[i, j, i, j] > 0  # the residual
            assert (influence[i, j][(distance > 0) & (distance <= side // 2)] == 0).all()
            assert (influence[i, j][distance > side // 2] > 0).all()
