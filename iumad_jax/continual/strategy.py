"""The interface of a strategy against forgetting."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from iumad_jax.methods.method import Loss
from iumad_jax.protocol import Step
from iumad_jax.shapes import Batch, Keys, StrategyState, Variables

_UNCHANGED = optax.with_extra_args_support(optax.identity())


@dataclass(frozen=True)
class Strategy:
    """A strategy against forgetting, as pure functions of an explicit state.

    The first step of a run, the base step, begins with an empty state, `{}`. Updates are compiled for the structure of
    the state, so what a step does may depend on which entries the state has.

    Attributes:
        loss: (state, variables, batch, keys) -> (loss, state). Computes the loss of an update and the state after it.
            Called within `devices.data_parallel` and differentiated with respect to `variables["params"]`. The
            returned state must be identical on every device.
        constrain: Transforms an update, learning rate included, right before it is added to the weights. Stateless;
            receives the strategy's state as the extra argument `strategy_state`.
        begin: (state, variables, batch, step) -> state. Called before the first update of a step. The batch is an
            example of the shapes.
        finish: (state, variables, batch, object id) -> state. Called after the last update of a step, once per object
            that the step learned, with all training images of that object as one (memory-mapped) batch. Also called
            with further images of an object learned before; the result then covers its earlier images too. It is
            stored between steps. What belongs to one object goes under the key BY_OBJECT, as a tuple with one item per
            object; snapshots store equal items once.
        describe: (state) -> JSON. What the ledger records of the state after each step.
        incremental: False if the strategy trains on the images of all objects learned so far.
    """

    loss: Callable[[StrategyState, Variables, Batch, Keys], tuple[Loss, StrategyState]]
    constrain: optax.GradientTransformationExtraArgs = _UNCHANGED
    begin: Callable[[StrategyState, Variables, Batch, int], StrategyState] = lambda state, *_: state
    finish: Callable[[StrategyState, Variables, Batch, int], StrategyState] = lambda state, *_: state
    describe: Callable[[StrategyState], dict[str, Any]] = lambda state: {}
    incremental: bool = True

    def objects(self, step: Step) -> tuple[str, ...]:
        """Return the objects whose images a step is trained on."""
        return step.trained if self.incremental or not step.trained else step.seen
