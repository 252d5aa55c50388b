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
from iumad_jax.methods import mahalanobis
from iumad_jax.methods.error_maps import norm, upsample_errors
from iumad_jax.methods.inputs import store_inputs
from iumad_jax.methods.latents import Difference, Space
from iumad_jax.methods.method import Loss, Method, of_objects, with_object, without_objects
from iumad_jax.methods.network import apply_in
from iumad_jax.models.diffusion import LEVELS_OF_NOISE, Sizes, add_noise, ddim, sampling_levels, target
from iumad_jax.models.hashed_bits import hashed_keys
from iumad_jax.runtime.in_batches import predict_in_batches
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Keys, Modality, Scalars, Variables

Latent = Float[Array, "h w c"]
View = Float[Array, "i j k"]  # what the guide sees of an image: its latent, or the normalised image

_ROWS = 16  # of the inputs of a layer, of an image and a step of sampling, that strategies get
OF_THE_LEVEL = {"time_embedding", "time_emb_proj"}


def sizes_of(config: ConfigDict) -> Sizes:
    """Return the sizes in `config.diffusion`.

    Raises:
        UserError: If the levels are not numbers, or heads or groups do not divide their channels.
    """
    settings = config.diffusion
    if settings.space not in ("features", "pixels"):
        raise UserError(f'config.diffusion.space is "{settings.space}"; use features or pixels.')
    try:
        channels = tuple(map(int, settings.channels.split(",")))
        attending = tuple(map(int, filter(None, settings.attending.split(","))))
    except ValueError as error:
        raise UserError(
            f'config.diffusion.channels is "{settings.channels}" and config.diffusion.attending is'
            f' "{settings.attending}"; use numbers with commas between them.'
        ) from error
    if not set(attending) <= set(range(len(channels))):
        known = ",".join(map(str, range(len(channels))))
        raise UserError(f'config.diffusion.attending is "{settings.attending}"; use some of {known}.')
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
    cross = settings.space == "pixels"
    return Sizes(
        channels, settings.blocks, attending, settings.heads, settings.groups, settings.latent, cross, settings.remat
    )


def from_guided(
    network: Any,
    space: Space,
    config: ConfigDict,
    *,
    difference: Difference,
    score: Callable[[Float[Array, "b m m"]], Float[Array, " b"]],
    corrupt: Callable[[Key[Array, ""], Any], Any] = lambda key, view: view,
    begin: Callable[[Any], Any] = lambda params: params,
    trained: Callable[[tuple[str, ...]], bool] = lambda path: True,
) -> Method:
    """Build the method of a guided UNet for a run's config, of which it uses `diffusion`, `model.dtype` and `modality`.

    Every modality has a network of its own. The error of a modality is the Mahalanobis distance of the difference of
    latents from those of the object's training images; before any are fitted, its norm. The published error is the sum
    of the differences over levels and modalities. In pixels, only this one is used.

    Args:
        network: Flax module for one image. `look(view, deterministic)` computes once what it needs of the image; the
            call (latent with noise, level, what it needs, context) predicts; `own_losses(clean view, what it needs)`
            returns further loss terms; `everything(latent, view, context)` runs all layers.
        space: Where diffusion takes place.
        config: Config of the run.
        difference: Published difference of features.
        score: Published image scores of anomaly maps.
        corrupt: (key, view) -> the view that the network looks at in training.
        begin: (parameters) -> parameters, once the UNet has its first weights.
        trained: (path of a parameter of the UNet) -> whether it is trained where weights were loaded.

    Raises:
        UserError: If `config.model.dtype` is unknown.
    """
    settings, modalities = config.diffusion, configs.modalities(config)
    levels, apply = sampling_levels(settings.steps, settings.start), apply_in(config.model.dtype, network)

    def init(key: PRNGKeyArray, batch: Batch) -> Variables:
        z = jnp.zeros(space.shape(batch))
        _check_sides(len(z), settings)
        context = jnp.zeros((1, settings.context)) if space.weights else None
        params = {}
        noise_key, *keys = jax.random.split(key, 1 + len(modalities))
        for m, own in zip(modalities, keys, strict=True):
            view = jax.tree.map(lambda x: jnp.zeros(x.shape[1:]), space.view(batch, m, z[None]))
            drawn = network.init(own, z, view, context, method="everything")["params"]
            if space.weights:  # which `load` will put there
                drawn |= {"unet": jax.tree.map(jnp.zeros_like, _trained(drawn["unet"], trained))}
            params[m] = drawn if space.weights else begin(drawn)
        noise = jax.random.normal(noise_key, z.shape)
        spaces = {m: space.begin(batch, m) for m in modalities}
        return {"params": params, "statistics": {"space": spaces, "noise": noise}, BY_OBJECT: ()}

    def load(variables: Variables) -> Variables:
        """Put the weights of the files in the place of the UNet's."""
        if not space.weights:
            return variables
        weights = space.weights()
        params = {}
        for m in modalities:
            begun = begin(variables["params"][m] | {"unet": weights["unet"]})
            params[m] = begun | {"unet": _trained(weights["unet"], trained)}
        return variables | {"params": params, "frozen": rest_of(weights)}

    def frozen() -> Any:
        return rest_of(space.weights()) if space.weights else {}

    def rest_of(weights: dict[str, Any]) -> dict[str, Any]:
        """Return what is not trained."""
        return weights | {"unet": _trained(weights["unet"], lambda path: not trained(path))}

    def observe(variables: Variables, batch: Batch, step: int) -> Variables:
        if step > 0:
            return variables
        statistics = variables["statistics"]
        spaces = {m: space.observe(statistics["space"][m], batch, m) for m in modalities}
        return variables | {"statistics": statistics | {"space": spaces}}

    def own_weights(variables: Variables, m: Modality) -> tuple[Variables, Any]:
        """Return all weights of a modality's network, and the context."""
        params = variables["params"][m]
        if not space.weights:
            return {"params": params}, None
        unet = flatten_dict(params["unet"]) | flatten_dict(variables["frozen"]["unet"])
        return {"params": params | {"unet": unflatten_dict(unet)}}, jnp.asarray(variables["frozen"]["context"])

    def loss(variables: Variables, batch: Batch, keys: Keys) -> Loss:
        def image_losses(own: Variables, context: Any, z: Latent, view: Any, key: Key[Array, ""]) -> Scalars:
            level_key, noise_key, corruption_key, dropout_key = jax.random.split(key, 4)
            level = jax.random.randint(level_key, (), 0, LEVELS_OF_NOISE)
            noise = jax.random.normal(noise_key, z.shape)
            corrupted = corrupt(corruption_key, view)
            seen = apply(own, corrupted, False, method="look", rngs={"dropout": dropout_key})
            output = apply(own, add_noise(z, noise, level), level, seen, context)
            error = jnp.mean(jnp.square(target(z, noise, level, settings.prediction) - output))
            return {"denoising": error} | apply(own, view, seen, method="own_losses")

        terms: Scalars = {}
        for m in modalities:  # with the same noise and the same corruption
            z = space.encode(variables, batch, m, jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys))
            one_image = functools.partial(image_losses, *own_weights(variables, m))
            of_images = jax.vmap(one_image)(z, space.view(batch, m, z), hashed_keys(keys))
            terms |= {f"{name}_{m}": batch.mean(values) for name, values in of_images.items()}
        return Loss(functools.reduce(jnp.add, terms.values()), terms)

    def sample(
        weights: tuple[Variables, Any], noise: Any, z: Latent, view: Any
    ) -> tuple[Latent, Float[Array, "s h w c"], Any]:
        """Return the rebuilt latent, what the network received at each step, and what it saw of the image."""
        own, context = weights
        seen = apply(own, view, True, method="look")

        def predict(z: Latent, level: Array) -> Latent:
            return apply(own, z, level, seen, context)

        start = add_noise(z, jnp.asarray(noise), settings.start)
        rebuilt, received = ddim(predict, start, levels, settings.prediction)
        return rebuilt, received, seen

    def rebuild(variables: Variables, batch: Batch) -> dict[Modality, tuple[Array, Array]]:
        """Return the latents of the images, and the rebuilt ones."""
        both = {}
        for m in modalities:
            z = space.encode(variables, batch, m, None)
            one_image = functools.partial(sample, own_weights(variables, m), variables["statistics"]["noise"])
            both[m] = z, jax.vmap(lambda z, view, one=one_image: one(z, view)[0])(z, space.view(batch, m, z))
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
        of_modality = {m: space.published(variables, batch, m, *pair, difference) for m, pair in both.items()}
        published = functools.reduce(jnp.add, of_modality.values())
        if not space.fits:
            return ErrorMaps(of_modality, None, published, score(published))
        changes = {m: _tokens(rebuilt - z) for m, (z, rebuilt) in both.items()}
        errors = {m: norm(change) for m, change in changes.items()}
        if variables.get(BY_OBJECT):
            gaussians = of_objects(variables[BY_OBJECT], batch.object_id)
            errors = {m: jax.vmap(mahalanobis.distances)(change, gaussians[m]) for m, change in changes.items()}
        return upsample_errors(errors)._replace(published=published, score=score(published))

    def stored(collection: str, variables: Variables, batch: Batch) -> dict[str, Any]:
        """Return what the layers of an image's network store while it samples, by modality and layer."""

        def of_image(m: Modality, z: Latent, view: Any) -> dict[str, Any]:
            own, context = own_weights(variables, m)
            _, received, seen = sample((own, context), variables["statistics"]["noise"], z, view)
            layers = {path[:-1] for path in flatten_dict(variables["params"][m])}

            def at_step(inputs: tuple[Array, Latent, Array]) -> dict[str, Any]:
                step, z, level = inputs
                _, state = apply(own, z, level, seen, context, mutable=[collection])
                return _some_rows(state.get(collection, {}), layers, step)

            by_step = jax.lax.map(at_step, (jnp.arange(len(levels)), received, jnp.asarray(levels)))
            _, state = apply(own, view, True, method="look", mutable=[collection])
            once = _some_rows(state.get(collection, {}), layers, 0)  # of other parts of the network
            return jax.tree.map(_joined, by_step) | once

        with nn.intercept_methods(store_inputs):
            z = {m: space.encode(variables, batch, m, None) for m in modalities}
            return {m: jax.vmap(functools.partial(of_image, m))(z[m], space.view(batch, m, z[m])) for m in modalities}

    return Method(
        init,
        predict,
        loss,
        start=load,
        observe=observe,
        fit=fit if space.fits else Method.fit,
        frozen=frozen,
        arrange=mahalanobis.arrange if space.fits else Method.arrange,
        activations=functools.partial(stored, "activations"),
        inputs=functools.partial(stored, "inputs"),
    )


def _tokens(z: Float[Array, "b h w c"]) -> Float[Array, "b p c"]:
    return z.reshape(len(z), -1, z.shape[-1])


def _trained(unet: Any, trained: Callable[[tuple[str, ...]], bool]) -> Any:
    """Return the parameters of a UNet that are trained."""
    return unflatten_dict({path: x for path, x in flatten_dict(unet).items() if trained(path)})


def _some_rows(stored: dict[str, Any], trained: set[tuple[str, ...]], step: Array | int) -> dict[str, Any]:
    """Return some rows of each trained layer, others at each step of sampling.

    Layers that see the level of noise instead of an image are left out.
    """

    def some(x: Float[Array, "*n d"]) -> Float[Array, "*k d"]:
        if x.ndim == 1:  # a mean
            return x
        order = jnp.asarray(np.random.default_rng(0).permutation(len(x)))  # a stride would keep few columns
        count = min(_ROWS, len(x))
        return x[order[(step * count + jnp.arange(count)) % len(x)]]

    flat = flatten_dict(stored)
    return unflatten_dict(
        {path: some(x) for path, x in flat.items() if path[:-1] in trained and not OF_THE_LEVEL & set(path)}
    )


def _joined(by_step: Float[Array, "s *n d"]) -> Float[Array, "*k d"]:
    """Join the rows of all steps; average what is no row."""
    return by_step.reshape(-1, by_step.shape[-1]) if by_step.ndim == 3 else by_step.mean(0)


def _check_sides(side: int, settings: ConfigDict) -> None:
    levels, key = settings.channels.count(",") + 1, "backbone.grid"
    if settings.space == "pixels":
        side, key = 8 * side, "input.size"
        levels += 3
    if -(-side // 2 ** (levels - 1)) < 2:
        raise UserError(
            f"config.{key} is {side}, of which the levels of config.diffusion.channels leave a single pixel; use a"
            " larger one or fewer levels."
        )
