"""Small kept features that the tests of the search write themselves."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from keras_rsft.features._store import FeatureSet
from keras_rsft.training._features import SplitFeatures

CLASSES, DIM = 3, 6


def feature_set(
    folder: Path,
    name: str,
    count: int,
    *,
    seed: int,
    wrong: float = 0.0,
    augmentations=1,
    noise: int = 0,
) -> FeatureSet:
    """Three clusters in six dimensions, some of their labels wrong.

    `noise` further dimensions say nothing.
    """
    rng = np.random.default_rng(seed)
    clean = rng.integers(0, CLASSES, count).astype("int32")
    dim = DIM + noise
    centres = 3.0 * np.eye(CLASSES, dim)
    values = centres[clean][:, None] + rng.normal(size=(count, augmentations, dim))
    path = folder / f"{name}.bin"
    (5.0 + 2.0 * values).astype("float32").tofile(path)
    flipped = rng.random(count) < wrong
    labels = np.where(flipped, (clean + 1) % CLASSES, clean).astype("int32")
    ids = np.array([f"{name}{number}" for number in range(count)])
    return FeatureSet(path, labels, ids, dim, augmentations, clean)


def split_features(folder: Path) -> SplitFeatures:
    """101 training rows: 7 batches of 16, 5 in the last. A fifth have a wrong label."""
    return SplitFeatures(
        feature_set(folder, "train", 101, seed=0, wrong=0.2),
        feature_set(folder, "validation", 31, seed=1),
        feature_set(folder, "test", 31, seed=2),
        ("a", "b", "c"),
    )
