"""DiAD and CDAD in pixels, with small files of Stable Diffusion: what is read, trained, frozen and compared."""

import functools
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from scipy.ndimage import gaussian_filter

from iumad_jax.config import small
from iumad_jax.errors import UserError
from iumad_jax.methods import build, latents, pixels
from iumad_jax.methods.diffusion import sizes_of
from iumad_jax.methods.method import with_frozen
from iumad_jax.models import pretrained, stable_diffusion
from iumad_jax.models.backbone import FeatureExtractor
from iumad_jax.models.diffusion import KEPT, AnomalyMasked, Guidance, PixelHint, SemanticGuide, UNet
from iumad_jax.shapes import Batch
from tests.models.stable_diffusion_files import as_safetensors, shapes
from tests.oracle.inputs import state_dict

pytestmark = pytest.mark.usefixtures("compile_quickly")

SIZE, IMAGES, METHODS = 64, 2, ("diad", "cdad")
SETTINGS = {"space": "pixels", "autoencoder_channels": "8,8,8,8", "context": 64, "latent": 4, "channels": "8,16"}
SETTINGS |= {"blocks": 1, "attending": "0", "heads": 2, "groups": 4, "steps": 2, "prediction": "noise"}
MASKED = {"layers": 1, "hidden": 16, "neighbourhood": 3, "dropout": 0.0}
LEVELS = 901, 1  # of two steps
MEAN, DEVIATION = np.array([123.675, 116.28, 103.53]), np.array([58.395, 57.12, 57.375])


def config_of(method, weights, **changes):
    config = small("10-0")
    config.update({"method": method, "modality": "rgb"})
    config.input.size = SIZE
    config.backbone.weights = "random"
    config.continual.strategy = "finetune"
    config.diffusion.update(SETTINGS | {"weights": str(weights)} | changes)
    config.diffusion.masked.update(MASKED)
    return config


def states(config):
    """Draw the tensors of the networks of a config, by their names in diffusers."""
    networks = pixels.networks(config, sizes_of(config))
    return {
        network: state_dict({name: t.shape for name, t in stable_diffusion.tensors(params).items()})
        for network, params in shapes(networks).items()
    }


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    """Write a small file of Stable Diffusion."""
    return as_safetensors(tmp_path_factory.mktemp("weights"), states(config_of("diad", "unused")))


@pytest.fixture(scope="module")
def file(weights):
    """Return what the file holds, as parameters."""
    config = config_of("diad", weights)
    return stable_diffusion.load(str(weights), pixels.networks(config, sizes_of(config)))


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    coarse = rng.uniform(0, 255, (IMAGES, 8, 8, 3)).repeat(8, 1).repeat(8, 2)
    images = (coarse + rng.normal(0, 5, coarse.shape)).astype(np.float32)
    features = np.zeros((IMAGES, 16, 192), np.float32)
    return Batch({"rgb": features}, {"rgb": images}, np.zeros(IMAGES, np.int32))


@pytest.fixture(scope="module")
def begun(weights, batch):
    """Return a method and its variables at the beginning of a run, by name."""

    @functools.cache
    def of(name):
        method = build(name, config_of(name, weights))
        variables = method.start(jax.jit(method.init)(jax.random.key(0), batch))
        return method, with_frozen(name, method, variables)

    return of


@pytest.fixture(scope="module")
def trained(begun, batch):
    """Return a method's variables after five updates of Adam, which does not decay what gets no gradient."""
    optimizer = optax.adam(1e-3)

    @functools.cache
    def of(name):
        method, variables = begun(name)

        @jax.jit
        def update(variables, moments, key):
            def loss(params):
                return method.loss(variables | {"params": params}, batch, jax.random.split(key, IMAGES)).total

            changes, moments = optimizer.update(jax.grad(loss)(variables["params"]), moments)
            return variables | {"params": optax.apply_updates(variables["params"], changes)}, moments

        moments = optimizer.init(variables["params"])
        for key in jax.random.split(jax.random.key(1), 5):
            variables, moments = update(variables, moments, key)
        return variables

    return of


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_trained_and_what_is_frozen_are_the_file(begun, file, method):
    _, variables = begun(method)
    params, frozen = variables["params"]["rgb"], variables["frozen"]
    unet = flatten_dict(file["unet"])
    if method == "diad":
        way_up = {"up_blocks_0", "up_blocks_1", "conv_norm_out", "conv_out"}
        expected = {path for path in unet if path[0] in way_up}
    else:
        of_noise = {"time_embedding", "time_emb_proj"}
        expected = {path for path in unet if path[-1] == "kernel" and not of_noise & set(path)}
    assert set(params) == {"unet", "guide"}
    assert set(flatten_dict(params["unet"])) == expected
    same(flatten_dict(params["unet"]), {path: unet[path] for path in expected})
    same(flatten_dict(frozen["unet"]), {path: value for path, value in unet.items() if path not in expected})
    same(frozen["autoencoder"], file["autoencoder"])
    same(frozen["context"], file["context"])
    same(frozen["scorer"], pretrained.load("efficientnet_lite0", "random"))
    assert set(frozen) == {"unet", "autoencoder", "context", "scorer"}


def test_what_starts_a_run_is_read_once(begun, weights, tmp_path):
    """The file is not needed again for what is frozen."""
    file = Path(shutil.copy(weights, tmp_path))
    method = build("cdad", config_of("cdad", file))
    drawn = {name: value for name, value in begun("cdad")[1].items() if name != "frozen"}
    started, frozen = method.start(drawn), method.frozen()
    file.unlink()
    same(with_frozen("cdad", method, started)["frozen"], frozen)
    with pytest.raises(UserError):
        with_frozen("cdad", method, drawn)


def test_the_semantic_guide_starts_as_the_files_way_down(begun, file):
    guide = begun("diad")[1]["params"]["rgb"]["guide"]
    for name in ("conv_in", "time_embedding", "down_blocks_0", "down_blocks_1", "mid_block"):
        same(guide[name], file["unet"][name])


@pytest.mark.parametrize("method", METHODS)
def test_an_update_moves_every_parameter_and_nothing_that_is_frozen(begun, trained, method):
    before, after = begun(method)[1], trained(method)
    fresh = flatten_dict(before["params"])
    assert not [path for path, value in flatten_dict(after["params"]).items() if np.array_equal(value, fresh[path])]
    same({**before, "params": None}, {**after, "params": None})


def test_latents_are_drawn_in_training_and_means_otherwise(begun, batch, file, weights):
    config, variables = config_of("cdad", weights), begun("cdad")[1]
    space = pixels.pixel_space(config, sizes_of(config))
    autoencoder = pixels.networks(config, sizes_of(config)).autoencoder
    image = jnp.asarray(batch.images["rgb"][0] / 127.5 - 1)
    mean, log_variance = autoencoder.apply({"params": file["autoencoder"]}, image, method="encode")
    repeated = jax.tree.map(lambda x: x[np.zeros(40, int)], batch)
    drawn = jax.jit(space.encode, static_argnums=2)(variables, repeated, "rgb", jax.random.split(jax.random.key(0), 40))
    noise = (np.asarray(drawn) / 0.18215 - mean[None]) / np.exp(log_variance / 2)[None]
    assert abs(noise.mean()) < 0.05
    assert noise.std() == pytest.approx(1, abs=0.03)
    fixed = space.encode(variables, batch, "rgb", None)
    np.testing.assert_allclose(fixed[0], 0.18215 * mean, atol=1e-5)


def reference_map(method, variables, image, config):
    """Compute the published map of an image from modules."""
    sizes, settings = sizes_of(config), config.diffusion
    own, frozen = variables["params"]["rgb"], variables["frozen"]
    autoencoder = pixels.networks(config, sizes).autoencoder
    symmetric = settings.pixels == "symmetric"
    normal = (image - MEAN) / DEVIATION
    received = image / 127.5 - 1 if symmetric else normal
    decoder = jax.jit(lambda z: autoencoder.apply({"params": frozen["autoencoder"]}, z, method="decode"))

    def decode(z):
        x = decoder(jnp.asarray(z / 0.18215, jnp.float32))
        return np.asarray((x + 1) * 127.5 if symmetric else x * DEVIATION.reshape(1, 1, 3) + MEAN.reshape(1, 1, 3))

    encoder = jax.jit(lambda x: autoencoder.apply({"params": frozen["autoencoder"]}, x, method="encode")[0])
    latent = 0.18215 * np.asarray(encoder(jnp.asarray(received, jnp.float32)), np.float64)
    unet = {"params": unflatten_dict(flatten_dict(own["unet"]) | flatten_dict(frozen["unet"]))}
    hint = PixelHint(8, zero=method == "diad", bias=method == "diad")
    guide = SemanticGuide(sizes, hint, True) if method == "diad" else AnomalyMasked(hint, 1, 2, 16, 3, 0.0)

    @jax.jit
    def predict(z, level):
        view = jnp.asarray(normal, jnp.float32)
        if method == "diad":
            told = guide.apply({"params": own["guide"]}, z, level, frozen["context"], view)
        else:
            told = Guidance(start=guide.apply({"params": own["guide"]}, view, deterministic=True)[0])
        return UNet(sizes).apply(unet, z, level, frozen["context"], told)

    noise = np.asarray(variables["statistics"]["noise"], np.float64)
    z = np.sqrt(KEPT[999]) * latent + np.sqrt(1 - KEPT[999]) * noise
    for level, following in zip(LEVELS, (*LEVELS[1:], 0), strict=True):
        output = np.asarray(predict(jnp.asarray(z, jnp.float32), jnp.int32(level)), np.float64)
        clean = (z - np.sqrt(1 - KEPT[level]) * output) / np.sqrt(KEPT[level])
        z = np.sqrt(KEPT[following]) * clean + np.sqrt(1 - KEPT[following]) * output
    original = decode(latent) if settings.compare == "autoencoded" else image
    scorer = FeatureExtractor(config.backbone.name, 1, "4,8,16")
    images = jnp.asarray(np.stack([original, decode(z)]), jnp.float32)
    total = 0
    for both in scorer.apply(frozen["scorer"], images, method="outputs"):
        a, b = np.asarray(both, np.float64)
        if method == "diad":
            error = 1 - (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
        else:
            error = np.sqrt(np.mean((a - b) ** 2, -1))
        total = total + enlarged(enlarged(error).T).T
    return gaussian_filter(total, 5 * 224 / 256)


def enlarged(rows):
    """Interpolate between 224 rows, the first and last of which are those given."""
    places = np.linspace(0, len(rows) - 1, 224)
    return np.stack([np.interp(places, np.arange(len(rows)), column) for column in rows.T], axis=1)


@pytest.mark.parametrize(("method", "changes"), [
    ("diad", {}), ("cdad", {"compare": "input", "pixels": "imagenet"}),
])  # fmt: skip
def test_the_map_is_the_published_difference_of_the_decoded_images(trained, batch, weights, method, changes):
    """The two cases differ in all settings."""
    config, variables = config_of(method, weights, **changes), trained(method)
    predicted = jax.jit(build(method, config).predict)(variables, batch)
    expected = reference_map(method, variables, batch.images["rgb"][1].astype(np.float64), config)
    np.testing.assert_allclose(predicted.maps["rgb"][1], expected, atol=1e-3 * expected.max())
    np.testing.assert_array_equal(predicted.published, predicted.maps["rgb"])


def test_compiled_programs_take_what_is_frozen_as_arguments(begun, trained, batch):
    method, _ = begun("diad")
    variables = trained("diad")
    predict = jax.jit(method.predict)
    before = predict(variables, batch).published
    frozen = flatten_dict(variables["frozen"])
    for part in ({"unet"}, {"context"}, {"scorer"}, {"encoder"}, {"decoder"}):
        changed = {path: 1.1 * x if part & set(path) else x for path, x in frozen.items()}
        after = predict(variables | {"frozen": unflatten_dict(changed)}, batch).published
        assert np.abs(after - before).max() > 1e-3 * before.max(), part


def test_a_pasted_rectangle_agrees_with_the_image_around_it_and_nothing_else_changes():
    """Compare jumps at the borders of rectangles with those of plain copies."""
    y, x = np.mgrid[:48, :48] / 48
    image = jnp.asarray(np.stack([np.sin(5 * x + y), x - 2 * y, np.cos(3 * y) * x], axis=-1), jnp.float32)

    def jumps(pasted, inside):
        across = [
            np.abs(np.diff(pasted, axis=axis)).sum(-1)[np.diff(inside.astype(int), axis=axis) != 0] for axis in (0, 1)
        ]
        return np.concatenate(across)

    mark = jax.jit(functools.partial(latents.paste, blend=lambda image, *_: jnp.full_like(image, -9)))
    plain, blended = jax.jit(latents.paste), jax.jit(functools.partial(latents.paste, blend=pixels.blend))
    copied, agreeing = [], []
    for key in jax.random.split(jax.random.key(0), 12):
        inside = np.asarray(mark(key, image) == -9).all(-1)
        result = np.asarray(blended(key, image))
        np.testing.assert_array_equal(result[~inside], image[~inside])
        assert not np.array_equal(result[inside], image[inside])
        copied.append(jumps(np.asarray(plain(key, image)), inside))
        agreeing.append(jumps(result, inside))
    assert np.concatenate(agreeing).mean() < 0.2 * np.concatenate(copied).mean()


def test_blending_shifts_colours_and_keeps_the_texture():
    inside = np.zeros((32, 32), bool)
    inside[8:20, 6:26] = True
    half = jnp.array([6.0, 10.0])
    rows, columns = np.indices(inside.shape)
    image = jnp.asarray((rows + columns)[..., None] * np.array([1.0, 2, 3]), jnp.float32)
    shifted = pixels.blend(image, image + jnp.array([[[5.0, -40, 90]]]), inside, half)
    np.testing.assert_allclose(shifted[inside], image[inside], atol=1e-3)
    texture = np.where((rows + columns) % 2, 20, -20)[..., None] * np.ones(3)
    pasted = np.asarray(pixels.blend(image, jnp.asarray(texture + 100, jnp.float32), inside, half))
    changes = np.diff((pasted - texture)[8:20, 6:26], axis=0)
    assert np.abs(changes).max() < 10  # texture changes by 40


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"diffusion.weights": ""}, "--config.diffusion.weights=PATH"),
    ({"diffusion.weights": "nowhere.safetensors"}, "nowhere.safetensors"),
    ({"diffusion.pixels": "raw"}, 'config.diffusion.pixels is "raw"; use symmetric or imagenet.'),
    ({"diffusion.compare": "both"}, 'config.diffusion.compare is "both"; use autoencoded or input.'),
    ({"diffusion.autoencoder_channels": "8,x,8,8"}, 'config.diffusion.autoencoder_channels is "8,x,8,8"'),
    ({"diffusion.autoencoder_channels": "8,8,8"}, 'config.diffusion.autoencoder_channels is "8,8,8"'),
    ({"diffusion.autoencoder_channels": "8,8,8,6"}, 'config.diffusion.autoencoder_channels is "8,8,8,6"'),
    ({"diffusion.context": 32}, "'model.diffusion_model."),
    ({"input.size": 60}, "config.input.size is 60;"),
    ({"input.size": 8}, "config.input.size is 8, "),
    ({"backbone.name": "dinov2_vits14"}, "config.backbone.name is dinov2_vits14"),
    ({"continual.strategy": "replay"}, "config.continual.strategy is replay"),
], ids=str)  # fmt: skip
def test_what_does_not_fit_is_refused(weights, batch, changes, sentence):
    config = config_of("diad", weights)
    config.update_from_flattened_dict(changes)

    def begin():
        method = build("diad", config)
        return method.start(jax.eval_shape(method.init, jax.random.key(0), batch))

    with pytest.raises(UserError, match=re.escape(sentence)):
        begin()
