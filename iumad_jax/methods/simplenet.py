"""SimpleNet (Liu et al., CVPR 2023): a discriminator that tells features of good images from noisy copies of them.

Frozen features, averaged over 3 x 3 tokens, pass a linear layer, the adaptor. Noise is added to a copy of the adapted
features, and a discriminator of two layers learns with a hinge loss to tell both apart. Its negated output is the error
of a token.

Our extensions: each modality has an adaptor and a discriminator, whose outputs are summed as published; features are
z-scored, as the published noise suits one backbone only; and batch norm uses the mean and covariance of the features
of the base step. The discriminator's first layer is a linear map of them, so both are exact, its output depends neither
on the batch nor on the number of devices, and the biases before batch norm cancel, so there are none.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict
from scipy.ndimage import gaussian_filter1d

from iumad_jax.methods.error_maps import upsample_errors
from iumad_jax.methods.mahalanobis import in_parts
from iumad_jax.methods.method import Loss, Method
from iumad_jax.methods.moments import Covariance, merge_covariance, no_covariance
from iumad_jax.models.backbone import channels_of
from iumad_jax.models.hashed_bits import hashed_keys
from iumad_jax.shapes import MAP_SIZE, Batch, ErrorMaps, Keys, Modality, Scalars, Tokens, Variables

EPSILON = 1e-5  # of batch norm
_KERNEL = nn.initializers.variance_scaling(1, "fan_avg", "normal")


def simplenet(config: ConfigDict, backbone: ConfigDict, modalities: tuple[Modality, ...]) -> Method:
    """Build the method for `config.simplenet` and the levels of `config.backbone`.

    Raises:
        UserError: If `config.levels` are not among the levels of the backbone's features.
    """
    channels = channels_of(backbone, config.levels, "simplenet.levels")
    average = jax.jit(jax.vmap(lambda tokens: average_neighbours(tokens[:, channels])))

    def init(key: PRNGKeyArray, _: Batch) -> Variables:
        count = len(channels)
        params: dict[str, Any] = {}
        for m, modality_key in zip(modalities, jax.random.split(key, len(modalities)), strict=True):
            keys = jax.random.split(modality_key, 3)
            params |= {
                f"adaptor_{m}": {"kernel": _KERNEL(keys[0], (count, count))},
                f"hidden_{m}": {"kernel": _KERNEL(keys[1], (count, config.hidden))},
                f"norm_{m}": {"scale": jnp.ones(config.hidden), "bias": jnp.zeros(config.hidden)},
                f"output_{m}": {"kernel": _KERNEL(keys[2], (config.hidden, 1))},
            }
        return {"params": params, "statistics": {m: no_covariance(count) for m in modalities}}

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if step > 0:
            return variables
        statistics = dict(variables["statistics"])
        for m in modalities:
            for part in in_parts(batch.features[m]):
                rows = np.asarray(average(np.asarray(part, np.float32)), np.float64).reshape(-1, len(channels))
                statistics[m] = merge_covariance(statistics[m], rows)
        return variables | {"statistics": statistics}

    def centred(variables: Variables, m: Modality, tokens: Tokens) -> Float[Array, "p c"]:
        moments = variables["statistics"][m]
        return (average_neighbours(tokens[:, channels]) - moments["mean"][None]) / deviation(moments)[None]

    def deviation(moments: Covariance) -> Float[Array, " c"]:
        variance = jnp.diagonal(moments["covariance"])
        return jnp.sqrt(variance + 1e-6) if config.standardise else jnp.ones_like(variance)

    def discriminators(variables: Variables) -> dict[Modality, Any]:
        """Return, by modality, the discriminator of adapted tokens (p c) -> (p), which is positive where good."""
        params = variables["params"]

        def make(m: Modality) -> Any:
            moments = variables["statistics"][m]
            covariance = moments["covariance"] / jnp.outer(deviation(moments), deviation(moments))
            hidden, norm = params[f"hidden_{m}"]["kernel"], params[f"norm_{m}"]
            variance = hidden_variance(params[f"adaptor_{m}"]["kernel"], hidden, covariance, config.noise)

            def judge(adapted: Float[Array, "p c"]) -> Float[Array, " p"]:
                normalised = adapted @ hidden / jnp.sqrt(variance + EPSILON)[None]
                activated = nn.leaky_relu(normalised * norm["scale"][None] + norm["bias"][None], 0.2)
                return (activated @ params[f"output_{m}"]["kernel"])[:, 0]

            return judge

        return {m: make(m) for m in modalities}

    def adapt(variables: Variables, m: Modality, tokens: Tokens) -> Float[Array, "p c"]:
        return centred(variables, m, tokens) @ variables["params"][f"adaptor_{m}"]["kernel"]

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        judges = discriminators(variables)

        def image_losses(features: dict[Modality, Tokens], key: PRNGKeyArray) -> tuple[Scalars, Scalars, Any]:
            hinges: Scalars = {}
            shares: Scalars = {}
            outputs = {}
            for m, modality_key in zip(modalities, jax.random.split(key, len(modalities)), strict=True):
                true = adapt(variables, m, features[m])
                noisy = true + config.noise * jax.random.normal(modality_key, true.shape)
                good, bad = judges[m](true), judges[m](noisy)
                hinges |= {f"true_{m}": nn.relu(config.margin - good).mean()}
                hinges |= {f"fake_{m}": nn.relu(config.margin + bad).mean()}
                shares |= {f"p_true_{m}": (good >= config.margin).mean(), f"p_fake_{m}": (bad < -config.margin).mean()}
                outputs[m] = true.mean(0)
            return hinges, shares, outputs

        hinges, shares, outputs = jax.vmap(image_losses)(batch.features, hashed_keys(keys))
        hinges, shares = jax.tree.map(batch.mean, (hinges, shares))
        return Loss(functools.reduce(jnp.add, hinges.values()), hinges | shares, outputs)

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        judges = discriminators(variables)
        errors = {m: jax.vmap(lambda x, m=m: -judges[m](adapt(variables, m, x)))(batch.features[m]) for m in modalities}
        total = functools.reduce(jnp.add, errors.values())
        side = round(total.shape[1] ** 0.5)
        enlarge = smoothing_matrix(side, config.smoothing)
        smooth = jnp.einsum("ij,bjk,lk->bil", enlarge, total.reshape(-1, side, side), enlarge)
        maps = upsample_errors({m: nn.softplus(error) for m, error in errors.items()})
        return maps._replace(published=nn.softplus(smooth), score=nn.softplus(total.max(-1)))

    def activations(variables: Variables, batch: Batch) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for m in modalities:
            adapted = jax.vmap(lambda x, m=m: adapt(variables, m, x))(batch.features[m]).mean(1)
            layers[f"adaptor_{m}"] = {"mean": adapted}
            layers[f"hidden_{m}"] = {"mean": adapted @ variables["params"][f"hidden_{m}"]["kernel"]}
        return layers

    return Method(
        init,
        predict,
        loss,
        observe=observe,
        optimizer=functools.partial(make_optimizer, config),
        activations=activations,
    )


def hidden_variance(
    adaptor: Float[Array, "c c"], hidden: Float[Array, "c h"], covariance: Float[Array, "c c"], noise: float
) -> Float[Array, " h"]:
    """Compute the variance of the hidden layer's outputs, over tokens and as many noisy copies of them.

    Args:
        adaptor: Weights of the adaptor.
        hidden: Weights of the hidden layer.
        covariance: Covariance of the tokens.
        noise: Standard deviation of the noise that is added to adapted tokens.
    """
    combined = adaptor @ hidden
    return jnp.einsum("ch,cd,dh->h", combined, covariance, combined) + noise**2 / 2 * (hidden**2).sum(0)


def average_neighbours(tokens: Float[Array, "p c"]) -> Float[Array, "p c"]:
    """Average each token of a square grid with its 3 x 3 neighbours; those outside of the grid count as zero."""
    side = round(len(tokens) ** 0.5)
    near = (np.abs(np.subtract.outer(np.arange(side), np.arange(side))) <= 1).astype(np.float32) / 3
    return jnp.einsum("ij,kl,jlc->ikc", near, near, tokens.reshape(side, side, -1)).reshape(tokens.shape)


def smoothing_matrix(side: int, sigma: float) -> Float[np.ndarray, "m g"]:
    """Compute the matrix that enlarges `side` values to `MAP_SIZE` bilinearly (half-pixel centres) and smooths them.

    The Gaussian filter has a standard deviation of `sigma` pixels, ends at four of them and mirrors the border.
    """
    position = np.clip((np.arange(MAP_SIZE) + 0.5) * side / MAP_SIZE - 0.5, 0, side - 1)
    enlarge = np.maximum(1 - np.abs(position[:, None] - np.arange(side)), 0)
    return (gaussian_filter1d(enlarge, sigma, axis=0) if sigma else enlarge).astype(np.float32)


def make_optimizer(config: ConfigDict, train: ConfigDict) -> optax.GradientTransformation:
    """Create AdamW for the adaptors and Adam with an L2 penalty for the discriminators, as in the release.

    Updates are relative to `train.learning_rate`, by which the caller multiplies them.
    """
    adam = functools.partial(optax.scale_by_adam, b1=0.9, b2=0.999)

    def at_rate(rate: float) -> optax.GradientTransformation:
        return optax.scale(rate / train.learning_rate if train.learning_rate else 0.0)

    optimizers = {
        "adaptor": optax.chain(
            adam(),
            optax.add_decayed_weights(config.adaptor_decay),
            at_rate(config.adaptor_rate),
        ),
        "discriminator": optax.chain(
            optax.add_decayed_weights(config.discriminator_decay),
            adam(),
            at_rate(config.discriminator_rate),
        ),
    }

    def labels(params: Any) -> Any:
        return {name: "adaptor" if name.startswith("adaptor") else "discriminator" for name in params}

    return optax.multi_transform(optimizers, labels)
