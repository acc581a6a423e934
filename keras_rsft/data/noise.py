"""Makes some labels wrong on purpose, to measure what a method does about it.

Noise that depends on the image is made from a thumbnail of it, not from a base's
features: those are not known when data is loaded, and the same seed must give the
same wrong labels whatever base is tried.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from keras_rsft.data.partition import SPLITS
from keras_rsft.data.samples import ImageSplit, SampleData
from keras_rsft.errors import InvalidArgument

SYMMETRIC = "symmetric"
ASYMMETRIC = "asymmetric"
INSTANCE = "instance"
KINDS = (SYMMETRIC, ASYMMETRIC, INSTANCE)

THUMBNAIL_SIZE = 8
# Of a sample's own flip rate around the mean rate, as in the published code.
_RATE_DEVIATION = 0.1


def add_label_noise(
    data: SampleData, spec: str, *, seed: int, splits: tuple[str, ...] = ("train",)
) -> SampleData:
    """Gives a share of the samples a wrong label.

    Args:
        data: The data set.
        spec: "symmetric:RATE" moves round(RATE x n) labels of a split, chosen
            uniformly, each to any other class. "asymmetric:RATE" moves
            round(RATE x n) labels of each class to the next class, and those
            of the last class to the first. "instance:RATE" moves
            round(RATE x n) labels of a split, each to a class that its image
            decides: see `instance_noise`. RATE is in (0, 1).
        seed: Chooses the labels, in [0, 2**63). Each split is drawn by itself.
        splits: The names of the splits to change.

    Returns:
        The data set with these labels. The labels from before become the clean
        labels of the splits changed, where none are known.

    Raises:
        InvalidArgument: If an argument is not as above.

    Example:
        >>> import keras_rsft as rsft
        >>> data = rsft.load_images("digits")
        >>> noisy = rsft.add_label_noise(data, "symmetric:0.3", seed=0)
        >>> round(float((noisy.train.labels != data.train.labels).mean()), 2)
        0.3
    """
    kind, rate = parse_noise(spec)
    if not isinstance(seed, (int, np.integer)) or not 0 <= seed < 2**63:
        raise InvalidArgument(
            f"`seed` must be an integer in [0, 2**63). Received: seed={seed!r}."
        )
    if isinstance(splits, str) or not set(splits) <= set(SPLITS):
        raise InvalidArgument(
            f"`splits` must be a tuple of names out of {SPLITS}. "
            f"Received: splits={splits!r}."
        )
    if kind == INSTANCE and data.kind != "images":
        raise InvalidArgument(
            f"Noise of the kind {INSTANCE} is made of images. Received: {data.kind}. "
            f"Use {SYMMETRIC} or {ASYMMETRIC}."
        )
    changed = {}
    for name in splits:
        split = getattr(data, name)
        rng = np.random.default_rng([seed, SPLITS.index(name)])
        options = {"num_classes": data.num_classes, "rng": rng}
        if kind == INSTANCE:
            options |= {"thumbnails": thumbnails_of(split), "seed": seed}
        labels = _NOISES[kind](split.labels, rate, **options)
        clean = split.labels if split.clean_labels is None else split.clean_labels
        changed[name] = split.with_labels(labels, clean)
    return dataclasses.replace(data, **changed)


def parse_noise(spec: str) -> tuple[str, float]:
    """Reads "symmetric:0.3", "asymmetric:0.3" or "instance:0.3"."""
    kind, _, text = str(spec).partition(":")
    try:
        rate = float(text)
    except ValueError:
        rate = math.nan
    if kind not in KINDS or not 0 < rate < 1:
        raise InvalidArgument(
            'Label noise must be "symmetric:RATE" or "asymmetric:RATE" or '
            f'"instance:RATE" with RATE in (0, 1). Received: {spec!r}. '
            'Use "symmetric:0.3", for example.'
        )
    return kind, rate


def symmetric_noise(
    labels: np.ndarray, rate: float, *, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Moves round(rate x n) labels, each to one of the other classes."""
    noisy = labels.copy()
    moved = rng.choice(len(labels), size=round(rate * len(labels)), replace=False)
    steps = rng.integers(1, num_classes, size=len(moved))
    noisy[moved] = (labels[moved] + steps) % num_classes
    return noisy


def asymmetric_noise(
    labels: np.ndarray, rate: float, *, num_classes: int, rng: np.random.Generator
) -> np.ndarray:
    """Moves round(rate x n) labels of each class to the class that follows."""
    noisy = labels.copy()
    for label in range(num_classes):
        members = np.flatnonzero(labels == label)
        moved = rng.choice(members, size=round(rate * len(members)), replace=False)
        noisy[moved] = (label + 1) % num_classes
    return noisy


def instance_noise(
    labels: np.ndarray,
    rate: float,
    *,
    num_classes: int,
    rng: np.random.Generator,
    thumbnails: np.ndarray,
    seed: int,
) -> np.ndarray:
    """Moves round(rate x n) labels, each to a class that its image decides."""
    # Source: Xia et al., "Part-dependent label noise: towards instance-dependent label
    # noise", NeurIPS 2020, appendix. A sample's own flip rate comes from a normal
    # distribution around `rate` with deviation 0.1, cut to [0, 1]; its wrong class from
    # the softmax of its image times a random matrix of its class, without its own
    # class. Simplified: the image is one part, a thumbnail; and exactly round(rate x n)
    # samples move, drawn with their flip rates as weights, so that a measured rate is
    # the rate asked for.
    noisy = labels.copy()
    size = round(rate * len(labels))
    if size == 0:
        return noisy
    shape = (num_classes, thumbnails.shape[1], num_classes)
    matrices = np.random.default_rng([seed, len(SPLITS)]).normal(size=shape)
    rates = np.clip(rng.normal(rate, _RATE_DEVIATION, len(labels)), 1e-6, 1)
    moved = rng.choice(len(labels), size, replace=False, p=rates / rates.sum())
    # The largest of scores plus Gumbel noise is a draw from their softmax.
    draws = rng.gumbel(size=(size, num_classes))
    for sample, draw in zip(moved, draws, strict=True):
        scores = thumbnails[sample] @ matrices[labels[sample]] + draw
        scores[labels[sample]] = -np.inf
        noisy[sample] = np.argmax(scores)
    return noisy


def thumbnails_of(split: ImageSplit) -> np.ndarray:
    """Returns each image as 8 x 8 x 3 values with mean 0 and deviation 1."""
    thumbnails = np.zeros((len(split), THUMBNAIL_SIZE**2 * 3), np.float32)
    for index, image in split.images(THUMBNAIL_SIZE):
        values = image.numpy().reshape(-1)
        values -= values.mean()
        thumbnails[int(index)] = values / max(float(values.std()), 1e-6)
    return thumbnails


_NOISES = {
    SYMMETRIC: symmetric_noise,
    ASYMMETRIC: asymmetric_noise,
    INSTANCE: instance_noise,
}
