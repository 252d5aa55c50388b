"""Replay without stored images: old objects are sampled from low-rank Gaussians of their features and images.

A network that is trained end to end keeps reconstructing old objects only if it rehearses them. Since the backbone is
frozen, stored statistics of its features remain valid. Recognising objects needs images, so each sample consists of
features and a coarse image, drawn jointly.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped
from ml_collections import ConfigDict

from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.methods.method import Loss, Method, stack_objects
from iumad_jax.shapes import BY_OBJECT, Batch, Keys, Variables

Gaussian = dict[str, Any]  # of one object: count () of images; mean, directions and residual, each by part

_resize = jax.jit(jax.image.resize, static_argnums=(1, 2))


def principal_components(
    parts: dict[str, Float[np.ndarray, "n ..."]], rank: int, earlier: Gaussian | None = None
) -> Gaussian:
    """Fit a low-rank Gaussian to several views of the same images.

    Args:
        parts: Views of the same n images by name, each weighted to a total variance of 1.
        rank: Number of directions. Those beyond the number of images - 1 are zero.
        earlier: Gaussian of other images, which are included.

    Returns:
        `count`, the number of images; `mean` (...) and `directions` (rank, ...) of each part, the strongest direction
        first, each one standard deviation long. mean + z @ directions with z ~ N(0, I) has the mean of the images and,
        up to the rank, their covariance, also across parts. `residual` (channels), of each part: standard deviation of
        what the directions leave out of a channel.
    """
    weights = np.ones(len(next(iter(parts.values()))))
    if earlier:
        points = jax.tree.map(_points, earlier["mean"], earlier["directions"])
        parts = {name: np.concatenate([part, points[name]]) for name, part in parts.items()}
        added = len(next(iter(points.values())))
        weights = np.append(weights, np.full(added, earlier["count"] / added))
    count = weights.sum()
    flat = {name: np.reshape(part, (len(part), -1)) for name, part in parts.items()}
    means = {name: np.einsum("n,nd->d", weights, rows) / count for name, rows in flat.items()}
    roots = np.sqrt(weights)[:, None]
    centred = {name: (rows - means[name].astype(rows.dtype)) * roots.astype(rows.dtype) for name, rows in flat.items()}
    grams = [(rows @ rows.T).astype(np.float64) for rows in centred.values()]
    joint_gram = sum(gram / max(np.trace(gram), 1e-12) for gram in grams)
    scores = np.sqrt(count) * np.linalg.eigh(joint_gram)[1][:, ::-1][:, :rank]
    directions = {name: np.zeros((rank, rows.shape[1])) for name, rows in centred.items()}
    residual = {}
    for name, rows in centred.items():
        directions[name][: scores.shape[1]] = scores.T @ rows / count
        variance = np.square(rows).sum(0) / count - np.square(directions[name]).sum(0)
        residual[name] = variance.reshape(-1, parts[name].shape[-1]).mean(0)
        if earlier:
            residual[name] += earlier["count"] / count * np.square(earlier["residual"][name], dtype=np.float64)
    return {
        "count": np.float32(count),
        "mean": {name: means[name].reshape(part.shape[1:]).astype(np.float16) for name, part in parts.items()},
        "directions": {
            name: directions[name].reshape(rank, *part.shape[1:]).astype(np.float16) for name, part in parts.items()
        },
        "residual": {name: np.sqrt(np.maximum(r, 0)).astype(np.float16) for name, r in residual.items()},
    }


def _points(mean: Float[np.ndarray, "..."], directions: Float[np.ndarray, "r ..."]) -> Float[np.ndarray, "n ..."]:
    """Return points that have the mean and the covariance of a low-rank Gaussian: two per direction, or the mean."""
    if not len(directions):
        return np.asarray(mean, np.float32)[None]
    offsets = np.sqrt(len(directions)) * np.asarray(directions, np.float32)
    return np.asarray(mean, np.float32) + np.concatenate([offsets, -offsets])


def draw_sample(
    strategy_state: StrategyState, key: Array, with_residual: bool = False
) -> tuple[dict[str, Array], Array]:
    """Draw an old object, all being equally likely, and a sample of it.

    Args:
        strategy_state: Stacked Gaussians with room for further objects; the first `objects` are filled.
        key: Random key.
        with_residual: Whether to add noise of the standard deviation that the directions leave out.

    Returns:
        The parts of the sample (float32) and the number of its object.
    """
    object_key, sample_key = jax.random.split(key)
    capacity, rank = jax.tree.leaves(strategy_state["directions"])[0].shape[:2]
    logits = jnp.where(jnp.arange(capacity) < strategy_state["objects"], 0, -jnp.inf)
    object_id = jax.random.categorical(object_key, logits)
    z = jax.random.normal(sample_key, rank)

    def sample(name: str, noise_key: Array) -> Array:
        mean, directions, residual = (
            strategy_state[key][name][object_id].astype(jnp.float32) for key in ("mean", "directions", "residual")
        )
        drawn = mean + jnp.tensordot(z, directions, 1)
        noise = jax.random.normal(noise_key, drawn.shape) * jnp.broadcast_to(residual, drawn.shape)
        return drawn + noise if with_residual else drawn

    names = strategy_state["mean"]
    noise_keys = jax.random.split(jax.random.fold_in(sample_key, 1), len(names))
    return dict(zip(names, map(sample, names, noise_keys), strict=True)), object_id


def replay(config: ConfigDict, method: Method) -> Strategy:
    """Build the strategy for `config.continual.replay`.

    In later steps, a sample of an old object is added for each image. Between steps the state holds, for each
    object, `rank` + 1 arrays of the size of an image's features and coarse image, in half precision, whatever the
    number of images.
    """
    without_replay = finetune(method)

    def loss(
        strategy_state: StrategyState, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[Loss, StrategyState]:
        if not strategy_state:
            return without_replay.loss(strategy_state, variables, batch, keys)
        keys, old_keys, draw_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        parts, object_id = jax.vmap(lambda key: draw_sample(strategy_state, key, config.residual))(draw_keys)
        old = Batch(
            {m: parts[f"features_{m}"] for m in batch.features},
            {
                m: jnp.clip(jax.image.resize(parts[f"image_{m}"], batch.images[m].shape, "bilinear"), 0, 255)
                for m in batch.images
            },
            object_id,
            batch.sample_weight,
            foreground=None if batch.foreground is None else _enlarge(parts["foreground"], batch.foreground),
        )
        new = batch._replace(progress=None)
        combined = jax.tree.map(lambda a, b: jnp.concatenate([a, b.astype(a.dtype)]), new, old)
        combined = combined._replace(progress=batch.progress)
        return without_replay.loss(strategy_state, variables, combined, jnp.concatenate([keys, old_keys]))

    def begin(strategy_state: StrategyState, _: Variables, batch: Batch, step: int) -> StrategyState:
        """Stack the Gaussians of old objects."""
        gaussians = strategy_state.get(BY_OBJECT, ())
        return stack_objects(gaussians) | {"objects": np.int32(len(gaussians))} if gaussians else {}

    def finish(strategy_state: StrategyState, _: Variables, batch: Batch, object_id: int) -> StrategyState:
        gaussians = _gaussians(strategy_state)
        earlier = gaussians[object_id] if object_id < len(gaussians) else None
        parts = {f"features_{m}": np.asarray(features, np.float32) for m, features in batch.features.items()}
        parts |= {f"image_{m}": downsample(images, config.image_size) for m, images in batch.images.items()}
        if batch.foreground is not None:
            parts["foreground"] = downsample(batch.foreground[..., None], config.image_size)
        merged = principal_components(parts, config.rank, earlier)
        return {BY_OBJECT: (*gaussians[:object_id], merged, *gaussians[object_id + 1 :])}

    return Strategy(loss, begin=begin, finish=finish)


def _gaussians(strategy_state: StrategyState) -> tuple[Gaussian, ...]:
    """Return the Gaussian of each old object, from a state between steps or within a step."""
    if BY_OBJECT in strategy_state or not strategy_state:
        return strategy_state.get(BY_OBJECT, ())
    stacked = {name: strategy_state[name] for name in ("count", "mean", "directions", "residual")}
    return tuple(jax.tree.map(lambda array, i=i: array[i], stacked) for i in range(int(strategy_state["objects"])))


def downsample(images: Shaped[Array | np.ndarray, "n h w c"], size: int) -> Float[np.ndarray, "n s s c"]:
    """Resize images to `size` x `size` pixels."""
    shape = size, size, images.shape[-1]
    return np.stack([_resize(np.asarray(image, np.float32), shape, "bilinear") for image in images])


def _enlarge(drawn: Float[Array, "b s s 1"], masks: Shaped[Array, "b m m"]) -> Float[Array, "b m m"]:
    """Turn drawn shares of foreground into masks of the size of others; 1 where the share is more than half."""
    return (jax.image.resize(drawn[..., 0], masks.shape, "bilinear") > 0.5).astype(jnp.float32)
