"""Chooses among finished trials."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from keras_rsft._stats import paired_error
from keras_rsft.config import AUTO, FROZEN, UNFREEZE_NAMES, SearchConfig, TrainConfig
from keras_rsft.errors import TrainingStalled
from keras_rsft.training._head import credited_to

COMPLETED = "COMPLETED"
GIVEN_ACCURACY = "val_accuracy"
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
    reason: str
    # By trial the standard error of its difference to the best, on the same samples.
    errors: Mapping[str, float]

    @property
    def noise(self) -> float:
        return self.errors[self.chosen.trial_id]


def choose_trial(
    outcomes: Sequence[TrialOutcome],
    options: SearchConfig,
    predicted: Mapping[str, np.ndarray] | None = None,
    credits: np.ndarray | None = None,
) -> Choice:
    """Chooses the most convincing of the trials that train least of the backbone.

    These are the cheapest of which one is within one standard error of the best, paired
    by validation sample. Most convincing is the highest sum of the objective and of the
    agreement with all trials, each weighted by how likely it is as good as the best:
    where trials err, they err differently, so that their votes add to what few labels
    say. A trial of `auto` is preferred within one standard error of that one.

    `predicted` has by trial the class of each validation sample, `(n,)`; the mean of
    the `credits`, `(n, classes)`, of these classes is the objective. Without them only
    equals are as good, and the least selective is chosen.
    """
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
    errors = dict.fromkeys((one.trial_id for one in completed), 0.0)
    if predicted is not None and credits is not None:
        of_best = credited_to(credits, predicted[best.trial_id])
        for name in errors.keys() - {best.trial_id}:
            errors[name] = paired_error(of_best, credited_to(credits, predicted[name]))
    as_good = [
        one
        for one in eligible
        if best.goodness(options) - one.goodness(options) <= errors[one.trial_id]
    ]
    cost = min(one.cost for one in as_good)
    candidates = [one for one in as_good if one.cost == cost]
    score = dict.fromkeys((one.trial_id for one in eligible), 0.0)
    if predicted is not None:
        gaps = [best.goodness(options) - one.goodness(options) for one in eligible]
        names = [one.trial_id for one in eligible]
        noise = np.maximum([errors[name] for name in names], 1e-12)
        weights = np.exp(-0.5 * np.square(gaps / noise))  # How likely as good.
        agreement = agreements([predicted[name] for name in names], weights)
        for one, agreed in zip(eligible, agreement, strict=True):
            score[one.trial_id] = one.goodness(options) + agreed
        if cost == best.cost:
            candidates = [one for one in eligible if one.cost == cost]

    def convincing(one: TrialOutcome) -> tuple[float, ...]:
        return score[one.trial_id], one.acceptance, one.goodness(options)

    likeliest = max(candidates, key=convincing)
    of_auto = [one for one in candidates if one.settings.policy.name == AUTO]
    if of_auto and likeliest not in of_auto and predicted and credits is not None:
        auto = max(of_auto, key=convincing)
        error = paired_error(
            *(
                credited_to(credits, predicted[one.trial_id])
                for one in (likeliest, auto)
            )
        )
        if likeliest.goodness(options) - auto.goodness(options) <= error:
            value, other = (one.metrics[objective] for one in (auto, likeliest))
            reason = (
                f"Trial {auto.trial_id} leaves out the labels that look wrong, and no "
                f"other is better by more than one standard error ({error:.4f}): "
                f"{value:.4f} against {other:.4f} of trial {likeliest.trial_id}."
            )
            return Choice(auto, best, reason, errors)
    reason = _reason(likeliest, best, errors[likeliest.trial_id], objective)
    return Choice(likeliest, best, reason, errors)


def agreements(predicted: Sequence[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Returns how much of all votes agrees with each, in the mean of the samples."""
    rows = np.arange(len(predicted[0]))
    votes = np.zeros((len(rows), 1 + max(int(one.max()) for one in predicted)))
    for one, weight in zip(predicted, weights / weights.sum(), strict=True):
        votes[rows, one] += weight
    return np.array([votes[rows, one].mean() for one in predicted])


def _reason(
    chosen: TrialOutcome, best: TrialOutcome, noise: float, objective: str
) -> str:
    value, best_value = (one.metrics[objective] for one in (chosen, best))
    name = f"Trial {chosen.trial_id}"
    if chosen is best:
        return f"{name} has the best {objective}, {value:.4f}."
    of_best = f"{value:.4f} against {best_value:.4f} of trial {best.trial_id}"
    if chosen.cost < best.cost:
        what = "no part" if chosen.cost == 0 else "the least"
        return (
            f"{name} trains {what} of the backbone, and its {objective} is within one "
            f"standard error ({noise:.4f}) of the best: {of_best}."
        )
    alike = _ALIKE[chosen.cost] if UNFREEZE in chosen.values else ""
    if value == best_value and not noise:
        return (
            f"{name} has the best {objective}, {value:.4f}, and rejects the least of "
            f"those {alike}that have it."
        )
    return (
        f"{name} has the highest sum of {objective} and agreement with the other "
        f"trials{alike and ', of those ' + alike.strip()}: {of_best}, a difference "
        f"with a standard error of {noise:.4f}."
    )
