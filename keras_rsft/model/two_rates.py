"""Any Keras optimizer with a smaller learning rate for some of the variables.

`keras.optimizers.MultiOptimizer` clips the gradients of each part apart, and has no
`learning_rate` for a schedule or callback. The gradients stay what they are: Adam and
its kin divide by their size, so scaling them would change nothing. What is scaled is
the learning rate of each variable's update, and with it that of its decoupled weight
decay.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from keras_rsft.errors import InvalidArgument


class _TwoRates:
    """Mixed into an optimizer's class: the first variables are the slow ones."""

    def __init__(
        self, *, slow_variables: int = 0, slow_rate: float = 1.0, **options: Any
    ):
        super().__init__(**options)
        self.slow_variables = slow_variables
        self.slow_rate = slow_rate
        self._slow: set[Any] = set()

    def build(self, variables: list[Any]) -> None:
        self._slow = {self._var_key(one) for one in variables[: self.slow_variables]}
        super().build(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self._var_key(variable) in self._slow:
            learning_rate = learning_rate * self.slow_rate
        super().update_step(gradient, variable, learning_rate)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {
            "slow_variables": self.slow_variables,
            "slow_rate": self.slow_rate,
        }

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        decay = self.weight_decay
        if decay is None:
            return
        slow = [v for v in variables if self._var_key(v) in self._slow]
        fast = [v for v in variables if self._var_key(v) not in self._slow]
        super()._apply_weight_decay(fast)
        try:  # It is multiplied by the learning rate of all.
            self.weight_decay = decay * self.slow_rate
            super()._apply_weight_decay(slow)
        finally:
            self.weight_decay = decay


# A class of each of Keras's optimizers, so that all can be saved.
_TWO_RATES = {
    kind: keras.saving.register_keras_serializable("keras_rsft")(
        type(f"TwoRates{name}", (_TwoRates, kind), {})
    )
    for name, kind in sorted(vars(keras.optimizers).items())
    if inspect.isclass(kind)
    and issubclass(kind, keras.optimizers.Optimizer)
    and kind not in (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer)
}


def with_two_rates(
    optimizer: keras.optimizers.Optimizer, *, slow_variables: int, slow_rate: float
) -> keras.optimizers.Optimizer:
    """Returns an unused optimizer's like, under which the first variables learn slowly.

    At `slow_rate` times the learning rate; what changes that changes both.
    """
    two_rates = _TWO_RATES.get(type(optimizer))
    if two_rates is None:
        raise InvalidArgument(
            "Two learning rates need one of Keras's own optimizers. Received: "
            f"{type(optimizer).__name__}."
        )
    if slow_variables < 0 or not 0 <= slow_rate < float("inf"):
        raise InvalidArgument(
            "`slow_variables` and `slow_rate` must be at least 0. Received: "
            f"slow_variables={slow_variables}, slow_rate={slow_rate}."
        )
    config = optimizer.get_config()
    return two_rates.from_config(
        config | {"slow_variables": slow_variables, "slow_rate": slow_rate}
    )
