"""Combination of a method's error maps into one anomaly map and one score per image.

The error maps of two modalities have different units and tails. Each is divided by its usual value on good images of
the recognised object before they are combined, see `Scale`.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int
from ml_collections import ConfigDict

from iumad_jax.config import modalities
from iumad_jax.errors import UserError
from iumad_jax.shapes import ErrorMaps, Prediction, Scale, Scales

_QUANTILE = 0.99  # of good pixels, to which `maximum` scales
_TOP_SHARE = 0.005  # of the pixels; chosen on synthetic defects, `python -m iumad_jax.choose` compares it with others

COMBINATIONS = {
    "maximum": "largest of the modalities' errors, each divided by the 99 % quantile of good images",
    "sum": "sum of the modalities' errors above the mean of good images, each divided by the standard deviation",
    "rgb": "RGB's error alone",
    "depth": "depth's error alone",
    "published": "combination of the method's paper, without scales",
}
SCORES = {
    "common": "one rule for all methods, see `common_score`",
    "window16": "largest mean over windows of 16 x 16 pixels, as published for IB-IUMAD",
    "own": "score of the method's paper, whatever the combination; window16 where it has none",
}


class Rule(NamedTuple):
    """How error maps become anomaly maps and scores."""

    combine: str  # key of COMBINATIONS
    score: str  # key of SCORES


def make_rule(config: ConfigDict) -> Rule:
    """Build the rule of a config.

    Raises:
        UserError: If `config.combine` or `config.score` is unknown, or selects a modality that is not judged.
    """
    for key, known in (("combine", COMBINATIONS), ("score", SCORES)):
        if config[key] not in known:
            raise UserError(f'config.{key} is "{config[key]}"; use one of {", ".join(known)}.')
    judged = set(modalities(config))
    if config.method == "ib_iumad" and len(judged) == 2 and config.model.target != "both":
        judged = {config.model.target}
    segmented = config.method == "destseg" and config.destseg.map == "segmentation"
    if segmented or (config.method == "simplenet" and config.simplenet.fusion == "early"):
        judged = {config.modality}  # jointly
    if config.combine in ("rgb", "depth") and config.combine not in judged:
        raise UserError(f"config.combine is {config.combine}, but only {', '.join(judged)} is judged; use maximum.")
    return Rule(config.combine, config.score)


@functools.partial(jax.jit, static_argnames="rule")
def combine(errors: ErrorMaps, scales: Scales, object_id: Int[Array, " b"], rule: Rule) -> Prediction:
    """Combine error maps by a rule, with the scales of each image's object."""
    maps = errors.maps

    def of_object(values: Float[Array | np.ndarray, " k"]) -> Float[Array, "b 1 1"]:
        return jnp.take(values, object_id, mode="clip")[:, None, None]

    combined: Array
    if rule.combine == "published":
        combined = functools.reduce(jnp.add, maps.values()) if errors.published is None else errors.published
    elif rule.combine == "sum":
        z_scores = [(x - of_object(scales[m].mean)) / of_object(scales[m].deviation) for m, x in maps.items()]
        combined = functools.reduce(jnp.add, [jnp.maximum(z, 0) for z in z_scores])
    else:
        chosen = maps if rule.combine == "maximum" else {rule.combine: maps[rule.combine]}
        combined = functools.reduce(jnp.maximum, [x / of_object(scales[m].quantile) for m, x in chosen.items()])
    score = common_score(combined) if rule.score == "common" else errors.score if rule.score == "own" else None
    return Prediction(combined, window_score(combined) if score is None else score, errors.object_logits)


def window_score(maps: Float[Array, "b m m"]) -> Float[Array, " b"]:
    """Compute the largest mean over sliding windows of 16 x 16 pixels (Long et al., CVPR 2026)."""
    return nn.avg_pool(maps[..., None], (16, 16)).max((1, 2, 3))


def common_score(maps: Float[Array, "b m m"]) -> Float[Array, " b"]:
    """Compute the mean of the largest 0.5 % of the values, about as many pixels as a window of 16 x 16 has."""
    values = maps.reshape(len(maps), -1)
    return jax.lax.top_k(values, math.ceil(_TOP_SHARE * values.shape[1]))[0].mean(-1)


def measure_scales(good: ErrorMaps) -> dict[str, Scale]:
    """Measure the usual values of the error maps of an object's good images. Values without spread count as 1."""

    def measure(maps: Float[np.ndarray, "n m m"]) -> Scale:
        quantile, deviation = np.quantile(maps, _QUANTILE), maps.std()
        values = quantile if quantile > 0 else 1, maps.mean(), deviation if deviation > 0 else 1
        return Scale(*(np.asarray(value, np.float32) for value in values))

    return {m: measure(np.asarray(maps)) for m, maps in good.maps.items()}
