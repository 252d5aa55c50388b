"""Nothing is done against forgetting: each step goes on training on its own objects."""

import jax

from iumad_jax.continual.strategy import Memory, Strategy
from iumad_jax.methods.method import Method
from iumad_jax.shapes import Batch, Keys, Scalars, Variables


def finetune(method: Method) -> Strategy:
    """The method's own loss."""

    def loss(
        memory: Memory, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[jax.Array, tuple[Scalars, Memory]]:
        assert method.loss is not None
        own = method.loss(variables, batch, keys)
        return own.total, (own.terms, memory)

    return Strategy(loss)
