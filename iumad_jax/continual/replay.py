"""Replay without images: old objects are trained on as drawn from low-rank Gaussians of what they looked like.

Nothing but rehearsal tells a network that is trained from end to end how to keep reconstructing an old object, and the
backbone is frozen, so that what was gathered of its features never goes stale. Features alone would not do, since what
recognises objects reads images; so features and a coarse image are drawn together.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from ml_collections import ConfigDict

from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.methods.method import Loss, Method
from iumad_jax.shapes import BY_OBJECT, Batch, Keys, Variables

_resize = jax.jit(jax.image.resize, static_argnums=(1, 2))


def principal_components(
    parts: dict[str, Float[np.ndarray, "n ..."]], rank: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The means of all parts together and their strongest directions of variation, each one standard deviation long.

    Args:
        parts: several views of the same n images; each counts with a total variance of 1.
        rank: how many directions; those beyond n - 1 are zero.

    Returns:
        For each part, (...) and (rank, ...): mean + z @ directions with z ~ N(0, I) has their mean and, up to the rank,
        their covariance, also across parts.
    """
    flat = {name: np.reshape(part, (len(part), -1)) for name, part in parts.items()}
    means = {name: rows.mean(0, dtype=np.float64) for name, rows in flat.items()}
    centred = {name: rows - means[name].astype(rows.dtype) for name, rows in flat.items()}
    grams = [(rows @ rows.T).astype(np.float64) for rows in centred.values()]
    together = sum(gram / max(np.trace(gram), 1e-12) for gram in grams)
    scores = np.sqrt(len(together)) * np.linalg.eigh(together)[1][:, ::-1][:, :rank]
    directions = {name: np.zeros((rank, rows.shape[1])) for name, rows in centred.items()}
    for name, rows in centred.items():
        directions[name][: scores.shape[1]] = scores.T @ rows / len(rows)
    shapes = {name: part.shape[1:] for name, part in parts.items()}
    return (
        {name: mean.reshape(shapes[name]).astype(np.float16) for name, mean in means.items()},
        {name: rows.reshape(rank, *shapes[name]).astype(np.float16) for name, rows in directions.items()},
    )


def draw(strategy_state: StrategyState, key: Array) -> tuple[dict[str, Array], Array]:
    """One sample's parts, float32, and its object, each of those remembered being as likely.

    Args:
        strategy_state: `mean` and `directions` of all objects, stacked, of which the first `objects` are remembered.
        key: of all chance.
    """
    which, how = jax.random.split(key)
    capacity, rank = jax.tree.leaves(strategy_state["directions"])[0].shape[:2]
    object_ = jax.random.categorical(which, jnp.where(jnp.arange(capacity) < strategy_state["objects"], 0, -jnp.inf))
    z = jax.random.normal(how, rank)

    def sample(mean: Array, directions: Array) -> Array:
        return mean[object_].astype(jnp.float32) + jnp.tensordot(z, directions[object_].astype(jnp.float32), 1)

    return jax.tree.map(sample, strategy_state["mean"], strategy_state["directions"]), object_


def replay(config: ConfigDict, method: Method, objects: int) -> Strategy:
    """The strategy for `config.continual.replay`: every image of a later step is joined by a drawn one.

    Between steps it keeps `rank` + 1 arrays of the size of an object's features and coarse image per object, in half
    precision, however many images the object had.
    """
    own = finetune(method)

    def loss(
        strategy_state: StrategyState, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[Loss, StrategyState]:
        if not strategy_state:
            return own.loss(strategy_state, variables, batch, keys)
        keys, old_keys, draw_keys = jnp.moveaxis(jax.vmap(lambda key: jax.random.split(key, 3))(keys), 1, 0)
        parts, object_id = jax.vmap(lambda key: draw(strategy_state, key))(draw_keys)
        old = Batch(
            {m: parts[f"features_{m}"] for m in batch.features},
            {
                m: jnp.clip(jax.image.resize(parts[f"image_{m}"], batch.images[m].shape, "bilinear"), 0, 255)
                for m in batch.images
            },
            object_id,
            batch.sample_weight,
        )
        new = batch._replace(progress=None)
        both = jax.tree.map(lambda array, drawn: jnp.concatenate([array, drawn.astype(array.dtype)]), new, old)
        both = both._replace(progress=batch.progress)
        return own.loss(strategy_state, variables, both, jnp.concatenate([keys, old_keys]))

    def begin(strategy_state: StrategyState, _: Variables, batch: Batch, step: int) -> StrategyState:
        """Stacks what is remembered, with room for all objects, so that later steps compile no update of their own."""
        remembered = strategy_state.get(BY_OBJECT, ())

        def stack(*arrays: np.ndarray) -> np.ndarray:
            room = np.zeros((objects - len(arrays), *arrays[0].shape), arrays[0].dtype)
            return np.concatenate([arrays, room])

        return jax.tree.map(stack, *remembered) | {"objects": np.int32(len(remembered))} if remembered else {}

    def finish(strategy_state: StrategyState, _: Variables, batch: Batch, object_: int) -> StrategyState:
        parts = {f"features_{m}": np.asarray(features, np.float32) for m, features in batch.features.items()}
        parts |= {f"image_{m}": coarse(images, config.image_size) for m, images in batch.images.items()}
        mean, directions = principal_components(parts, config.rank)
        return {BY_OBJECT: (*_remembered(strategy_state), {"mean": mean, "directions": directions})}

    return Strategy(loss, begin=begin, finish=finish)


def _remembered(strategy_state: StrategyState) -> tuple[dict[str, Any], ...]:
    """What each object is remembered by, also of the strategy_state within a step."""
    if BY_OBJECT in strategy_state or not strategy_state:
        return strategy_state.get(BY_OBJECT, ())
    parts = {name: strategy_state[name] for name in ("mean", "directions")}
    return tuple(jax.tree.map(lambda array, i=i: array[i], parts) for i in range(int(strategy_state["objects"])))


def coarse(images: Float[Array | np.ndarray, "n h w 3"], size: int) -> Float[np.ndarray, "n s s 3"]:
    """The images at a small size."""
    return np.stack([_resize(np.asarray(image, np.float32), (size, size, 3), "bilinear") for image in images])
