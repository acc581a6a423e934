"""What is searched: ranges of hyperparameters and the settings they mean."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras_tuner
import numpy as np
from keras_tuner.engine.hyperparameters import Fixed as _Fixed

from keras_rsft.config import ARTICLE, SearchSpace, TrainConfig, require_known
from keras_rsft.errors import InvalidArgument

# Space --------------------------------------------------------------------------------

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
    """Returns how to train a trial."""
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
    """Tries a space once, with default values."""
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


# Numbers of heads that train together -------------------------------------------------

ACCEPT_ALL, BELOW, BATCH_BELOW, KEEP_SMALLEST, LISTED = range(5)
# Adam with decoupled weight decay is AdamW, and Keras gives both the same formula.
UPDATE_RULES = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}
# What `keras.optimizers.AdamW` decays by where nothing else is said.
ADAMW_WEIGHT_DECAY = 0.004
_GROUP_SIZE = 8
_ACCEPTANCES = {
    "accept-all": ACCEPT_ALL,
    "auto": LISTED,
    "loss-threshold": BELOW,
    "keep-fraction": KEEP_SMALLEST,
}


@dataclasses.dataclass(frozen=True, eq=False)
class HeadTrials:
    """Hyperparameters of `k` heads of one update rule, in arrays of shape `(k,)`."""

    update_rule: str  # "sgd" or "adam".
    learning_rate: np.ndarray
    momentum: np.ndarray  # Used by "sgd" alone.
    weight_decay: np.ndarray  # Decoupled, as in Keras.
    acceptance: np.ndarray  # ACCEPT_ALL to LISTED.
    threshold: np.ndarray  # In the loss's units.
    keep_fraction: np.ndarray
    warmup_steps: np.ndarray  # Everything is accepted, or the kept share falls.

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        names = [field.name for field in dataclasses.fields(self)]
        return {name: getattr(self, name) for name in names if name != "update_rule"}

    @property
    def groups(self) -> dict[int, np.ndarray]:
        """Which trials accept in which way: for each way their places, int32."""
        found = {}
        for way in np.unique(self.acceptance).tolist():
            places = np.flatnonzero(self.acceptance == way).astype(np.int32)
            missing = -len(places) % _GROUP_SIZE
            found[way] = np.pad(places, (0, missing), constant_values=places[0])
        return found

    def take(self, rows: np.ndarray) -> HeadTrials:
        chosen = {name: values[rows] for name, values in self.arrays.items()}
        return HeadTrials(self.update_rule, **chosen)


def stack_trials(
    settings: Sequence[TrainConfig],
    *,
    num_classes: int,
    steps_per_epoch: int,
    loss_limit: float = math.inf,
) -> HeadTrials:
    """Returns the settings of trials, all of one update rule, as one entry a trial."""
    rules = {update_rule(one) for one in settings}
    if len(rules) != 1:
        raise InvalidArgument(
            "Heads that are trained together must share one update rule. "
            f"Received: {sorted(rules)}. Call this once for each."
        )
    rows = []
    for one in settings:
        policy, decay = one.policy, one.weight_decay
        way = _ACCEPTANCES[policy.name]
        if way == BELOW and policy.level == "batch":
            way = BATCH_BELOW
        threshold = loss_limit if way == LISTED else policy.threshold
        if threshold is None:
            threshold = policy.relative_threshold * math.log(num_classes)
        if decay is None:
            decay = ADAMW_WEIGHT_DECAY if one.optimizer.lower() == "adamw" else 0.0
        rows.append(
            {
                "learning_rate": one.learning_rate,
                "momentum": one.momentum,
                "weight_decay": decay,
                "acceptance": way,
                "threshold": threshold,
                "keep_fraction": policy.keep_fraction,
                "warmup_steps": round(policy.warmup_epochs * steps_per_epoch),
            }
        )
    types = {"acceptance": np.int32, "warmup_steps": np.int32}
    columns = {
        name: np.array([row[name] for row in rows], types.get(name, np.float32))
        for name in rows[0]
    }
    return HeadTrials(rules.pop(), **columns)


def update_rule(settings: TrainConfig) -> str:
    """Returns how a trial's weights change: `"sgd"` or `"adam"`."""
    policy, optimizer = settings.policy, settings.optimizer.lower()
    refused = None
    if optimizer not in UPDATE_RULES:
        refused = f"the optimizer {settings.optimizer} ({', '.join(UPDATE_RULES)})"
    elif policy.name not in _ACCEPTANCES:
        refused = f"the policy {policy.name} ({', '.join(_ACCEPTANCES)})"
    elif policy.class_floor > 0:
        refused = f"a class floor of {policy.class_floor} (0)"
    elif settings.early_stopping:
        refused = "early stopping (without it)"
    if refused is not None:
        what, known = refused.rsplit(" (", 1)
        raise InvalidArgument(
            f"The batched tuner cannot train {what}, only {known[:-1]}: use the tuner "
            "random, bayesian, hyperband or grid, which train one head at a time."
        )
    return UPDATE_RULES[optimizer]
