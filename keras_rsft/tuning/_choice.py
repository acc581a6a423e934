"""Chooses among finished trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras_rsft.config import ALL, FROZEN, LAST_BLOCK, OBJECTIVES, UNFREEZE_NAMES
from keras_rsft.errors import TrainingStalled
from keras_rsft.training._curves import accuracy_error

COMPLETED = "COMPLETED"
ACCURACY = "val_accuracy"
# Name of the value that says what of a model learnt.
TRAINABLE = "trainable"
_ALIKE = {
    FROZEN: "on a frozen base ",
    LAST_BLOCK: "that train the last block ",
    ALL: "that train all of the base ",
}


@dataclasses.dataclass(frozen=True)
class TrialOutcome:
    """What became of one trial."""

    trial_id: str
    status: str
    values: Mapping[str, Any]
    metrics: Mapping[str, float]
    epochs: int
    message: str | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """Which trial is chosen, and why."""

    chosen: TrialOutcome
    best: TrialOutcome
    noise: float
    reason: str


def choose_trial(
    outcomes: Sequence[TrialOutcome],
    *,
    objective: str,
    validation_size: int,
    min_acceptance: float,
) -> Choice:
    """Chooses the cheapest of the trials that are as good as the best."""
    completed = [one for one in outcomes if one.status == COMPLETED]
    if not completed:
        first = next(
            (one.message for one in outcomes if one.message), "no reason given"
        )
        raise TrainingStalled(
            f"All {len(outcomes)} trials failed. The first says: {first} "
            "Change the search space."
        )
    eligible = [one for one in completed if _acceptance(one) >= min_acceptance]
    if not eligible:
        most = max(map(_acceptance, completed))
        raise TrainingStalled(
            f"No trial accepted at least {min_acceptance:.0%} of the samples; the "
            f"highest was {most:.0%}. Raise the thresholds or lower the least "
            "acceptance."
        )
    sign = 1.0 if OBJECTIVES[objective] == "max" else -1.0

    def value(outcome: TrialOutcome) -> float:
        return sign * outcome.metrics[objective]

    best = max(eligible, key=value)
    noise = 0.0
    if objective == ACCURACY:
        noise = accuracy_error(best.metrics[objective], validation_size)
    as_good = [one for one in eligible if value(one) >= value(best) - noise]
    chosen = max(as_good, key=lambda one: (-cost_of(one), _acceptance(one), value(one)))
    return Choice(chosen, best, noise, _reason(chosen, best, noise, objective))


def trainable_of(outcome: TrialOutcome) -> str:
    """Returns what learnt in a trial, out of `UNFREEZE_NAMES`."""
    name = outcome.values.get(TRAINABLE)
    return name if name in UNFREEZE_NAMES else FROZEN


def cost_of(outcome: TrialOutcome) -> int:
    """Returns a number that is higher where more of the base is trained; 0: none."""
    return UNFREEZE_NAMES.index(trainable_of(outcome))


def _acceptance(outcome: TrialOutcome) -> float:
    return outcome.metrics["acceptance_rate"]


def _reason(
    chosen: TrialOutcome, best: TrialOutcome, noise: float, objective: str
) -> str:
    value, best_value = (one.metrics[objective] for one in (chosen, best))
    name = f"Trial {chosen.trial_id}"
    if chosen is best:
        return f"{name} has the best {objective}, {value:.4f}."
    if cost_of(chosen) < cost_of(best):
        what = "no part" if trainable_of(chosen) == FROZEN else "the least"
        return (
            f"{name} trains {what} of the base, and its {objective} is within the "
            f"noise ({noise:.4f}) of the best: {value:.4f} against {best_value:.4f} of "
            f"trial {best.trial_id}."
        )
    alike = _ALIKE[trainable_of(chosen)] if TRAINABLE in chosen.values else ""
    if value == best_value:
        return (
            f"{name} has the best {objective}, {value:.4f}, and rejects the least of "
            f"those {alike}that have it."
        )
    return (
        f"{name} rejects the least of those {alike}whose {objective} is within the "
        f"noise ({noise:.4f}) of the best: {value:.4f} against {best_value:.4f} of "
        f"trial {best.trial_id}."
    )
