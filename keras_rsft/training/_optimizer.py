"""Makes optimizers, also with a smaller learning rate for some variables."""

from __future__ import annotations

import inspect
from typing import Any

import keras

from keras_rsft.config import NOT_DECAYED, TrainConfig
from keras_rsft.errors import InvalidArgument

# Optimizers ---------------------------------------------------------------------------


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


# Discriminative learning rates --------------------------------------------------------


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
    """Returns the same optimizer with a smaller rate for the first variables."""
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
