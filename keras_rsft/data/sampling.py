"""A part of a split in which every class keeps its share."""

from __future__ import annotations

import numpy as np

from keras_rsft.errors import InvalidArgument


def stratified_sample(labels: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Chooses some samples at random, as many of each class as it has in all."""
    if count < 1:
        raise InvalidArgument(f"`count` must be at least 1. Received: {count}.")
    labels = np.asarray(labels)
    if count >= len(labels):
        return np.arange(len(labels))
    classes, sizes = np.unique(labels, return_counts=True)
    exact = sizes * (count / sizes.sum())
    least = 1 if len(sizes) <= count else 0
    shares = np.maximum(np.floor(exact), least).astype(int)
    # Once the small classes have their one, the larger ones may have too many.
    while shares.sum() > count:
        excess = np.where(shares > least, shares - exact, -np.inf)
        shares[np.argmax(excess)] -= 1
    for place in np.argsort(shares - exact, kind="stable")[: count - shares.sum()]:
        shares[place] += 1
    taken = shares
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, taken, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
