"""Chooses among finished trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from keras_rsft.config import FROZEN, UNFREEZE_NAMES, SearchConfig, TrainConfig
from keras_rsft.errors import TrainingStalled
from keras_rsft.training._curves import accuracy_error

COMPLETED = "COMPLETED"
ACCURACY = "val_accuracy"
PLAIN = "accept-all"
# Name of the value that says how much of the backbone is trained.
UNFREEZE = "unfreeze"
# By `TrialOutcome.cost`.
_ALIKE = (
    "on a frozen backbone ",
    "that train the last block ",
    "that train all of the backbone ",
)


@dataclasses.dataclass(frozen=True)
class TrialOutcome:
    """One trial: its values, and the metrics of its best epoch."""

    trial_id: str
    status: str
    values: Mapping[str, Any]
    metrics: Mapping[str, float]
    epochs: int  # Up to its best.
    message: str | None = None
    # They train it again, up to its best epoch.
    settings: TrainConfig = dataclasses.field(default_factory=TrainConfig)

    @property
    def completed(self) -> bool:
        return self.status == COMPLETED

    @property
    def is_plain(self) -> bool:
        """Says whether it is a completed one of a head that accepts everything."""
        return self.completed and self.settings.policy.name == PLAIN and not self.cost

    @property
    def unfreeze(self) -> str:
        """How much of the backbone is trained, out of `UNFREEZE_NAMES`."""
        name = self.values.get(UNFREEZE)
        return name if name in UNFREEZE_NAMES else FROZEN

    @property
    def cost(self) -> int:
        """A number that is higher where more of the backbone is trained; 0: none."""
        return UNFREEZE_NAMES.index(self.unfreeze)

    @property
    def acceptance(self) -> float:
        return self.metrics["acceptance_rate"]

    def goodness(self, options: SearchConfig) -> float:
        """Returns the objective, negated where lower is better."""
        value = self.metrics[options.objective]
        return value if options.direction == "max" else -value


@dataclasses.dataclass(frozen=True)
class Choice:
    chosen: TrialOutcome
    best: TrialOutcome
    noise: float
    reason: str


def choose_trial(
    outcomes: Sequence[TrialOutcome], options: SearchConfig, *, validation_size: int
) -> Choice:
    """Chooses the cheapest of the trials that are as good as the best."""
    completed = [one for one in outcomes if one.completed]
    if not completed:
        told = (one.message for one in outcomes if one.message)
        first = next(told, "no reason given")
        raise TrainingStalled(
            f"All {len(outcomes)} trials failed. The first says: {first} "
            "Change the search space."
        )
    objective, least = options.objective, options.min_acceptance
    eligible = [one for one in completed if one.acceptance >= least]
    if not eligible:
        most = max(one.acceptance for one in completed)
        raise TrainingStalled(
            f"No trial accepted at least {least:.0%} of the samples; the "
            f"highest was {most:.0%}. Raise the thresholds or lower the least "
            "acceptance."
        )
    best = max(eligible, key=lambda one: one.goodness(options))
    noise = 0.0
    if objective == ACCURACY:
        noise = accuracy_error(best.metrics[objective], validation_size)
    lowest = best.goodness(options) - noise
    as_good = [one for one in eligible if one.goodness(options) >= lowest]
    chosen = max(
        as_good, key=lambda one: (-one.cost, one.acceptance, one.goodness(options))
    )
    return Choice(chosen, best, noise, _reason(chosen, best, noise, objective))


def _reason(
    chosen: TrialOutcome, best: TrialOutcome, noise: float, objective: str
) -> str:
    value, best_value = (one.metrics[objective] for one in (chosen, best))
    name = f"Trial {chosen.trial_id}"
    if chosen is best:
        return f"{name} has the best {objective}, {value:.4f}."
    if chosen.cost < best.cost:
        what = "no part" if chosen.cost == 0 else "the least"
        return (
            f"{name} trains {what} of the backbone, and its {objective} is within one "
            f"standard error ({noise:.4f}) of the best: {value:.4f} against "
            f"{best_value:.4f} of trial {best.trial_id}."
        )
    alike = _ALIKE[chosen.cost] if UNFREEZE in chosen.values else ""
    if value == best_value:
        return (
            f"{name} has the best {objective}, {value:.4f}, and rejects the least of "
            f"those {alike}that have it."
        )
    return (
        f"{name} rejects the least of those {alike}whose {objective} is within one "
        f"standard error ({noise:.4f}) of the best: {value:.4f} against "
        f"{best_value:.4f} of trial {best.trial_id}."
    )
