"""Optimisers and learning rates of a step."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method

NOT_DECAYED = {"A_log", "D", "bias", "dt_bias", "scale"}


def step_config(config: ConfigDict, step: int) -> ConfigDict:
    """`config.train` as it holds in a step: the optimiser of later ones is that of `config.continual`."""
    own = config.train.copy_and_resolve_references()
    if step > 0:
        own.optimizer = config.continual.optimizer
        if own.optimizer == "sgd":
            own.learning_rate = config.continual.sgd_learning_rate
    return own


def optimizer_name(method: Method, config: ConfigDict) -> str:
    """The optimiser of a step, whose `config.train` this is, by name: "own" for that of the method."""
    return "own" if method.optimizer else config.optimizer


def step_optimizer(method: Method, config: ConfigDict) -> optax.GradientTransformation:
    """The optimiser of a step: the method's own, or the one that the step's `config.train` names.

    Raises:
        UserError: there is no such optimiser.
    """
    return method.optimizer(config) if method.optimizer else make_optimizer(config)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """AdamW, as in the paper, or plain SGD with clipping of the global norm, up to the learning rate; `config` is
    config.train.

    Raises:
        UserError: there is no such optimiser.
    """
    optimizers = {
        "adamw": (optax.scale_by_adam(b1=0.9, b2=0.999), optax.add_decayed_weights(config.weight_decay, _decayed)),
        "sgd": (),
    }
    if config.optimizer not in optimizers:
        raise UserError(
            f'config.train.optimizer or config.continual.optimizer is "{config.optimizer}"; use one of'
            f" {', '.join(optimizers)}."
        )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), *optimizers[config.optimizer])


def learning_rates(config: ConfigDict, updates_per_epoch: int) -> optax.Schedule:
    """The learning rate at each update of a step; `config` is config.train.

    Raises:
        UserError: there is no such schedule.
    """
    total = config.epochs * updates_per_epoch
    schedules = {
        "step": lambda rate: optax.piecewise_constant_schedule(rate, {config.drop_epoch * updates_per_epoch: 0.1}),
        "cosine": lambda rate: optax.warmup_cosine_decay_schedule(0, rate, total // 20, total),
    }
    if config.schedule not in schedules:
        raise UserError(f'config.train.schedule is "{config.schedule}"; use one of {", ".join(schedules)}.')
    return schedules[config.schedule](config.learning_rate)


def _decayed(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in NOT_DECAYED, params)
