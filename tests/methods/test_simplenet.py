"""SimpleNet: features, moments of batch norm, noise, loss, optimisers and maps, and that it learns a boundary."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict
from scipy import ndimage

from iumad_jax.config import paper, small
from iumad_jax.errors import UserError
from iumad_jax.methods import build
from iumad_jax.methods.method import with_frozen
from iumad_jax.methods.moments import merge_covariance, no_covariance
from iumad_jax.methods.simplenet import (
    average_consecutive,
    average_neighbours,
    hidden_variance,
    make_optimizer,
    noisy_channels,
    released_tokens,
    smoothing_matrix,
)
from iumad_jax.models.backbone import FeatureExtractor, channels_of
from iumad_jax.shapes import Batch
from iumad_jax.training.optimization import optimizer_name, step_config
from tests.methods.reference import grown_variables

GRID, TOKENS, CHANNELS, SIZE = 7, 49, 192, 4


def make(modality="rgb", **keys):
    config = small("1-0")
    config.modality, config.backbone.weights = modality, "random"
    config.simplenet.update({"hidden": 12, "noise": 0.1, **keys})
    return build("simplenet", config)


def batch(seed, count=3, modalities=("rgb",), scale=1.0):
    rng = np.random.default_rng(seed)
    features = {m: scale * rng.normal(1, 2, (count, TOKENS, CHANNELS)).astype(np.float32) for m in modalities}
    images = {m: np.zeros((count, SIZE, SIZE, 3), np.float32) for m in modalities}
    return Batch(features, images, np.zeros(count, np.int32))


def variables_of(method, images):
    variables = grown_variables(method, images, 1)
    return method.observe(variables, images, 0)


def used_tokens(features):
    """Average 3 x 3 tokens of the strides 8 and 16 in float64; those outside of the grid are zero."""
    grid = np.pad(features[..., 40:].astype(np.float64).reshape(-1, GRID, GRID, 152), [(0, 0), (1, 1), (1, 1), (0, 0)])
    shifted = [grid[:, i : i + GRID, j : j + GRID] for i in range(3) for j in range(3)]
    return np.mean(shifted, axis=0).reshape(-1, TOKENS, 152)


def discriminate(variables, m, tokens, noise, adapted_noise=0.0):
    """Compute what the discriminator says of tokens (n, p, 152), in float64 and with explicit biases of zero mean."""
    params = jax.tree.map(lambda x: np.asarray(x, np.float64), variables["params"])
    mean, covariance = variables["statistics"][m]["mean"], variables["statistics"][m]["covariance"]
    z = (tokens - mean) / np.sqrt(np.diag(covariance) + 1e-6)
    adapted = z @ params[f"adaptor_{m}"]["kernel"] + adapted_noise
    hidden = params[f"hidden_{m}"]["kernel"]
    z_covariance = covariance / np.sqrt(np.outer(np.diag(covariance) + 1e-6, np.diag(covariance) + 1e-6))
    adapted_covariance = params[f"adaptor_{m}"]["kernel"].T @ z_covariance @ params[f"adaptor_{m}"]["kernel"]
    adapted_covariance += noise**2 / 2 * np.eye(len(adapted_covariance))
    deviation = np.sqrt(np.diag(hidden.T @ adapted_covariance @ hidden) + 1e-5)
    x = adapted @ hidden / deviation * params[f"norm_{m}"]["scale"] + params[f"norm_{m}"]["bias"]
    return (np.where(x > 0, x, 0.2 * x) @ params[f"output_{m}"]["kernel"])[..., 0]


def test_neighbours_outside_of_the_grid_count_as_zero():
    averages = average_neighbours(jnp.ones((25, 1))).reshape(5, 5)
    expected = np.full((5, 5), 6 / 9)
    expected[1:-1, 1:-1] = 1
    expected[[0, 0, -1, -1], [0, -1, 0, -1]] = 4 / 9
    np.testing.assert_allclose(averages, expected, rtol=1e-6)


def released(levels, size):
    """Compute the release's tokens of one image by loops, in float64; sizes that divide alone."""
    side = len(levels[0])
    parts = []
    for x in levels:
        n, padded = len(x), np.pad(x, [(1, 1), (1, 1), (0, 0)])
        patches = np.zeros((n, n, x.shape[-1] * 9))
        for row, column, c, i, j in np.ndindex(n, n, x.shape[-1], 3, 3):
            patches[row, column, 9 * c + 3 * i + j] = padded[row + i, column + j, c]
        resized = np.asarray(jax.image.resize(patches, (side, side, patches.shape[-1]), "bilinear", antialias=False))
        parts.append(resized.reshape(side, side, size, -1).mean(-1))
    return np.concatenate(parts, -1).reshape(side * side, size, -1).mean(-1)


def test_aggregation_of_the_release_is_that_of_loops():
    """Of levels with 4 and 8 channels: means of 6 and 12 elements of the patches."""
    rng = np.random.default_rng(0)
    levels = [rng.normal(size=(2, side, side, c)).astype(np.float32) for side, c in ((6, 4), (3, 8))]
    actual = released_tokens(levels, 12)
    for image in range(2):
        np.testing.assert_allclose(actual[image], released([x[image] for x in levels], 12), atol=1e-5)


@pytest.mark.parametrize(("level", "channel", "outputs"), [
    (0, 0, {0: 6, 1: 3}), (0, 3, {4: 3, 5: 6}), (1, 0, {6: 9}), (1, 1, {6: 3, 7: 6}), (1, 7, {11: 9}),
])  # fmt: skip
def test_a_channel_reaches_the_outputs_that_its_elements_are_part_of(level, channel, outputs):
    """Within the grid, all nine elements of a channel that is 1 everywhere are 1; `outputs` counts them."""
    levels = [np.zeros((1, side, side, c), np.float32) for side, c in ((8, 4), (4, 8))]
    levels[level][..., channel] = 1
    expected = np.zeros(12)
    for output, count in outputs.items():
        expected[output] = count / (6, 12)[level]
    np.testing.assert_allclose(released_tokens(levels, 12)[0].reshape(8, 8, 12)[4, 4], expected, atol=1e-6)


def test_channels_that_do_not_divide_are_averaged_as_by_adaptive_pooling():
    np.testing.assert_allclose(average_consecutive(jnp.arange(5.0), 3), [0.5, 2, 3.5])


def test_tokens_of_the_release_are_those_of_images():
    """Moments, losses, errors and what strategies see."""
    method, rng = make(aggregation="release"), np.random.default_rng(3)
    images = batch(0, 2)._replace(images={"rgb": rng.uniform(0, 255, (2, 32, 32, 3)).astype(np.float32)})
    variables = with_frozen("simplenet", method, jax.jit(method.init)(jax.random.key(0), images))
    variables = method.observe(variables, images, 0)
    outputs = FeatureExtractor("efficientnet_lite0", 1, "8,16").apply(
        variables["frozen"], images.images["rgb"], method="outputs"
    )
    tokens = np.asarray(released_tokens(outputs, 152), np.float64)
    assert tokens.shape == (2, 16, 152)
    np.testing.assert_allclose(variables["statistics"]["rgb"]["mean"], tokens.mean((0, 1)), atol=1e-4)
    good = discriminate(variables, "rgb", tokens, 0.1)
    errors = jax.jit(method.predict)(variables, images)
    np.testing.assert_allclose(errors.score, np.log1p(np.exp(-good.min(-1))), rtol=1e-3)
    assert errors.maps["rgb"].shape == (2, 224, 224)
    loss = jax.jit(method.loss)(variables, images, jax.random.split(jax.random.key(0), 2))
    np.testing.assert_allclose(loss.terms["true_rgb"], np.maximum(0.5 - good, 0).mean(), rtol=1e-3)
    assert set(method.activations(variables, images)) == {"adaptor_rgb", "hidden_rgb"}


def test_the_published_network_has_the_published_size():
    """As of Liu et al.: WideResNet50-2 at the strides 8 and 16, 3.94 million parameters."""
    config = paper("1-0")
    config.update({"method": "simplenet", "modality": "rgb"})
    config.backbone.name = "wide_resnet50_2"
    config.simplenet.update({"aggregation": "release", "standardise": False, "noise": 0.015})
    method = build("simplenet", config)
    params = jax.eval_shape(method.init, jax.random.key(0), batch(0))["params"]
    assert params["adaptor_rgb"]["kernel"].shape == (1536, 1536)
    assert params["hidden_rgb"]["kernel"].shape == (1536, 1024)
    assert sum(x.size for x in jax.tree.leaves(params)) == pytest.approx(3.94e6, rel=2e-3)


@pytest.mark.parametrize("key", ["aggregation", "fusion"])
def test_an_unknown_choice_is_refused(key):
    with pytest.raises(UserError, match=rf'^config\.simplenet\.{key} is "x"; use \w+ or \w+\.$'):
        make(**{key: "x"})


def test_early_fusion_judges_both_modalities_together():
    """Against a computation in float64."""
    method, images = make("rgb+depth", fusion="early", noise=2.0), batch(5, 4, ("rgb", "depth"))
    variables = variables_of(method, images)
    tokens = np.concatenate([used_tokens(images.features[m]) for m in ("rgb", "depth")], axis=-1)
    zeros = np.zeros((152, 152))
    own = [np.asarray(variables["params"][f"adaptor_{m}"]["kernel"]) for m in ("rgb", "depth")]
    params = variables["params"] | {"adaptor_rgb+depth": {"kernel": np.block([[own[0], zeros], [zeros, own[1]]])}}
    noise = 2 * np.sqrt(2 / 3)  # each modality has noise in two thirds of the copies
    good = discriminate(variables | {"params": params}, "rgb+depth", tokens, noise)
    errors = jax.jit(method.predict)(variables, images)
    np.testing.assert_allclose(errors.score, np.log1p(np.exp(-good.min(-1))), rtol=1e-4)
    assert set(errors.maps) == {"rgb+depth"}
    loss = jax.jit(method.loss)(variables, images, jax.random.split(jax.random.key(0), 4))
    np.testing.assert_allclose(loss.terms["true_rgb+depth"], np.maximum(0.5 - good, 0).mean(), rtol=1e-3)
    watched = method.activations(variables, images)
    assert {name: layer["mean"].shape[-1] for name, layer in watched.items()} == {
        "adaptor_rgb": 152, "adaptor_depth": 152, "hidden_rgb+depth": 12,
    }  # fmt: skip


def test_noise_is_in_either_modality_or_in_both():
    drawn = np.asarray(noisy_channels(jax.random.key(0), 9000, 2))
    kinds, counts = np.unique(drawn, axis=0, return_counts=True)
    assert kinds.tolist() == [[False, True], [True, False], [True, True]]
    np.testing.assert_allclose(counts / 9000, 1 / 3, atol=0.02)
    assert noisy_channels(jax.random.key(0), 9, 1).all()


@pytest.mark.parametrize(
    ("name", "levels", "channels"),
    [("efficientnet_lite0", "8,16", 152), ("efficientnet_b4", "8,16", 216), ("wide_resnet50_2", "16", 1024)],
)
def test_features_of_the_chosen_levels_are_the_last(name, levels, channels):
    config = paper("1-0")
    config.backbone.name = name
    chosen = channels_of(config.backbone, levels, "simplenet.levels")
    total = {"efficientnet_lite0": 192, "efficientnet_b4": 272, "wide_resnet50_2": 1536}[name]
    np.testing.assert_array_equal(chosen, np.arange(total - channels, total))


@pytest.mark.parametrize("levels", ["", "16,8", "4,32", "x"])
def test_levels_that_are_not_there_are_refused(levels):
    with pytest.raises(UserError, match=r"config\.simplenet\.levels is .*; use some of 2,4,8,16 in this order"):
        make(levels=levels)


def test_moments_are_those_of_all_training_tokens():
    method = make()
    variables = method.init(jax.random.key(0), batch(0))
    images = [batch(seed, count) for seed, count in ((1, 3), (2, 70))]
    for part in images:
        variables = method.observe(variables, part, 0)
    rows = np.concatenate([used_tokens(part.features["rgb"]) for part in images]).reshape(-1, 152)
    moments = variables["statistics"]["rgb"]
    np.testing.assert_allclose(moments["mean"], rows.mean(0), atol=1e-5)
    np.testing.assert_allclose(moments["covariance"], np.cov(rows.T, bias=True), atol=1e-5)
    later = method.observe(variables, batch(3, scale=5.0), 1)
    np.testing.assert_array_equal(later["statistics"]["rgb"]["mean"], moments["mean"])


@pytest.mark.parametrize("noise", [0.0, 0.5, 5.0])
def test_variance_of_the_hidden_layer_is_that_of_tokens_and_noisy_copies(noise):
    rng = np.random.default_rng(0)
    tokens = rng.normal(0, 1, (200_000, 4)) @ rng.normal(0, 1, (4, 4))
    adaptor, hidden = rng.normal(0, 1, (4, 4)), rng.normal(0, 1, (4, 3))
    noisy = tokens @ adaptor + noise * rng.normal(0, 1, tokens.shape)
    outputs = np.concatenate([tokens @ adaptor, noisy]) @ hidden
    moments = merge_covariance(no_covariance(4), tokens)
    variance = hidden_variance(adaptor, hidden, moments["covariance"], noise)
    np.testing.assert_allclose(variance, outputs.var(0), rtol=0.01)


def test_errors_and_scores_equal_a_computation_in_float64():
    method, images = make("rgb+depth"), batch(4, 5, ("rgb", "depth"))
    variables = variables_of(method, images)
    good = {m: discriminate(variables, m, used_tokens(images.features[m]), 0.1) for m in ("rgb", "depth")}
    errors = jax.jit(method.predict)(variables, images)
    total = -(good["rgb"] + good["depth"])
    np.testing.assert_allclose(errors.score, np.log1p(np.exp(total.max(-1))), rtol=1e-4)
    for m in good:
        corners = errors.maps[m][:, [0, 0, -1, -1], [0, -1, 0, -1]]
        token = -good[m].reshape(-1, GRID, GRID)[:, [0, 0, -1, -1], [0, -1, 0, -1]]
        np.testing.assert_allclose(corners, np.log1p(np.exp(token)), rtol=1e-4)
    enlarged = np.stack([reference_map(x) for x in total.reshape(-1, GRID, GRID)])
    np.testing.assert_allclose(errors.published, np.log1p(np.exp(enlarged)), rtol=1e-4)


def reference_map(errors, sigma=4.0):
    """Enlarge errors at tokens bilinearly (half-pixel centres) to 224 x 224 pixels, and smooth them."""
    return ndimage.gaussian_filter(jax.image.resize(errors, (224, 224), "bilinear", antialias=False), sigma)


@pytest.mark.parametrize("sigma", [0.0, 4.0])
@pytest.mark.parametrize("side", [1, 7, 28])
def test_maps_are_enlarged_and_smoothed_as_by_scipy(side, sigma):
    errors = np.random.default_rng(0).normal(size=(side, side))
    matrix = smoothing_matrix(side, sigma)
    expected = reference_map(errors, sigma) if sigma else jax.image.resize(errors, (224, 224), "bilinear")
    np.testing.assert_allclose(matrix @ errors @ matrix.T, expected, atol=1e-5)


def test_an_image_has_the_same_score_in_any_batch():
    method, images = make(), batch(5, 4)
    variables, predict = variables_of(method, images), jax.jit(method.predict)
    alone = [predict(variables, jax.tree.map(lambda x, i=i: x[i : i + 1], images)).score[0] for i in range(4)]
    np.testing.assert_allclose(predict(variables, images).score, alone, rtol=1e-6)


@pytest.mark.parametrize(
    ("answer", "true", "fake"), [(0.2, 0.3, 0.7), (-0.1, 0.6, 0.4), (0.5, 0.0, 1.0), (-0.75, 1.25, 0.0)]
)
def test_hinge_loss_by_hand(answer, true, fake):
    """A discriminator that gives one answer to everything."""
    method, images = make(), batch(6)
    variables = variables_of(method, images)
    params = variables["params"]
    params["norm_rgb"] = {"scale": np.zeros(12, np.float32), "bias": np.ones(12, np.float32)}
    params["output_rgb"] = {"kernel": np.full((12, 1), answer / 12, np.float32)}
    keys = jax.random.split(jax.random.key(0), 3)
    loss = jax.jit(method.loss)(variables, images, keys)
    np.testing.assert_allclose([loss.terms["true_rgb"], loss.terms["fake_rgb"]], [true, fake], atol=1e-6)
    np.testing.assert_allclose(loss.total, true + fake, rtol=1e-6)
    assert [loss.terms["p_true_rgb"], loss.terms["p_fake_rgb"]] == [answer >= 0.5, answer < -0.5]


def test_noise_differs_between_images_and_keys():
    method, images = make(), jax.tree.map(lambda x: np.repeat(x, 4, 0), batch(7, 1))
    variables, loss = variables_of(method, images), jax.jit(method.loss)

    def fake(keys):
        return loss(variables, images, keys).terms["fake_rgb"]

    keys = jax.random.split(jax.random.key(1), 4)
    same = jnp.stack([keys[0]] * 4)
    assert fake(keys) == fake(keys)
    assert fake(keys) != fake(jax.random.split(jax.random.key(2), 4))
    assert fake(keys) != fake(same)


def test_noise_has_the_standard_deviation_of_the_config():
    """With one hidden unit that reads one adapted channel, the answers differ by this channel's noise."""
    method = make(noise=0.4, hidden=1, margin=0.0)
    images = batch(8, 40)
    variables = variables_of(method, images)
    identity = np.eye(152, dtype=np.float32)
    variables["params"] = {
        "adaptor_rgb": {"kernel": 1e-4 * identity},
        "hidden_rgb": {"kernel": identity[:, 3:4]},
        "norm_rgb": {"scale": np.ones(1, np.float32), "bias": np.zeros(1, np.float32)},
        "output_rgb": {"kernel": np.ones((1, 1), np.float32)},
    }
    deviation = np.sqrt(0.4**2 / 2 + 1e-8 + 1e-5)  # of batch norm, half of whose rows carry noise
    terms = jax.jit(method.loss)(variables, images, jax.random.split(jax.random.key(0), 40)).terms
    # E[relu(n)] of n ~ N(0, s), whose negative side is multiplied by 0.2, which relu(D) leaves out.
    np.testing.assert_allclose(terms["fake_rgb"], 0.4 / deviation / np.sqrt(2 * np.pi), rtol=0.05)


@pytest.mark.parametrize("step", [0, 1])
def test_the_optimiser_is_that_of_the_release(step):
    config = paper("1-1")
    config.continual.optimizer = "sgd"
    train = step_config(config, step)
    optimizer = make_optimizer(config.simplenet, train)
    params = {name: {"kernel": jnp.full((2, 2), 3.0)} for name in ("adaptor_rgb", "hidden_rgb", "output_rgb")}
    gradients = jax.tree.map(jnp.ones_like, params)
    directions, _ = optimizer.update(gradients, optimizer.init(params), params)
    moves = optax.apply_updates(params, jax.tree.map(lambda x: -train.learning_rate * x, directions))
    np.testing.assert_allclose(3 - moves["adaptor_rgb"]["kernel"], 1e-4 * (1 + 0.01 * 3), rtol=1e-3)
    for name in ("hidden_rgb", "output_rgb"):
        np.testing.assert_allclose(3 - moves[name]["kernel"], 2e-4, rtol=1e-3)


def test_steps_of_different_learning_rates_have_different_optimisers():
    """A run makes one optimiser per name; updates are relative to the learning rate of the step."""
    config = small("1-1")
    names = [optimizer_name(make(), step_config(config, step)) for step in (0, 1)]
    assert names[0] == names[1]
    config.continual.optimizer = "sgd"
    names = [optimizer_name(make(), step_config(config, step)) for step in (0, 1)]
    assert names[0] != names[1]


def test_decay_of_the_discriminator_is_part_of_the_gradient():
    optimizer = make_optimizer(ConfigDict(paper("1-0").simplenet), paper("1-0").train)
    params = {"output_rgb": {"kernel": jnp.array([[2.0], [-2.0]])}}
    directions, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    np.testing.assert_allclose(
        directions["output_rgb"]["kernel"] * paper("1-0").train.learning_rate, [[2e-4], [-2e-4]], rtol=1e-3
    )


def test_it_learns_a_boundary_and_finds_the_token_off_it():
    """Good tokens lie in a plane of 152 dimensions."""
    method = make(noise=1.0, adaptor_rate=1e-3, discriminator_rate=1e-2, hidden=64)
    rng = np.random.default_rng(0)
    plane = rng.normal(size=(2, CHANNELS))
    features = rng.normal(size=(16, TOKENS, 2)) @ plane + 0.05 * rng.normal(size=(16, TOKENS, CHANNELS))
    images = batch(0, 16)._replace(features={"rgb": features.astype(np.float32)})
    variables = method.observe(jax.jit(method.init)(jax.random.key(0), images), images, 0)
    train = small("1-0").train
    optimizer = method.optimizer(train)

    @jax.jit
    def update(params, state, key, images):

        def objective(params):
            loss = method.loss(variables | {"params": params}, images, jax.random.split(key, 16))
            return loss.total, loss.terms

        (_, terms), gradients = jax.value_and_grad(objective, has_aux=True)(params)
        directions, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, jax.tree.map(lambda x: -train.learning_rate * x, directions))
        return params, state, terms

    params, state = variables["params"], optimizer.init(variables["params"])
    for key in jax.random.split(jax.random.key(1), 100):
        params, state, terms = update(params, state, key, images)
    assert terms["p_true_rgb"] > 0.9
    assert terms["p_fake_rgb"] > 0.9
    defect = images.features["rgb"].copy()
    row, column = 1, 5  # its 3 x 3 neighbours see it, too
    defect[0, row * GRID + column] += 10 * rng.normal(size=CHANNELS)
    errors = jax.jit(method.predict)(variables | {"params": params}, images._replace(features={"rgb": defect}))
    assert errors.score[0] > 1.2 * errors.score[1:].max()
    for maps in (errors.maps["rgb"], errors.published):
        peak = np.unravel_index(np.argmax(maps[0]), (224, 224))
        np.testing.assert_allclose(np.array(peak) / 224 * GRID, [row + 0.5, column + 0.5], atol=1.6)


def test_a_defect_in_one_modality_raises_the_sum():
    method, images = make("rgb+depth"), batch(9, 2, ("rgb", "depth"))
    variables = variables_of(method, images)
    changed = {"rgb": images.features["rgb"], "depth": images.features["depth"] + 5}
    before, after = (method.predict(variables, images._replace(features=f)) for f in (images.features, changed))
    np.testing.assert_array_equal(after.maps["rgb"], before.maps["rgb"])
    assert not np.array_equal(after.maps["depth"], before.maps["depth"])
    assert not np.array_equal(after.published, before.published)
