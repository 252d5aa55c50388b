"""A small method with everything that a strategy may need."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iumad_jax.methods.method import Loss, Method
from iumad_jax.shapes import Batch

CHANNELS, WIDTH = 5, 4


@pytest.fixture(autouse=True, scope="package")
def quick_compilation():
    """Compile without optimisation. Each function runs only a few times, so this takes a third of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def linear():
    """Build a linear autoencoder of tokens: a dense layer to a smaller width and one back."""

    def init(key, batch):
        a, b = jax.random.split(key)
        params = {
            "down": {"kernel": 0.5 * jax.random.normal(a, (CHANNELS, WIDTH)), "bias": jnp.zeros(WIDTH)},
            "up": {"kernel": 0.5 * jax.random.normal(b, (WIDTH, CHANNELS)), "bias": jnp.zeros(CHANNELS)},
        }
        return {"params": params, "statistics": {}}

    def narrow(variables, tokens):
        down = variables["params"]["down"]
        return tokens @ down["kernel"] + down["bias"][None, None]

    def loss(variables, batch, keys):
        tokens, up = batch.features["rgb"], variables["params"]["up"]
        noise = jax.vmap(lambda key: jax.random.normal(key, tokens.shape[1:]))(keys)
        hidden = narrow(variables, tokens + 0.1 * noise)
        error = jnp.mean((hidden @ up["kernel"] + up["bias"][None, None] - tokens) ** 2)
        return Loss(error, {"error": error}, {"hidden": hidden.mean(1)})

    def activations(variables, batch):
        return {"down": {"mean": narrow(variables, batch.features["rgb"]).mean(1)}}

    def inputs(variables, batch):
        tokens = batch.features["rgb"]
        return {"down": {"rows": tokens}, "up": {"rows": narrow(variables, tokens)}}

    return Method(init, predict=None, loss=loss, activations=activations, inputs=inputs)


def random_images(count, object_=0, seed=0):
    rng = np.random.default_rng([seed, object_])
    mean, mixing = rng.normal(0, 2, (1, 3, CHANNELS)), rng.normal(0, 1, (CHANNELS, CHANNELS))
    tokens = mean + rng.standard_normal((count, 3, CHANNELS)) @ mixing
    images = rng.uniform(0, 255, (count, 8, 8, 3))
    return Batch(
        {"rgb": tokens.astype(np.float32)},
        {"rgb": images.astype(np.float32)},
        np.full(count, object_, np.int32),
    )


def skewed(batch):
    """Scale the features so that most of their singular values are small."""
    narrow = np.array([30, 3, 0.2, 0.1, 0.1], np.float32)
    return batch._replace(features={"rgb": batch.features["rgb"] * narrow})


@pytest.fixture
def method():
    return linear()


@pytest.fixture
def variables(method):
    return jax.tree.map(np.asarray, method.init(jax.random.key(0), random_images(1)))


@pytest.fixture
def images():
    return random_images


@pytest.fixture
def skewed_images():
    return lambda *args: skewed(random_images(*args))


@pytest.fixture(scope="module", autouse=True)
def fast_compilation(compile_quickly):
    """Compile without optimisation, since these networks take longer to compile than to run."""
