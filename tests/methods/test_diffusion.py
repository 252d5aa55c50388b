"""DiAD and CDAD: what noise, sampling, guides, corruption and statistics do, against hand-worked results."""

import functools
import importlib
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax.traverse_util import flatten_dict

from iumad_jax.config import small
from iumad_jax.errors import UserError
from iumad_jax.methods import build, latents
from iumad_jax.methods.diffusion import from_guided, sizes_of
from iumad_jax.models import diffusion
from iumad_jax.models.diffusion import add_noise, ddim, sampling_levels, target
from iumad_jax.shapes import BY_OBJECT, Batch

GRID, CHANNELS, IMAGES = 8, 192, 4
METHODS = ("diad", "cdad")

diad, cdad = (importlib.import_module(f"iumad_jax.methods.{name}") for name in METHODS)  # the package names functions


def config_of(method, modality="rgb+depth", **changes):
    config = small("10-0")
    config.update({"method": method, "modality": modality})
    config.backbone.grid = GRID
    settings = {"latent": 8, "channels": "8,16", "attending": "", "heads": 2, "groups": 4, "steps": 3} | changes
    config.diffusion.update(settings)
    config.diffusion.masked.update({"layers": 1, "hidden": 16, "dropout": 0.0})
    return config


@pytest.fixture(scope="module")
def batch():
    """Images of two objects, whose features are correlated and vary little between images of an object."""
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(12, CHANNELS))
    objects = rng.normal(size=(2, GRID**2, 12))
    ids = np.arange(IMAGES, dtype=np.int32) % 2
    codes = {m: objects[ids] + 0.2 * rng.normal(size=(IMAGES, GRID**2, 12)) for m in ("rgb", "depth")}
    features = {
        m: (code @ mixing + 0.1 * rng.normal(size=(IMAGES, GRID**2, CHANNELS)) + 3) for m, code in codes.items()
    }
    images = {m: np.zeros((IMAGES, 16, 16, 3), np.float32) for m in codes}
    return Batch({m: x.astype(np.float32) for m, x in features.items()}, images, ids)


class Learned(NamedTuple):
    """A method of one modality after training on two objects."""

    method: Any
    variables: Any
    fresh: Any  # parameters before training
    losses: Any
    predict: Any  # compiled


@pytest.fixture(scope="module")
def learned(batch):
    """Return a method after 150 updates of AdamW, by name; each is trained once."""
    optimizer = optax.adam(3e-3)  # without decay, which moves what has no gradient

    @functools.cache
    def of(name):
        method = build(name, config_of(name, "rgb"))
        variables = method.observe(jax.jit(method.init)(jax.random.key(0), batch), batch, 0)

        @jax.jit
        def update(params, moments, key):
            def loss(params):
                return method.loss(variables | {"params": params}, batch, jax.random.split(key, IMAGES)).total

            value, gradients = jax.value_and_grad(loss)(params)
            changes, moments = optimizer.update(gradients, moments, params)
            return optax.apply_updates(params, changes), moments, value

        params, moments, losses = variables["params"], optimizer.init(variables["params"]), []
        for key in jax.random.split(jax.random.key(7), 150):
            params, moments, value = update(params, moments, key)
            losses.append(float(value))
        return Learned(
            method,
            variables | {"params": params},
            variables["params"],
            np.array(losses),
            jax.jit(method.predict),
        )

    return of


def test_latents_are_white_and_their_map_is_a_projection():
    rng = np.random.default_rng(1)
    mixing = rng.normal(size=(20, 20)) * np.geomspace(3, 0.3, 20)
    features = (rng.normal(size=(60, 16, 20)) @ mixing + 5).astype(np.float32)
    space = latents.no_components(20, 6)
    for part in (features[:10], features[10:]):
        space = latents.observe(space, part)
    encoded = jax.vmap(functools.partial(latents.encode, space))(features)
    rows = np.asarray(encoded).reshape(-1, 6)
    np.testing.assert_allclose(rows.mean(0), 0, atol=1e-4)
    np.testing.assert_allclose(np.cov(rows, rowvar=False), np.eye(6), atol=1e-2)
    again = np.asarray(jax.vmap(lambda z: latents.decode(space, z))(encoded))
    spread, mean = features.reshape(-1, 20).std(0), features.reshape(-1, 20).mean(0)
    once_more = jax.vmap(functools.partial(latents.encode, space))(again * spread + mean)
    np.testing.assert_allclose(once_more, encoded, atol=1e-2)
    z_scores = (features - mean) / spread
    strongest = np.linalg.svd(z_scores.reshape(-1, 20), full_matrices=False)[2][:6]
    np.testing.assert_allclose(again, z_scores @ strongest.T @ strongest, atol=2e-2)


def test_later_steps_do_not_change_the_latents(batch):
    method = build("diad", config_of("diad"))
    before = method.observe(jax.jit(method.init)(jax.random.key(0), batch), batch, 0)
    after = method.observe(before, jax.tree.map(lambda x: x + 1, batch), 1)
    jax.tree.map(np.testing.assert_array_equal, before["statistics"], after["statistics"])


@pytest.mark.parametrize("method", METHODS)
def test_a_network_that_predicts_nothing_costs_1(batch, method):
    built = build(method, config_of(method, prediction="noise"))
    variables = built.observe(jax.jit(built.init)(jax.random.key(0), batch), batch, 0)
    terms = jax.jit(built.loss)(variables, batch, jax.random.split(jax.random.key(1), IMAGES)).terms
    assert terms["denoising_rgb"] == pytest.approx(1, abs=0.1)
    assert terms["denoising_rgb"] == terms["denoising_depth"]  # the same noise in both modalities


def test_levels_of_noise_cover_their_range(batch):
    class LevelOnly(nn.Module):
        def look(self, z, deterministic):
            return z

        def __call__(self, z, level, seen, context):
            return jnp.broadcast_to(level.astype(jnp.float32), z.shape)

        def own_losses(self, view, seen):
            return {}

        @nn.compact
        def everything(self, z, view, context):
            return self.param("unused", nn.initializers.zeros, (1,))

    config = config_of("diad", "rgb", prediction="noise")
    method = from_guided(
        LevelOnly(), latents.feature_space(config), config, difference=latents.cosine_distance, score=cdad.largest
    )
    variables = method.init(jax.random.key(0), batch)
    images = jax.tree.map(lambda x: np.repeat(x, 250, axis=0), batch)
    total = jax.jit(method.loss)(variables, images, jax.random.split(jax.random.key(2), 4 * 250)).total
    assert total == pytest.approx(np.mean(np.arange(1000.0) ** 2) + 1, rel=0.06)  # mean of (level - noise)^2


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_to_remove_noise(learned, method):
    losses = learned(method).losses
    assert losses[:10].mean() > 0.9
    assert losses[-30:].mean() < 0.75 * losses[:10].mean()


@pytest.mark.parametrize("method", METHODS)
def test_every_parameter_is_trained(learned, method):
    fresh, params = flatten_dict(learned(method).fresh), flatten_dict(learned(method).variables["params"])
    assert not [path for path, value in params.items() if np.array_equal(value, fresh[path])]


def network_of(name, target_gradient=True):
    sizes = sizes_of(config_of(name))
    if name == "diad":
        return diad.Network(sizes, diffusion.LatentHint, True)
    return cdad.Network(sizes, diffusion.LatentHint, 1, 16, 3, 0.0, target_gradient)


@pytest.fixture
def networks():
    """Return DiAD's and CDAD's networks, and a latent with noise and two images."""
    return network_of("diad"), network_of("cdad"), *jax.random.normal(jax.random.key(3), (3, GRID, GRID, 8))


def random_last_layer(params):
    """Return parameters whose output is not zero."""
    unet = params["unet"] | {"conv_out": jax.tree.map(lambda x: x + 0.1, params["unet"]["conv_out"])}
    return params | {"unet": unet}


def test_the_semantic_guide_starts_as_the_unet_and_without_effect(networks, learned):
    guided, _, z, image, other = networks
    params = learned("diad").fresh["rgb"]
    for name in ("conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"):
        jax.tree.map(np.testing.assert_array_equal, params["guide"][name], params["unet"][name])
    params = random_last_layer(params)
    alone = diffusion.UNet(guided.sizes).apply({"params": params["unet"]}, z, jnp.int32(501))
    for seen in (image, other):
        np.testing.assert_array_equal(guided.apply({"params": params}, z, jnp.int32(501), seen, None), alone)


def test_spatial_aware_fusion_changes_what_the_guide_tells(networks):
    guided, _, z, image, _ = networks
    params = guided.init(jax.random.key(0), z, z, None, method="everything")["params"]["guide"]
    params = jax.tree.map(lambda x: x + 0.05 * jax.random.normal(jax.random.key(x.size), x.shape), params)
    for fuse in (True, False):
        guide = diffusion.SemanticGuide(guided.sizes, diffusion.LatentHint(8, zero=True), fuse)
        told = guide.apply({"params": params}, z, jnp.int32(1), None, image)
        finest = params["controlnet_down_blocks_1"]  # of the second coarsest level, which fusion alone uses
        changed = params | {"controlnet_down_blocks_1": jax.tree.map(lambda x: x + 1, finest)}
        again = guide.apply({"params": changed}, z, jnp.int32(1), None, image)
        assert fuse != all(np.array_equal(a, b) for a, b in zip(told.coarsest, again.coarsest, strict=True))
        np.testing.assert_array_equal(told.middle, again.middle)


@pytest.mark.parametrize("method", METHODS)
def test_a_trained_network_needs_the_guide_of_its_own_image(learned, batch, method):
    variables = learned(method).variables
    network = network_of(method)
    own, space = {"params": variables["params"]["rgb"]}, variables["statistics"]["space"]["rgb"]
    z = jax.vmap(functools.partial(latents.encode, space))(batch.features["rgb"])

    @jax.jit
    def error(z, image, key):
        noise = jax.random.normal(key, z.shape)
        seen = network.apply(own, image, True, method="look")
        output = network.apply(own, add_noise(z, noise, 901), jnp.int32(901), seen, None)
        return jnp.mean(jnp.square(output - target(z, noise, 901, "v")))

    keys = jax.random.split(jax.random.key(5), 40)
    right, wrong = (np.mean([error(z[0], z[other], key) for key in keys]) for other in (0, 1))
    assert wrong > right * 1.2


@pytest.mark.parametrize("changes", [{"steps": 1}, {"start": 300}, {"noise": 2.0}], ids=str)
def test_steps_start_and_noise_change_the_map(learned, batch, changes):
    variables = learned("diad").variables
    noise = variables["statistics"]["noise"] * changes.pop("noise", 1)
    variables = variables | {"statistics": variables["statistics"] | {"noise": noise}}
    predict = (
        jax.jit(build("diad", config_of("diad", "rgb", **changes)).predict) if changes else learned("diad").predict
    )
    before = learned("diad").predict(learned("diad").variables, batch).published
    assert np.abs(predict(variables, batch).published - before).max() > 0.05 * before.max()


def test_the_map_of_an_image_does_not_depend_on_its_batch(learned, batch):
    cdad = learned("cdad")
    together = cdad.predict(cdad.variables, batch)
    rearranged = cdad.predict(cdad.variables, jax.tree.map(lambda x: x[[2, 2, 0, 3]], batch))
    np.testing.assert_allclose(rearranged.maps["rgb"][1], together.maps["rgb"][2], rtol=1e-4, atol=1e-4)


def test_the_loss_does_not_depend_on_how_devices_share_the_batch(learned, batch):
    """Devices average the losses of their shares. Noise, corruption and level of an image come from its key alone."""
    method, variables = learned("cdad").method, learned("cdad").variables
    keys, loss = jax.random.split(jax.random.key(4), IMAGES), jax.jit(method.loss)
    whole = loss(variables, batch, keys).terms
    shares = [
        loss(variables, jax.tree.map(lambda x, rows=rows: x[np.array(rows)], batch), keys[np.array(rows)]).terms
        for rows in ([3, 0], [1, 2])
    ]
    for name, value in whole.items():
        assert value == pytest.approx(float(shares[0][name] + shares[1][name]) / 2, rel=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_each_modality_is_judged_as_if_it_were_alone(batch, method):
    both = build(method, config_of(method))
    variables = both.observe(jax.jit(both.init)(jax.random.key(0), batch), batch, 0)
    params = {m: random_last_layer(tree) for m, tree in variables["params"].items()}
    variables = variables | {"params": params}
    maps = jax.jit(both.predict)(variables, batch)
    keys = jax.random.split(jax.random.key(1), IMAGES)
    terms = jax.jit(both.loss)(variables, batch, keys).terms
    total = 0
    for m in ("rgb", "depth"):
        single = build(method, config_of(method, m))
        statistics = variables["statistics"] | {"space": {m: variables["statistics"]["space"][m]}}
        alone = {"params": {m: params[m]}, "statistics": statistics, BY_OBJECT: ()}
        own = jax.jit(single.predict)(alone, batch)
        np.testing.assert_allclose(own.maps[m], maps.maps[m], rtol=1e-4, atol=1e-4)
        total += own.published
        for name, term in jax.jit(single.loss)(alone, batch, keys).terms.items():
            assert term == pytest.approx(float(terms[name]), rel=1e-5)
    np.testing.assert_allclose(total, maps.published, rtol=1e-4, atol=1e-4)


def test_errors_are_distances_from_those_of_good_images(learned, batch):
    method, variables = learned("diad").method, learned("diad").variables
    fitted = method.fit(variables, batch, 0, False)
    errors = learned("diad").predict(method.arrange(fitted), batch).maps["rgb"]
    gaussian = fitted[BY_OBJECT][0]["rgb"]
    space, noise = variables["statistics"]["space"]["rgb"], variables["statistics"]["noise"]
    z = latents.encode(space, batch.features["rgb"][0])
    network = network_of("diad")

    def predict(noisy, level):
        return network.apply({"params": variables["params"]["rgb"]}, noisy, level, z, None)

    rebuilt, _ = ddim(predict, add_noise(z, noise, 999), sampling_levels(3, 999), "v")
    whitened = (np.asarray(rebuilt - z).reshape(-1, 8) - gaussian["mean"]) @ gaussian["whitening"]
    corners = np.linalg.norm(whitened, axis=1).reshape(GRID, GRID)[[0, 0, -1, -1], [0, -1, 0, -1]]
    np.testing.assert_allclose(errors[0][[0, 0, -1, -1], [0, -1, 0, -1]], corners, rtol=1e-3)


def test_corruption_copies_rectangles():
    """Tokens tell their places; all of a rectangle come from places at the same distance."""
    number = np.arange(GRID**2)
    z = jnp.asarray(np.stack([number // GRID, number % GRID], -1).reshape(GRID, GRID, 2), jnp.float32)
    changed_shares, single, rectangles = [], 0, 0
    for key in jax.random.split(jax.random.key(0), 60):
        shift = np.asarray(latents.paste(key, z)) - np.asarray(z)
        changed = (shift != 0).any(-1)
        changed_shares.append(changed.mean())
        shifts = {tuple(s) for s in shift[changed]}
        assert len(shifts) <= 4
        if len(shifts) == 1:
            single += 1
            rows, columns = np.nonzero(changed)
            rectangles += changed[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1].all()
    assert rectangles > single / 2 > 2  # in others, two rectangles have the same shift
    assert np.mean(np.array(changed_shares) > 0) > 0.9  # the first always, unless source and place are the same
    assert len(set(changed_shares)) > 20


def test_half_of_the_images_are_corrupted_and_the_target_is_the_clean_one(batch):
    """The masked loss of a guide that passes on its input is zero for clean images, and only for these."""

    class PassesOn(nn.Module):
        def look(self, z, deterministic):
            return z

        def __call__(self, z, level, seen, context):
            return jnp.zeros_like(z)

        def own_losses(self, view, seen):
            return {"corrupted": (jnp.abs(seen - view).max() > 0).astype(jnp.float32)}

        @nn.compact
        def everything(self, z, view, context):
            return self.param("unused", nn.initializers.zeros, (1,))

    share = {}
    for corruption in (0.0, 0.5, 1.0):
        config = config_of("cdad", "rgb")
        method = from_guided(
            PassesOn(),
            latents.feature_space(config),
            config,
            difference=latents.root_mean_square,
            score=cdad.largest,
            corrupt=cdad.corruption(corruption, latents.paste),
        )
        images = jax.tree.map(lambda x: np.repeat(x, 100, axis=0), batch)
        variables = method.observe(method.init(jax.random.key(0), batch), batch, 0)
        terms = jax.jit(method.loss)(variables, images, jax.random.split(jax.random.key(2), 400)).terms
        share[corruption] = float(terms["corrupted_rgb"])
    assert share[0.0] == 0
    assert share[1.0] > 0.95
    assert share[0.5] == pytest.approx(0.5 * share[1.0], abs=0.07)


def test_the_masked_loss_compares_with_the_clean_image_and_trains_both_sides(networks):
    _, masked, z, clean, other = networks
    params = masked.init(jax.random.key(0), z, z, None, method="everything")["params"]

    def loss(params, target_gradient=True):
        network = network_of("cdad", target_gradient)
        seen = network.apply({"params": params}, other, True, method="look")
        return network.apply({"params": params}, clean, seen, method="own_losses")["masked"]

    hint = diffusion.LatentHint(8, zero=False, bias=False).apply({"params": params["guide"]["hint"]}, clean)
    added, _ = masked.apply({"params": params}, other, True, method="look")
    assert loss(params) == pytest.approx(float(jnp.mean((added - hint) ** 2)), rel=1e-5)
    zero = masked.apply({"params": params}, clean, (hint, hint), method="own_losses")["masked"]
    assert zero == 0
    both, one = (jax.grad(loss)(params, flag)["guide"]["hint"]["conv_out"]["kernel"] for flag in (True, False))
    assert np.abs(both - one).max() > 0.01 * np.abs(both).max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_rows_times_kernel_plus_bias_are_outputs_of_every_layer_at_each_step(learned, batch, method):
    variables = learned(method).variables
    inputs = flatten_dict(jax.jit(learned(method).method.inputs)(variables, batch))
    network, own = network_of(method), {"params": variables["params"]["rgb"]}
    z = latents.encode(variables["statistics"]["space"]["rgb"], batch.features["rgb"][1])
    seen, looked = network.apply(own, z, True, method="look", capture_intermediates=True, mutable=["intermediates"])
    levels = sampling_levels(3, 999)
    start = add_noise(z, variables["statistics"]["noise"], 999)
    _, received = ddim(lambda z, level: network.apply(own, z, level, seen, None), start, levels, "v")
    outputs = {path: [value] for path, value in flatten_dict(looked.get("intermediates", {})).items()}
    for noisy, level in zip(received, levels, strict=True):
        _, called = network.apply(
            own, noisy, jnp.int32(level), seen, None, capture_intermediates=True, mutable=["intermediates"]
        )
        for path, value in flatten_dict(called["intermediates"]).items():
            outputs.setdefault(path, []).append(value)
    params = flatten_dict(own["params"])
    for (_, *layer, _), rows in inputs.items():
        kernel, bias = params[*layer, "kernel"], params.get((*layer, "bias"), np.zeros(1))
        of_steps = [np.asarray(value[-1]).reshape(-1, kernel.shape[-1]) for value in outputs[*layer, "__call__"]]
        computed = rows[1] @ kernel.reshape(rows.shape[-1], -1) + bias.reshape(1, -1)
        if len(of_steps[0]) != len(of_steps[0].reshape(-1, computed.shape[-1])):  # heads of attention
            of_steps = [output.reshape(-1, computed.shape[-1]) for output in of_steps]
        for part, output in zip(np.split(computed, len(of_steps)), of_steps, strict=True):
            distances = np.abs(part[:, None] - output[None]).max(-1).min(1)
            assert distances.max() < 1e-3 * max(np.abs(output).max(), 1e-2), layer
    kernels = {path[:-1] for path in params if path[-1] == "kernel"}
    unseen = kernels - {tuple(path[1:-1]) for path in inputs}
    assert all({"time_embedding", "time_emb_proj"} & set(path) for path in unseen), unseen


def test_rows_come_from_all_over_the_image(batch):
    """Outside of the image, inputs of a convolution are 0: no input is so in all rows, and each corner comes up once.

    16 steps of 16 rows see each of 16 x 16 places.
    """

    class Convolution(nn.Module):
        def setup(self):
            self.layer = nn.Conv(8, (3, 3), padding=((1, 1), (1, 1)))

        def look(self, z, deterministic):
            return z

        def __call__(self, z, level, seen, context):
            return self.layer(z)

        def own_losses(self, view, seen):
            return {}

        def everything(self, z, view, context):
            return self.layer(z)

    for grid, steps in ((8, 1), (16, 1), (32, 1), (16, 16)):
        config = config_of("diad", "rgb", steps=steps)
        method = from_guided(
            Convolution(), latents.feature_space(config), config, difference=latents.cosine_distance, score=cdad.largest
        )
        features = np.random.default_rng(0).normal(size=(1, grid**2, CHANNELS)).astype(np.float32)
        images = Batch({"rgb": features}, {"rgb": np.zeros((1, 16, 16, 3), np.float32)}, np.zeros(1, np.int32))
        variables = method.observe(method.init(jax.random.key(0), images), images, 0)
        rows = method.inputs(variables, images)["rgb"]["layer"]["rows"][0]
        assert rows.shape == (16 * steps, 9 * 8)
        assert np.abs(rows).max(0).min() > 0
        outside = (np.abs(rows).reshape(len(rows), 9, 8).max(-1) == 0).sum(1)
        assert steps == 1 or np.count_nonzero(outside == 5) == 4


@pytest.mark.parametrize(("changes", "key"), [
    ({"channels": "8,x"}, "diffusion.channels"), ({"heads": 3}, "diffusion.heads"), ({"groups": 5}, "diffusion.groups"),
    ({"latent": 9}, "diffusion.latent"), ({"prediction": "x0"}, "diffusion.prediction"),
    ({"attending": "2"}, "diffusion.attending"), ({"channels": "8"}, "diffusion.channels"),
    ({"channels": "8,16,16,16"}, "backbone.grid"),
])  # fmt: skip
def test_sizes_that_do_not_fit_are_refused(batch, changes, key):
    with pytest.raises(UserError, match=rf"config\.{key}"):
        build("diad", config_of("diad", **changes)).init(jax.random.key(0), batch)


@pytest.mark.parametrize("side", [2, GRID - 2, GRID + 1])
def test_an_even_neighbourhood_and_one_as_large_as_the_image_are_refused(side):
    config = config_of("cdad", "rgb")
    config.diffusion.masked.neighbourhood = side
    reason = "an even side" if side < GRID else "which hides all"
    with pytest.raises(UserError, match=rf"^config\.diffusion\.masked\.neighbourhood is {side}, {reason}"):
        build("cdad", config)


def test_a_neighbourhood_may_leave_each_token_few_others(batch):
    config = config_of("cdad", "rgb")
    config.diffusion.masked.neighbourhood = GRID - 1  # the largest odd one in which every token sees some
    method = build("cdad", config)
    variables = method.observe(jax.jit(method.init)(jax.random.key(0), batch), batch, 0)
    assert np.isfinite(jax.jit(method.loss)(variables, batch, jax.random.split(jax.random.key(1), IMAGES)).total)
