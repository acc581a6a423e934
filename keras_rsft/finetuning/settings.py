"""Makes the optimizer that a `TrainConfig` asks for."""

from __future__ import annotations

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
