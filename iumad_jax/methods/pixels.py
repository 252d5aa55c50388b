"""The published space of DiAD and CDAD: latents of Stable Diffusion's autoencoder, read from the user's files.

Original and rebuilt images are compared by the features that the run's frozen backbone has of them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.latents import Difference, Latents, Space, feature_space, paste
from iumad_jax.methods.simplenet import smoothing_matrix
from iumad_jax.models import pretrained, stable_diffusion
from iumad_jax.models.autoencoder_kl import AutoencoderKL
from iumad_jax.models.backbone import FeatureExtractor, named
from iumad_jax.models.diffusion import PixelHint, Sizes, UNet
from iumad_jax.models.layers import resize_aligned
from iumad_jax.models.text_encoder import TextEncoder
from iumad_jax.shapes import MAP_SIZE, Batch, Keys, Modality, Variables

LEVELS = (4, 8, 16)  # strides of the features that are compared
_SCALE = 0.18215  # of latents
_REDUCTION = 8  # pixels per position of a latent
_SMOOTHING = 5 / 256 * MAP_SIZE  # standard deviation of the Gaussian filter of maps
_IMAGENET = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)  # mean and standard deviation of its images


def networks(config: ConfigDict, sizes: Sizes) -> stable_diffusion.Networks:
    """Return the networks of Stable Diffusion, in the sizes of `config.diffusion`.

    Raises:
        UserError: If the channels of the autoencoder do not fit.
    """
    settings = config.diffusion
    autoencoder = AutoencoderKL(_autoencoder_channels(settings), settings.latent, sizes.groups)
    text_encoder = TextEncoder(width=settings.context, heads=max(settings.context // 64, 1))
    return stable_diffusion.Networks(UNet(sizes), autoencoder, text_encoder)


def space_of(config: ConfigDict, sizes: Sizes) -> Space:
    """Build the space that a run's config selects; for errors see `pixel_space`."""
    return pixel_space(config, sizes) if config.diffusion.space == "pixels" else feature_space(config)


def pixel_space(config: ConfigDict, sizes: Sizes) -> Space:
    """Build the space of images for a run's config.

    Raises:
        UserError: If no weights are given or they do not fit, the size does not fit, or replay is chosen.
    """
    settings, size = config.diffusion, config.input.size
    _check(config)
    all_networks = networks(config, sizes)
    stable_diffusion.check(settings.weights, all_networks, settings.autoencoder)  # before a run begins
    autoencoder: Any = all_networks.autoencoder
    scorer = FeatureExtractor(config.backbone.name, 1, ",".join(map(str, LEVELS)))

    def normalise(images: Float[Array, "b h w 3"]) -> Float[Array, "b h w 3"]:
        return images / 127.5 - 1 if settings.pixels == "symmetric" else _by_imagenet(images)

    def encode(variables: Variables, batch: Batch, m: Modality, keys: Keys | None) -> Latents:
        params = {"params": variables["frozen"]["autoencoder"]}

        def of_image(image: Float[Array, "h w 3"], key: Any) -> Float[Array, "i j c"]:
            mean, log_variance = autoencoder.apply(params, image, method="encode")
            drawn = 0 if key is None else jnp.exp(log_variance / 2) * jax.random.normal(key, mean.shape)
            return _SCALE * (mean + drawn)

        return jax.vmap(of_image, in_axes=(0, None if keys is None else 0))(normalise(batch.images[m]), keys)

    def decode(variables: Variables, z: Latents) -> Float[Array, "b i j 3"]:
        params = {"params": variables["frozen"]["autoencoder"]}
        x = jax.vmap(lambda z: autoencoder.apply(params, z / _SCALE, method="decode"))(z)
        return (x + 1) * 127.5 if settings.pixels == "symmetric" else _from_imagenet(x)

    def published(
        variables: Variables, batch: Batch, m: Modality, z: Latents, rebuilt: Latents, difference: Difference
    ) -> Float[Array, "b m m"]:
        original = decode(variables, z) if settings.compare == "autoencoded" else batch.images[m]
        images = original, decode(variables, rebuilt)
        pairs = (scorer.apply(variables["frozen"]["scorer"], x, method="outputs") for x in images)
        maps = [resize_aligned(difference(a, b)[..., None], MAP_SIZE)[..., 0] for a, b in zip(*pairs, strict=True)]
        smooth = smoothing_matrix(MAP_SIZE, _SMOOTHING)
        return jnp.einsum("ij,bjk,lk->bil", smooth, functools.reduce(jnp.add, maps), smooth)

    def weights() -> dict[str, Any]:
        loaded = stable_diffusion.load(settings.weights, all_networks)
        if settings.autoencoder:
            loaded["autoencoder"] = stable_diffusion.load_autoencoder(settings.autoencoder, autoencoder)
        return loaded | {"scorer": pretrained.load(config.backbone.name, config.backbone.weights)}

    return Space(
        shape=lambda batch: (size // _REDUCTION, size // _REDUCTION, settings.latent),
        hint=PixelHint,
        begin=lambda batch, m: {},
        observe=lambda statistics, batch, m: statistics,
        encode=encode,
        view=lambda batch, m, z: _by_imagenet(batch.images[m]),
        corrupt=functools.partial(paste, blend=blend),
        published=published,
        fits=False,
        weights=weights,
    )


def blend(
    image: Float[Array, "h w c"], copy: Float[Array, "h w c"], inside: Bool[Array, "h w"], half: Float[Array, "2"]
) -> Float[Array, "h w c"]:
    """Shift the colours of a pasted rectangle smoothly, so that its border agrees with the image.

    This is close to Poisson blending (Perez et al., 2003). `half` is half of the rectangle's sides.
    """
    far = jnp.pad(inside, 1)
    inner = far[:-2, 1:-1] & far[2:, 1:-1] & far[1:-1, :-2] & far[1:-1, 2:]
    ring = (inside & ~inner).astype(image.dtype)[..., None]
    distances = jnp.subtract.outer(jnp.arange(len(image)), jnp.arange(len(image)))

    def blur(x: Float[Array, "h w c"]) -> Float[Array, "h w c"]:
        deviations = jnp.maximum(half / 2, 1)
        rows, columns = (jnp.exp(-jnp.square(distances / deviations[axis]) / 2) for axis in (0, 1))
        return jnp.einsum("ij,jkc,lk->ilc", rows, x, columns)

    return copy + blur(ring * (image - copy)) / jnp.maximum(blur(ring), 1e-12)


def _autoencoder_channels(settings: ConfigDict) -> tuple[int, ...]:
    numbers = settings.autoencoder_channels.split(",")
    channels = tuple(int(number) for number in numbers if number.isdecimal())
    if (
        2 ** (len(numbers) - 1) != _REDUCTION
        or len(channels) < len(numbers)
        or any(c % settings.groups for c in channels)
    ):
        raise UserError(
            f'config.diffusion.autoencoder_channels is "{settings.autoencoder_channels}"; use four multiples of'
            f" config.diffusion.groups, {settings.groups}, such as 128,256,512,512."
        )
    return channels


def _by_imagenet(images: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    mean, deviation = (jnp.broadcast_to(jnp.array(values), images.shape) for values in _IMAGENET)
    return (images - mean) / deviation


def _from_imagenet(x: Float[Array, "*b h w 3"]) -> Float[Array, "*b h w 3"]:
    mean, deviation = (jnp.broadcast_to(jnp.array(values), x.shape) for values in _IMAGENET)
    return x * deviation + mean


def _check(config: ConfigDict) -> None:
    settings = config.diffusion
    if not settings.weights:
        raise UserError(
            "config.diffusion.space is pixels, which needs the weights of Stable Diffusion 1.5; name them with"
            " --config.diffusion.weights=PATH, a .safetensors or .ckpt file or a folder, or use"
            " --config.diffusion.space=features."
        )
    for key, known in (("pixels", ("symmetric", "imagenet")), ("compare", ("autoencoded", "input"))):
        if settings[key] not in known:
            raise UserError(f'config.diffusion.{key} is "{settings[key]}"; use {" or ".join(known)}.')
    if config.input.size % _REDUCTION:
        raise UserError(
            f"config.input.size is {config.input.size}; diffusion of pixels needs a multiple of {_REDUCTION}, such as"
            " 256."
        )
    if not set(LEVELS) <= set(named(config.backbone.name).architecture.levels):
        raise UserError(
            f"config.backbone.name is {config.backbone.name}, which has no features at the strides 4, 8 and 16 by which"
            " images are compared; use a convolutional backbone, such as resnet50."
        )
    if config.continual.strategy == "replay":
        raise UserError(
            "config.continual.strategy is replay, whose images are coarse, but config.diffusion.space is pixels, which"
            " would learn their blur; use finetune, isvd or joint."
        )
