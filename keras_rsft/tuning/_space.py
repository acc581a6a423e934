"""The search space: ranges of hyperparameters, and the settings they mean."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.hyperparameters import Boolean as _Boolean
from keras_tuner.engine.hyperparameters import Choice as _Choice
from keras_tuner.engine.hyperparameters import Fixed as _Fixed

from keras_rsft.config import ARTICLE, SearchSpace, TrainConfig, require_known
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import MIN_RIGHT_PROBABILITY
from keras_rsft.tuning._choice import PLAIN

# Space --------------------------------------------------------------------------------

_BY_RELATIVE_THRESHOLD = ("loss-threshold", "self-paced")
_WITHOUT_WARMUP = ("accept-all", "auto", ARTICLE)
_OF_SETTINGS = ("learning_rate", "optimizer", "momentum", "weight_decay", "epochs")
_OF_POLICY = (
    "threshold",
    "relative_threshold",
    "right_probability",
    "keep_fraction",
    "level",
    "warmup_epochs",
    "class_floor",
)
VALUE_NAMES = ("policy", *_OF_SETTINGS, *_OF_POLICY)

# A user's own space returns values out of `VALUE_NAMES`.
Space = SearchSpace | Callable[[keras_tuner.HyperParameters], Mapping[str, Any]]


def values_of(space: Space, hp: keras_tuner.HyperParameters) -> Mapping[str, Any]:
    """Declares the hyperparameters and returns those that are active."""
    if not isinstance(space, SearchSpace):
        return space(hp)

    def name_of(name: str, known: tuple[str, ...]) -> str:
        return (
            hp.Choice(name, list(known)) if len(known) > 1 else hp.Fixed(name, *known)
        )

    def ranged(kind: type, name: str, bounds: tuple[Any, Any], **options: str) -> Any:
        low, high = map(kind, bounds)
        if low == high:
            return hp.Fixed(name, low)
        return (hp.Int if kind is int else hp.Float)(name, low, high, **options)

    whole, number = functools.partial(ranged, int), functools.partial(ranged, float)
    log = functools.partial(number, sampling="log")
    values: dict[str, Any] = {
        "optimizer": name_of("optimizer", space.optimizers),
        "policy": name_of("policy", space.policies),
        "learning_rate": log("learning_rate", space.learning_rate),
    }
    if space.epochs is not None:
        values["epochs"] = whole("epochs", space.epochs)
    threshold, bounds = "relative_threshold", space.relative_threshold
    if space.threshold is not None:
        threshold, bounds = "threshold", space.threshold
    warmed_up = [name for name in space.policies if name not in _WITHOUT_WARMUP]
    conditional: tuple[tuple[str, Sequence[str], str, Callable, Any], ...] = (
        ("optimizer", ("adamw",), "weight_decay", log, space.weight_decay),
        ("policy", ("auto",), "right_probability", number, space.right_probability),
        ("policy", _BY_RELATIVE_THRESHOLD, threshold, number, bounds),
        ("policy", (ARTICLE,), "threshold", number, space.article_threshold),
        ("policy", ("keep-fraction",), "keep_fraction", number, space.keep_fraction),
        ("policy", warmed_up, "warmup_epochs", whole, space.warmup_epochs),
    )
    names = {"optimizer": space.optimizers, "policy": space.policies}
    for parent, parent_values, name, declare, limits in conditional:
        # Keras Tuner would look forever for a condition that can never hold.
        possible = [v for v in names[parent] if v in parent_values]
        if not possible:
            continue
        with hp.conditional_scope(parent, possible):
            value = declare(name, limits)
        if values[parent] in possible:
            values[name] = value
    return values


def explored(space: Space) -> keras_tuner.HyperParameters:
    """Returns all that a space declares, for whatever choices it depends on.

    A function may declare some within a Python `if`, where Keras Tuner sees none that
    the default choices do not lead to.
    """
    found = keras_tuner.HyperParameters()
    tried: set[tuple[str, Any]] = set()
    waiting: list[dict[str, Any]] = [{}]
    while waiting:
        chosen = waiting.pop()
        hp = keras_tuner.HyperParameters()
        hp.values.update(chosen)
        values_of(space, hp)
        found.merge(hp, overwrite=False)
        for one in hp.space:
            if isinstance(one, (_Choice, _Boolean)) and one.name in hp.values:
                options = {(one.name, value) for value in one.values} - tried
                tried |= options
                waiting += [hp.values | dict([option]) for option in options]
    return found


def settings_of_values(values: Mapping[str, Any], given: TrainConfig) -> TrainConfig:
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
    if "right_probability" in policy:  # The threshold of `auto`.
        policy["threshold"] = policy.pop("right_probability")
    name = values.get("policy", given.policy.name)
    if name == ARTICLE:
        policy = {"warmup_epochs": 0.0} | policy | {"level": "batch"}
        name = "loss-threshold"
    elif "policy" in values:  # Else its level is the given policy's.
        of_another = {} if name == given.policy.name else {"threshold": None}
        policy = {"level": "sample"} | of_another | policy
    settings = dataclasses.replace(
        given, **{name: values[name] for name in _OF_SETTINGS if name in values}
    )
    # The training must not end inside its own warm-up.
    warmup = policy.get("warmup_epochs", given.policy.warmup_epochs)
    policy["warmup_epochs"] = min(warmup, settings.epochs - 1)
    chosen = dataclasses.replace(given.policy, name=name, **policy)
    return dataclasses.replace(settings, policy=chosen)


def first_epoch(settings: TrainConfig) -> int:
    """Returns the first epoch, counted from 0, that ends behind the warm-up."""
    policy = settings.policy
    return 0 if policy.name == PLAIN else math.floor(policy.warmup_epochs)


def check_space(space: Space, given: TrainConfig) -> None:
    """Tries a space once, with default values."""
    if not (isinstance(space, SearchSpace) or callable(space)):
        raise InvalidArgument(
            "`space` must be a `SearchSpace` or a function of Keras Tuner's "
            f"hyperparameters. Received: {type(space).__name__}."
        )
    hp = keras_tuner.HyperParameters()
    settings_of_values(values_of(space, hp), given)
    if all(isinstance(one, _Fixed) for one in hp.space):
        raise InvalidArgument(
            "The search space is empty: every hyperparameter has one value. "
            "Widen a range or name a second policy."
        )


# Numbers of heads that train together -------------------------------------------------

ACCEPT_ALL, BELOW, BATCH_BELOW, KEEP_SMALLEST, LISTED = range(5)
# Adam with decoupled weight decay is AdamW, and Keras gives both the same formula.
UPDATE_RULES = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}
# The default of `keras.optimizers.AdamW`.
ADAMW_WEIGHT_DECAY = 0.004
_GROUP_SIZE = 8
_ACCEPTANCES = {
    "accept-all": ACCEPT_ALL,
    "auto": LISTED,
    "loss-threshold": BELOW,
    "keep-fraction": KEEP_SMALLEST,
}


def stack_trials(
    settings: Sequence[TrainConfig],
    *,
    num_classes: int,
    steps_per_epoch: int,
    loss_limit: float = math.inf,
) -> dict[str, np.ndarray]:
    """Returns the numbers of `k` heads, each of shape `(k,)`."""
    rows = []
    for one in settings:
        policy, decay = one.policy, one.weight_decay
        way = _ACCEPTANCES[str(policy.name)]
        if way == BELOW and policy.level == "batch":
            way = BATCH_BELOW
        threshold = loss_limit if way == LISTED else policy.threshold
        probability = policy.threshold if way == LISTED else None
        if probability is None:
            probability = MIN_RIGHT_PROBABILITY
        if threshold is None:
            threshold = policy.relative_threshold * math.log(num_classes)
        if decay is None:
            decay = ADAMW_WEIGHT_DECAY if one.optimizer.lower() == "adamw" else 0.0
        rows.append(
            {
                "learning_rate": one.learning_rate,
                "momentum": one.momentum,
                "weight_decay": decay,  # Decoupled, as in Keras.
                "acceptance": way,
                "threshold": threshold,  # In the loss's units.
                "right_probability": probability,
                "keep_fraction": policy.keep_fraction,
                "warmup_steps": round(policy.warmup_epochs * steps_per_epoch),
            }
        )
    types = {"acceptance": np.int32, "warmup_steps": np.int32}
    return {
        name: np.array([row[name] for row in rows], types.get(name, np.float32))
        for name in rows[0]
    }


def acceptance_groups(acceptance: np.ndarray) -> dict[int, np.ndarray]:
    """Returns for each way of acceptance the positions of its trials, int32."""
    groups = {}
    for way in np.unique(acceptance).tolist():
        positions = np.flatnonzero(acceptance == way).astype(np.int32)
        missing = -len(positions) % _GROUP_SIZE
        groups[way] = np.pad(positions, (0, missing), constant_values=positions[0])
    return groups


def update_rule(settings: TrainConfig) -> str:
    """Returns `"sgd"` or `"adam"`; raises InvalidArgument where it is neither."""
    policy, optimizer = settings.policy, settings.optimizer.lower()
    refused = None
    if optimizer not in UPDATE_RULES:
        refused = f"the optimizer {settings.optimizer}, only {', '.join(UPDATE_RULES)}"
    elif policy.name not in _ACCEPTANCES:
        refused = f"the policy {policy.name}, only {', '.join(_ACCEPTANCES)}"
    elif policy.class_floor > 0:
        refused = f"a class floor of {policy.class_floor}, only 0"
    elif settings.early_stopping:
        refused = "early stopping, only without it"
    if refused is not None:
        raise InvalidArgument(
            f"The batched tuner cannot train {refused}: use the tuner "
            "random, bayesian, hyperband or grid, which train one head at a time."
        )
    return UPDATE_RULES[optimizer]
