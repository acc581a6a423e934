"""Fits the matrix of label noise, and how to calibrate scores."""

from __future__ import annotations

import math

import numpy as np

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
        even_noise(FIRST_NOISE_RATE, num_classes),
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
        noise = fit_noise_alone(scores, labels, calibration, noise, known, shares)
    return calibration, noise


def fit_noise_alone(
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
        for part in parts_of(*scores.shape):
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
    prior = even_noise(float(rate), len(counted))
    noise = counted + PRIOR_COUNT * prior + 1e-9
    return noise / noise.sum(axis=1, keepdims=True)


def even_noise(rate: float, num_classes: int) -> np.ndarray:
    noise = np.full((num_classes, num_classes), rate / (num_classes - 1))
    np.fill_diagonal(noise, 1.0 - rate)
    return noise
