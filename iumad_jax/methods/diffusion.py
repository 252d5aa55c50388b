"""`from_guided` turns a guided UNet into a method: it adds noise, sampling, errors and statistics.

An image's latent gets noise and is denoised in a few steps. What the guide does not let through, defects above all, is
replaced by what good images have. The error is the difference between the image and the result.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, Key, PRNGKeyArray
from ml_collections import ConfigDict

from iumad_jax import config as configs
from iumad_jax.errors import UserError
from iumad_jax.methods import latents, mahalanobis
from iumad_jax.methods.error_maps import norm, upsample_errors
from iumad_jax.methods.inputs import store_inputs
from iumad_jax.methods.method import Loss, Method, of_objects, with_object, without_objects
from iumad_jax.models.diffusion import LEVELS_OF_NOISE, Sizes, add_noise, ddim, sampling_levels, target
from iumad_jax.models.hashed_bits import hashed_keys
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Keys, Modality, Scalars, Tokens, Variables

Latent = Float[Array, "g g c"]

_ROWS = 16  # of the inputs of a layer, of an image and a step of sampling, that strategies get
_OF_THE_LEVEL = {"time_embedding", "time_emb_proj"}


def sizes_of(settings: ConfigDict) -> Sizes:
    """Return the sizes in `config.diffusion`.

    Raises:
        UserError: If the levels are not numbers, or heads or groups do not divide their channels.
    """
    try:
        channels = tuple(map(int, settings.channels.split(",")))
        attending = tuple(map(int, filter(None, settings.attending.split(","))))
    except ValueError as error:
        raise UserError(
            f'config.diffusion.channels is "{settings.channels}" and config.diffusion.attending is'
            f' "{settings.attending}"; use numbers with commas between them.'
        ) from error
    for key in ("heads", "groups"):
        if any(width < 2 or width % settings[key] for width in channels):
            raise UserError(
                f"config.diffusion.{key} is {settings[key]}, which does not divide {settings.channels}, the value of"
                " config.diffusion.channels."
            )
    if settings.latent > channels[0]:
        raise UserError(
            f"config.diffusion.latent is {settings.latent}, more than the {channels[0]} channels of the finest level,"
            " which could not tell noise apart from it; use at most as many."
        )
    if settings.prediction not in ("noise", "v"):
        raise UserError(f'config.diffusion.prediction is "{settings.prediction}"; use noise or v.')
    return Sizes(
        channels, settings.blocks, attending, settings.heads, settings.groups, settings.latent, False, settings.remat
    )


def from_guided(
    network: Any,
    config: ConfigDict,
    *,
    difference: Callable[[Tokens, Tokens], Float[Array, " p"]],
    score: Callable[[Float[Array, "b m m"]], Float[Array, " b"]],
    corrupt: Callable[[Key[Array, ""], Latent], Latent] = lambda key, z: z,
    begin: Callable[[Any], Any] = lambda params: params,
) -> Method:
    """Build the method of a guided UNet for a run's config, of which it uses `diffusion`, `backbone` and `modality`.

    Every modality has a network of its own. The error of a modality is the Mahalanobis distance of the difference of
    latents from those of the object's training images; before any are fitted, its norm. As published, it is the sum of
    the differences at the backbone's levels, and that of two modalities the sum of both.

    Args:
        network: Flax module for one image. `look(latent, deterministic)` computes once what it needs of the image; the
            call (latent with noise, level, what it needs) predicts; `own_losses(clean latent, what it needs)` returns
            further loss terms.
        config: Config of the run.
        difference: Published difference of features, token by token.
        score: Published image scores of anomaly maps.
        corrupt: (key, latent) -> the latent that the network looks at in training.
        begin: (parameters) -> parameters, right after they are drawn.
    """
    settings, modalities = config.diffusion, configs.modalities(config)
    levels = sampling_levels(settings.steps, settings.start)
    channels = np.cumsum(latents.channels_of_levels(config.backbone))[:-1]

    def init(key: PRNGKeyArray, batch: Batch) -> Variables:
        side = round(batch.features[modalities[0]].shape[1] ** 0.5)
        _check_sides(side, settings.channels)
        z = jnp.zeros((side, side, settings.latent))
        params, spaces = {}, {}
        for m, own in zip(modalities, jax.random.split(key, len(modalities)), strict=True):
            params[m] = begin(network.init(own, z, method="everything")["params"])
            spaces[m] = latents.no_space(batch.features[m].shape[-1], settings.latent)
        noise = jax.random.normal(jax.random.fold_in(key, 1), z.shape)
        return {"params": params, "statistics": {"space": spaces, "noise": noise}, BY_OBJECT: ()}

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if step > 0:
            return variables
        statistics = variables["statistics"]
        spaces = {m: latents.observe(statistics["space"][m], np.asarray(batch.features[m])) for m in modalities}
        return variables | {"statistics": statistics | {"space": spaces}}

    def encoded(variables: Variables, batch: Batch, m: Modality) -> Float[Array, "b g g c"]:
        space = variables["statistics"]["space"][m]
        return jax.vmap(functools.partial(latents.encode, space))(batch.features[m])

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        def image_losses(m: Modality, z: Latent, key: Key[Array, ""]) -> Scalars:
            own = {"params": variables["params"][m]}
            level_key, noise_key, corruption_key, dropout_key = jax.random.split(key, 4)
            level = jax.random.randint(level_key, (), 0, LEVELS_OF_NOISE)
            noise = jax.random.normal(noise_key, z.shape)
            corrupted = corrupt(corruption_key, z)
            seen = network.apply(own, corrupted, False, method="look", rngs={"dropout": dropout_key})
            output = network.apply(own, add_noise(z, noise, level), level, seen)
            error = jnp.mean(jnp.square(target(z, noise, level, settings.prediction) - output))
            return {"denoising": error} | network.apply(own, z, seen, method="own_losses")

        terms: Scalars = {}
        for m in modalities:  # with the same noise and the same corruption
            of_images = jax.vmap(functools.partial(image_losses, m))(encoded(variables, batch, m), hashed_keys(keys))
            terms |= {f"{name}_{m}": batch.mean(values) for name, values in of_images.items()}
        return Loss(functools.reduce(jnp.add, terms.values()), terms)

    def sample(own: Variables, statistics: Any, z: Latent) -> tuple[Latent, Float[Array, "s g g c"], Any]:
        """Return the rebuilt latent, what the network received at each step, and what it saw of the image."""
        seen = network.apply(own, z, True, method="look")
        start = add_noise(z, jnp.asarray(statistics["noise"]), settings.start)

        def predict(z: Latent, level: Array) -> Latent:
            return network.apply(own, z, level, seen)

        rebuilt, received = ddim(predict, start, levels, settings.prediction)
        return rebuilt, received, seen

    def rebuild(variables: Variables, batch: Batch) -> dict[Modality, tuple[Array, Array]]:
        """Return the latents of the images, and the rebuilt ones."""
        both = {}
        for m in modalities:
            own, z = {"params": variables["params"][m]}, encoded(variables, batch, m)
            both[m] = z, jax.vmap(lambda z, own=own: sample(own, variables["statistics"], z)[0])(z)
        return both

    @jax.jit
    def residuals(variables: Variables, batch: Batch) -> dict[Modality, Float[Array, "b p c"]]:
        return {m: _tokens(rebuilt - z) for m, (z, rebuilt) in rebuild(variables, batch).items()}

    def fit(variables: Variables, batch: Batch, object_id: int, further: bool) -> Variables:
        earlier = variables[BY_OBJECT][object_id] if further else None  # of residuals with the weights at that time
        weights = without_objects(variables)
        parts = (predict_in_batches(residuals, weights, part) for part in mahalanobis.in_parts(batch))
        return with_object(variables, object_id, mahalanobis.fit(parts, earlier))

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        both = rebuild(variables, batch)
        changes = {m: _tokens(rebuilt - z) for m, (z, rebuilt) in both.items()}
        errors = {m: norm(change) for m, change in changes.items()}
        if variables.get(BY_OBJECT):
            gaussians = of_objects(variables[BY_OBJECT], batch.object_id)
            errors = {m: jax.vmap(mahalanobis.distances)(change, gaussians[m]) for m, change in changes.items()}

        def published(m: Modality, z: Latent, rebuilt: Latent) -> Float[Array, " p"]:
            space = variables["statistics"]["space"][m]
            pair = (jnp.split(latents.decode(space, x), channels, axis=-1) for x in (z, rebuilt))
            return functools.reduce(jnp.add, map(difference, *pair))

        of_modality = [jax.vmap(functools.partial(published, m))(*pair) for m, pair in both.items()]
        maps = upsample_errors(errors, None, functools.reduce(jnp.add, of_modality))
        return maps._replace(score=None if maps.published is None else score(maps.published))

    def stored(collection: str, variables: Variables, batch: Batch) -> dict[str, Any]:
        """Return what the layers of an image's network store while it samples, by modality and layer."""

        def of_image(m: Modality, z: Latent) -> dict[str, Any]:
            own = {"params": variables["params"][m]}
            _, received, seen = sample(own, variables["statistics"], z)

            def at_step(received_and_level: tuple[Latent, Array]) -> dict[str, Any]:
                _, state = network.apply(own, *received_and_level, seen, mutable=[collection])
                return _some_rows(state.get(collection, {}))

            by_step = jax.lax.map(at_step, (received, jnp.asarray(levels)))
            _, state = network.apply(own, z, True, method="look", mutable=[collection])
            return jax.tree.map(_joined, by_step) | _some_rows(state.get(collection, {}))

        with nn.intercept_methods(store_inputs):
            return {m: jax.vmap(functools.partial(of_image, m))(encoded(variables, batch, m)) for m in modalities}

    return Method(
        init,
        predict,
        loss,
        observe=observe,
        fit=fit,
        arrange=mahalanobis.arrange,
        activations=functools.partial(stored, "activations"),
        inputs=functools.partial(stored, "inputs"),
    )


def _tokens(z: Float[Array, "b g g c"]) -> Float[Array, "b p c"]:
    return z.reshape(len(z), -1, z.shape[-1])


def _some_rows(stored: dict[str, Any]) -> dict[str, Any]:
    """Return evenly spaced rows of each layer, without the layers that see the level of noise instead of the image."""
    flat = {path: x for path, x in flatten_dict(stored).items() if not _OF_THE_LEVEL & set(path)}
    return unflatten_dict({path: x[:: -(-len(x) // _ROWS)] if x.ndim == 2 else x for path, x in flat.items()})


def _joined(by_step: Float[Array, "s *n d"]) -> Float[Array, "*k d"]:
    """Join the rows of all steps; average what is no row."""
    return by_step.reshape(-1, by_step.shape[-1]) if by_step.ndim == 3 else by_step.mean(0)


def _check_sides(side: int, channels: str) -> None:
    levels = channels.count(",") + 1
    if -(-side // 2 ** (levels - 1)) < 2:
        raise UserError(
            f"config.backbone.grid is {side}, of which the {levels} levels of config.diffusion.channels leave a single"
            " pixel; use a larger grid or fewer levels."
        )
