"""`from_network` turns a network for one image into a method: it adds batching, z-scores and averaged loss terms."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, PRNGKeyArray
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods import mahalanobis
from iumad_jax.methods.error_maps import norm, upsample_errors
from iumad_jax.methods.inputs import store_inputs
from iumad_jax.methods.method import Loss, Method, of_objects, with_object, without_objects
from iumad_jax.methods.moments import merge_moments, no_moments, standardise
from iumad_jax.models.hashed_bits import hashed_keys
from iumad_jax.models.object_head import grow_heads
from iumad_jax.models.reconstruction import ReconstructionTransformer
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import BY_OBJECT, Batch, Condition, ErrorMaps, Keys, Logits, Modality, Scalars, Tokens, Variables

EXPONENTS = {"A_log", "dt_bias"}  # names of parameters whose exponential is taken

Residuals = dict[Modality, Tokens]  # rebuilt features minus true ones


def jitter(key: PRNGKeyArray, tokens: Tokens, *, scale: float, probability: float) -> Tokens:
    """Replace each token t of an image by t + n * (|t|_2 / f) * scale with n ~ N(0, I), as UniAD does.

    With probability 1 - `probability` the image is left unchanged. UniAD decides this once for a whole batch.
    """
    apply_key, noise_key = jax.random.split(key)
    strength = scale * jnp.linalg.norm(tokens, axis=-1, keepdims=True) / tokens.shape[-1]
    applied = jax.random.bernoulli(apply_key, probability)
    return (tokens + applied * strength * jax.random.normal(noise_key, tokens.shape)).astype(tokens.dtype)


def apply_in(dtype: str, network: Any) -> Callable[..., Any]:
    """Return `network.apply` with weights and inputs converted to a dtype, and float32 outputs.

    Parameters of the scan that are exponents stay float32.

    Raises:
        UserError: If `dtype`, the value of `config.model.dtype`, is unknown.
    """
    if dtype not in ("float32", "bfloat16"):
        raise UserError(f'config.model.dtype is "{dtype}"; use float32 or bfloat16.')

    def convert(tree: Any, to: Any) -> Any:
        def of_leaf(x: Any) -> Any:
            return x.astype(to) if jnp.issubdtype(jnp.result_type(x), jnp.floating) else x

        return jax.tree.map(of_leaf, tree)

    def apply(variables: Variables, *inputs: Any, **options: Any) -> Any:
        params = jax.tree.map_with_path(
            lambda path, leaf: leaf if path[-1].key in EXPONENTS else leaf.astype(dtype), variables["params"]
        )
        outputs = network.apply(variables | {"params": params}, *convert(inputs, dtype), **options)
        return convert(outputs, jnp.float32)

    def apply_to(variables: Variables, *inputs: Any, **options: Any) -> Any:
        return (network.apply if dtype == "float32" else apply)(without_objects(variables), *inputs, **options)

    return apply_to


def reconstruct(
    network: Any,
    modality: Modality,
    tokens: Tokens,
    condition: Condition | None,
    *,
    deterministic: bool,
    hide_neighbours: bool = False,
) -> tuple[Float[Array, "p d"], ...]:
    """Run a modality's reconstruction transformer on (jittered) tokens, and return the outputs of its decoder layers.

    Must be called within `__call__` of a network whose attribute `config` is `config.model`.
    """
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
    residuals_and_logits: Callable[[Any, dict[Modality, Tokens]], tuple[Residuals, dict[Modality, Logits]]],
) -> Method:
    """Build the method of a network.

    Args:
        network: Flax module that takes the tokens and images of one image, by modality, and returns an output of any
            type and the outputs of the decoder layers by modality.
        config: `config.model`.
        modalities: Modalities that the network takes.
        losses: (output, features, object id) -> loss terms of one image. The features are the target.
        residuals_and_logits: (output, features) -> residuals of one image and logits of the object, both by modality
            (no logits if the network does not recognise objects). The error of a modality is the Mahalanobis distance
            of its residual from those of the object's training images; before any are fitted, its norm. As published,
            errors are norms of the residuals of all modalities together.

    Raises:
        UserError: If `config.dtype` is unknown.
    """
    apply = apply_in(config.dtype, network)

    def normalised(variables: Variables, batch: Batch) -> dict[Modality, Float[Array, "b p f"]]:
        return (
            {m: standardise(batch.features[m], variables["statistics"][m]) for m in modalities}
            if config.standardise
            else batch.features
        )

    def init(key: PRNGKeyArray, batch: Batch) -> Variables:
        image = jax.tree.map(lambda array: jnp.asarray(array[0]), batch)
        variables = network.init(key, image.features, image.images, deterministic=True)
        moments = {m: no_moments(batch.features[m].shape[-1]) for m in modalities} if config.standardise else {}
        statistics = variables.get("statistics", {}) | moments
        return {"params": variables["params"], "statistics": statistics, BY_OBJECT: ()}

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if not config.standardise or step > 0:
            return variables
        statistics = variables["statistics"]
        moments = {m: merge_moments(statistics[m], batch.features[m]) for m in modalities}
        return variables | {"statistics": statistics | moments}

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        def image_losses(features: Any, images: Any, object_id: Array, key: PRNGKeyArray) -> tuple[Scalars, Any]:
            rngs = dict(zip(("jitter", "dropout"), jax.random.split(key), strict=True))
            output, decoder = apply(variables, features, images, deterministic=False, rngs=rngs)
            # IUF's strategy compresses the outputs of the first three decoder layers.
            means = {f"{m}_{i}": x.mean(0) for m, outputs in decoder.items() for i, x in enumerate(outputs[:3])}
            return losses(output, features, object_id), means

        features = normalised(variables, batch)
        terms, outputs = jax.vmap(image_losses)(features, batch.images, batch.object_id, hashed_keys(keys))
        terms = jax.tree.map(batch.mean, terms)
        return Loss(sum(terms.values()), terms, outputs)

    def residuals(
        variables: Variables, batch: Batch
    ) -> tuple[dict[Modality, Float[Array, "b p f"]], Float[Array, "b k"] | None]:
        def image_residuals(features: Any, images: Any) -> tuple[Residuals, Logits | None]:
            output, _ = apply(variables, features, images, deterministic=True)
            by_modality, logits = residuals_and_logits(output, features)
            log_probabilities = [nn.log_softmax(x) for x in logits.values()]
            return by_modality, sum(log_probabilities[1:], start=log_probabilities[0]) if log_probabilities else None

        return jax.vmap(image_residuals)(normalised(variables, batch), batch.images)

    jitted_residuals = jax.jit(residuals)

    def fit(variables: Variables, batch: Batch, object_id: int, further: bool) -> Variables:
        earlier = variables[BY_OBJECT][object_id] if further else None  # of residuals with the weights at that time
        weights = without_objects(variables)
        parts = (predict_in_batches(jitted_residuals, weights, part)[0] for part in mahalanobis.in_parts(batch))
        return with_object(variables, object_id, mahalanobis.fit(parts, earlier))

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        by_modality, object_logits = residuals(variables, batch)
        norms = {m: norm(residual) for m, residual in by_modality.items()}
        errors, published = norms, norm(jnp.stack(list(norms.values()), axis=-1))
        if variables.get(BY_OBJECT):
            gaussians = of_objects(variables[BY_OBJECT], batch.object_id)
            errors = {m: jax.vmap(mahalanobis.distances)(x, gaussians[m]) for m, x in by_modality.items()}
        return upsample_errors(errors, object_logits, published)

    def activations(variables: Variables, batch: Batch) -> dict[str, Any]:
        def image_activations(features: Any, images: Any) -> dict[str, Any]:
            _, state = apply(variables, features, images, deterministic=True, mutable=["activations"])
            return state.get("activations", {})

        return jax.vmap(image_activations)(normalised(variables, batch), batch.images)

    def inputs(variables: Variables, batch: Batch) -> dict[str, Any]:
        def image_inputs(features: Any, images: Any) -> dict[str, Any]:
            with nn.intercept_methods(store_inputs):
                _, state = apply(variables, features, images, deterministic=True, mutable=["inputs"])
            return state["inputs"]

        return jax.vmap(image_inputs)(normalised(variables, batch), batch.images)

    return Method(
        init,
        predict,
        loss,
        grow=grow_heads,
        observe=observe,
        fit=fit,
        arrange=mahalanobis.arrange,
        activations=activations,
        inputs=inputs,
    )
