"""The hyperparameters of heads that are trained together: one number a trial.

Owns what a batched trial can be, and says which settings cannot be one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

from keras_rsft.errors import InvalidArgument
from keras_rsft.finetuning import TrainingSettings

ACCEPT_ALL, BELOW, BATCH_BELOW, KEEP_SMALLEST, LISTED = range(5)
# Adam with decoupled weight decay is AdamW, and Keras gives both the same formula.
UPDATE_RULES = {"sgd": "sgd", "adam": "adam", "adamw": "adam"}
# What `keras.optimizers.AdamW` decays by where nothing else is said.
ADAMW_WEIGHT_DECAY = 0.004
_GROUP_SIZE = 8
BATCHED_POLICIES = ("accept-all", "auto", "loss-threshold", "keep-fraction")


@dataclasses.dataclass(frozen=True, eq=False)
class HeadTrials:
    """Hyperparameters of `k` heads that share an update rule.

    Attributes:
        update_rule: `"sgd"` or `"adam"`.
        learning_rate: Float32 array `(k,)`, positive.
        momentum: Float32 array `(k,)` in [0, 1]; used by `"sgd"` alone.
        weight_decay: Float32 array `(k,)`, at least 0; decoupled, as in Keras.
        acceptance: int32 array `(k,)`: `ACCEPT_ALL`, `BELOW` a threshold by sample,
            `BATCH_BELOW` it by batch, `KEEP_SMALLEST`, or `LISTED`.
        threshold: Float32 array `(k,)`, in the loss's units.
        keep_fraction: Float32 array `(k,)` in (0, 1].
        warmup_steps: int32 array `(k,)`: steps in which everything is accepted, or
            over which the kept share falls.
    """

    update_rule: str
    learning_rate: np.ndarray
    momentum: np.ndarray
    weight_decay: np.ndarray
    acceptance: np.ndarray
    threshold: np.ndarray
    keep_fraction: np.ndarray
    warmup_steps: np.ndarray

    def __len__(self) -> int:
        return len(self.learning_rate)

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """All attributes that have one number a trial."""
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
        """Returns some of the trials.

        Args:
            rows: Integer array `(m,)`, which ones.
        """
        chosen = {name: values[rows] for name, values in self.arrays.items()}
        return HeadTrials(self.update_rule, **chosen)


def stack_trials(
    settings: Sequence[TrainingSettings],
    *,
    num_classes: int,
    steps_per_epoch: int,
    loss_limit: float = math.inf,
) -> HeadTrials:
    """Returns the settings of trials as arrays, one entry a trial.

    Args:
        settings: At least one; all of one update rule.
        num_classes: Number of classes, at least 2.
        steps_per_epoch: Batches per epoch, at least 1.
        loss_limit: Of `auto`, see `AutoPolicy`. Default: infinity.

    Raises:
        InvalidArgument: If a setting cannot be trained together with others.
    """
    rules = {update_rule(one) for one in settings}
    if len(rules) != 1:
        raise InvalidArgument(
            "Heads that are trained together must share one update rule. "
            f"Received: {sorted(rules)}. Call this once for each."
        )
    rows = [_row(one, num_classes, steps_per_epoch, loss_limit) for one in settings]
    types = {"acceptance": np.int32, "warmup_steps": np.int32}
    arrays = {
        name: np.array([row[name] for row in rows], types.get(name, np.float32))
        for name in rows[0]
    }
    return HeadTrials(rules.pop(), **arrays)


def update_rule(settings: TrainingSettings) -> str:
    """Returns how a trial's weights change: `"sgd"` or `"adam"`.

    Raises:
        InvalidArgument: If the settings cannot be trained together with others.
    """
    policy, optimizer = settings.policy, settings.optimizer.lower()
    refused = None
    if optimizer not in UPDATE_RULES:
        refused = f"the optimizer {settings.optimizer} ({', '.join(UPDATE_RULES)})"
    elif policy.name not in BATCHED_POLICIES:
        refused = f"the policy {policy.name} ({', '.join(BATCHED_POLICIES)})"
    elif policy.class_floor > 0:
        refused = f"a class floor of {policy.class_floor} (0)"
    elif settings.early_stopping:
        refused = "early stopping (none)"
    if refused is not None:
        what, known = refused.rsplit(" (", 1)
        raise InvalidArgument(
            f"The batched tuner cannot train {what}, only {known[:-1]}: use the tuner "
            "random, bayesian, hyperband or grid, which train one head at a time."
        )
    return UPDATE_RULES[optimizer]


def _row(
    settings: TrainingSettings,
    num_classes: int,
    steps_per_epoch: int,
    loss_limit: float,
) -> dict[str, float]:
    policy = settings.policy
    by_loss = BATCH_BELOW if policy.level == "batch" else BELOW
    acceptances = {
        "accept-all": ACCEPT_ALL,
        "auto": LISTED,
        "loss-threshold": by_loss,
        "keep-fraction": KEEP_SMALLEST,
    }
    threshold = loss_limit if policy.name == "auto" else policy.threshold
    if threshold is None:
        threshold = policy.relative_threshold * math.log(num_classes)
    decay = settings.weight_decay
    if decay is None:
        decay = ADAMW_WEIGHT_DECAY if settings.optimizer.lower() == "adamw" else 0.0
    return {
        "learning_rate": settings.learning_rate,
        "momentum": settings.momentum,
        "weight_decay": decay,
        "acceptance": acceptances[policy.name],
        "threshold": threshold,
        "keep_fraction": policy.keep_fraction,
        "warmup_steps": round(policy.warmup_epochs * steps_per_epoch),
    }
