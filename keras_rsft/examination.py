"""Finds out from kept features how many labels are wrong, and which.

A room between features and policies: it needs no trained head, no clean labels
and no noise rate, and decides nothing about training. NumPy only.

How: a ridge regression on the one-hot labels gives each sample's class scores as
if that sample had been left out, exactly and in closed form (Allen, 1974, PRESS).
A linear fit with a well-chosen ridge memorises no single label, so a sample's own
wrong label does not vouch for itself. From these scores and the given labels,
expectation maximisation estimates a matrix of label noise (Dawid and Skene, 1979;
for noisy labels Natarajan et al., 2013, and Patrini et al., 2017), and with it the
probability that each label is right. The regression is then repeated with these
probabilities as weights, so that wrong labels stop pulling at it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from keras_rsft.errors import DataError
from keras_rsft.features import FeatureSet
from keras_rsft.progress import progress_bar

ROUNDS = 4
RIDGES = 10.0 ** np.arange(1.0, 5.25, 0.5)
SHARPNESSES = np.array([2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32], float)
FIRST_NOISE_RATE = 0.1
EXPECTATION_STEPS = 20
# Pseudo-counts that pull each class's noise towards evenly spread noise, which
# matters where a class has few samples.
PRIOR_COUNT = 20.0
# The ridge does not depend on the number of samples: some are enough to choose it.
MAX_ROWS_TO_CHOOSE = 10_000
CHUNK_ROWS = 4096
# With fewer samples a class's labels are not judged.
MIN_CLASS_SIZE = 5
MIN_NOISE_RATE = 0.02
MIN_RIGHT_PROBABILITY = 0.6


@dataclasses.dataclass(frozen=True, eq=False)
class Examination:
    """What was found out about the labels of `n` samples in `k` classes.

    Attributes:
        out_of_sample: Float32 array `(n, k)`, each row adding up to 1: how likely
            each class is, from the other samples alone.
        right_probability: Float32 array `(n,)` in [0, 1]: how likely the given
            label is right.
        noise_rate: Estimated share of wrong labels, in [0, 1].
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

    def accept_mask(self, *, class_floor: float = 0.1) -> np.ndarray:
        """Chooses the samples to learn from.

        Args:
            class_floor: Least share of each class's samples to accept, in [0, 1];
                at least one is. Default 0.1.

        Returns:
            Boolean array `(n,)`. All True where nothing is to be rejected.
        """
        if self.reason is not None:
            return np.ones(len(self.labels), bool)
        accepted = self.right_probability >= MIN_RIGHT_PROBABILITY
        counts = np.bincount(self.labels, minlength=len(self.noise))
        small = counts < MIN_CLASS_SIZE
        accepted |= small[self.labels]
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
        kept = self.accept_mask().mean()
        return (
            f"About {100 * self.noise_rate:.0f} % of the labels look wrong; keeping "
            f"the {100 * kept:.0f} % of the samples whose label is right with a "
            f"probability of {MIN_RIGHT_PROBABILITY} or more."
        )


def examine_labels(
    features: FeatureSet, num_classes: int, *, seed: int = 0, progress: bool = True
) -> Examination:
    """Estimates how many labels are wrong, and for each how likely it is right.

    Takes some seconds for 10,000 samples; the time grows with the number of samples
    and with the square of the number of features.

    Args:
        features: Kept features of the training samples with their given labels.
        num_classes: Number of classes, at least 2.
        seed: Chooses the samples by which the ridge is chosen, where there are
            more than 10,000. Default 0.
        progress: Show a progress bar. Default True.

    Returns:
        What was found. Where there is too little to go by, `reason` says so.

    Raises:
        DataError: If a feature is NaN or infinite.
    """
    labels = np.asarray(features.labels)
    counts = np.bincount(labels, minlength=num_classes)
    if np.count_nonzero(counts >= MIN_CLASS_SIZE) < 2:
        return _unjudged(
            labels,
            counts,
            f"Fewer than two classes have {MIN_CLASS_SIZE} samples, too few to judge "
            "labels by",
        )
    regression = _Regression(features, num_classes, seed)
    weights = np.ones(len(labels), np.float32)
    sharpness = noise = None
    with progress_bar(
        "Examining the labels", total=ROUNDS, unit="rounds", visible=progress
    ) as advance:
        for _ in range(ROUNDS):
            scores = regression.left_out_scores(weights)
            sharpness, noise = fit_noise(scores, labels, near=sharpness)
            out_of_sample = softmax(sharpness * scores)
            posterior = true_label_posterior(out_of_sample, noise, labels)
            weights = posterior[np.arange(len(labels)), labels].astype(np.float32)
            advance(1)
    examination = Examination(
        out_of_sample.astype(np.float32),
        weights,
        float(1.0 - weights.mean()),
        noise,
        labels,
    )
    return dataclasses.replace(examination, reason=_reason_to_keep_all(examination))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns probabilities along the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def true_label_posterior(
    probabilities: np.ndarray, noise: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Returns how likely each class is the right one, given the label too.

    Args:
        probabilities: Shape `(n, k)`: of each class, from the features alone.
        noise: Shape `(k, k)`, as in `Examination`.
        labels: Shape `(n,)`, the given labels.

    Returns:
        Array `(n, k)` whose rows add up to 1, by Bayes' rule.
    """
    joint = probabilities * noise[:, labels].T
    return joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30)


def fit_noise(
    scores: np.ndarray, labels: np.ndarray, *, near: float | None = None
) -> tuple[float, np.ndarray]:
    """Fits the noise matrix and how sharp the scores are, by maximum likelihood.

    Args:
        scores: Shape `(n, k)`, class scores that do not depend on the sample's own
            label.
        labels: Shape `(n,)`, the given labels.
        near: A sharpness whose neighbours alone are tried. Default: all are.

    Returns:
        The factor by which the scores go into a softmax, and the noise matrix
        `(k, k)`.
    """
    best = (-np.inf, 1.0, np.eye(scores.shape[1]))
    for sharpness in _neighbours(SHARPNESSES, near):
        likelihood, noise = _expectation_maximisation(
            softmax(sharpness * scores), labels
        )
        if likelihood > best[0]:
            best = (likelihood, float(sharpness), noise)
    return best[1], best[2]


def _expectation_maximisation(
    probabilities: np.ndarray, labels: np.ndarray
) -> tuple[float, np.ndarray]:
    num_classes = probabilities.shape[1]
    noise = _even_noise(FIRST_NOISE_RATE, num_classes)
    one_hot = np.eye(num_classes, dtype=probabilities.dtype)[labels]
    for _ in range(EXPECTATION_STEPS):
        posterior = true_label_posterior(probabilities, noise, labels)
        rate = 1.0 - (posterior * one_hot).sum(axis=1).mean()
        counted = posterior.T @ one_hot
        noise = counted + PRIOR_COUNT * _even_noise(float(rate), num_classes) + 1e-9
        noise /= noise.sum(axis=1, keepdims=True)
    likelihood = (probabilities * noise[:, labels].T).sum(axis=1)
    return float(np.log(np.maximum(likelihood, 1e-30)).sum()), noise


def _even_noise(rate: float, num_classes: int) -> np.ndarray:
    noise = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(noise, 1.0 - rate)
    return noise


def _neighbours(values: np.ndarray, near: float | None) -> np.ndarray:
    if near is None:
        return values
    place = int(np.argmin(np.abs(values - near)))
    return values[max(place - 1, 0) : place + 2]


class _Regression:
    """Weighted ridge regression on one-hot labels, each sample left out in turn.

    Features are standardised, and read chunk by chunk where there are many.
    """

    def __init__(self, features: FeatureSet, num_classes: int, seed: int):
        self._features = features
        self._labels = np.asarray(features.labels)
        self._num_classes = num_classes
        mean, variance = features.moments()
        if not (np.isfinite(mean).all() and np.isfinite(variance).all()):
            raise DataError(_not_finite_message(features))
        self._mean, self._scale = mean, 1.0 / np.sqrt(variance)
        count = len(features)
        chosen = np.random.default_rng(seed).permutation(count)[:MAX_ROWS_TO_CHOOSE]
        self._sampled = np.zeros(count, bool)
        self._sampled[chosen] = True
        self._ridge: float | None = None

    def left_out_scores(self, weights: np.ndarray) -> np.ndarray:
        """Returns class scores `(n, k)` of each sample from the other samples.

        Args:
            weights: Float32 array `(n,)` in [0, 1], how much each sample counts.
        """
        gram, moment = self._normal_equations(weights, self._sampled)
        sample = np.concatenate(
            [
                inputs[self._sampled[start : start + len(inputs)]]
                for start, inputs in self._chunks()
            ]
        )
        targets = self._one_hot(np.flatnonzero(self._sampled))
        sample_weights = weights[self._sampled]

        def error(ridge: float) -> float:
            inverse = _inverse(gram, ridge)
            scores = _leave_one_out(sample, targets, sample_weights, inverse, moment)
            return float(sample_weights @ np.square(scores - targets).sum(axis=1))

        self._ridge = _least(_neighbours(RIDGES, self._ridge), error)
        if not self._sampled.all():
            gram, moment = self._normal_equations(weights, None)
        inverse = _inverse(gram, self._ridge)
        scores = np.empty((len(weights), self._num_classes), np.float32)
        for start, inputs in self._chunks():
            place = slice(start, start + len(inputs))
            targets = self._one_hot(np.arange(start, start + len(inputs)))
            scores[place] = _leave_one_out(
                inputs, targets, weights[place], inverse, moment
            )
        return scores

    def _chunks(self):
        start = 0
        for chunk in self._features.chunks(CHUNK_ROWS):
            inputs = np.ones((len(chunk), chunk.shape[1] + 1), np.float32)
            inputs[:, :-1] = (chunk - self._mean) * self._scale
            yield start, inputs
            start += len(chunk)

    def _one_hot(self, rows: np.ndarray) -> np.ndarray:
        return np.eye(self._num_classes, dtype=np.float32)[self._labels[rows]]

    def _normal_equations(
        self, weights: np.ndarray, only: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the weighted Gram matrix and the moments with the targets."""
        width = self._features.dim + 1
        gram = np.zeros((width, width))
        moment = np.zeros((width, self._num_classes))
        for start, inputs in self._chunks():
            rows = np.arange(start, start + len(inputs))
            weighted = inputs * weights[rows, None]
            if only is not None:
                weighted *= only[rows, None]
            gram += weighted.T @ inputs
            moment += weighted.T @ self._one_hot(rows)
        return gram, moment.astype(np.float32)


def _inverse(gram: np.ndarray, ridge: float) -> np.ndarray:
    penalty = np.full(len(gram), ridge)
    penalty[-1] = 1e-3  # The intercept is hardly held back.
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


def _least(candidates: np.ndarray, error: Callable[[float], float]) -> float:
    return float(min(candidates, key=error))


def _unjudged(labels: np.ndarray, counts: np.ndarray, reason: str) -> Examination:
    """Says nothing against any label: each class is as likely as it is frequent."""
    shares = (counts / max(counts.sum(), 1)).astype(np.float32)
    return Examination(
        np.tile(shares, (len(labels), 1)),
        np.ones(len(labels), np.float32),
        0.0,
        np.eye(len(counts)),
        labels,
        reason,
    )


def _reason_to_keep_all(examination: Examination) -> str | None:
    labels, rate = examination.labels, examination.noise_rate
    shares = np.bincount(labels, minlength=len(examination.noise)) / len(labels)
    chance = float(shares.max())
    agreement = float(np.mean(examination.out_of_sample.argmax(axis=1) == labels))
    if agreement <= chance + 3 * np.sqrt(chance * (1 - chance) / len(labels)):
        return (
            "The labels do not fit the images better than chance (they agree with a "
            f"head that has not seen them in {100 * agreement:.0f} % of the cases, "
            f"against {100 * chance:.0f} % for the commonest class), so that right "
            "and wrong ones cannot be told apart"
        )
    if rate < MIN_NOISE_RATE:
        return f"No sign of wrong labels (about {100 * rate:.1f} %)"
    return None


def _not_finite_message(features: FeatureSet) -> str:
    bad = np.concatenate(
        [~np.isfinite(chunk).all(axis=1) for chunk in features.chunks()]
    )
    named = ", ".join(map(str, features.ids[bad][:3]))
    return (
        f"The features of {np.count_nonzero(bad)} of {len(features)} images are NaN or "
        f"infinite, for example {named}. Try `--precision float32`, or another base."
    )
