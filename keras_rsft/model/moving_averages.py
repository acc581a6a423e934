"""Where the averages of `use_ema` begin."""

from __future__ import annotations

from typing import Any


def seed_moving_averages(optimizer: Any, variables: list[Any]) -> None:
    """Starts the averages of `use_ema` at the weights instead of at zero.

    Keras copies the averages over the weights when training ends, even if no
    step was applied; zeros would wipe out the model.

    Args:
        optimizer: A built Keras optimizer.
        variables: The variables that it was built for.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    if not optimizer.use_ema or optimizer.iterations.numpy() > 0:
        return
    averages = optimizer._model_variables_moving_average
    for variable, average in zip(variables, averages, strict=True):
        # A copy: JAX gives up what a step was given, and cannot give one value twice.
        average.assign(variable.numpy())
