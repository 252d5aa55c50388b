"""SimpleNet (Liu et al., CVPR 2023): a discriminator that tells features of good images from noisy copies of them.

Frozen features, averaged over 3 x 3 tokens, pass a linear layer, the adaptor. Noise is added to a copy of the adapted
features, and a discriminator of two layers learns with a hinge loss to tell both apart. Its negated output is the error
of a token.

Our extensions: each modality has an adaptor and a discriminator, whose outputs are summed ("late"), or one
discriminator judges the adapted features of both ("early"); features are z-scored, as the published noise suits one
backbone only; and batch norm uses the mean and covariance of the features of the base step. The discriminator's first
layer is a linear map of them, so both are exact, its output depends neither on the batch nor on the number of devices,
and the biases before batch norm cancel, so there are none.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax.scipy.linalg import block_diag
from jaxtyping import Array, Bool, Float, Key, PRNGKeyArray
from ml_collections import ConfigDict
from scipy.ndimage import gaussian_filter1d

from iumad_jax.errors import UserError
from iumad_jax.methods.error_maps import upsample_errors
from iumad_jax.methods.mahalanobis import in_parts
from iumad_jax.methods.method import Loss, Method
from iumad_jax.methods.moments import Covariance, merge_covariance, no_covariance
from iumad_jax.models import pretrained
from iumad_jax.models.backbone import FeatureExtractor, channels_of
from iumad_jax.models.hashed_bits import hashed_keys
from iumad_jax.models.layers import taps
from iumad_jax.shapes import MAP_SIZE, Batch, ErrorMaps, Keys, Modality, Scalars, Variables

EPSILON = 1e-5  # of batch norm
_KERNEL = nn.initializers.variance_scaling(1, "fan_avg", "normal")


def simplenet(config: ConfigDict, backbone: ConfigDict, modalities: tuple[Modality, ...]) -> Method:
    """Build the method for `config.simplenet` and the levels of `config.backbone`.

    Raises:
        UserError: If `config.levels` are not among the levels of the backbone's features, or another value is unknown.
    """
    _check(config)
    channels = channels_of(backbone, config.levels, "simplenet.levels")
    count, released = len(channels), config.aggregation == "release"
    extractor = FeatureExtractor(backbone.name, 1, config.levels)
    early = ("+".join(modalities), modalities)
    judged = dict([early] if config.fusion == "early" else [(m, (m,)) for m in modalities])

    def init(key: PRNGKeyArray, _: Batch) -> Variables:
        own_keys = jax.random.split(key, len(modalities))
        keys = {m: jax.random.split(own, 3) for m, own in zip(modalities, own_keys, strict=True)}
        params: dict[str, Any] = {f"adaptor_{m}": {"kernel": _KERNEL(keys[m][0], (count, count))} for m in modalities}
        for name, members in judged.items():
            _, hidden_key, output_key = keys[members[0]]
            params |= {
                f"hidden_{name}": {"kernel": _KERNEL(hidden_key, (count * len(members), config.hidden))},
                f"norm_{name}": {"scale": jnp.ones(config.hidden), "bias": jnp.zeros(config.hidden)},
                f"output_{name}": {"kernel": _KERNEL(output_key, (config.hidden, 1))},
            }
        statistics = {name: no_covariance(count * len(members)) for name, members in judged.items()}
        return {"params": params, "statistics": statistics}

    @jax.jit
    def aggregate(frozen: Any, inputs: Float[Array, "b ..."]) -> Float[Array, "b p c"]:
        if released:
            levels: Any = extractor.apply(frozen, inputs, method="outputs")
            return released_tokens(levels, count)
        return jax.vmap(average_neighbours)(inputs[..., channels])

    def tokens_of(frozen: Any, inputs: dict[Modality, Any]) -> dict[str, Float[Array, "b p c"]]:
        """Return the aggregated tokens that each discriminator judges, of images or features."""
        aggregated = {m: aggregate(frozen, jnp.asarray(inputs[m], jnp.float32)) for m in modalities}
        return {name: jnp.concatenate([aggregated[m] for m in ms], axis=-1) for name, ms in judged.items()}

    def inputs_of(batch: Batch) -> dict[Modality, Any]:
        return batch.images if released else batch.features

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if step > 0:
            return variables
        statistics = dict(variables["statistics"])
        for part in in_parts(inputs_of(batch)):
            for name, tokens in tokens_of(variables.get("frozen"), part).items():
                rows = np.asarray(tokens, np.float64).reshape(-1, tokens.shape[-1])
                statistics[name] = merge_covariance(statistics[name], rows)
        return variables | {"statistics": statistics}

    def deviation(moments: Covariance) -> Float[Array, " c"]:
        variance = jnp.diagonal(moments["covariance"])
        return jnp.sqrt(variance + 1e-6) if config.standardise else jnp.ones_like(variance)

    def discriminators(variables: Variables) -> dict[str, Any]:
        """Return, by name, the discriminator of adapted tokens (p c) -> (p), which is positive where good."""
        params = variables["params"]

        def make(name: str) -> Any:
            moments = variables["statistics"][name]
            covariance = moments["covariance"] / jnp.outer(deviation(moments), deviation(moments))
            hidden, norm = params[f"hidden_{name}"]["kernel"], params[f"norm_{name}"]
            noise = config.noise * noisy_share(len(judged[name])) ** 0.5
            variance = hidden_variance(adaptor(variables, name), hidden, covariance, noise)

            def judge(adapted: Float[Array, "p c"]) -> Float[Array, " p"]:
                normalised = adapted @ hidden / jnp.sqrt(variance + EPSILON)[None]
                activated = nn.leaky_relu(normalised * norm["scale"][None] + norm["bias"][None], 0.2)
                return (activated @ params[f"output_{name}"]["kernel"])[:, 0]

            return judge

        return {name: make(name) for name in judged}

    def adaptor(variables: Variables, name: str) -> Float[Array, "c c"]:
        return block_diag(*(variables["params"][f"adaptor_{m}"]["kernel"] for m in judged[name]))

    def adapt(variables: Variables, name: str, tokens: Float[Array, "p c"]) -> Float[Array, "p c"]:
        moments = variables["statistics"][name]
        return (tokens - moments["mean"][None]) / deviation(moments)[None] @ adaptor(variables, name)

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        judges = discriminators(variables)

        def image_losses(tokens: dict[str, Any], key: PRNGKeyArray) -> tuple[Scalars, Scalars, Any]:
            hinges: Scalars = {}
            shares: Scalars = {}
            outputs = {}
            for (n, members), own in zip(judged.items(), jax.random.split(key, len(judged)), strict=True):
                true = adapt(variables, n, tokens[n])
                where = noisy_channels(jax.random.fold_in(own, 1), len(true), len(members))
                noise = config.noise * jax.random.normal(own, true.shape) * jnp.repeat(where, count, axis=1)
                good, bad = judges[n](true), judges[n](true + noise)
                hinges |= {f"true_{n}": nn.relu(config.margin - good).mean()}
                hinges |= {f"fake_{n}": nn.relu(config.margin + bad).mean()}
                shares |= {f"p_true_{n}": (good >= config.margin).mean(), f"p_fake_{n}": (bad < -config.margin).mean()}
                outputs[n] = true.mean(0)
            return hinges, shares, outputs

        tokens = tokens_of(variables.get("frozen"), inputs_of(batch))
        hinges, shares, outputs = jax.vmap(image_losses)(tokens, hashed_keys(keys))
        hinges, shares = jax.tree.map(batch.mean, (hinges, shares))
        return Loss(functools.reduce(jnp.add, hinges.values()), hinges | shares, outputs)

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        judges = discriminators(variables)
        tokens = tokens_of(variables.get("frozen"), inputs_of(batch))
        errors = {n: jax.vmap(lambda x, n=n: -judges[n](adapt(variables, n, x)))(x) for n, x in tokens.items()}
        total = functools.reduce(jnp.add, errors.values())
        side = round(total.shape[1] ** 0.5)
        enlarge = smoothing_matrix(side, config.smoothing)
        smooth = jnp.einsum("ij,bjk,lk->bil", enlarge, total.reshape(-1, side, side), enlarge)
        maps = upsample_errors({m: nn.softplus(error) for m, error in errors.items()})
        return maps._replace(published=nn.softplus(smooth), score=nn.softplus(total.max(-1)))

    def activations(variables: Variables, batch: Batch) -> dict[str, Any]:
        layers: dict[str, Any] = {}
        for n, tokens in tokens_of(variables.get("frozen"), inputs_of(batch)).items():
            adapted = jax.vmap(lambda x, n=n: adapt(variables, n, x))(tokens).mean(1)
            own = jnp.split(adapted, len(judged[n]), axis=-1)
            layers |= {f"adaptor_{m}": {"mean": x} for m, x in zip(judged[n], own, strict=True)}
            layers[f"hidden_{n}"] = {"mean": adapted @ variables["params"][f"hidden_{n}"]["kernel"]}
        return layers

    return Method(
        init,
        predict,
        loss,
        observe=observe,
        optimizer=functools.partial(make_optimizer, config),
        frozen=(lambda: pretrained.load(backbone.name, backbone.weights)) if released else dict,
        activations=activations,
    )


def _check(config: ConfigDict) -> None:
    for key, known in (("aggregation", ("mean", "release")), ("fusion", ("late", "early"))):
        if config[key] not in known:
            raise UserError(f'config.simplenet.{key} is "{config[key]}"; use {" or ".join(known)}.')


def noisy_share(modalities: int) -> float:
    """Return the share of noisy copies of tokens in which the noise is in a certain one of one or two modalities."""
    return 1.0 if modalities == 1 else 2 / 3


def noisy_channels(key: Key[Array, ""], tokens: int, modalities: int) -> Bool[Array, "p m"]:
    """Draw which modalities of each token get noise: the only one; or the first, the second or both alike."""
    if modalities == 1:
        return jnp.ones((tokens, 1), bool)
    left_out = jax.random.randint(key, (tokens, 1), 0, 3)  # 2: none
    return left_out != jnp.arange(2)[None]


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


def released_tokens(levels: Sequence[Float[Array, "b i j d"]], size: int) -> Float[Array, "b p c"]:
    """Aggregate neighbours as the authors' release does, which mixes neighbouring channels.

    The 3 x 3 neighbours of each token (zero outside of the grid) are one vector, the neighbours of a channel side by
    side. Averages of consecutive elements reduce it to `size`, and those of all levels together again.

    Args:
        levels: Features, the finest first, to whose grid all are resized (half-pixel centres).
        size: Channels of the tokens.
    """
    batch, rows, columns, _ = levels[0].shape
    parts = []
    for x in levels:
        padded = jnp.pad(x, [(0, 0), (1, 1), (1, 1), (0, 0)])
        patches = jnp.stack(taps(padded, 3, 1), axis=-1).reshape(*x.shape[:3], -1)
        reduced = average_consecutive(patches, size)  # before it is enlarged: both are linear
        parts.append(jax.image.resize(reduced, (batch, rows, columns, size), "bilinear", antialias=False))
    return average_consecutive(jnp.concatenate(parts, axis=-1), size).reshape(batch, -1, size)


def average_consecutive(x: Float[Array, "*b c"], size: int) -> Float[Array, "*b s"]:
    """Average elements i c / size (rounded down) to (i + 1) c / size (rounded up), as adaptive pooling does."""
    count = x.shape[-1]
    first, end = np.arange(size) * count // size, -(-(np.arange(size) + 1) * count // size)
    places = first[:, None] + np.arange((end - first).max())
    weights = (places < end[:, None]) / (end - first)[:, None]
    return jnp.einsum("...sk,sk->...s", jnp.take(x, np.minimum(places, count - 1), axis=-1), weights.astype(np.float32))


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
