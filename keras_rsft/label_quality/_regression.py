"""Scores the classes of each sample from the other samples alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from keras_rsft.errors import DataError
from keras_rsft.features._store import FeatureSet

RIDGES = 10.0 ** np.arange(1.0, 5.25, 0.5)
# The ridge does not depend on the number of samples: some are enough to choose it.
MAX_ROWS_TO_CHOOSE = 4096
CHUNK_ROWS = 4096
# Larger groups of copies are left out by another fit, not by solving for them.
MAX_GROUP_TO_SOLVE = 512


# -- Copies ------------------------------------------------------------------------


def groups_of(features: FeatureSet) -> np.ndarray:
    return np.arange(len(features)) if features.groups is None else features.groups


def shares_of(groups: np.ndarray, counted: np.ndarray | None = None) -> np.ndarray:
    """Returns each sample's share of the one witness that its copies are together."""
    _, group_of = np.unique(groups, return_inverse=True)
    sizes = np.bincount(group_of, counted)
    return (1.0 / np.maximum(sizes, 1.0)).astype(np.float32)[group_of]


def known_by_copies(groups: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Returns the known labels, -1 for none, also of the copies of known samples."""
    of_group = np.full(groups.max(initial=0) + 1, -1)
    of_group[groups[known >= 0]] = known[known >= 0]
    return np.where(known >= 0, known, of_group[groups])


Rivals = tuple[np.ndarray, np.ndarray, np.ndarray]


def find_rivals(
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


def right_among(
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
        self.sampled = _sampled(len(features), seed)
        self._ridge: float | None = None
        self._fit: _RidgePath | None = None
        self._weights = np.zeros(len(features), np.float32)

    def left_out_scores(self, weights: np.ndarray) -> np.ndarray:
        """Returns class scores `(n, k)`; weights `(n,)` say how much samples count."""
        sampled = self.sampled
        sample = np.concatenate([x[sampled[rows]] for rows, x in self._chunks()])
        targets, sample_weights = self._one_hot(sampled), weights[sampled]
        fit = self._path_of([(sample, targets, sample_weights)])
        rotated = fit.rotated(sample)
        groups = groups_of(self._features)
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
        return self._path_of(
            (inputs, self._one_hot(rows), weights[rows])
            for rows, inputs in self._chunks()
        )

    def _path_of(
        self, chunks: Iterable[tuple[np.ndarray, np.ndarray, np.ndarray]]
    ) -> _RidgePath:
        """Fits inputs to targets with weights."""
        width = self._features.dim
        if len(self._weights) < width:
            return _path_of_few(*map(np.concatenate, zip(*chunks, strict=True)))
        gram, moment = np.zeros((width, width)), np.zeros((width, self._num_classes))
        inputs_sum, targets_sum = np.zeros(width), np.zeros(self._num_classes)
        total = 0.0
        for inputs, targets, weights in chunks:
            weighted = inputs * weights[:, None]
            gram += weighted.T @ inputs
            moment += weighted.T @ targets
            inputs_sum += weighted.sum(axis=0)
            targets_sum += weights @ targets
            total += float(weights.sum(dtype=float))
        total = max(total, 1e-9)
        centre, mean_target = inputs_sum / total, targets_sum / total
        gram -= total * np.outer(centre, centre)
        moment -= total * np.outer(centre, mean_target)
        values, axes = np.linalg.eigh(gram)
        return _RidgePath(values, axes, axes.T @ moment, centre, mean_target, total)


def _sampled(count: int, seed: int) -> np.ndarray:
    chosen = np.random.default_rng(seed).permutation(count)[:MAX_ROWS_TO_CHOOSE]
    sampled = np.zeros(count, bool)
    sampled[chosen] = True
    return sampled


class GivenScores:
    """Scores of another model, in place of features and their `LeftOutRegression`."""

    def __init__(self, features: FeatureSet, num_classes: int, seed: int):
        self._features, self._num_classes = features, num_classes
        self.sampled = _sampled(len(features), seed)

    def left_out_scores(self, weights: np.ndarray) -> np.ndarray:
        return self.scores(self._features)

    def scores(self, others: FeatureSet) -> np.ndarray:
        empty = np.empty((0, self._num_classes), np.float32)
        return np.concatenate([empty, *others.chunks(CHUNK_ROWS)])


class _RidgePath:
    """Ridge regression with an intercept; one eigendecomposition serves every ridge."""

    def __init__(
        self,
        values: np.ndarray,
        axes: np.ndarray,
        moment: np.ndarray,
        centre: np.ndarray,
        mean_target: np.ndarray,
        total: float,
    ):
        self._values = np.maximum(values, 0.0)
        self._axes = axes.astype(np.float32)
        self._moment = moment.astype(np.float32)
        self._centre = centre.astype(np.float32)
        self._mean_target = mean_target.astype(np.float32)
        self._total = total

    def rotated(self, inputs: np.ndarray) -> np.ndarray:
        flat = inputs.reshape(-1, inputs.shape[-1])  # One product, not one a group.
        rotated = (flat - self._centre) @ self._axes
        return rotated.reshape(*inputs.shape[:-1], -1)

    def _shrunk(self, ridge: float) -> np.ndarray:
        return self._moment / (self._values + ridge)[:, None].astype(np.float32)

    def scores(self, rotated: np.ndarray, ridge: float) -> np.ndarray:
        shrunk = self._shrunk(ridge)
        scores = self._mean_target + rotated.reshape(-1, rotated.shape[-1]) @ shrunk
        return scores.reshape(*rotated.shape[:-1], shrunk.shape[1])

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


def _path_of_few(
    inputs: np.ndarray, targets: np.ndarray, weights: np.ndarray
) -> _RidgePath:
    """Fits fewer samples than they have features, by their products alone.

    What is at right angles to all of them has no part in any score.
    """
    total = max(float(weights.sum(dtype=float)), 1e-9)
    centre, mean_target = weights @ inputs / total, weights @ targets / total
    roots = np.sqrt(weights.astype(float))[:, None]
    rows = roots * (inputs - centre)
    values, left = np.linalg.eigh(rows @ rows.T)
    found = values > 1e-12 * max(float(values[-1]), 1e-9)
    values, left = values[found], left[:, found]
    scales = np.sqrt(values)
    moment = scales[:, None] * (left.T @ (roots * (targets - mean_target)))
    axes = rows.T @ (left / scales)
    return _RidgePath(values, axes, moment, centre, mean_target, total)


def _neighbours(values: np.ndarray, near: float | None) -> np.ndarray:
    if near is None:
        return values
    nearest = int(np.argmin(np.abs(values - near)))
    return values[max(nearest - 1, 0) : nearest + 2]
