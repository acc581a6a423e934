"""Audits labels: how many are wrong, and which."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterator

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft.errors import DataError
from keras_rsft.features._store import FeatureSet

ROUNDS = 4
# With fewer samples a class's labels are not judged.
MIN_CLASS_SIZE = 5
MIN_NOISE_RATE = 0.02
MIN_RIGHT_PROBABILITY = 0.6

RIDGES = 10.0 ** np.arange(1.0, 5.25, 0.5)
# The ridge does not depend on the number of samples: some are enough to choose it.
MAX_ROWS_TO_CHOOSE = 10_000
CHUNK_ROWS = 4096

SHARPNESSES = np.array([2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32], float)
FIRST_NOISE_RATE = 0.1
EXPECTATION_STEPS = 20
# Pseudo-counts that pull each class's noise towards evenly spread noise, which
# matters where a class has few samples.
PRIOR_COUNT = 20.0
CHUNK_VALUES = 2**22


@dataclasses.dataclass(frozen=True, eq=False)
class LabelQuality:
    """What was found out about the labels of `n` samples in `k` classes.

    Attributes:
        out_of_sample: Float32 array `(n, k)`, each row adding up to 1: how likely
            each class is, from the other samples alone.
        right_probability: Float32 array `(n,)` in [0, 1]: how likely the given
            label is right.
        noise_rate: Estimated fraction of wrong labels, in [0, 1].
        noise: Float64 array `(k, k)`: `noise[c, g]` is the estimated probability
            that a sample of class `c` was labelled `g`. Rows add up to 1.
        labels: int32 array `(n,)`, the given labels.
        reason: Why nothing is rejected, or None if the labels could be judged.
    """

    out_of_sample: np.ndarray
    right_probability: np.ndarray
    noise_rate: float
    noise: np.ndarray
    labels: np.ndarray
    reason: str | None = None

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

    def accept_mask(self, *, class_floor: float = 0.1) -> np.ndarray:
        """Chooses the samples to learn from.

        Args:
            class_floor: Minimum fraction of each class's samples to accept, in [0, 1];
                at least one is. Default 0.1.

        Returns:
            Boolean array `(n,)`. All True where nothing is to be rejected.
        """
        if self.reason is not None:
            return np.ones(len(self.labels), bool)
        accepted = self.right_probability >= MIN_RIGHT_PROBABILITY
        counts = np.bincount(self.labels, minlength=len(self.noise))
        accepted |= (counts < MIN_CLASS_SIZE)[self.labels]
        for label in np.flatnonzero(counts):
            members = np.flatnonzero(self.labels == label)
            least = max(1, int(np.ceil(class_floor * len(members))))
            if np.count_nonzero(accepted[members]) < least:
                best = np.argsort(-self.right_probability[members], kind="stable")
                accepted[members[best[:least]]] = True
        return accepted

    def describe(self) -> str:
        """Says in one line what was found and chosen."""
        if self.reason is not None:
            return f"{self.reason}: keeping every sample."
        accepted = self.accept_mask().mean()
        return (
            f"About {100 * self.noise_rate:.0f} % of the labels look wrong; accepting "
            f"the {100 * accepted:.0f} % that are right with a probability of "
            f"{MIN_RIGHT_PROBABILITY} or more, and of these, after the warm-up, those "
            "with a loss below ln(classes), a uniform guess."
        )


def audit_labels(
    features: FeatureSet, num_classes: int, *, seed: int = 0, progress: bool = True
) -> LabelQuality:
    """Estimates how many labels are wrong, and for each how likely it is right.

    Reviewed labels count as right, and the others are judged by them too.
    The noise is estimated from the labels as they were before a review.

    Sources: Allen, "The relationship between variable selection and data augmentation
    and a method for prediction", Technometrics 1974 (each sample judged as if it had
    been left out, in closed form); Dawid and Skene, "Maximum likelihood estimation of
    observer error-rates using the EM algorithm", 1979 (the matrix of label noise).

    Takes some seconds for 10,000 samples; the time grows with the number of samples
    and with the square of the number of features.

    Args:
        features: Cached features of the training samples with their given labels.
        num_classes: Number of classes, at least 2.
        seed: Chooses the samples by which the ridge is chosen, where there are
            more than 10,000. Default 0.
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
    labels = np.asarray(features.labels)
    counts = np.bincount(labels, minlength=num_classes)
    if np.count_nonzero(counts >= MIN_CLASS_SIZE) < 2:
        # Nothing is said against any label: each class is as likely as it is frequent.
        shares = (counts / max(counts.sum(), 1)).astype(np.float32)
        return LabelQuality(
            np.tile(shares, (len(labels), 1)),
            np.ones(len(labels), np.float32),
            0.0,
            np.eye(len(counts)),
            labels,
            f"Fewer than two classes have {MIN_CLASS_SIZE} samples, too few to judge "
            "labels by",
        )
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
    known = None
    if features.reviewed is not None:
        known = np.full(len(given), -1)
        known[judged[features.reviewed]] = labels[features.reviewed]
    dropped = np.ones(len(given), bool)
    dropped[judged] = False
    regression = LeftOutRegression(learnt, num_classes, seed)
    weights = np.where(dropped, np.float32(0), np.float32(1))
    sharpness: float | None = None
    noise = np.eye(num_classes)
    with progress_bar(
        "Examining the labels", total=ROUNDS, unit="rounds", visible=progress
    ) as advance:
        for _ in range(ROUNDS):
            scores = regression.left_out_scores(weights)
            sharpness, noise = fit_noise(
                scores, given, known=known, near=sharpness, chosen=regression.sampled
            )
            out_of_sample = softmax(sharpness * scores)
            for part in _parts(*out_of_sample.shape):
                posterior = true_label_posterior(
                    out_of_sample[part], noise, given[part]
                )
                weights[part] = posterior[np.arange(len(posterior)), given[part]]
            if known is not None:
                weights[known >= 0] = 1.0
            weights[dropped] = 0.0
            advance(1)
    probability, scored = weights[judged], out_of_sample[judged].astype(np.float32)
    rate = float(1.0 - probability.mean())
    chance = float(counts.max() / len(labels))
    agreement = float(np.mean(scored.argmax(axis=1) == labels))
    reason = None
    if agreement <= chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
        reason = (
            "The labels fit the features no better than chance (they agree with a "
            f"regression that has not seen them in {100 * agreement:.0f} % of the "
            f"cases, against {100 * chance:.0f} % for the commonest class), so that "
            "right and wrong ones cannot be told apart"
        )
    elif rate < MIN_NOISE_RATE:
        reason = f"No sign of wrong labels (about {100 * rate:.1f} %)"
    return LabelQuality(scored, probability, rate, noise, labels, reason)


# -- Class scores of each sample from the other samples alone --------------------


class LeftOutRegression:
    """Weighted ridge regression on one-hot labels, each sample left out in turn."""

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

    def left_out_scores(self, weights: np.ndarray) -> np.ndarray:
        """Returns class scores `(n, k)`; weights `(n,)` say how much samples count."""
        gram, moment = self._normal_equations(weights * self.sampled)
        sample = np.concatenate(
            [inputs[self.sampled[rows]] for rows, inputs in self._chunks()]
        )
        targets = self._one_hot(self.sampled)
        sample_weights = weights[self.sampled]

        def error(ridge: float) -> float:
            inverse = _inverse(gram, ridge)
            scores = _leave_one_out(sample, targets, sample_weights, inverse, moment)
            return float(sample_weights @ np.square(scores - targets).sum(axis=1))

        self._ridge = float(min(_neighbours(RIDGES, self._ridge), key=error))
        if not self.sampled.all():
            gram, moment = self._normal_equations(weights)
        inverse = _inverse(gram, self._ridge)
        scores = np.empty((len(weights), self._num_classes), np.float32)
        for rows, inputs in self._chunks():
            scores[rows] = _leave_one_out(
                inputs, self._one_hot(rows), weights[rows], inverse, moment
            )
        return scores

    def _chunks(self) -> Iterator[tuple[slice, np.ndarray]]:
        start = 0
        for chunk in self._features.chunks(CHUNK_ROWS):
            inputs = np.ones((len(chunk), chunk.shape[1] + 1), np.float32)
            inputs[:, :-1] = (chunk - self._mean) * self._scale
            yield slice(start, start + len(chunk)), inputs
            start += len(chunk)

    def _one_hot(self, rows: np.ndarray | slice) -> np.ndarray:
        return np.eye(self._num_classes, dtype=np.float32)[self._labels[rows]]

    def _normal_equations(self, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        width = self._features.dim + 1
        gram = np.zeros((width, width))
        moment = np.zeros((width, self._num_classes))
        for rows, inputs in self._chunks():
            weighted = inputs * weights[rows, None]
            gram += weighted.T @ inputs
            moment += weighted.T @ self._one_hot(rows)
        return gram, moment.astype(np.float32)


def _inverse(gram: np.ndarray, ridge: float) -> np.ndarray:
    penalty = np.full(len(gram), ridge)
    penalty[-1] = 1e-3  # The intercept is barely regularised.
    return np.linalg.inv(gram + np.diag(penalty)).astype(np.float32)


def _leave_one_out(
    inputs: np.ndarray,
    targets: np.ndarray,
    weights: np.ndarray,
    inverse: np.ndarray,
    moment: np.ndarray,
) -> np.ndarray:
    fitted = inputs @ (inverse @ moment)
    leverage = np.einsum("ij,ij->i", inputs @ inverse, inputs) * weights
    leverage = np.minimum(leverage, 0.999)[:, None]
    return fitted + leverage / (1.0 - leverage) * (fitted - targets)


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


def fit_noise(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    near: float | None = None,
    chosen: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Fits how sharp the scores are, and the noise matrix, by maximum likelihood."""
    everything = chosen is None or chosen.all()
    rows = slice(None) if everything else chosen
    some_known = None if known is None else known[rows]
    fits = []
    for sharpness in _neighbours(SHARPNESSES, near).tolist():
        probabilities = softmax(sharpness * scores[rows])
        fit = _expectation_maximisation(probabilities, labels[rows], some_known)
        fits.append((*fit, sharpness))
    _, noise, sharpness = max(fits, key=operator.itemgetter(0))
    if not everything:
        _, noise = _expectation_maximisation(softmax(sharpness * scores), labels, known)
    return sharpness, noise


def _expectation_maximisation(
    probabilities: np.ndarray, labels: np.ndarray, known: np.ndarray | None
) -> tuple[float, np.ndarray]:
    num_classes = probabilities.shape[1]
    chunks = [
        (probabilities[part], labels[part], None if known is None else known[part])
        for part in _parts(*probabilities.shape)
    ]
    noise = _even_noise(FIRST_NOISE_RATE, num_classes)
    for _ in range(EXPECTATION_STEPS):
        counted = np.zeros((num_classes, num_classes))
        for part, given, right in chunks:
            posterior = true_label_posterior(part, noise, given, right)
            counted += posterior.T @ np.eye(num_classes, dtype=part.dtype)[given]
        rate = 1.0 - np.trace(counted) / len(labels)
        noise = counted + PRIOR_COUNT * _even_noise(float(rate), num_classes) + 1e-9
        noise /= noise.sum(axis=1, keepdims=True)
    likelihood = sum(
        np.log(np.maximum(_joint(part, noise, given, right).sum(axis=1), 1e-30)).sum()
        for part, given, right in chunks
    )
    return float(likelihood), noise


def _even_noise(rate: float, num_classes: int) -> np.ndarray:
    noise = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(noise, 1.0 - rate)
    return noise
