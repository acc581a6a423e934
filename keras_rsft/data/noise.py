"""Makes some labels wrong on purpose, to measure what a method does about it."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from keras_rsft.data.partition import SPLITS
from keras_rsft.data.splits import ImageData
from keras_rsft.errors import InvalidArgument

SYMMETRIC = "symmetric"
ASYMMETRIC = "asymmetric"


def add_label_noise(
    data: ImageData, spec: str, *, seed: int, splits: tuple[str, ...] = ("train",)
) -> ImageData:
    """Gives a share of the samples a wrong label.

    Args:
        data: The data set.
        spec: "symmetric:RATE" moves round(RATE x n) labels of a split, chosen
            uniformly, each to any other class. "asymmetric:RATE" moves
            round(RATE x n) labels of each class to the next class, and those
            of the last class to the first. RATE is in (0, 1).
        seed: Chooses the labels, in [0, 2**63). Each split is drawn by itself.
        splits: The names of the splits to change.

    Returns:
        The data set with these labels. The labels from before become the clean
        labels of the splits changed, where none are known.

    Raises:
        InvalidArgument: If an argument is not as above.
    """
    kind, rate = parse_noise(spec)
    _check(seed, splits)
    changed = {}
    for name in splits:
        split = getattr(data, name)
        rng = np.random.default_rng([seed, SPLITS.index(name)])
        noise = symmetric_noise if kind == SYMMETRIC else asymmetric_noise
        labels = noise(split.labels, rate, num_classes=data.num_classes, rng=rng)
        clean = split.labels if split.clean_labels is None else split.clean_labels
        changed[name] = split.with_labels(labels, clean)
    return dataclasses.replace(data, **changed)


def parse_noise(spec: str) -> tuple[str, float]:
    """Reads "symmetric:0.3" or "asymmetric:0.3".

    Args:
        spec: The text.

    Returns:
        The kind, "symmetric" or "asymmetric", and the rate in (0, 1).

    Raises:
        InvalidArgument: If it is anything else.
    """
    kind, _, text = str(spec).partition(":")
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if kind not in (SYMMETRIC, ASYMMETRIC) or not 0 < rate < 1:
        raise InvalidArgument(
            'Label noise must be "symmetric:RATE" or "asymmetric:RATE" with RATE '
            f'in (0, 1). Received: {spec!r}. Use "symmetric:0.3", for example.'
        )
    return kind, rate


def symmetric_noise(
    labels: np.ndarray, rate: float, *, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Moves round(rate x n) labels, each to one of the other classes.

    Args:
        labels: Shape `(n,)`, integers in [0, num_classes).
        rate: In (0, 1).
        num_classes: Two or more.
        rng: Chooses the labels and their new classes, uniformly.

    Returns:
        New labels of the same shape and dtype.
    """
    noisy = labels.copy()
    moved = rng.choice(len(labels), size=round(rate * len(labels)), replace=False)
    steps = rng.integers(1, num_classes, size=len(moved))
    noisy[moved] = (labels[moved] + steps) % num_classes
    return noisy


def asymmetric_noise(
    labels: np.ndarray, rate: float, *, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Moves round(rate x n) labels of each class to the class that follows.

    Args:
        labels: Shape `(n,)`, integers in [0, num_classes).
        rate: In (0, 1).
        num_classes: Two or more; class 0 follows the last.
        rng: Chooses the labels, uniformly.

    Returns:
        New labels of the same shape and dtype.
    """
    noisy = labels.copy()
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        moved = rng.choice(members, size=round(rate * len(members)), replace=False)
        noisy[moved] = (label + 1) % num_classes
    return noisy


def _check(seed: int, splits: tuple[str, ...]) -> None:
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise InvalidArgument(
            f"`seed` must be an integer in [0, 2**63). Received: seed={seed!r}."
        )
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
        raise InvalidArgument(
            f"`splits` must be a tuple of names out of {SPLITS}. "
            f"Received: splits={splits!r}."
        )
