"""Audits labels: how many are wrong, and which."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft._stats import NORMAL_QUANTILE, proportion_interval
from keras_rsft.errors import DataError
from keras_rsft.features._neighbours import with_copies
from keras_rsft.features._store import FeatureSet

ROUNDS = 4
# With fewer samples a class's labels are not judged.
MIN_CLASS_SIZE = 5
MIN_NOISE_RATE = 0.02
MIN_RIGHT_PROBABILITY = 0.6

RIDGES = 10.0 ** np.arange(1.0, 5.25, 0.5)
# The ridge does not depend on the number of samples: some are enough to choose it.
MAX_ROWS_TO_CHOOSE = 4096
CHUNK_ROWS = 4096
# Larger groups of copies are left out by another fit, not by solving for them.
MAX_GROUP_TO_SOLVE = 512

FIRST_SHARPNESS = 12.0
FIRST_NOISE_RATE = 0.1
# Without momentum it takes hundreds of steps where most labels are wrong.
FIT_STEPS = 40
MOMENTUM = 0.8
# A step that lowers the mean log-likelihood by more is taken back; the next is damped.
MAX_FALL = 0.01
FIRST_DAMPING = 0.05
# Per class: pulls the calibration towards one sharpness for all.
CALIBRATION_RIDGE = 0.1
# Pseudo-counts that pull each class's noise towards evenly spread noise, which
# matters where a class has few samples.
PRIOR_COUNT = 40.0
CHUNK_VALUES = 2**22

# Deviation of what the probabilities get wrong about an accuracy; see `accuracy`.
PRIOR_BIAS = 0.0175
# Of how often predictions are right, in the units of a logit; see `credits`.
PRIOR_LOGIT_DEVIATION = 2.0


class Estimate(NamedTuple):
    """An estimated fraction, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, eq=False)
class LabelQuality:
    """What was found out about the labels of `n` samples in `k` classes.

    Attributes:
        out_of_sample: Float32 array `(n, k)`, each row adding up to 1: how likely
            each class is, from the other samples alone.
        right_probability: Float32 array `(n,)` in [0, 1]: how likely the given
            label is right. 1 where a person has reviewed it, where its class has
            fewer than 5 training samples, and where nothing can be judged.
        noise_rate: Estimated fraction of wrong labels, in [0, 1]: one minus the mean
            of `right_probability`.
        noise: Float64 array `(k, k)`: `noise[c, g]` is the estimated probability
            that a sample of class `c` was labelled `g`. Rows add up to 1.
        labels: int32 array `(n,)`, the given labels.
        reason: Why nothing is rejected, or None if the labels could be judged.
        held_out: The same of each further split.
        left_out: The same, by split, of held-out samples that were left out of it,
            since their copy is in another split.
        can_judge: Whether right and wrong labels can be told apart.
        reviewed: Boolean array `(n,)`, the labels that a person confirmed or
            corrected. None: nobody looked.
        regression: What judged the labels, as a head over the features: its kernel
            `(dim, k)` and bias `(k,)`, float32. None where they cannot be judged.
    """

    out_of_sample: np.ndarray
    right_probability: np.ndarray
    noise_rate: float
    noise: np.ndarray
    labels: np.ndarray
    reason: str | None = None
    held_out: tuple[LabelQuality, ...] = ()
    can_judge: bool = True
    reviewed: np.ndarray | None = None
    left_out: dict[str, LabelQuality] = dataclasses.field(default_factory=dict)
    regression: tuple[np.ndarray, np.ndarray] | None = None

    @property
    def suspicion(self) -> np.ndarray:
        """Float32 array `(n,)` in [0, 1]; the higher, the likelier a wrong label."""
        return 1.0 - self.out_of_sample[np.arange(len(self.labels)), self.labels]

    @property
    def loss_limit(self) -> float:
        """Loss from which on a trained head does no better than a guess: ln(k).

        Infinite where nothing is to be rejected. A sample above it is wrong, or so
        hard that a head memorises it.
        """
        return math.inf if self.reason is not None else math.log(len(self.noise))

    def accept_mask(
        self, *, threshold: float | None = None, class_floor: float = 0.1
    ) -> np.ndarray:
        """Chooses the samples to learn from.

        Args:
            threshold: Least probability of a right label, in (0, 1]. Default None: 0.6.
            class_floor: Minimum fraction of each class's samples to accept, in [0, 1];
                at least one is. Default 0.1.

        Returns:
            Boolean array `(n,)`. All True where nothing is to be rejected.
        """
        if threshold is None:
            threshold = MIN_RIGHT_PROBABILITY
        return self.highest_thresholds(class_floor=class_floor) >= threshold

    def highest_thresholds(self, *, class_floor: float = 0.1) -> np.ndarray:
        """Returns up to which threshold of `accept_mask` each sample is accepted.

        Args:
            class_floor: As in `accept_mask`.

        Returns:
            Float32 array `(n,)` in [0, 1]. All 1 where nothing is to be rejected.
        """
        if self.reason is not None:
            return np.ones(len(self.labels), np.float32)
        highest = self.right_probability.astype(np.float32)
        counts = np.bincount(self.labels, minlength=len(self.noise))
        highest[(counts < MIN_CLASS_SIZE)[self.labels]] = 1.0
        for label in np.flatnonzero(counts):
            members = np.flatnonzero(self.labels == label)
            least = max(1, int(np.ceil(class_floor * len(members))))
            best = np.argsort(-self.right_probability[members], kind="stable")
            highest[members[best[:least]]] = 1.0
        return highest

    def accuracy(self, predicted: np.ndarray) -> Estimate | None:
        """Estimates how many predictions are right, although some labels are not.

        The mean of the predictions' `credits`. The model that predicts has no part in
        them. A label that was reviewed counts as right, and so does every label where
        none looks wrong.

        Args:
            predicted: Integers `(n,)`, the predicted classes of these samples.

        Returns:
            The accuracy with an interval that covers the choice of samples too. None
            where the labels cannot be judged, or there is no sample.

        Example:
            >>> import numpy as np
            >>> import keras_rsft as rsft
            >>> given = np.array([0, 1] * 20)
            >>> sure = np.full(40, 1.0, "float32")
            >>> clean = rsft.LabelQuality(
            ...     np.eye(2, dtype="float32")[given], sure, 0.0, np.eye(2), given,
            ...     reason="No sign of wrong labels")
            >>> clean.accuracy(np.where(np.arange(40) < 4, 1 - given, given)).value
            0.9
        """
        if not self.can_judge or not len(self.labels):
            return None
        credit = self._credit(predicted)
        value = min(max(float(credit.mean(dtype=float)), 0.0), 1.0)
        count, spread = float(len(credit)), value * (1.0 - value)
        if spread > 0:  # As many clean labels would say as much.
            count = spread / (float(credit.var()) / count + self._bias**2)
        low, high = proportion_interval(value * count, count)
        return Estimate(value, min(low, value), max(high, value))

    def gain(self, ours: np.ndarray, others: np.ndarray) -> Estimate | None:
        """Estimates how much more of one model's predictions are right: `accuracy`.

        Args:
            ours: Integers `(n,)`, the predicted classes of one model.
            others: Integers `(n,)`, those of the other, of the same samples.

        Returns:
            The difference of the two accuracies, paired by sample. None as above.
        """
        if not self.can_judge or not len(self.labels):
            return None
        difference = self._credit(ours) - self._credit(others)
        value = float(np.mean(difference, dtype=float))
        bias = self._bias * float(np.mean(np.asarray(ours) != np.asarray(others)))
        half = NORMAL_QUANTILE * math.hypot(
            float(difference.std()) / math.sqrt(len(difference)), bias
        )
        return Estimate(value, max(value - half, -1.0), min(value + half, 1.0))

    def with_right_labels(self, labels: np.ndarray) -> LabelQuality:
        """Returns the same of labels that are known to be right.

        Args:
            labels: Integers `(n,)`.
        """
        reason = "The right labels are known"
        return dataclasses.replace(self, labels=labels, reason=reason, can_judge=True)

    @functools.cached_property
    def credits(self) -> np.ndarray:
        """Float32 array `(n, k)`: what predicting each class counts for each sample.

        The mean over samples of the predicted classes' credits is the estimated
        accuracy. 0 or 1 where the right label is known; else how likely the class is
        by the other samples, plus a multiple of what the given label adds to that, so
        that it can lie outside of [0, 1].

        The multiple, at least 1 but for few samples, makes up for labels that are often
        wrong and so move the probabilities too little: one step of Newton's method
        towards the most likely share of right predictions. With many samples and no
        evidence but the labels it is the inverse of the noise matrix (Natarajan et al.,
        "Learning with noisy labels", 2013). It is 1 where some labels were reviewed.
        """
        matches = self.labels[:, None] == np.arange(len(self.noise))
        matches = matches.astype(np.float32)
        if self.reason is not None:  # No label is wrong, as far as one can see.
            return matches
        found = np.empty_like(matches)
        unknown, informed = 0.0, PRIOR_LOGIT_DEVIATION**-2
        for part in _parts(*matches.shape):
            likely = self.out_of_sample[part]
            found[part] = true_label_posterior(likely, self.noise, self.labels[part])
            top, given = likely.argmax(axis=1), likely @ self.noise
            prior = likely[np.arange(len(likely)), top]
            unknown += float((prior * (1.0 - prior)).sum())
            # How much of that the given label takes away, on the average.
            joint = np.square(prior[:, None] * self.noise[top])
            moved = joint / np.maximum(given, 1e-30)
            informed += float((moved.sum(axis=1) - np.square(prior)).sum())
        if self.reviewed is not None and self.reviewed.any():
            # A review takes the wrong labels first: there is less noise among the
            # others than the matrix says.
            found[self.reviewed] = matches[self.reviewed]
            return found
        found -= self.out_of_sample
        found *= np.float32(unknown / informed)
        found += self.out_of_sample
        return found

    def _credit(self, predicted: np.ndarray) -> np.ndarray:
        return self.credits[np.arange(len(self.labels)), np.asarray(predicted)]

    @property
    def _bias(self) -> float:
        """Returns the deviation of the accuracy that comes from wrong probabilities."""
        if self.reason is not None:
            return 0.0
        known = 0.0 if self.reviewed is None else float(self.reviewed.mean())
        return PRIOR_BIAS * (1.0 - known)

    def first_weights(
        self, mean: np.ndarray, deviation: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """Returns `regression` for standardised features: where `auto`'s head starts.

        Args:
            mean: Float array `(dim,)`, what is taken off the features.
            deviation: Float array `(dim,)`, what they are then divided by.

        Returns:
            Kernel `(dim, k)` and bias `(k,)`, or None.
        """
        if self.regression is None:
            return None
        kernel, bias = self.regression
        return kernel * deviation[:, None], bias + mean @ kernel

    @property
    def looks_wrong(self) -> np.ndarray:
        """Boolean array `(n,)`: labels that are right with a probability below 0.6."""
        return self.right_probability < MIN_RIGHT_PROBABILITY

    @property
    def expected_wrong(self) -> float:
        """How many labels are wrong: the sum of the probabilities, in [0, n]."""
        return float(np.sum(1.0 - self.right_probability, dtype=float))

    @property
    def confusion(self) -> np.ndarray:
        """Float64 array `(k, k)`: how many samples labelled `g` are of class `c`.

        At `[g, c]`. A row adds up to the samples with that label; outside of the
        diagonal it adds up to the wrong ones among them.
        """
        labels, (count, classes) = self.labels, self.out_of_sample.shape
        found = np.diag(np.bincount(labels, self.right_probability, classes))
        for part in _parts(count, classes):
            given, wrong = labels[part], 1.0 - self.right_probability[part]
            others = true_label_posterior(self.out_of_sample[part], self.noise, given)
            others[np.arange(len(given)), given] = 0.0
            others *= (wrong / np.maximum(others.sum(axis=1), 1e-30))[:, None]
            np.add.at(found, given, others)
        return found

    @property
    def finding(self) -> str:
        """Says in one sentence how many labels of all splits look wrong."""
        if not self.can_judge:
            return f"{self.reason}."
        parts = (self, *self.held_out, *self.left_out.values())
        samples = sum(len(part.labels) for part in parts)
        wrong = sum(part.expected_wrong for part in parts)
        look_wrong = sum(int(part.looks_wrong.sum()) for part in parts)
        if not look_wrong:
            return (
                f"None of {samples:,} labels looks wrong, judged by the other samples "
                f"({wrong:,.0f} expected). A mistake that all samples of a class share "
                "cannot be seen."
            )
        return (
            f"About {wrong:,.0f} of {samples:,} labels are wrong "
            f"({100 * wrong / samples:.1f} %), judged by the other samples; "
            f"{look_wrong:,} look wrong."
        )

    def describe(self, threshold: float | None = None) -> str:
        """Says in one line what was found in the training labels and what is chosen.

        Args:
            threshold: As in `accept_mask`.
        """
        if self.reason is not None:
            return f"{self.reason}: keeping every sample."
        below, words = self.looks_wrong, "look wrong"
        if threshold is not None:
            below = self.right_probability < threshold
            words = f"are right with a probability below {threshold:.3g}"
        kept = self.accept_mask(threshold=threshold)
        spared = int((below & kept).sum())
        but = (
            f", but for {spared:,} of classes that are wrong by most" if spared else ""
        )
        return (
            f"About {100 * self.noise_rate:.1f} % of the training labels are wrong. "
            f"{int(below.sum()):,} of {len(kept):,} {words} and are left out{but}; of "
            f"the other {int(kept.sum()):,}, after the warm-up, those with a loss "
            "above ln(classes), a uniform guess."
        )


def audit_labels(
    features: FeatureSet,
    num_classes: int,
    *,
    held_out: Sequence[FeatureSet] = (),
    seed: int = 0,
    progress: bool = True,
) -> LabelQuality:
    """Estimates how many labels are wrong, and for each how likely it is right.

    Reviewed labels count as right, and the others are judged by them too.
    The noise is estimated from the labels as they were before a review.

    Copies count as one sample: a group is left out together, each copy has its share of
    the weight of one, and a held-out sample is judged without its copies. Where copies
    have different labels, at most one of these can be right.

    Sources: Allen, "The relationship between variable selection and data augmentation
    and a method for prediction", Technometrics 1974 (each sample judged as if it had
    been left out, in closed form); Dawid and Skene, "Maximum likelihood estimation of
    observer error-rates using the EM algorithm", 1979 (the matrix of label noise); Guo
    et al., "On calibration of modern neural networks", 2017 (matrix scaling of scores).

    Takes some seconds for 10,000 samples; the time grows with the number of samples
    and with the square of the number of features.

    Args:
        features: Cached features of the training samples with their given labels.
            Copies are looked for where `groups` is None.
        num_classes: Number of classes, at least 2.
        held_out: Further splits. Their labels are judged by the training samples
            alone, and have no part in judging others. Default: none.
        seed: Chooses the samples by which the ridge is chosen, where there are
            more than 4,096. Default 0.
        progress: Show a progress bar. Default True.

    Returns:
        What was found. Where there is too little to go by, `reason` says so.

    Raises:
        DataError: If a feature is NaN or infinite.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> right = np.arange(200) % 2
        >>> values = np.random.default_rng(0).normal(size=(200, 4)) + 3 * right[:, None]
        >>> file = Path(tempfile.mkdtemp(), "features.bin")
        >>> values.astype("float32").tofile(file)
        >>> given = np.where(np.arange(200) < 20, 1 - right, right)
        >>> features = rsft.FeatureSet(file, given, np.arange(200).astype(str), dim=4)
        >>> found = rsft.audit_labels(features, 2, progress=False)
        >>> round(found.noise_rate, 1), bool((found.suspicion[:20] > 0.5).all())
        (0.1, True)
    """
    if any(part.groups is None for part in (features, *held_out)):
        features, *held_out = with_copies((features, *held_out), progress=progress)
    labels = np.asarray(features.labels)
    counts = np.bincount(
        labels, _shares_of(_groups_of(features)), minlength=num_classes
    )
    counts = counts.round(3)  # Three thirds are one.
    if np.count_nonzero(counts >= MIN_CLASS_SIZE) < 2:
        too_few = (
            f"Fewer than two classes have {MIN_CLASS_SIZE} training samples, too few "
            "to judge labels by"
        )
        # Nothing is said against any label: each class is as likely as it is frequent.
        shares = (counts / max(counts.sum(), 1)).astype(np.float32)

        def unjudged(part: FeatureSet) -> LabelQuality:
            count, given = len(part), np.asarray(part.labels)
            right, noise = np.ones(count, np.float32), np.eye(num_classes)
            rows = np.tile(shares, (count, 1))
            return _trusted(
                LabelQuality(
                    rows,
                    right,
                    0.0,
                    noise,
                    given,
                    too_few,
                    can_judge=False,
                    reviewed=part.reviewed,
                )
            )

        others = tuple(unjudged(part) for part in held_out)
        return dataclasses.replace(unjudged(features), held_out=others)
    # The noise is estimated from all samples there were before a review; `judged` are
    # the positions of today's among them.
    before = features.before_review if features.reviewed is not None else None
    learnt, given, judged = features, labels, np.arange(len(labels))
    if before is not None:
        rows = features.file_rows(judged)
        judged = np.searchsorted(before.file_rows(np.arange(len(before))), rows)
        right_labels = np.array(before.labels)
        right_labels[judged] = labels
        learnt, given = before.with_labels(right_labels), np.asarray(before.labels)
    known, groups = None, _groups_of(learnt)
    if features.reviewed is not None:
        known = np.full(len(given), -1)
        known[judged[features.reviewed]] = labels[features.reviewed]
    all_known = known is not None and bool((known[judged] >= 0).all())
    if known is not None:
        known = _known_by_copies(groups, known)
    dropped = np.ones(len(given), bool)
    dropped[judged] = False
    regression = LeftOutRegression(learnt, num_classes, seed)
    weights = np.where(dropped, np.float32(0), np.float32(1))
    fit: tuple[np.ndarray, np.ndarray] | None = None
    shares = _shares_of(groups, ~dropped)
    rivals = _rivals(groups, given, groups[judged], labels)
    with progress_bar(
        "Examining the labels", total=ROUNDS, unit="rounds", visible=progress
    ) as advance:
        for _ in range(ROUNDS):
            scores = regression.left_out_scores(weights * shares)
            fit = calibration, noise = fit_noise(
                scores,
                given,
                known=known,
                start=fit,
                chosen=regression.sampled,
                shares=shares,
            )
            out_of_sample = calibrated(scores, calibration)
            for part in _parts(*out_of_sample.shape):
                posterior = true_label_posterior(
                    out_of_sample[part], noise, given[part]
                )
                weights[part] = posterior[np.arange(len(posterior)), given[part]]
            weights[rivals[0]] = _right_among(out_of_sample, noise, given, rivals)
            if known is not None:
                weights[known >= 0] = (known == learnt.labels)[known >= 0]
            weights[dropped] = 0.0
            advance(1)
    probability, scored = weights[judged], out_of_sample[judged].astype(np.float32)
    # A class of so few is not judged: none of its labels looks wrong.
    too_small = counts < MIN_CLASS_SIZE
    probability[too_small[labels]] = 1.0
    rate = float(1.0 - probability.mean(dtype=float))
    chance = float(counts.max() / counts.sum())
    agrees = scored.argmax(axis=1) == labels
    agreement = float(np.average(agrees, weights=shares[judged]))
    reason: str | None = None
    can_judge = True
    by_chance = chance + 3 * math.sqrt(chance * (1 - chance) / counts.sum())
    if agreement <= by_chance:
        reason = (
            "The labels fit the features no better than chance (the other samples "
            f"predict {100 * agreement:.0f} % of them, chance alone up to "
            f"{min(100 * by_chance, 100):.0f} %), so that right and wrong ones cannot "
            "be told apart"
        )
        can_judge, rate = False, 0.0
        probability[:] = 1.0
    elif all_known:
        reason = "All training labels are known to be right"
    elif rate < MIN_NOISE_RATE:
        reason = f"Hardly any training label is wrong (about {100 * rate:.1f} %)"
    unknown = [part for part in held_out if len(part) and part.reviewed is None]
    if all_known and before is None and unknown:
        # Right training labels tell nothing about the noise of the other splits.
        scores = np.concatenate([regression.scores(part) for part in unknown])
        given = np.concatenate([part.labels for part in unknown])
        their_shares = _shares_of(np.concatenate(list(map(_groups_of, unknown))))
        anew = _even_noise(FIRST_NOISE_RATE, num_classes)
        noise = _noise_alone(scores, given, calibration, anew, None, their_shares)
    parts = []
    for other in held_out:
        shares = calibrated(regression.scores(other), calibration)
        other_labels = np.asarray(other.labels)
        posterior = true_label_posterior(shares, noise, other_labels)
        right = posterior[np.arange(len(other)), other_labels].astype(np.float32)
        theirs = _groups_of(other)
        copied = np.concatenate([groups[judged], theirs])
        copy_labels = np.concatenate([labels, other_labels])
        rivals = _rivals(theirs, other_labels, copied, copy_labels)
        right[rivals[0]] = _right_among(shares, noise, other_labels, rivals)
        if known is not None:
            both = np.concatenate([known[judged], np.full(len(other), -1)])
            settled = _known_by_copies(copied, both)[len(labels) :]
            right[settled >= 0] = (settled == other_labels)[settled >= 0]
        right[too_small[other_labels] | (not can_judge)] = 1.0
        if other.reviewed is not None:
            right[other.reviewed] = 1.0
        missing = float(1.0 - right.mean(dtype=float)) if len(other) else 0.0
        is_noisy = all_known and can_judge and missing >= MIN_NOISE_RATE
        found = LabelQuality(
            shares,
            right,
            missing,
            noise,
            other_labels,
            None if is_noisy else reason,
            can_judge=can_judge,
            reviewed=other.reviewed,
        )
        parts.append(_trusted(found))
    return LabelQuality(
        scored,
        probability,
        rate,
        noise,
        labels,
        reason,
        tuple(parts),
        can_judge,
        features.reviewed,
        regression=regression.as_head(calibration) if can_judge else None,
    )


def _trusted(found: LabelQuality) -> LabelQuality:
    """Returns the same; where every label was reviewed, as labels that are right."""
    if found.reviewed is None or not found.reviewed.all():
        return found
    return found.with_right_labels(found.labels)


# -- Copies ------------------------------------------------------------------------


def _groups_of(features: FeatureSet) -> np.ndarray:
    return np.arange(len(features)) if features.groups is None else features.groups


def _shares_of(groups: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Returns each sample's share of the one witness that its copies are together."""
    _, group_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of, counted)
    return (1.0 / np.maximum(sizes, 1.0)).astype(np.float32)[group_of]


def _known_by_copies(groups: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns the known labels, -1 for none, also of the copies of known samples."""
    of_group = np.full(groups.max(initial=0) + 1, -1)
    of_group[groups[known >= 0]] = known[known >= 0]
    return np.where(known >= 0, known, of_group[groups])


Rivals = tuple[np.ndarray, np.ndarray, np.ndarray]


def _rivals(
    groups: np.ndarray, labels: np.ndarray, copied: np.ndarray, copy_labels: np.ndarray
) -> Rivals:
    """Returns the samples whose copies have other labels, and these as pairs.

    A pair is a position among those samples, and another label.
    """
    width = int(max(labels.max(initial=0), copy_labels.max(initial=0))) + 1
    given = np.unique(copied.astype(np.int64) * width + copy_labels)
    numbers, counts = np.unique(given // width, return_counts=True)
    samples = np.flatnonzero(np.isin(groups, numbers[counts > 1]))
    first = np.searchsorted(given, groups[samples] * width)
    last = np.searchsorted(given, (groups[samples] + 1) * width)
    positions = np.repeat(np.arange(len(samples)), last - first)
    inside = np.arange(len(positions)) - np.repeat(
        np.cumsum(last - first) - (last - first), last - first
    )
    others = given[first[positions] + inside] % width
    different = others != labels[samples[positions]]
    return samples, positions[different], others[different]


def _right_among(
    probabilities: np.ndarray, noise: np.ndarray, labels: np.ndarray, rivals: Rivals
) -> np.ndarray:
    """Returns how likely the labels of samples are right whose copies have others."""
    samples, positions, others = rivals
    joint = probabilities[samples] * noise[:, labels[samples]].T
    np.multiply.at(joint, positions, noise[:, others].T)
    right = joint[np.arange(len(samples)), labels[samples]]
    return right / np.maximum(joint.sum(axis=1), 1e-30)


def _whole_groups(groups: np.ndarray) -> list[np.ndarray]:
    """Returns the positions of copies, an array `(groups, size)` for each size."""
    order = np.argsort(groups, kind="stable")
    _, starts, sizes = np.unique(groups[order], return_index=True, return_counts=True)
    return [
        order[starts[sizes == size][:, None] + np.arange(size)]
        for size in np.unique(sizes[sizes > 1])
    ]


def _in_parts(groups: list[np.ndarray]) -> Iterator[np.ndarray]:
    """Cuts groups `(m, s)` into parts of few samples, large ones into one each."""
    for members in groups:
        size = members.shape[1]
        step = 1 if size > MAX_GROUP_TO_SOLVE else max(1, CHUNK_ROWS // size)
        for start in range(0, len(members), step):
            yield members[start : start + step]


def _copied_in(
    groups: np.ndarray, others: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields copies `(m, s)` here and `(m, t)` in another split, of the same groups."""
    common = np.intersect1d(groups, others)
    orders, firsts, sizes = [], [], []
    for one in (groups, others):
        orders.append(np.argsort(one, kind="stable"))
        ordered = one[orders[-1]]
        firsts.append(np.searchsorted(ordered, common))
        sizes.append(np.searchsorted(ordered, common, side="right") - firsts[-1])
    for here, there in np.unique(np.stack(sizes, axis=1), axis=0):
        alike = np.flatnonzero((sizes[0] == here) & (sizes[1] == there))
        for part in _in_parts([np.tile(alike[:, None], here + there)]):
            yield tuple(
                order[first[part[:, :1]] + np.arange(size)]
                for order, first, size in zip(
                    orders, firsts, (here, there), strict=True
                )
            )


# -- Class scores of each sample from the other samples alone --------------------


class LeftOutRegression:
    """Weighted ridge regression on one-hot labels, each sample left out in turn.

    Copies are left out together.
    """

    def __init__(self, features: FeatureSet, num_classes: int, seed: int):
        self._features = features
        self._labels = np.asarray(features.labels)
        self._num_classes = num_classes
        mean, variance = features.moments()
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            finite = [np.isfinite(chunk).all(axis=1) for chunk in features.chunks()]
            bad = ~np.concatenate(finite)
            raise DataError(
                f"The features of {np.count_nonzero(bad)} of {len(features)} samples "
                f"are NaN or infinite, for example {', '.join(features.ids[bad][:3])}. "
                "Try `--set dtype=float32`, or another backbone."
            )
        self._mean, self._scale = mean, 1.0 / np.sqrt(variance)
        count = len(features)
        chosen = np.random.default_rng(seed).permutation(count)[:MAX_ROWS_TO_CHOOSE]
        self.sampled = np.zeros(count, bool)
        self.sampled[chosen] = True
        self._ridge: float | None = None
        self._fit: _RidgePath | None = None
        self._weights = np.zeros(count, np.float32)

    def left_out_scores(self, weights: np.ndarray) -> np.ndarray:
        """Returns class scores `(n, k)`; weights `(n,)` say how much samples count."""
        sampled = self.sampled
        fit = self._fitted(weights * sampled)
        sample = np.concatenate([x[sampled[rows]] for rows, x in self._chunks()])
        targets, sample_weights = self._one_hot(sampled), weights[sampled]
        rotated = fit.rotated(sample)
        groups = _groups_of(self._features)
        copies = _whole_groups(groups[sampled])
        judges = sample_weights.copy()
        for large in copies:
            if large.shape[1] > MAX_GROUP_TO_SOLVE:
                judges[large] = 0.0
        copies = [one for one in copies if one.shape[1] <= MAX_GROUP_TO_SOLVE]

        def error(ridge: float) -> float:
            scores = fit.left_out_scores(rotated, targets, sample_weights, ridge)
            for rows in _in_parts(copies):
                scores[rows] = fit.left_out_groups(
                    rotated[rows], targets[rows], sample_weights[rows], ridge
                )
            return float(judges @ np.square(scores - targets).sum(axis=1))

        self._ridge = float(min(_neighbours(RIDGES, self._ridge), key=error))
        if not sampled.all():
            fit = self._fitted(weights)
        scores = np.empty((len(weights), self._num_classes), np.float32)
        for rows, inputs in self._chunks():
            scores[rows] = fit.left_out_scores(
                fit.rotated(inputs), self._one_hot(rows), weights[rows], self._ridge
            )
        self._fit, self._weights = fit, weights
        for members in _in_parts(_whole_groups(groups)):
            scores[members] = self._left_out_groups(members)
        return scores

    def _left_out_groups(
        self, members: np.ndarray, others: np.ndarray | None = None
    ) -> np.ndarray:
        """Returns scores of groups `(m, s)`, or of further copies of them."""
        fit, ridge = self._last_fit()
        inputs = self._inputs_of(self._features, members)
        weights = self._weights[members]
        if members.shape[1] > MAX_GROUP_TO_SOLVE:
            kept = self._weights.copy()
            kept[members] = 0.0
            fit = self._fitted(kept)
            return fit.scores(fit.rotated(inputs if others is None else others), ridge)
        targets = self._one_hot(members)
        if others is not None:  # It has no weight, so any label will do.
            inputs = np.concatenate([inputs, others], axis=1)
            more = (0, others.shape[1])
            weights = np.pad(weights, ((0, 0), more))
            targets = np.pad(targets, ((0, 0), more, (0, 0)))
        scores = fit.left_out_groups(fit.rotated(inputs), targets, weights, ridge)
        return scores if others is None else scores[:, members.shape[1] :]

    def _inputs_of(self, features: FeatureSet, samples: np.ndarray) -> np.ndarray:
        values = features.views_of(samples.ravel())[:, 0].astype(np.float32)
        return self._standardised(values).reshape(*samples.shape, -1)

    def scores(self, others: FeatureSet) -> np.ndarray:
        """Returns class scores `(m, k)` of samples that were not among those fitted."""
        fit, ridge = self._last_fit()
        parts = [
            fit.scores(fit.rotated(self._standardised(chunk)), ridge)
            for chunk in others.chunks(CHUNK_ROWS)
        ]
        scores = np.concatenate([np.empty((0, self._num_classes), np.float32), *parts])
        if others.groups is not None and self._features.groups is not None:
            for members, samples in _copied_in(self._features.groups, others.groups):
                inputs = self._inputs_of(others, samples)
                scores[samples] = self._left_out_groups(members, inputs)
        return scores

    def _last_fit(self) -> tuple[_RidgePath, float]:
        if self._fit is None or self._ridge is None:
            raise ValueError("Nothing was fitted yet.")
        return self._fit, self._ridge

    def as_head(self, calibration: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns kernel and bias over the features as they are."""
        fit, ridge = self._last_fit()
        kernel, bias = fit.coefficients(ridge)
        kernel = self._scale[:, None] * kernel
        bias = (bias - self._mean @ kernel) @ calibration[:-1] + calibration[-1]
        return kernel @ calibration[:-1], bias

    def _standardised(self, values: np.ndarray) -> np.ndarray:
        return ((values - self._mean) * self._scale).astype(np.float32)

    def _chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        start = 0
        for chunk in self._features.chunks(CHUNK_ROWS):
            yield slice(start, start + len(chunk)), self._standardised(chunk)
            start += len(chunk)

    def _one_hot(self, rows: np.ndarray | slice) -> np.ndarray:
        return np.eye(self._num_classes, dtype=np.float32)[self._labels[rows]]

    def _fitted(self, weights: np.ndarray) -> _RidgePath:
        width = self._features.dim
        gram, moment = np.zeros((width, width)), np.zeros((width, self._num_classes))
        inputs_sum, targets_sum = np.zeros(width), np.zeros(self._num_classes)
        for rows, inputs in self._chunks():
            weighted, targets = inputs * weights[rows, None], self._one_hot(rows)
            gram += weighted.T @ inputs
            moment += weighted.T @ targets
            inputs_sum += weighted.sum(axis=0)
            targets_sum += weights[rows] @ targets
        return _RidgePath(
            gram, moment, inputs_sum, targets_sum, max(float(weights.sum()), 1e-9)
        )


class _RidgePath:
    """Ridge regression with an intercept; one eigendecomposition serves every ridge."""

    def __init__(
        self,
        gram: np.ndarray,
        moment: np.ndarray,
        inputs_sum: np.ndarray,
        targets_sum: np.ndarray,
        total: float,
    ):
        centre, mean_target = inputs_sum / total, targets_sum / total
        gram = gram - total * np.outer(centre, centre)
        moment = moment - total * np.outer(centre, mean_target)
        values, axes = np.linalg.eigh(gram)
        self._values = np.maximum(values, 0.0)
        self._axes = axes.astype(np.float32)
        self._moment = (axes.T @ moment).astype(np.float32)
        self._centre = centre.astype(np.float32)
        self._mean_target = mean_target.astype(np.float32)
        self._total = total

    def rotated(self, inputs: np.ndarray) -> np.ndarray:
        flat = inputs.reshape(-1, inputs.shape[-1])  # One product, not one a group.
        return ((flat - self._centre) @ self._axes).reshape(inputs.shape)

    def scores(self, rotated: np.ndarray, ridge: float) -> np.ndarray:
        shrunk = self._moment / (self._values + ridge)[:, None].astype(np.float32)
        scores = self._mean_target + rotated.reshape(-1, rotated.shape[-1]) @ shrunk
        return scores.reshape(*rotated.shape[:-1], shrunk.shape[1])

    def coefficients(self, ridge: float) -> tuple[np.ndarray, np.ndarray]:
        shrunk = self._moment / (self._values + ridge)[:, None].astype(np.float32)
        kernel = self._axes @ shrunk
        return kernel, self._mean_target - self._centre @ kernel

    def left_out_scores(
        self,
        rotated: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        ridge: float,
    ) -> np.ndarray:
        """Returns scores as if each sample had been left out (Allen, 1974)."""
        fitted = self.scores(rotated, ridge)
        inverse = (1.0 / (self._values + ridge)).astype(np.float32)
        leverage = weights * (1.0 / self._total + np.square(rotated) @ inverse)
        leverage = np.minimum(leverage, 0.999).astype(np.float32)[:, None]
        return fitted + leverage / (1.0 - leverage) * (fitted - targets)

    def left_out_groups(
        self,
        rotated: np.ndarray,
        targets: np.ndarray,
        weights: np.ndarray,
        ridge: float,
    ) -> np.ndarray:
        """Returns scores as if each group of samples, `(m, s, ...)`, had been left out.

        What is left of (I - H)^-1 (y - f) where the weights in H may be 0.
        """
        fitted = self.scores(rotated, ridge)
        inverse = (1.0 / (self._values + ridge)).astype(np.float32)
        shared = 1.0 / self._total + (rotated * inverse) @ rotated.swapaxes(1, 2)
        roots = np.sqrt(weights)[:, :, None].astype(np.float32)
        values, axes = np.linalg.eigh(roots * shared * roots.swapaxes(1, 2))
        solved = axes.swapaxes(1, 2) @ (roots * (fitted - targets))
        solved = axes @ (solved / (1.0 - np.minimum(values, 0.999))[:, :, None])
        return fitted + shared @ (roots * solved)


def _neighbours(values: np.ndarray, near: float | None) -> np.ndarray:
    if near is None:
        return values
    nearest = int(np.argmin(np.abs(values - near)))
    return values[max(nearest - 1, 0) : nearest + 2]


# -- The matrix of label noise ---------------------------------------------------


def softmax(scores: np.ndarray) -> np.ndarray:
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def true_label_posterior(
    probabilities: np.ndarray,
    noise: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Returns how likely each class is the right one, given the label too, `(n, k)`."""
    joint = _joint(probabilities, noise, labels, known)
    return joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30)


def _joint(
    probabilities: np.ndarray,
    noise: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None,
) -> np.ndarray:
    joint = probabilities * noise[:, labels].T
    if known is not None:
        possible = known[:, None] == np.arange(len(noise))
        joint *= possible | (known < 0)[:, None]
    return joint


def _parts(count: int, num_classes: int) -> list[slice]:
    """Cuts samples into parts: a thousand classes would need much memory at once."""
    rows = max(1, CHUNK_VALUES // num_classes)
    return [slice(at, at + rows) for at in range(0, count, rows)]


def calibrated(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Returns probabilities `(n, k)` of scores by a matrix `(k + 1, k)`."""
    return softmax(scores @ calibration[:-1] + calibration[-1])


def fit_noise(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    start: tuple[np.ndarray, np.ndarray] | None = None,
    chosen: np.ndarray | None = None,
    shares: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fits how to calibrate scores, and the noise matrix, by maximum likelihood.

    `shares` say how much samples count: copies share the weight of one.
    """
    if shares is None:
        shares = np.ones(len(labels), np.float32)
    num_classes = scores.shape[1]
    diagonal = np.eye(num_classes + 1, num_classes, dtype=np.float32)
    calibration, noise = start or (
        FIRST_SHARPNESS * diagonal,
        _even_noise(FIRST_NOISE_RATE, num_classes),
    )
    everything = chosen is None or chosen.all()
    rows = slice(None) if everything else chosen
    given, right = labels[rows], None if known is None else known[rows]
    weights = shares[rows, None]
    inputs = np.hstack([scores[rows], np.ones((len(given), 1), np.float32)])
    ridge = CALIBRATION_RIDGE * num_classes
    last = calibration, noise
    reached, damping, pace = -math.inf, 0.0, 0
    for _ in range(FIT_STEPS):  # Of a generalised EM.
        momentum = min(MOMENTUM, pace / (pace + 3))
        ahead = calibration + momentum * (calibration - last[0])
        assumed = np.maximum(noise + momentum * (noise - last[1]), noise / 4)
        assumed /= assumed.sum(axis=1, keepdims=True)
        assumed = assumed.astype(np.float32)
        probabilities = softmax(inputs @ ahead)
        posterior = _joint(probabilities, assumed, given, right)
        evidence = np.maximum(posterior.sum(axis=1, keepdims=True), 1e-30)
        likelihood = float((weights * np.log(evidence)).sum() / weights.sum())
        if likelihood < reached - MAX_FALL:
            (calibration, noise), pace = last, 0
            damping = max(4.0 * damping, FIRST_DAMPING)
            continue
        reached, last = likelihood, (calibration, noise)
        damping, pace = damping / 2.0, pace + 1
        posterior /= evidence
        noise = _noise_from(_counted(posterior * weights, given))
        # The trace of each sample's curvature bounds it.
        bound = 1.0 - np.square(probabilities).sum(axis=1, keepdims=True)
        curvature = (inputs * (weights * (bound + damping))).T @ inputs
        curvature[np.diag_indices_from(curvature)] += ridge
        pull = ahead - np.trace(ahead) / num_classes * diagonal
        surplus = weights * (posterior - probabilities)
        gradient = inputs.T @ surplus - ridge * pull
        step = np.linalg.solve(curvature, gradient)
        calibration = (ahead + step).astype(np.float32)
    if not everything:
        noise = _noise_alone(scores, labels, calibration, noise, known, shares)
    return calibration, noise


def _noise_alone(
    scores: np.ndarray,
    labels: np.ndarray,
    calibration: np.ndarray,
    noise: np.ndarray,
    known: np.ndarray | None,
    shares: np.ndarray,
) -> np.ndarray:
    """Fits the noise matrix to scores that are calibrated already."""
    for _ in range(FIT_STEPS // 4):
        counted = np.zeros_like(noise)
        for part in _parts(*scores.shape):
            right = None if known is None else known[part]
            probabilities = calibrated(scores[part], calibration)
            posterior = true_label_posterior(probabilities, noise, labels[part], right)
            counted += _counted(posterior * shares[part, None], labels[part])
        noise = _noise_from(counted)
    return noise


def _counted(posterior: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return posterior.T @ np.eye(posterior.shape[1], dtype=posterior.dtype)[labels]


def _noise_from(counted: np.ndarray) -> np.ndarray:
    total = counted.sum()  # As if one more were wrong: never seen is not impossible.
    rate = (total - np.trace(counted) + 1.0) / (total + 1.0)
    prior = _even_noise(float(rate), len(counted))
    noise = counted + PRIOR_COUNT * prior + 1e-9
    return noise / noise.sum(axis=1, keepdims=True)


def _even_noise(rate: float, num_classes: int) -> np.ndarray:
    noise = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(noise, 1.0 - rate)
    return noise
