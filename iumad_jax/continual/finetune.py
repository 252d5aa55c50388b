"""Nothing is done against forgetting: each step goes on training on its own objects."""

from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.methods.method import Loss, Method
from iumad_jax.shapes import Batch, Keys, Variables


def finetune(method: Method) -> Strategy:
    """The method's own loss."""

    def loss(
        strategy_state: StrategyState, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[Loss, StrategyState]:
        assert method.loss is not None
        return method.loss(variables, batch, keys), strategy_state

    return Strategy(loss)
