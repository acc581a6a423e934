"""Which heads the base is trained on from, and how all strategies compare.

Pure functions of numbers: `base_trials.py` trains, `choice.py` chooses.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from keras_rsft.finetuning.overfitting import accuracy_error
from keras_rsft.searching.choice import (
    ACCURACY,
    COMPLETED,
    TrialOutcome,
    trainable_of,
)
from keras_rsft.searching.names import ALL, FROZEN, LAST_BLOCK, OBJECTIVES
from keras_rsft.trainable_choice import EVERYTHING, TrainableFrom

SECONDS, WEIGHTS = "training_seconds", "trainable_weights"
# What the names mean to `TrainingSettings.trainable_from`.
TRAINABLE_FROM: dict[str, TrainableFrom] = {LAST_BLOCK: 1, ALL: EVERYTHING}
# The base's learning rate is a tenth of the head's, and at most this: the rate that is
# best for a new head may be one that ruins a base. Optimizers that divide by the
# gradient's size need a smaller one.
HIGHEST_BASE_RATE = {"sgd": 1e-3}
HIGHEST_ADAPTIVE_BASE_RATE = 1e-4


@dataclasses.dataclass(frozen=True)
class PlannedTrial:
    """A head's trial that is trained on with a part of the base.

    Attributes:
        trainable: What of the base learns, `"last-block"` or `"all"`.
        begins_from: The head's trial.
    """

    trainable: str
    begins_from: TrialOutcome

    @property
    def trial_id(self) -> str:
        """Name of the trial."""
        return f"{self.trainable}-{self.begins_from.trial_id}"


@dataclasses.dataclass(frozen=True)
class StrategyRow:
    """One strategy in numbers.

    Attributes:
        trainable: What learnt, out of `TRAINABLE_NAMES`.
        rejects: Whether any sample was rejected.
        trial: Name of its trial.
        policy: Its policy.
        validation_accuracy: In [0, 1]; None where the trial failed.
        standard_error: Binomial, of that accuracy; None likewise.
        acceptance_rate: In [0, 1]; None likewise.
        seconds: Of training. A head's is its share of the time of all that were
            trained together; None where it is not known.
        trainable_weights: How many numbers learnt.
        chosen: Whether it is the choice.
        message: Why it failed, or None.
    """

    trainable: str
    rejects: bool
    trial: str
    policy: str
    validation_accuracy: float | None
    standard_error: float | None
    acceptance_rate: float | None
    seconds: float | None
    trainable_weights: int | None
    chosen: bool
    message: str | None = None


def best_heads(
    outcomes: Sequence[TrialOutcome],
    is_plain: Callable[[TrialOutcome], bool],
    *,
    objective: str,
    min_acceptance: float,
) -> tuple[TrialOutcome, ...]:
    """Returns the best plain trial and the best one that rejects, as far as there are.

    Of equally good ones it is the one that rejects less.

    Args:
        outcomes: Trials of heads.
        is_plain: Whether a trial's policy accepts everything by itself.
        objective: Name out of `OBJECTIVES`.
        min_acceptance: A trial that accepts a smaller share is passed over.
    """
    sign = 1.0 if OBJECTIVES[objective] == "max" else -1.0
    completed = [one for one in outcomes if one.status == COMPLETED]
    plain = [one for one in completed if is_plain(one)]
    # What accepted everything all the same would be the plain training once more.
    rejecting = [
        one
        for one in completed
        if not is_plain(one) and min_acceptance <= one.metrics["acceptance_rate"] < 1.0
    ]

    def goodness(one: TrialOutcome) -> tuple[float, float]:
        return sign * one.metrics[objective], one.metrics["acceptance_rate"]

    return tuple(max(group, key=goodness) for group in (plain, rejecting) if group)


def planned_trials(
    heads: Sequence[TrialOutcome], trainable: Sequence[str]
) -> tuple[PlannedTrial, ...]:
    """Returns the trials in which the base learns, the cheapest first.

    Args:
        heads: Those to train on from.
        trainable: What of the base learns, in order.
    """
    return tuple(PlannedTrial(name, head) for name in trainable for head in heads)


def base_learning_rate(head_rate: float, optimizer: str) -> float:
    """Returns the base's learning rate where none is asked for.

    Args:
        head_rate: The head's.
        optimizer: Name of the optimizer.
    """
    highest = HIGHEST_BASE_RATE.get(optimizer.lower(), HIGHEST_ADAPTIVE_BASE_RATE)
    return min(0.1 * head_rate, highest)


def strategy_rows(
    outcomes: Sequence[TrialOutcome],
    *,
    chosen: TrialOutcome,
    policy_of: Callable[[TrialOutcome], str],
    validation_size: int,
    head_seconds: float | None,
    head_weights: int,
) -> tuple[StrategyRow, ...]:
    """Returns one row for each trial that stands for a strategy.

    Args:
        outcomes: The best heads, and all trials in which the base learnt. The choice
            gets a row of its own where it is not among them.
        chosen: The choice.
        policy_of: Returns the name of a trial's policy.
        validation_size: Samples that an accuracy was measured on, at least 1.
        head_seconds: Time of a head's training.
        head_weights: Trainable weights of a head.
    """
    ids = {one.trial_id for one in outcomes}
    shown = [*outcomes, *([] if chosen.trial_id in ids else [chosen])]
    rows = []
    for one in shown:
        policy, of_head = policy_of(one), trainable_of(one) == FROZEN
        accuracy = one.metrics.get(ACCURACY)
        accepted = one.metrics.get("acceptance_rate")
        weights = head_weights if of_head else one.metrics.get(WEIGHTS)
        rows.append(
            StrategyRow(
                trainable=trainable_of(one),
                rejects=policy != "accept-all",
                trial=one.trial_id,
                policy=policy,
                validation_accuracy=accuracy,
                standard_error=(
                    None
                    if accuracy is None
                    else accuracy_error(accuracy, validation_size)
                ),
                acceptance_rate=accepted,
                seconds=head_seconds if of_head else one.metrics.get(SECONDS),
                trainable_weights=None if weights is None else int(weights),
                chosen=one.trial_id == chosen.trial_id,
                message=one.message,
            )
        )
    order = [FROZEN, LAST_BLOCK, ALL]
    return tuple(
        sorted(rows, key=lambda row: (order.index(row.trainable), row.rejects))
    )
