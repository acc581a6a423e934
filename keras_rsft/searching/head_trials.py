"""The hyperparameters of heads that are trained together: one number a trial.

Owns what a batched trial can be, and says which settings cannot be one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from keras_rsft.config import TrainConfig
from keras_rsft.errors import InvalidArgument

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
        """Which trials accept in which way: for each way their places, int32.

        Each is filled up with its first place to a multiple of eight, so that the
        programs compiled for one set of trials serve most others too.
        """
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
    """Returns the settings of trials, all of one update rule, as one entry a trial.

    `loss_limit` is that of `auto`, see `AutoPolicy`.
    """
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
