"""What a way of learning without forgetting must be able to do."""

from collections.abc import Callable
from dataclasses import dataclass

import optax

from iumad_jax.methods.method import Loss
from iumad_jax.protocol import Step
from iumad_jax.shapes import Batch, Keys, Memory, Variables

_UNCHANGED = optax.with_extra_args_support(optax.identity())


@dataclass(frozen=True)
class Strategy:
    """Pure functions over explicit memory; nothing is held.

    What a step does may depend on which parts its memory has, since an update is compiled for their shapes.

    The base step begins with an empty memory.

    Attributes:
        loss: (memory, variables, batch, keys) -> (loss, memory): the loss of an update, such as the method's, and the
            memory after it. Within `devices.data_parallel`; differentiated with respect to
            `variables["params"]`. What it returns as memory must be the same on every device.
        constrain: the last word on an update: transforms what is to be added to the weights, learning rate included.
            It has no state but is given `memory` as an extra argument.
        begin: (memory, variables, batch, step) -> memory, before a step's first update; the batch shows shapes only.
        finish: (memory, variables, batch, object) -> memory, after a step's last update, once for each object that it
            learned, with all of the object's training images as one (memory-mapped) batch. What is then left is what
            the strategy keeps between steps; what belongs to one object alone and never changes goes under the key
            BY_OBJECT, as one entry of a tuple per object, which snapshots store once.
        incremental: False if it trains on the images of all objects seen so far.
    """

    loss: Callable[[Memory, Variables, Batch, Keys], tuple[Loss, Memory]]
    constrain: optax.GradientTransformationExtraArgs = _UNCHANGED
    begin: Callable[[Memory, Variables, Batch, int], Memory] = lambda memory, variables, batch, step: memory
    finish: Callable[[Memory, Variables, Batch, int], Memory] = lambda memory, variables, batch, object_: memory
    incremental: bool = True

    def objects(self, step: Step) -> tuple[str, ...]:
        """Those whose images a step is trained on."""
        return step.learned if self.incremental else step.seen
