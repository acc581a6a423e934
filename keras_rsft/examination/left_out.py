"""Class scores of each sample from the other samples alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from keras_rsft.errors import DataError
from keras_rsft.features import FeatureSet

RIDGES = 10.0 ** np.arange(1.0, 5.25, 0.5)
# The ridge does not depend on the number of samples: some are enough to choose it.
MAX_ROWS_TO_CHOOSE = 10_000
CHUNK_ROWS = 4096


class LeftOutRegression:
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
        self.sampled = np.zeros(count, bool)
        self.sampled[chosen] = True
        self._ridge: float | None = None
        self._coefficients: np.ndarray | None = None

    def left_out_scores(self, weights: np.ndarray) -> np.ndarray:
        """Returns class scores `(n, k)` of each sample from the other samples.

        Args:
            weights: Float32 array `(n,)` in [0, 1], how much each sample counts.
        """
        gram, moment = self._normal_equations(weights, self.sampled)
        sample = np.concatenate(
            [
                inputs[self.sampled[start : start + len(inputs)]]
                for start, inputs in self._chunks(self._features)
            ]
        )
        targets = self._one_hot(np.flatnonzero(self.sampled))
        sample_weights = weights[self.sampled]

        def error(ridge: float) -> float:
            inverse = _inverse(gram, ridge)
            scores = _leave_one_out(sample, targets, sample_weights, inverse, moment)
            return float(sample_weights @ np.square(scores - targets).sum(axis=1))

        self._ridge = _least(neighbours(RIDGES, self._ridge), error)
        if not self.sampled.all():
            gram, moment = self._normal_equations(weights, None)
        inverse = _inverse(gram, self._ridge)
        self._coefficients = inverse @ moment
        scores = np.empty((len(weights), self._num_classes), np.float32)
        for start, inputs in self._chunks(self._features):
            place = slice(start, start + len(inputs))
            targets = self._one_hot(np.arange(start, start + len(inputs)))
            scores[place] = _leave_one_out(
                inputs, targets, weights[place], inverse, moment
            )
        return scores

    def scores_of(self, others: FeatureSet) -> np.ndarray:
        """Returns class scores `(m, k)` of other samples, by what was fitted last.

        Args:
            others: Features of samples that were not among the fitted ones.
        """
        chunks = [inputs @ self._coefficients for _, inputs in self._chunks(others)]
        return np.concatenate(chunks)

    def _chunks(self, features: FeatureSet) -> Iterator[tuple[int, np.ndarray]]:
        start = 0
        for chunk in features.chunks(CHUNK_ROWS):
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
        for start, inputs in self._chunks(self._features):
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


def neighbours(values: np.ndarray, near: float | None) -> np.ndarray:
    """Returns the values next to one of them; all if that is None."""
    if near is None:
        return values
    place = int(np.argmin(np.abs(values - near)))
    return values[max(place - 1, 0) : place + 2]


def _not_finite_message(features: FeatureSet) -> str:
    bad = np.concatenate(
        [~np.isfinite(chunk).all(axis=1) for chunk in features.chunks()]
    )
    named = ", ".join(map(str, features.ids[bad][:3]))
    return (
        f"The features of {np.count_nonzero(bad)} of {len(features)} images are NaN or "
        f"infinite, for example {named}. Try `--precision float32`, or another base."
    )
