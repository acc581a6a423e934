"""Fits the matrix of label noise, and how to calibrate scores."""

from __future__ import annotations

import math

import numpy as np

# Tried on their scores' deviation, so that they mean the same for all scores.
SHARPNESSES = np.geomspace(0.1, 40.0, 32)
NOISE_RATES = np.concatenate([[0.001], np.linspace(0.02, 0.9, 45)])
# With more classes there are too few samples, and too little time, for a matrix.
MAX_CLASSES_TO_CALIBRATE = 100
REPEATS = 3  # Of a fit of the calibration, and of the noise.
CALIBRATION_STEPS = 20
NOISE_STEPS = 40
NOISE_TOLERANCE = 1e-4
MOMENTUM = 0.8
# A step that lowers the mean log-likelihood by more is taken back; the next is damped.
MAX_FALL = 0.01
FIRST_DAMPING = 0.05
# Per class: pulls the calibration towards one sharpness for all.
CALIBRATION_RIDGE = 0.1
# Pseudo-counts that pull each class's noise towards evenly spread noise, times the
# root of the number of classes: it matters where a class has few samples.
PRIOR_COUNT = 12.65
CHUNK_VALUES = 2**20


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


def parts_of(count: int, num_classes: int) -> list[slice]:
    """Cuts samples into parts: a thousand classes would need much memory at once."""
    rows = max(1, CHUNK_VALUES // num_classes)
    return [slice(at, at + rows) for at in range(0, count, rows)]


def calibrated(scores: np.ndarray, calibration: np.ndarray) -> np.ndarray:
    """Returns probabilities `(n, k)` of scores by a matrix `(k + 1, k)`."""
    probabilities = np.empty(scores.shape, np.float32)
    for part in parts_of(*scores.shape):
        probabilities[part] = softmax(scores[part] @ calibration[:-1] + calibration[-1])
    return probabilities


def fit_noise(
    scores: np.ndarray,
    labels: np.ndarray,
    *,
    known: np.ndarray | None = None,
    chosen: np.ndarray | None = None,
    shares: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Fits how to calibrate scores, and the noise matrix, by maximum likelihood.

    Returns the calibration, the noise and the calibrated probabilities.

    All at once, the noise would also take up what the scores get wrong: so one
    sharpness is fitted with evenly spread noise, and then in turn the noise matrix and
    the calibration.

    `shares` say how much samples count: copies share the weight of one. The samples
    that are `chosen` are enough for the calibration.
    """
    if shares is None:
        shares = np.ones(len(labels), np.float32)
    num_classes = scores.shape[1]
    rows = np.arange(len(labels)) if chosen is None else np.flatnonzero(chosen)
    right = None if known is None else known[rows]
    some = scores[rows], labels[rows], right, shares[rows]
    sharpness, rate = _fit_evenly(*some)
    calibration = sharpness * np.eye(num_classes + 1, num_classes, dtype=np.float32)
    noise = even_noise(rate, num_classes)
    probabilities = calibrated(scores, calibration)
    noise = fit_noise_alone(probabilities, labels, noise, known, shares)
    if num_classes > MAX_CLASSES_TO_CALIBRATE:
        return calibration, noise, probabilities
    for _ in range(REPEATS):
        calibration = _fit_calibration(*some, calibration, noise)
        probabilities = calibrated(scores, calibration)
        noise = fit_noise_alone(probabilities, labels, noise, known, shares)
    return calibration, noise, probabilities


def _fit_evenly(
    scores: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None,
    shares: np.ndarray,
) -> tuple[float, float]:
    """Returns the sharpness and the rate of evenly spread noise that fit best."""
    scores = scores - scores.mean(axis=1, keepdims=True)
    unit = max(float(scores.std()), 1e-12)
    other = NOISE_RATES / (scores.shape[1] - 1)
    unknown = np.full(len(labels), True) if known is None else known < 0
    right = labels if known is None else np.where(unknown, labels, known)
    if_right = np.where((right == labels)[:, None], 1.0 - NOISE_RATES, other)
    if_wrong = np.where(unknown[:, None], other, 0.0)
    best = (-math.inf, 0.0, 0.0)
    for sharpness in (SHARPNESSES / unit).astype(np.float32):
        likely = softmax(scores * sharpness)[np.arange(len(labels)), right][:, None]
        evidence = likely * if_right + (1.0 - likely) * if_wrong
        likelihood = shares @ np.log(np.maximum(evidence, 1e-30))
        top = int(likelihood.argmax())
        found = (float(likelihood[top]), float(sharpness), float(NOISE_RATES[top]))
        best = max(best, found)
    return best[1:]


def _fit_calibration(
    scores: np.ndarray,
    labels: np.ndarray,
    known: np.ndarray | None,
    shares: np.ndarray,
    calibration: np.ndarray,
    noise: np.ndarray,
) -> np.ndarray:
    """Fits how to calibrate scores, given the noise, by a generalised EM."""
    num_classes = scores.shape[1]
    inputs = np.hstack([scores, np.ones((len(scores), 1), np.float32)])
    diagonal = np.eye(num_classes + 1, num_classes, dtype=np.float32)
    ridge = CALIBRATION_RIDGE * num_classes
    weights, noise = shares[:, None], noise.astype(np.float32)
    last, reached, damping, pace = calibration, -math.inf, 0.0, 0
    for _ in range(CALIBRATION_STEPS):
        momentum = min(MOMENTUM, pace / (pace + 3))
        ahead = calibration + momentum * (calibration - last)
        probabilities = softmax(inputs @ ahead)
        posterior = _joint(probabilities, noise, labels, known)
        evidence = np.maximum(posterior.sum(axis=1, keepdims=True), 1e-30)
        likelihood = float((weights * np.log(evidence)).sum() / weights.sum())
        if likelihood < reached - MAX_FALL:
            calibration, pace = last, 0
            damping = max(4.0 * damping, FIRST_DAMPING)
            continue
        reached, last = likelihood, calibration
        damping, pace = damping / 2.0, pace + 1
        # The trace of each sample's curvature bounds it.
        bound = 1.0 - np.square(probabilities).sum(axis=1, keepdims=True)
        curvature = (inputs * (weights * (bound + damping))).T @ inputs
        curvature[np.diag_indices_from(curvature)] += ridge
        pull = ahead - np.trace(ahead) / num_classes * diagonal
        surplus = weights * (posterior / evidence - probabilities)
        step = np.linalg.solve(curvature, inputs.T @ surplus - ridge * pull)
        calibration = (ahead + step).astype(np.float32)
    return calibration


def fit_noise_alone(
    probabilities: np.ndarray,
    labels: np.ndarray,
    noise: np.ndarray,
    known: np.ndarray | None,
    shares: np.ndarray,
) -> np.ndarray:
    """Fits the noise matrix to probabilities that are calibrated already."""
    for _ in range(NOISE_STEPS):
        counted = np.zeros_like(noise)
        for part in parts_of(*probabilities.shape):
            right = None if known is None else known[part]
            likely, given = probabilities[part], labels[part]
            posterior = true_label_posterior(likely, noise, given, right)
            counted += _counted(posterior * shares[part, None], given)
        last, noise = noise, _noise_from(counted)
        if np.abs(noise - last).max() < NOISE_TOLERANCE:
            break
    return noise


def _counted(posterior: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the sums `(k, k)` of the posteriors, at `[class, given label]`."""
    counted = np.zeros((posterior.shape[1],) * 2)
    order = np.argsort(labels, kind="stable")
    given, starts = np.unique(labels[order], return_index=True)
    counted[:, given] = np.add.reduceat(posterior[order], starts).T
    return counted


def _noise_from(counted: np.ndarray) -> np.ndarray:
    total = counted.sum()  # As if one more were wrong: never seen is not impossible.
    rate = (total - np.trace(counted) + 1.0) / (total + 1.0)
    prior = even_noise(float(rate), len(counted))
    noise = counted + PRIOR_COUNT * math.sqrt(len(counted)) * prior + 1e-9
    return noise / noise.sum(axis=1, keepdims=True)


def even_noise(rate: float, num_classes: int) -> np.ndarray:
    noise = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(noise, 1.0 - rate)
    return noise
