"""Audits labels: how many are wrong, and which."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft._stats import NORMAL_QUANTILE, proportion_interval
from keras_rsft.config import SPLITS
from keras_rsft.features._neighbours import with_copies
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality._inputs import read_inputs
from keras_rsft.label_quality._noise import (
    calibrated,
    even_noise,
    fit_noise,
    fit_noise_alone,
    parts_of,
    true_label_posterior,
)
from keras_rsft.label_quality._regression import (
    GivenScores,
    LeftOutRegression,
    find_rivals,
    groups_of,
    known_by_copies,
    right_among,
    shares_of,
)

ROUNDS = 4
# With fewer samples a class's labels are not judged.
MIN_CLASS_SIZE = 5
MIN_NOISE_RATE = 0.02
MIN_RIGHT_PROBABILITY = 0.6
FIRST_NOISE_RATE = 0.1

# Deviation of what the probabilities get wrong about an accuracy; see `accuracy`.
PRIOR_BIAS = 0.02
# Of how often predictions are right, in the units of a logit; see `credits`.
PRIOR_LOGIT_DEVIATION = 2.0


class Estimate(NamedTuple):
    """An estimated fraction, or a difference of two, with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
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
        ids: Array `(n,)`, the ids of the samples. None: their row numbers.
        class_names: The `k` classes by label, as they were given. None: numbers.
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
    ids: np.ndarray | None = None
    class_names: tuple[Any, ...] | None = None

    @property
    def wrong(self) -> np.ndarray:
        """Ids, or row numbers, of the labels that look wrong, most suspicious first."""
        return self._suspects if self.ids is None else self.ids[self._suspects]

    @property
    def _suspects(self) -> np.ndarray:
        rows = np.flatnonzero(self.looks_wrong)
        return rows[np.argsort(-self.suspicion[rows], kind="stable")]

    @property
    def proposed(self) -> np.ndarray:
        """int32 array `(n,)`: the likeliest other class where a label looks wrong.

        Elsewhere the given label.
        """
        labels, rows = self.labels.astype(np.int32), np.flatnonzero(self.looks_wrong)
        others = self.out_of_sample[rows]
        others[np.arange(len(rows)), labels[rows]] = -1.0
        labels[rows] = others.argmax(axis=1)
        return labels

    def to_frame(self) -> Any:
        """Returns a pandas DataFrame with a row for each sample, in their order.

        Without pandas a dict of arrays. Columns: `id`, `given_label`,
        `proposed_label` (see `proposed`), `right_probability`, `looks_wrong`.
        """
        count = len(self.labels)
        names = np.arange(len(self.noise))
        if self.class_names is not None:
            names = np.array(self.class_names)
        columns = {
            "id": np.arange(count) if self.ids is None else self.ids,
            "given_label": names[self.labels],
            "proposed_label": names[self.proposed],
            "right_probability": self.right_probability,
            "looks_wrong": self.looks_wrong,
        }
        try:
            import pandas as pd
        except ImportError:
            return columns
        return pd.DataFrame(columns)

    def summary(self) -> str:
        """Returns the finding, and the numbers by class and by split, as text."""
        from keras_rsft.report._summary import quality_summary, summary_text

        return summary_text(quality_summary(self._numbers))

    def __repr__(self) -> str:
        return f"<LabelQuality: {self.finding}>"

    def _repr_html_(self) -> str:
        from keras_rsft.report._notebook import quality_html

        return quality_html(self, self._numbers, self._suspects)

    @property
    def _numbers(self) -> dict[str, Any]:
        names = self.class_names or range(len(self.noise))
        held_out = (f"held_out[{number}]" for number in range(len(self.held_out)))
        return label_results(self, tuple(map(str, names)), ("labels", *held_out))

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

    @functools.cached_property
    def weights(self) -> np.ndarray:
        """Float32 array `(n,)` in [0, 1]: how much each accepted sample counts.

        The root of how likely its label is by the other samples: a head memorises the
        labels that these do not predict, the right ones too. Equal on the mean in every
        class. 1 where a person has reviewed it, and where nothing is to be rejected.

        After the generalised cross-entropy (Zhang and Sabuncu, 2018), which weighs by a
        power of the model's own probability.
        """
        found = np.ones(len(self.labels), np.float32)
        if self.reason is not None:
            return found
        likely = np.sqrt(1.0 - self.suspicion)
        right = self.right_probability.astype(float)
        classes = len(self.noise)
        sums = np.bincount(self.labels, right * likely, classes)
        counts = np.bincount(self.labels, right, classes)
        means = np.divide(sums, counts, out=np.ones(classes), where=sums > 0)
        mean = sums.sum() / max(counts.sum(), 1e-30)
        found = np.minimum(likely * (mean / means)[self.labels], 1.0).astype(np.float32)
        if self.reviewed is not None:
            found[self.reviewed] = 1.0
        return found

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
        for part in parts_of(*matches.shape):
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
        for part in parts_of(count, classes):
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
        wrong = round(sum(part.expected_wrong for part in parts))
        look_wrong = sum(int(part.looks_wrong.sum()) for part in parts)
        if not look_wrong:
            return (
                f"None of {samples:,} labels looks wrong, judged by the other samples "
                f"({wrong:,} expected). A mistake that all samples of a class share "
                "cannot be seen."
            )
        are = "is" if wrong == 1 else "are"
        look = "looks" if look_wrong == 1 else "look"
        return (
            f"About {wrong:,} of {samples:,} labels {are} wrong "
            f"({100 * wrong / samples:.1f} %), judged by the other samples; "
            f"{look_wrong:,} {look} wrong."
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
    features: Any = None,
    labels: Any = None,
    *,
    probabilities: Any = None,
    held_out: Sequence[Any] = (),
    num_classes: int | None = None,
    class_names: Sequence[Any] | None = None,
    ids: Any = None,
    corrections: Any = None,
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
        features: Embeddings of the samples, from any model: `(n, dim)`, integers or
            floats, as a NumPy array, a memory map, a tensor, a DataFrame or lists. They
            are read in parts and not copied. Or a `FeatureSet`, which has labels and
            ids; copies are looked for where its `groups` is None.
        labels: The given labels, `(n,)`: integers from 0, or names as strings, in an
            array, a list, a tensor or a pandas column, categorical too; or one-hot,
            `(n, k)`.
        probabilities: In place of `features`, predictions of any model, `(n, k)` in
            [0, 1], rows that add up to 1. Each must come from a model that has not been
            trained on that sample, such as one of a cross-validation: predictions for
            samples that it has seen repeat their labels. They are calibrated together
            with the noise, and copies are not looked for. Columns are in the order of
            `class_names`, or of the sorted names.
        held_out: Further splits, each a pair `(features, labels)`, or `(probabilities,
            labels)`, or a `FeatureSet`. Their labels are judged by the training samples
            alone, and have no part in judging others. Default: none.
        num_classes: Number of classes, at least 2. Default: by the labels, one more
            than the largest.
        class_names: Names of the classes, by label. Default: the names among the
            labels, sorted, or in the order of their categories.
        ids: `(n,)`, different from one another, to name samples by. Default: row
            numbers.
        corrections: What a review has decided, as in `apply_corrections`: one file, a
            DataFrame, a dict of columns, or `Correction` rows. Labels that were kept or
            changed are known to be right, dropped samples are left out of the result.
            Default: nobody looked.
        seed: Chooses the samples by which the ridge is chosen, where there are
            more than 4,096. Default 0.
        progress: Show a progress bar. Default True.

    Returns:
        What was found. Where there is too little to go by, `reason` says so.

    Raises:
        InvalidArgument: If an argument has another shape or type, or lengths differ.
        DataError: If a feature is NaN or infinite, or a label cannot be one.

    Example:
        >>> import numpy as np
        >>> import keras_rsft as rsft
        >>> right = np.arange(200) % 2
        >>> x = np.random.default_rng(0).normal(size=(200, 4)) + 5 * right[:, None]
        >>> y = np.array(["cat", "dog"])[right]
        >>> y[:20] = y[1:21]
        >>> quality = rsft.audit_labels(x, y, progress=False)
        >>> len(quality.wrong), bool((quality.wrong < 20).all())
        (20, True)
    """
    given = read_inputs(
        features,
        labels,
        probabilities=probabilities,
        held_out=held_out,
        num_classes=num_classes,
        class_names=class_names,
        ids=ids,
        corrections=corrections,
    )
    found = _audited(
        given.features,
        given.num_classes,
        held_out=given.held_out,
        seed=seed,
        progress=progress,
        scorer=LeftOutRegression if probabilities is None else GivenScores,
    )

    def named(quality: LabelQuality, part: FeatureSet) -> LabelQuality:
        names = given.class_names
        return dataclasses.replace(quality, ids=part.ids, class_names=names)

    parts = tuple(map(named, found.held_out, given.held_out))
    return dataclasses.replace(named(found, given.features), held_out=parts)


def _audited(
    features: FeatureSet,
    num_classes: int,
    *,
    held_out: Sequence[FeatureSet],
    seed: int,
    progress: bool,
    scorer: type[LeftOutRegression] | type[GivenScores],
) -> LabelQuality:
    if any(part.groups is None for part in (features, *held_out)):
        features, *held_out = with_copies((features, *held_out), progress=progress)
    labels = np.asarray(features.labels)
    counts = np.bincount(labels, shares_of(groups_of(features)), minlength=num_classes)
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
    known, groups = None, groups_of(learnt)
    if features.reviewed is not None:
        known = np.full(len(given), -1)
        known[judged[features.reviewed]] = labels[features.reviewed]
    all_known = known is not None and bool((known[judged] >= 0).all())
    if known is not None:
        known = known_by_copies(groups, known)
    dropped = np.ones(len(given), bool)
    dropped[judged] = False
    regression = scorer(learnt, num_classes, seed)
    weights = np.where(dropped, np.float32(0), np.float32(1))
    shares = shares_of(groups, ~dropped)
    rivals = find_rivals(groups, given, groups[judged], labels)
    with progress_bar(
        "Examining the labels", total=ROUNDS, unit="rounds", visible=progress
    ) as advance:
        for _ in range(ROUNDS):
            out_of_sample = np.empty((0, 0), np.float32)  # Makes room for the next.
            calibration, noise, out_of_sample = fit_noise(
                regression.left_out_scores(weights * shares),
                given,
                known=known,
                chosen=regression.sampled,
                shares=shares,
            )
            for part in parts_of(*out_of_sample.shape):
                posterior = true_label_posterior(
                    out_of_sample[part], noise, given[part]
                )
                weights[part] = posterior[np.arange(len(posterior)), given[part]]
            weights[rivals[0]] = right_among(out_of_sample, noise, given, rivals)
            if known is not None:
                weights[known >= 0] = (known == learnt.labels)[known >= 0]
            weights[dropped] = 0.0
            advance(1)
    probability, scored = weights[judged], out_of_sample
    if before is not None:
        scored = out_of_sample[judged]
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
        theirs = [calibrated(regression.scores(one), calibration) for one in unknown]
        given = np.concatenate([part.labels for part in unknown])
        their_shares = shares_of(np.concatenate(list(map(groups_of, unknown))))
        anew = even_noise(FIRST_NOISE_RATE, num_classes)
        noise = fit_noise_alone(np.concatenate(theirs), given, anew, None, their_shares)
    judge = _Judge(
        regression,
        calibration,
        noise,
        groups[judged],
        labels,
        None if known is None else known[judged],
    )
    parts = []
    for other in held_out:
        likely, right = judge(other)
        right[too_small[other.labels] | (not can_judge)] = 1.0
        if other.reviewed is not None:
            right[other.reviewed] = 1.0
        missing = float(1.0 - right.mean(dtype=float)) if len(other) else 0.0
        is_noisy = all_known and can_judge and missing >= MIN_NOISE_RATE
        found = LabelQuality(
            likely,
            right,
            missing,
            noise,
            np.asarray(other.labels),
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
    )


class _Judge(NamedTuple):
    """Judges held-out labels by the training samples."""

    regression: LeftOutRegression | GivenScores
    calibration: np.ndarray
    noise: np.ndarray
    groups: np.ndarray
    labels: np.ndarray
    known: np.ndarray | None

    def __call__(self, other: FeatureSet) -> tuple[np.ndarray, np.ndarray]:
        """Returns how likely each class is, and how likely the given label is right."""
        labels, groups = np.asarray(other.labels), groups_of(other)
        likely = calibrated(self.regression.scores(other), self.calibration)
        posterior = true_label_posterior(likely, self.noise, labels)
        right = posterior[np.arange(len(other)), labels].astype(np.float32)
        copied = np.concatenate([self.groups, groups])
        copy_labels = np.concatenate([self.labels, labels])
        rivals = find_rivals(groups, labels, copied, copy_labels)
        right[rivals[0]] = right_among(likely, self.noise, labels, rivals)
        if self.known is not None:
            both = np.concatenate([self.known, np.full(len(other), -1)])
            settled = known_by_copies(copied, both)[len(self.labels) :]
            right[settled >= 0] = (settled == labels)[settled >= 0]
        return likely, right


def _trusted(found: LabelQuality) -> LabelQuality:
    """Returns the same; where every label was reviewed, as labels that are right."""
    if found.reviewed is None or not found.reviewed.all():
        return found
    return found.with_right_labels(found.labels)


# In numbers ---------------------------------------------------------------------------


def left_out_of(split: str) -> str:
    """Returns how the samples are called that were left out of a split."""
    return f"{split} (left out)"


def label_results(
    quality: LabelQuality,
    class_names: Sequence[str],
    splits: Sequence[str] = SPLITS,
) -> dict[str, Any]:
    """Returns what an audit found, for JSON: in all, by split and by class.

    All numbers of labels that are shown come from here. Those of the splits and those
    of the classes add up to the same sums.
    """
    named = dict(zip(splits, (quality, *quality.held_out), strict=True))
    named |= {left_out_of(name): part for name, part in quality.left_out.items()}
    parts = {name: part for name, part in named.items() if len(part.labels)}

    def row(labels: np.ndarray, wrong: float, looks_wrong: np.ndarray) -> dict:
        known = {"expected_wrong": wrong if quality.can_judge else None}
        return {"samples": len(labels), **known, "look_wrong": int(looks_wrong.sum())}

    labels, looks_wrong = (
        np.concatenate([getattr(part, name) for part in parts.values()])
        for name in ("labels", "looks_wrong")
    )
    confusion = np.sum([part.confusion for part in parts.values()], axis=0)
    wrong = confusion - np.diag(np.diag(confusion))
    sizes, classes = np.bincount(quality.labels, minlength=len(class_names)), []
    for number, name in enumerate(class_names):
        members, other = labels == number, int(wrong[number].argmax())
        found = row(labels[members], float(wrong[number].sum()), looks_wrong[members])
        if sizes[number] < MIN_CLASS_SIZE:
            found["expected_wrong"] = None
        likely = class_names[other] if wrong[number, other] > 0 else None
        classes.append({"class": name, **found, "confused_with": likely})
    return {
        "finding": quality.finding,
        **row(labels, float(wrong.sum()), looks_wrong),
        "splits": {
            name: row(part.labels, part.expected_wrong, part.looks_wrong)
            | {"known": 0 if part.reviewed is None else int(part.reviewed.sum())}
            for name, part in parts.items()
        },
        "classes": classes,
    }
