"""How well features suit labels, without training: published scores in NumPy."""

from __future__ import annotations

import numpy as np

_MOST_STEPS = 100
_SETTLED = 1e-6
# Far below what matters: keeps logarithms finite where features say nothing, or all.
_TINY = 1e-12


def log_me(features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the logarithm of the maximum evidence (You et al., 2021, "LogME").

    For each class a Bayesian linear regression on its 0-1 labels: weights with a
    Gaussian prior of precision alpha, labels with Gaussian noise of precision beta.
    The evidence is maximised over both by the fixed-point steps of MacKay (1992), on
    one singular value decomposition for all classes. Features are taken as they are,
    not centred, as in the paper.

    Args:
        features: Shape `(n, d)`, finite.
        labels: Integers, shape `(n,)`.

    Returns:
        Mean over the classes of the log evidence by sample. The higher, the better;
        comparable between features of the same samples only.
    """
    features = np.asarray(features, np.float64)
    # The evidence does not depend on their unit, but _TINY does.
    features = features / max(float(np.sqrt(np.mean(np.square(features)))), _TINY)
    left, singular, _ = np.linalg.svd(features, full_matrices=False)
    evidences = []
    for label in np.unique(labels):
        target = (labels == label).astype(np.float64)
        projected = np.square(left.T @ target)
        outside = max(float(target @ target - projected.sum()), 0.0)
        evidences.append(
            _maximum_evidence(np.square(singular), projected, outside, features.shape)
        )
    return float(np.mean(evidences))


def _maximum_evidence(
    squares: np.ndarray, projected: np.ndarray, outside: float, shape: tuple[int, int]
) -> float:
    """Returns the log evidence by sample of one regression.

    Args:
        squares: Squared singular values `(r,)`.
        projected: Squared components `(r,)` of the target along the left vectors.
        outside: Squared length of what these vectors do not reach.
        shape: Samples and features.
    """
    count = shape[0]
    ratio = 1.0  # alpha / beta: the ridge of the regression.
    best = -np.inf
    for _ in range(_MOST_STEPS):
        weight_norm, residual, effective = _solution(squares, projected, outside, ratio)
        alpha = max(effective, _TINY) / max(weight_norm, _TINY)
        beta = max(count - effective, _TINY) / max(residual, _TINY)
        evidence = _evidence(squares, projected, outside, shape, alpha, beta)
        settled = evidence - best <= _SETTLED * abs(evidence)
        best = max(best, evidence)
        if settled:
            break
        ratio = alpha / beta
    return best / count


def _solution(
    squares: np.ndarray, projected: np.ndarray, outside: float, ratio: float
) -> tuple[float, float, float]:
    """Returns the squared norm of the mean weights, of the residual, and gamma.

    Gamma is the effective number of weights: the sum of `s^2 / (s^2 + ratio)`.
    """
    kept = squares / (squares + ratio)
    weight_norm = float(np.sum(projected * squares / np.square(squares + ratio)))
    residual = float(np.sum(projected * np.square(1.0 - kept))) + outside
    return weight_norm, residual, float(kept.sum())


def _evidence(
    squares: np.ndarray,
    projected: np.ndarray,
    outside: float,
    shape: tuple[int, int],
    alpha: float,
    beta: float,
) -> float:
    count, dim = shape
    weight_norm, residual, _ = _solution(squares, projected, outside, alpha / beta)
    determinant = np.sum(np.log(alpha + beta * squares))
    determinant += (dim - len(squares)) * np.log(alpha)
    return 0.5 * float(
        count * np.log(beta / (2.0 * np.pi))
        + dim * np.log(alpha)
        - beta * residual
        - alpha * weight_norm
        - determinant
    )


def h_score(features: np.ndarray, labels: np.ndarray) -> float:
    """Returns the shrunken H-score (Bao et al., 2019; Ibrahim et al., 2021).

    `trace(S_a^-1 (1 - a) B)`: B is the covariance of the class means, each taken as
    often as its class, S_a the covariance of the features, shrunken towards a multiple
    of the identity by Ledoit and Wolf's share a (2004). Without shrinkage the score
    grows with the number of features where that is not far below the number of samples.

    Args:
        features: Shape `(n, d)`, finite.
        labels: Integers, shape `(n,)`.

    Returns:
        A number in [0, classes - 1]. The higher, the better.
    """
    centred = np.asarray(features, np.float64)
    centred = centred - centred.mean(axis=0)
    covariance, shrinkage = ledoit_wolf(centred)
    classes, sizes = np.unique(labels, return_counts=True)
    means = np.stack([centred[labels == label].mean(axis=0) for label in classes])
    scaled = means * np.sqrt(sizes / len(labels))[:, None]
    solved = np.linalg.lstsq(covariance, scaled.T, rcond=None)[0]
    return float((1.0 - shrinkage) * np.sum(scaled.T * solved))


def ledoit_wolf(centred: np.ndarray) -> tuple[np.ndarray, float]:
    """Returns a shrunken covariance (Ledoit and Wolf, 2004) and the share of shrinkage.

    Args:
        centred: Shape `(n, d)`; each column has the mean 0.

    Returns:
        `(1 - a) S + a trace(S) / d I`, shape `(d, d)`, with S the covariance over n,
        and a in [0, 1].
    """
    count, dim = centred.shape
    covariance = centred.T @ centred / count
    mean_variance = float(np.trace(covariance)) / dim
    spread = float(np.sum(np.square(covariance)))
    distance = spread - dim * mean_variance**2
    fourth = float(np.mean(np.square(np.sum(np.square(centred), axis=1))))
    error = (fourth - spread) / count
    shrinkage = min(max(error / distance, 0.0), 1.0) if distance > 0 else 1.0
    shrunken = (1.0 - shrinkage) * covariance
    shrunken[np.diag_indices(dim)] += shrinkage * mean_variance
    return shrunken, shrinkage


def kendall_tau(ones: np.ndarray, others: np.ndarray) -> float:
    """Returns how far two lists of scores put things in the same order (tau-b).

    Args:
        ones: Shape `(n,)`.
        others: Shape `(n,)`.

    Returns:
        1 for the same order, -1 for the opposite one; corrected for ties (Kendall,
        1945). NaN where one list has no order, as with fewer than two entries.
    """
    signs = [np.sign(np.subtract.outer(np.asarray(x), x)) for x in (ones, others)]
    untied = np.sqrt(np.sum(np.abs(signs[0])) * np.sum(np.abs(signs[1])))
    return float(np.sum(signs[0] * signs[1]) / untied) if untied else float("nan")
