"""Declares what is searched to Keras Tuner, and makes settings of what it proposes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import keras_tuner
from keras_tuner.engine.hyperparameters import Fixed as _Fixed

from keras_rsft.config import (
    ARTICLE,
    SearchSpace,
    TrainConfig,
    require_known,
)
from keras_rsft.errors import InvalidArgument

_BY_RELATIVE_THRESHOLD = ("loss-threshold", "self-paced")
_WITHOUT_WARMUP = ("accept-all", "auto", ARTICLE)
_OF_SETTINGS = ("learning_rate", "optimizer", "momentum", "weight_decay", "epochs")
_OF_POLICY = (
    "threshold",
    "relative_threshold",
    "keep_fraction",
    "level",
    "warmup_epochs",
    "class_floor",
)
VALUE_NAMES = ("policy", *_OF_SETTINGS, *_OF_POLICY)

# A function that declares hyperparameters and returns values out of `VALUE_NAMES`.
Space = Callable[[keras_tuner.HyperParameters], Mapping[str, Any]]


def declare(space: SearchSpace, hp: keras_tuner.HyperParameters) -> dict[str, Any]:
    """Declares the hyperparameters and returns those that are active."""
    optimizer = _choice(hp, "optimizer", space.optimizers)
    policy = _choice(hp, "policy", space.policies)
    rate = _number(hp, "learning_rate", space.learning_rate, log=True)
    values = {"learning_rate": rate, "optimizer": optimizer, "policy": policy}
    if space.epochs is not None:
        values["epochs"] = _whole(hp, "epochs", space.epochs)
    threshold, bounds = "relative_threshold", space.relative_threshold
    if space.threshold is not None:
        threshold, bounds = "threshold", space.threshold
    warmed_up = [name for name in space.policies if name not in _WITHOUT_WARMUP]
    declared = (
        ("optimizer", ("adamw",), "weight_decay",
         lambda name: _number(hp, name, space.weight_decay, log=True)),
        ("policy", _BY_RELATIVE_THRESHOLD, threshold,
         lambda name: _number(hp, name, bounds)),
        ("policy", (ARTICLE,), "threshold",
         lambda name: _number(hp, name, space.article_threshold)),
        ("policy", ("keep-fraction",), "keep_fraction",
         lambda name: _number(hp, name, space.keep_fraction)),
        ("policy", warmed_up, "warmup_epochs",
         lambda name: _whole(hp, name, space.warmup_epochs)),
    )  # fmt: skip
    names = {"optimizer": space.optimizers, "policy": space.policies}
    for parent, parent_values, name, declare in declared:
        # A condition that can never hold would have Keras Tuner look for ever.
        possible = [v for v in names[parent] if v in parent_values]
        if not possible:
            continue
        with hp.conditional_scope(parent, possible):
            value = declare(name)
        if values[parent] in possible:
            values[name] = value
    return values


def settings_of_values(values: Mapping[str, Any], given: TrainConfig) -> TrainConfig:
    """Returns how to train a trial.

    Args:
        values: Values out of `VALUE_NAMES`.
        given: Where what `values` does not say comes from.

    Raises:
        InvalidArgument: If a name is not known, or a value out of its range.
    """
    if not isinstance(values, Mapping):
        raise InvalidArgument(
            "A space must return a dict of values by name, such as "
            f"{{'learning_rate': 0.01}}. Received: {type(values).__name__}."
        )
    for name in values:
        require_known("hyperparameter", name, VALUE_NAMES)
    policy = {name: values[name] for name in _OF_POLICY if name in values}
    if "threshold" in policy and "relative_threshold" in policy:
        raise InvalidArgument(
            "A space must give `threshold` or `relative_threshold`, for one is the "
            "other divided by ln(classes). Received: both."
        )
    if "relative_threshold" in policy:
        policy["threshold"] = None
    name = values.get("policy", given.policy.name)
    if name == ARTICLE:
        policy = {"warmup_epochs": 0.0} | policy | {"level": "batch"}
        name = "loss-threshold"
    elif "policy" in values:  # Else its level is the given policy's.
        policy = {"level": "sample"} | policy
    return dataclasses.replace(
        given,
        policy=dataclasses.replace(given.policy, name=name, **policy),
        **{name: values[name] for name in _OF_SETTINGS if name in values},
    )


def check_space(space: Space, given: TrainConfig) -> None:
    """Tries a space once, with default values.

    Raises:
        InvalidArgument: If it declares nothing, or returns what cannot be trained.
    """
    if not callable(space):
        raise InvalidArgument(
            "`space` must be a `SearchSpace` or a function of Keras Tuner's "
            f"hyperparameters. Received: {type(space).__name__}."
        )
    hp = keras_tuner.HyperParameters()
    settings_of_values(space(hp), given)
    if all(isinstance(one, _Fixed) for one in hp.space):
        raise InvalidArgument(
            "The search space is empty: every hyperparameter has one value. "
            "Widen a range or name a second policy."
        )


def _choice(hp: keras_tuner.HyperParameters, name: str, values: tuple[str, ...]) -> str:
    if len(values) > 1:
        return hp.Choice(name, list(values))
    return hp.Fixed(name, values[0])


def _number(
    hp: keras_tuner.HyperParameters,
    name: str,
    bounds: tuple[float, float],
    *,
    log: bool = False,
) -> float:
    low, high = (float(bound) for bound in bounds)
    if low == high:
        return hp.Fixed(name, low)
    return hp.Float(name, low, high, sampling="log" if log else "linear")


def _whole(hp: keras_tuner.HyperParameters, name: str, bounds: tuple[int, int]) -> int:
    low, high = (int(bound) for bound in bounds)
    return hp.Fixed(name, low) if low == high else hp.Int(name, low, high)
