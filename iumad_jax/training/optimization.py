"""Optimisers and learning-rate schedules of a step."""

from typing import Any

import jax
import optax
from ml_collections import ConfigDict

from iumad_jax.errors import UserError
from iumad_jax.methods.method import Method

NOT_DECAYED = {"A_log", "D", "bias", "dt_bias", "scale"}


def step_config(config: ConfigDict, step: int) -> ConfigDict:
    """Return `config.train` for a step. Later steps take their optimiser from `config.continual`."""
    train = config.train.copy_and_resolve_references()
    if step > 0:
        train.optimizer = config.continual.optimizer
        if train.optimizer == "sgd":
            train.learning_rate = config.continual.sgd_learning_rate
    return train


def optimizer_name(method: Method, config: ConfigDict) -> str:
    """Return a name of the optimiser for a step's `config.train`; a method's own depends on the learning rate."""
    return f"own, relative to {config.learning_rate:g}" if method.optimizer else config.optimizer


def step_optimizer(method: Method, config: ConfigDict) -> optax.GradientTransformation:
    """Create the optimiser for a step's `config.train`, or the method's own if it has one.

    Raises:
        UserError: If the optimiser does not exist.
    """
    return method.optimizer(config) if method.optimizer else make_optimizer(config)


def make_optimizer(config: ConfigDict) -> optax.GradientTransformation:
    """Create AdamW (as in the paper) or SGD for a step's `config.train`.

    Both clip the global norm and leave the learning rate to the caller.

    Raises:
        UserError: If the optimiser does not exist.
    """
    clip = optax.clip_by_global_norm(config.clip_norm)
    # XLA compiles the update of one vector in a fraction of the time of the updates of hundreds of arrays.
    optimizers = {
        "adamw": lambda: optax.chain(
            optax.flatten(optax.chain(clip, optax.scale_by_adam(b1=0.9, b2=0.999))),
            optax.add_decayed_weights(config.weight_decay, _decayed),
        ),
        "sgd": lambda: optax.flatten(clip),
    }
    if config.optimizer not in optimizers:
        raise UserError(
            f'config.train.optimizer or config.continual.optimizer is "{config.optimizer}"; use one of'
            f" {', '.join(optimizers)}."
        )
    return optimizers[config.optimizer]()


def learning_rates(config: ConfigDict, updates_per_epoch: int) -> optax.Schedule:
    """Create the schedule of learning rates over a step's updates for its `config.train`.

    Raises:
        UserError: If the schedule does not exist.
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
