"""From the outcome of each method and seed to means, differences and a verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from keras_rsft.config import CLEAN_SUBSET, PLAIN
from keras_rsft.intervals import (
    Interval,
    mean_interval,
    paired_interval,
    paired_right_interval,
)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What one method did with one seed. Shares are in [0, 1].

    Attributes:
        method: Name of the method.
        seed: Its seed.
        seconds: Time for everything that the method needs, features excepted.
        test_right: Which test samples it gets right, booleans of shape `(n,)`; None
            if the training stalled.
        acceptance_rate: Share of the training samples that was learned from in
            the end; None for a method that has no such share.
        wrong_labels_rejected: Share of the wrong training labels that the method
            rejects in the end; None where it cannot be known.
        right_labels_rejected: The same of the right training labels.
        stalled: Why the training stalled, or None.
    """

    method: str
    seed: int
    seconds: float
    test_right: np.ndarray | None = dataclasses.field(
        default=None, repr=False, compare=False
    )
    acceptance_rate: float | None = None
    wrong_labels_rejected: float | None = None
    right_labels_rejected: float | None = None
    stalled: str | None = None

    @property
    def test_accuracy(self) -> float | None:
        """Accuracy on the test split; None if the training stalled."""
        return None if self.test_right is None else float(np.mean(self.test_right))


@dataclasses.dataclass(frozen=True)
class MethodSummary:
    """One method over all seeds.

    Attributes:
        test_accuracy: Mean and interval over the seeds that did not stall; None
            if all of them stalled.
        difference_to_plain: Paired by seed, its interval over seeds too; None for
            `plain`, and where a seed of either stalled.
        recovered: See `recovered_share`; None where the right labels are not
            known, and where a seed stalled.
        acceptance_rate: Mean, or None.
        wrong_labels_rejected: Mean, or None.
        right_labels_rejected: Mean, or None.
        seconds: Mean.
        stalled: Number of seeds whose training stalled.
    """

    test_accuracy: Interval | None
    difference_to_plain: Interval | None
    recovered: float | None
    acceptance_rate: float | None
    wrong_labels_rejected: float | None
    right_labels_rejected: float | None
    seconds: float
    stalled: int


@dataclasses.dataclass(frozen=True)
class Verdict:
    """Which method is ahead.

    Attributes:
        winner: The method that is ahead of every other by more than chance, or
            None.
        tied: The methods that may be the best, best mean first; one if there is
            a winner, none if nothing can be ranked.
        sentence: The same in words.
    """

    winner: str | None
    tied: tuple[str, ...]
    sentence: str


def summarize(outcomes: Sequence[Outcome]) -> dict[str, MethodSummary]:
    """Returns the summary of each method, in the order of the outcomes."""
    complete = {
        name: right.mean(axis=1).tolist()
        for name, right in _complete_right(outcomes).items()
    }
    means = {name: mean_interval(values).mean for name, values in complete.items()}
    summaries = {}
    for name in _names(outcomes):
        mine = [outcome for outcome in outcomes if outcome.method == name]
        accuracies = _known(mine, "test_accuracy")
        difference = recovered = None
        if name in complete and PLAIN in complete and name != PLAIN:
            difference = paired_interval(complete[name], complete[PLAIN])
        if {name, PLAIN, CLEAN_SUBSET} <= complete.keys():
            recovered = recovered_share(means[name], means[PLAIN], means[CLEAN_SUBSET])
        summaries[name] = MethodSummary(
            test_accuracy=mean_interval(accuracies) if accuracies else None,
            difference_to_plain=difference,
            recovered=recovered,
            acceptance_rate=_mean(mine, "acceptance_rate"),
            wrong_labels_rejected=_mean(mine, "wrong_labels_rejected"),
            right_labels_rejected=_mean(mine, "right_labels_rejected"),
            seconds=sum(outcome.seconds for outcome in mine) / len(mine),
            stalled=sum(outcome.stalled is not None for outcome in mine),
        )
    return summaries


def judge(outcomes: Sequence[Outcome]) -> Verdict:
    """Says which method is ahead by more than chance, if one is.

    The method with the best mean wins only if the paired 95 % interval of its
    lead, over seeds and test samples, excludes zero, over the runner-up and over every
    other method. The clean subset does not compete: it is told which labels are right.
    Nor does a method that stalled with some seed.
    """
    right = _complete_right(outcomes)
    right.pop(CLEAN_SUBSET, None)
    ranked = sorted(right, key=lambda name: -right[name].mean())
    if len(ranked) < 2:
        return Verdict(None, tuple(ranked), "There are not two methods to compare.")
    best, others = ranked[0], ranked[1:]
    leads = {name: paired_right_interval(right[best], right[name]) for name in others}
    level = [name for name in others if leads[name][0] <= 0]
    if not level:
        points = 100 * (right[best].mean() - right[others[0]].mean())
        low, high = (100 * end for end in leads[others[0]])
        return Verdict(
            best,
            (best,),
            f"{best} is ahead: {points:.1f} points over the next, {others[0]} "
            f"(95 % interval over seeds and test samples: {low:+.1f} to {high:+.1f}).",
        )
    tied = (best, *level)
    names = f"{', '.join(tied[:-1])} and {tied[-1]}"
    if len(right[best]) < 2:
        sentence = f"One seed cannot tell a lead from chance: {names} are tied."
    else:
        sentence = (
            "No method is ahead by more than what other seeds and test samples may "
            f"change: {names} are tied."
        )
    return Verdict(None, tied, sentence)


def recovered_share(method: float, plain: float, clean: float) -> float | None:
    """Returns the share of what wrong labels cost that a method wins back.

    0 is plain fine-tuning, 1 the clean subset, below 0 harm; None where the wrong
    labels cost nothing.
    """
    return (method - plain) / (clean - plain) if clean > plain else None


def _complete_right(outcomes: Sequence[Outcome]) -> dict[str, np.ndarray]:
    """Returns `(seeds, n)`, in the order of seeds, of each method without a stall."""
    right = {}
    for name in _names(outcomes):
        mine = [outcome for outcome in outcomes if outcome.method == name]
        mine.sort(key=lambda outcome: outcome.seed)
        judged = [one.test_right for one in mine if one.test_right is not None]
        if len(judged) == len(mine):
            right[name] = np.stack(judged)
    return right


def _names(outcomes: Sequence[Outcome]) -> list[str]:
    return list(dict.fromkeys(outcome.method for outcome in outcomes))


def _known(outcomes: Sequence[Outcome], field: str) -> list[float]:
    values = [getattr(outcome, field) for outcome in outcomes]
    return [value for value in values if value is not None]


def _mean(outcomes: Sequence[Outcome], field: str) -> float | None:
    values = _known(outcomes, field)
    return sum(values) / len(values) if values else None
