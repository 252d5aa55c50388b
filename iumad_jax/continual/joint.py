"""Joint training, which is not incremental: the upper bound for all other strategies."""

import dataclasses

from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.strategy import Strategy
from iumad_jax.methods.method import Method


def joint(method: Method) -> Strategy:
    """Build the strategy that trains each step on the images of all objects learned so far."""
    return dataclasses.replace(finetune(method), incremental=False)
