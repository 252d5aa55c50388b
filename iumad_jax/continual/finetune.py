"""Plain fine-tuning: each step trains on its own objects, without any protection against forgetting."""

from iumad_jax.continual.strategy import Strategy, StrategyState
from iumad_jax.methods.method import Loss, Method
from iumad_jax.shapes import Batch, Keys, Variables


def finetune(method: Method) -> Strategy:
    """Build the strategy that trains with the method's loss alone."""

    def loss(
        strategy_state: StrategyState, variables: Variables, batch: Batch, keys: Keys
    ) -> tuple[Loss, StrategyState]:
        assert method.loss is not None
        return method.loss(variables, batch, keys), strategy_state

    return Strategy(loss)
