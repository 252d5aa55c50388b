"""`from_network` makes a method of a network for one image: batches, z-scores, the sum and means of its losses."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from iumad_jax.methods.error_maps import maps_of
from iumad_jax.methods.method import Loss, Method
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.shapes import Batch, Condition, ErrorMaps, Keys, Logits, Modality, Scalars, Tokens, Variables

Errors = dict[str, Float[Array, " p"]]  # by modality or group of modalities


def jitter(key: PRNGKeyArray, tokens: Tokens, *, scale: float, probability: float) -> Tokens:
    """Token t becomes t + n * (|t|_2 / f) * scale with n ~ N(0, I), with this probability, drawn for each image.

    UniAD's jitter, which is drawn once for a whole batch.
    """
    chance, noise = jax.random.split(key)
    strength = scale * jnp.linalg.norm(tokens, axis=-1, keepdims=True) / tokens.shape[-1]
    applied = jax.random.bernoulli(chance, probability)
    return tokens + applied * strength * jax.random.normal(noise, tokens.shape)


def reconstruct(
    network: Any,
    modality: Modality,
    tokens: Tokens,
    condition: Condition | None,
    *,
    deterministic: bool,
    hide_neighbours: bool = False,
) -> tuple[Float[Array, "p d"], ...]:
    """Within a network that has a `config`: the decoder outputs of a modality's transformer for jittered tokens."""
    config = network.config
    transformer = ReconstructionTransformer(
        round(tokens.shape[0] ** 0.5),
        config.width,
        config.heads,
        config.layers,
        config.hidden,
        config.dropout,
        hide_neighbours,
        name=f"reconstruction_{modality}",
    )
    if not deterministic:
        key = network.make_rng("jitter")
        tokens = jitter(key, tokens, scale=config.jitter.scale, probability=config.jitter.probability)
    return transformer(tokens, condition, deterministic=deterministic)


def from_network(
    network: Any,
    config: ConfigDict,
    modalities: tuple[Modality, ...],
    losses: Callable[[Any, dict[Modality, Tokens], Array], Scalars],
    explain: Callable[[Any, dict[Modality, Tokens]], tuple[Errors, dict[Modality, Logits]]],
) -> Method:
    """The method of a network.

    Args:
        network: a flax module that takes the tokens and images of one image, by modality, and returns anything and the
            decoder outputs of each modality.
        config: `config.model`.
        modalities: what the network takes.
        losses: from the network's first output, the features (the target) and the object's number to the loss's terms.
        explain: from the network's first output and the features to the errors at each token, by modality or group of
            modalities, and, by modality, what object the image shows (none if the network does not tell).
    """

    def normalised(variables: Variables, batch: Batch) -> dict[Modality, Float[Array, "b p f"]]:
        return (
            {m: standardise(batch.features[m], variables["statistics"][m]) for m in modalities}
            if config.standardise
            else batch.features
        )

    def init(key: PRNGKeyArray, batch: Batch) -> Variables:
        first = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
        variables = network.init(key, first.features, first.images, deterministic=True)
        moments = {m: no_moments(batch.features[m].shape[-1]) for m in modalities} if config.standardise else {}
        return {"params": variables["params"], "statistics": variables.get("statistics", {}) | moments}

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if not config.standardise or step > 0:
            return variables
        seen = variables["statistics"]
        return variables | {"statistics": seen | {m: merge_moments(seen[m], batch.features[m]) for m in modalities}}

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        def of_one_image(features: Any, images: Any, object_id: Array, key: PRNGKeyArray) -> tuple[Scalars, Any]:
            rngs = dict(zip(("jitter", "dropout"), jax.random.split(key), strict=True))
            output, decoder = network.apply(variables, features, images, deterministic=False, rngs=rngs)
            # IUF shapes the first three decoder layers.
            means = {f"{m}_{i}": x.mean(0) for m, outputs in decoder.items() for i, x in enumerate(outputs[:3])}
            return losses(output, features, object_id), means

        features = normalised(variables, batch)
        terms, outputs = jax.vmap(of_one_image)(features, batch.images, batch.object_id, keys)
        terms = jax.tree.map(batch.mean, terms)
        return Loss(sum(terms.values()), terms, outputs)

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        def of_one_image(features: Any, images: Any) -> tuple[Errors, Logits | None]:
            output, _ = network.apply(variables, features, images, deterministic=True)
            errors, logits = explain(output, features)
            told = [nn.log_softmax(one) for one in logits.values()]
            return errors, sum(told[1:], start=told[0]) if told else None

        return maps_of(*jax.vmap(of_one_image)(normalised(variables, batch), batch.images))

    def activations(variables: Variables, batch: Batch) -> dict[str, Any]:
        def of_one_image(features: Any, images: Any) -> dict[str, Any]:
            _, state = network.apply(variables, features, images, deterministic=True, mutable=["activations"])
            return state.get("activations", {})

        return jax.vmap(of_one_image)(normalised(variables, batch), batch.images)

    return Method(init, predict, loss, observe=observe, activations=activations)
