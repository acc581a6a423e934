"""Makes optimizers, also with a smaller learning rate for some variables."""

from __future__ import annotations

from typing import Any

import keras

from keras_rsft.config import NOT_DECAYED, TrainConfig
from keras_rsft.errors import InvalidArgument


def make_optimizer(
    settings: TrainConfig, *, largest_gradient: float | None = None
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer; `largest_gradient` clips all gradients' norm."""
    config = {"learning_rate": settings.learning_rate}
    if largest_gradient is not None:
        config["global_clipnorm"] = largest_gradient
    if settings.optimizer.lower() == "sgd":
        config["momentum"] = float(settings.momentum)
    if settings.weight_decay is not None:
        config["weight_decay"] = settings.weight_decay
    try:
        optimizer = keras.optimizers.get(
            {"class_name": settings.optimizer.lower(), "config": config}
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgument(
            f"Keras {keras.__version__} cannot make this optimizer. Received: "
            f"{settings.optimizer!r}. Use another, such as sgd, adam or adamw."
        ) from error
    optimizer.exclude_from_weight_decay(var_names=list(NOT_DECAYED))
    return optimizer


class _TwoRates(keras.optimizers.Optimizer):
    """Mixed into an optimizer's class: the first variables are the slow ones."""

    weight_decay: Any
    slow_variables: int
    slow_rate: float

    def build(self, variables: list[Any]) -> None:
        self._slow = {self._var_key(one) for one in variables[: self.slow_variables]}
        super().build(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self._var_key(variable) in self._slow:
            learning_rate = learning_rate * self.slow_rate
        super().update_step(gradient, variable, learning_rate)

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


def with_two_rates(
    optimizer: keras.optimizers.Optimizer, *, slow_variables: int, slow_rate: float
) -> keras.optimizers.Optimizer:
    """Returns the same optimizer with a smaller rate for the first variables."""
    kind: Any = type("TwoRates", (_TwoRates, type(optimizer)), {})
    two_rates = kind.from_config(optimizer.get_config())
    two_rates.slow_variables, two_rates.slow_rate = slow_variables, slow_rate
    two_rates.exclude_from_weight_decay(var_names=list(NOT_DECAYED))
    return two_rates
