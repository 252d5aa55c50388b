"""Memory banks of good patches, one per object and modality, after PatchCore (Roth et al., CVPR 2022).

The error at a token is the distance to the nearest patch in the bank of the recognised object. Nothing is trained, and
objects share nothing, so learning a new object changes no old one.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Float16, Int
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.error_maps import upsample_errors
from iumad_jax.methods.method import Method, of_objects, stack_objects, with_object
from iumad_jax.methods.moments import Moments, merge_moments, no_moments, standardise
from iumad_jax.shapes import BY_OBJECT, Batch, ErrorMaps, Modality, Variables

Bank = dict[str, Any]  # of one object and modality: moments, patches (n, f + 2), held_out (i, p)

_CANDIDATES = 2**29  # bytes in float32 of the patches from which a bank is chosen, at most
_HELD_OUT = 200  # largest number of training images whose held-out errors are stored
_ROUND, _FARTHEST = 64, 512  # of `k_centres`: centres that a round adds, patches from which it chooses them


def memory_bank(config: ConfigDict, tiles: int = 1) -> Method:
    """Build the method for `config.memory_bank`, whose keys `iumad_jax.config` explains.

    Args:
        config: The keys.
        tiles: Number of tiles of an image, each of which is a row. All of an image are held out together.
    """

    def describe(tokens: Float[Array, "p f"], moments: Moments) -> Float[Array, "p f+2"]:
        """Return what is compared: z-scored means of neighbouring tokens, and their places."""
        z_scores = standardise(average_neighbours(tokens, config.neighbourhood), moments)
        return jnp.concatenate([z_scores, config.place * _places(len(tokens))], axis=-1)

    average = jax.jit(functools.partial(average_neighbours, size=config.neighbourhood))
    to_float16 = jax.jit(lambda tokens, moments: describe(tokens, moments).astype(jnp.float16))

    def learn(features: Float[np.ndarray, "n p f"], size: float, earlier: Bank | None) -> Bank:
        """Choose the patches of a bank of at most `size` bytes, and compute the errors of held-out training images.

        If the object has an earlier bank, patches are chosen from those of the bank and of the images. Its moments
        stay, so that both can be compared, and so do the errors of its held-out images, as far as there is room.
        """
        averages = np.stack([np.asarray(average(jnp.asarray(x, jnp.float32)), np.float16) for x in features])
        if earlier is None:
            parts = np.array_split(averages, -(-len(averages) // 64))  # bounds the memory of float64 copies
            moments = functools.reduce(merge_moments, parts, no_moments(features.shape[-1]))
        else:
            moments = earlier["moments"]
        described = np.stack([np.asarray(to_float16(jnp.asarray(x, jnp.float32), moments)) for x in features])
        images, tokens, channels = described.shape
        earlier = earlier or {"patches": described[:0, 0], "held_out": np.zeros((0, tokens), np.float16)}
        patches = described.reshape(-1, channels)
        if (count := int(size / channels / 2)) < 1:
            raise UserError(
                f"config.memory_bank.megabytes is {config.megabytes}, less than a patch of {channels} channels per"
                " modality; use a larger number."
            )
        rows = np.arange(len(patches))
        if len(rows) > (most := _CANDIDATES // (4 * channels) - len(earlier["patches"])):
            rows = np.sort(np.random.default_rng(0).permutation(rows)[:most])
        candidates = np.concatenate([patches[rows], earlier["patches"]])
        chosen = np.asarray(k_centres(candidates, count))
        alone = images == tiles and not len(earlier["patches"])  # then no other image's patches are in the bank
        held_out = _evenly_spaced(images, 0 if alone else _HELD_OUT, tiles)
        image_of = np.append(rows // tokens // tiles, np.full(len(earlier["patches"]), images))
        others = image_of[chosen][None] != (held_out // tiles)[:, None]
        others |= ~others.any(1, keepdims=True)  # an image that is the whole bank cannot be left out
        errors = np.asarray(_distances_of_images(described[held_out], candidates[chosen], others), np.float16)
        kept = _evenly_spaced(len(earlier["held_out"]), max(_HELD_OUT - len(errors), 0), tiles)
        errors = np.concatenate([errors, earlier["held_out"][kept]])
        return {"moments": moments, "patches": candidates[chosen], "held_out": errors}

    def init(_: jax.Array, __: Batch) -> Variables:
        return {"params": {}, "statistics": {}, BY_OBJECT: ()}

    def observe(variables: Variables, batch: Batch, _: int) -> Variables:
        size = config.megabytes * 2**20 / len(batch.features)
        object_id, by_object = int(batch.object_id[0]), variables[BY_OBJECT]
        earlier = by_object[object_id] if object_id < len(by_object) else {}
        banks = {m: learn(np.asarray(features), size, earlier.get(m)) for m, features in batch.features.items()}
        return with_object(variables, object_id, banks)

    def arrange(variables: Variables) -> Variables:
        """Stack what `predict` reads of all objects' banks. Smaller banks are filled up with copies of a patch."""
        by_object = variables[BY_OBJECT]
        largest = max(len(bank["patches"]) for banks in by_object for bank in banks.values())

        def searched(bank: Bank) -> Bank:
            patches = bank["patches"]
            if missing := largest - len(patches):
                patches = np.pad(patches, ((0, missing), (0, 0)), "edge")
            return {"moments": bank["moments"], "patches": patches}

        banks = [{m: searched(bank) for m, bank in banks.items()} for banks in by_object]
        return variables | {BY_OBJECT: stack_objects(banks)}

    def predict(variables: Variables, batch: Batch) -> ErrorMaps:
        def image_errors(inputs: tuple[Array, dict[str, Array]]) -> dict[str, Array]:
            object_id, tokens = inputs
            banks = of_objects(variables[BY_OBJECT], object_id)
            return {m: distances(describe(x, banks[m]["moments"]), banks[m]["patches"]) for m, x in tokens.items()}

        return with_score(jax.lax.map(image_errors, (batch.object_id, batch.features)))

    def held_out(variables: Variables, object_id: int) -> ErrorMaps | None:
        banks = variables[BY_OBJECT][object_id]
        errors = {m: jnp.asarray(bank["held_out"], jnp.float32) for m, bank in banks.items()}
        return with_score(errors) if all(map(len, errors.values())) else None

    return Method(init, predict, observe=observe, arrange=arrange, held_out=held_out, independent=True)


def _evenly_spaced(rows: int, most: int, tiles: int) -> Int[np.ndarray, " n"]:
    """Choose among images, each of which has rows for its tiles, and return about `most` rows, or all if fewer."""
    images = np.linspace(0, rows // tiles - 1, min(rows // tiles, -(-most // tiles))).astype(np.int32)
    return (images[:, None] * tiles + np.arange(tiles, dtype=np.int32)).ravel()


def with_score(errors: dict[Modality, Float[Array, "b p"]]) -> ErrorMaps:
    """Upsample errors, with the image score of PatchCore: the largest error, here summed over modalities."""
    largest = [error.max(-1) for error in errors.values()]
    return upsample_errors(errors)._replace(score=functools.reduce(jnp.add, largest))


def average_neighbours(tokens: Float[Array, "p f"], size: int) -> Float[Array, "p f"]:
    """Average each token with its neighbours in a square of `size` x `size`; the border is repeated outwards."""
    if size == 1:
        return tokens
    side = round(len(tokens) ** 0.5)
    rows = np.clip(np.arange(side + size - 1) - (size - 1) // 2, 0, side - 1)
    grid = jnp.take(jnp.take(tokens.reshape(side, side, -1), rows, axis=0), rows, axis=1)
    return nn.avg_pool(grid, (size, size)).reshape(tokens.shape)


def _places(tokens: int) -> Float[np.ndarray, "p 2"]:
    """Return row and column of each token, in sides of the image."""
    side = round(tokens**0.5)
    return np.stack(np.divmod(np.arange(tokens), side), axis=-1).astype(np.float32) / side


def distances(
    x: Float[Array, "p f"], patches: Float[Array, "n f"], allowed: Bool[Array, " n"] | None = None
) -> Float[Array, " p"]:
    """Compute the Euclidean distance of each row of x to the nearest (allowed) patch."""
    square = _square_distances(x, patches)
    square = square if allowed is None else jnp.where(allowed[None], square, jnp.inf)
    return jnp.sqrt(square.min(-1))


def _square_distances(x: Float[Array, "p f"], y: Float[Array, "n f"]) -> Float[Array, "p n"]:
    """Compute squared distances; those within the rounding error, such as of equal rows, are 0."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    lengths = (x**2).sum(-1)[:, None] + (y**2).sum(-1)[None]
    with jax.default_matmul_precision("float32"):
        square = lengths - 2 * x @ y.T
    return jnp.where(square > 1e-5 * lengths, square, 0)


@jax.jit
def _distances_of_images(
    images: Float16[Array, "i p f"], patches: Float16[Array, "n f"], allowed: Bool[Array, "i n"]
) -> Float[Array, "i p"]:
    return jax.lax.map(lambda inputs: distances(inputs[0], patches, inputs[1]), (images, allowed))


@functools.partial(jax.jit, static_argnums=1)
def k_centres(patches: Float16[Array, "n f"], count: int) -> Int[Array, " c"]:
    """Choose patches such that all patches are near a chosen one: always the farthest from those chosen.

    This is the greedy algorithm of Gonzalez (1985), beginning with the patch farthest from 0. Distances to all patches
    are updated in rounds of up to 64 centres. A round chooses among the 512 patches that are farthest when it begins,
    and ends when others could be farther.

    Args:
        patches: Candidates.
        count: Number of centres.

    Returns:
        Indices of the centres, in the order of choice; of all candidates if there are no more than `count`.
    """
    candidates = len(patches)
    if candidates <= count:
        return jnp.arange(candidates)
    patches = patches.astype(jnp.float32)

    def add_centres(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        square, centres, chosen = state
        farthest_square, farthest = jax.lax.top_k(square, min(_FARTHEST, candidates))
        mutual = _square_distances(patches[farthest], patches[farthest])

        def add_centre(nearest: Array, _: Any) -> tuple[Array, tuple[Array, Array]]:
            centre = jnp.argmax(nearest)
            is_farthest = nearest[centre] >= farthest_square[-1]
            return jnp.minimum(nearest, mutual[centre]).at[centre].set(0), (farthest[centre], is_farthest)

        _, (new, are_farthest) = jax.lax.scan(add_centre, farthest_square, None, _ROUND)
        new = jnp.where(are_farthest, new, new[0])
        square = jnp.minimum(square, _square_distances(patches, patches[new]).min(-1)).at[new].set(0)
        centres = jax.lax.dynamic_update_slice(centres, new, (chosen,))
        return square, centres, chosen + are_farthest.sum()

    first = jnp.argmax(jnp.square(patches).sum(-1)).astype(jnp.int32)
    square = _square_distances(patches, patches[first][None])[:, 0]
    state = square, jnp.full(count + _ROUND, first), jnp.int32(1)
    return jax.lax.while_loop(lambda state: state[2] < count, add_centres, state)[1][:count]
