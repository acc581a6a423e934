"""Which classes are taken for which: a matrix of label noise, from class scores."""

from __future__ import annotations

import numpy as np

from keras_rsft.examination.left_out import neighbours

SHARPNESSES = np.array([2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 25, 32], float)
FIRST_NOISE_RATE = 0.1
EXPECTATION_STEPS = 20
# Pseudo-counts that pull each class's noise towards evenly spread noise, which
# matters where a class has few samples.
PRIOR_COUNT = 20.0
CHUNK_VALUES = 2**22


def softmax(scores: np.ndarray) -> np.ndarray:
    """Returns probabilities along the last axis."""
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def true_label_posterior(
    probabilities: np.ndarray,
    noise: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None = None,
) -> np.ndarray:
    """Returns how likely each class is the right one, given the label too.

    Args:
        probabilities: Shape `(n, k)`: of each class, from the features alone.
        noise: Shape `(k, k)`, as in `Examination`.
        labels: Shape `(n,)`, the given labels.
        known: Shape `(n,)`, the right labels, -1 where they are not known. Default:
            none is.

    Returns:
        Array `(n, k)` whose rows add up to 1, by Bayes' rule.
    """
    joint = _joint(probabilities, noise, labels, known)
    return joint / np.maximum(joint.sum(axis=1, keepdims=True), 1e-30)


def _joint(
    probabilities: np.ndarray,
    noise: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None,
) -> np.ndarray:
    """Returns how likely each right class and the given label are together."""
    joint = probabilities * noise[:, labels].T
    if known is not None:
        possible = known[:, None] == np.arange(len(noise))
        joint *= possible | (known < 0)[:, None]
    return joint


def right_probability(
    probabilities: np.ndarray, noise: np.ndarray, labels: np.ndarray
) -> np.ndarray:
    """Returns how likely each given label is right, float32 `(n,)`."""
    rows = max(1, CHUNK_VALUES // probabilities.shape[1])
    right = np.empty(len(labels), np.float32)
    for start in range(0, len(labels), rows):
        given = labels[start : start + rows]
        posterior = true_label_posterior(
            probabilities[start : start + rows], noise, given
        )
        right[start : start + rows] = posterior[np.arange(len(given)), given]
    return right


def fit_noise(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    near: float | None = None,
    chosen: np.ndarray | None = None,
) -> tuple[float, np.ndarray]:
    """Fits the noise matrix and how sharp the scores are, by maximum likelihood.

    Args:
        scores: Shape `(n, k)`, class scores that do not depend on the sample's own
            label.
        labels: Shape `(n,)`, the given labels.
        known: Shape `(n,)`, the right labels, -1 where they are not known. Default:
            none is.
        near: A sharpness whose neighbours alone are tried. Default: all are.
        chosen: Boolean array `(n,)`, the samples by which the sharpness is chosen.
            Default: all.

    Returns:
        The factor by which the scores go into a softmax, and the noise matrix
        `(k, k)`.
    """
    everything = chosen is None or chosen.all()
    some_scores, some_labels, some_known = (
        values if everything or values is None else values[chosen]
        for values in (scores, labels, known)
    )
    best = (-np.inf, 1.0, np.eye(scores.shape[1]))
    for sharpness in neighbours(SHARPNESSES, near):
        likelihood, noise = _expectation_maximisation(
            softmax(sharpness * some_scores), some_labels, some_known
        )
        if likelihood > best[0]:
            best = (likelihood, float(sharpness), noise)
    _, sharpness, noise = best
    if not everything:
        _, noise = _expectation_maximisation(softmax(sharpness * scores), labels, known)
    return sharpness, noise


def _expectation_maximisation(
    probabilities: np.ndarray, labels: np.ndarray, known: np.ndarray | None
) -> tuple[float, np.ndarray]:
    """Returns the log-likelihood and the noise matrix.

    Samples are taken some at a time: with a thousand classes, what is computed on
    the way would need several times the memory of the probabilities.
    """
    num_classes = probabilities.shape[1]
    rows = max(1, CHUNK_VALUES // num_classes)
    parts = [slice(at, at + rows) for at in range(0, len(labels), rows)]
    chunks = [
        (probabilities[part], labels[part], None if known is None else known[part])
        for part in parts
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
