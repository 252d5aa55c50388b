"""Strategies against forgetting, one file each; `build` creates the one that a config selects."""

from ml_collections import ConfigDict

from iumad_jax.continual.finetune import finetune
from iumad_jax.continual.isvd import isvd
from iumad_jax.continual.iuf import iuf
from iumad_jax.continual.joint import joint
from iumad_jax.continual.replay import replay
from iumad_jax.continual.strategy import Strategy
from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method


def build(config: ConfigDict, method: Method) -> Strategy:
    """Build the strategy that `config.continual` selects.

    Raises:
        UserError: If the strategy does not exist.
    """
    strategies = {
        "finetune": lambda: finetune(method),
        "iuf": lambda: iuf(config.continual, method),
        "replay": lambda: replay(config.continual.replay, method),
        "isvd": lambda: isvd(config.continual.isvd, method),
        "joint": lambda: joint(method),
    }
    name = config.continual.strategy
    if name not in strategies:
        raise UserError(f'config.continual.strategy is "{name}"; use one of {", ".join(strategies)}.')
    return strategies[name]()
