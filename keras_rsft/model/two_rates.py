"""Any Keras optimizer with a smaller learning rate for some of the variables.

The gradients stay what they are: Adam and its kin divide by their size, so scaling them
would change nothing. What is scaled is the learning rate of each variable's update,
and with it that of its decoupled weight decay.
"""

from __future__ import annotations

import inspect
from typing import Any

import keras

from keras_rsft.errors import InvalidArgument


class _TwoRates:
    """Mixed into an optimizer's class.

    Args:
        slow_variables: How many of the variables, counted from the first, learn with
            `slow_rate` times the learning rate, at least 0.
        slow_rate: Multiple of the learning rate, at least 0.
        **options: Those of the optimizer.
    """

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
        if self._is_slow(variable):
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
        super()._apply_weight_decay([v for v in variables if not self._is_slow(v)])
        try:  # It is multiplied by the learning rate of all.
            self.weight_decay = decay * self.slow_rate
            super()._apply_weight_decay([v for v in variables if self._is_slow(v)])
        finally:
            self.weight_decay = decay

    def _is_slow(self, variable: Any) -> bool:
        return self._var_key(variable) in self._slow


def _with_two_rates() -> dict[type, type]:
    """Makes such a class of each of Keras's optimizers, so that all can be saved."""
    excluded = (keras.optimizers.Optimizer, keras.optimizers.LossScaleOptimizer)
    made = {}
    for name, optimizer in sorted(vars(keras.optimizers).items()):
        if (
            inspect.isclass(optimizer)
            and issubclass(optimizer, keras.optimizers.Optimizer)
            and optimizer not in excluded
        ):
            two_rates = type(f"TwoRates{name}", (_TwoRates, optimizer), {})
            register = keras.saving.register_keras_serializable("keras_rsft")
            made[optimizer] = register(two_rates)
    return made


_TWO_RATES = _with_two_rates()


def with_two_rates(
    optimizer: keras.optimizers.Optimizer, *, slow_variables: int, slow_rate: float
) -> keras.optimizers.Optimizer:
    """Returns an optimizer of the same kind whose first variables learn more slowly.

    A schedule or callback that changes `learning_rate` changes both in proportion.

    Args:
        optimizer: One of Keras's own, not used yet.
        slow_variables: How many of the model's trainable variables, counted from the
            first, are slow, at least 0.
        slow_rate: Their share of the learning rate, at least 0.

    Raises:
        InvalidArgument: If the optimizer is not one of Keras's own, or a number is
            negative.
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
