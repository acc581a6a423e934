"""Finds images that look the same to the backbone and have different labels."""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft.features._store import FeatureSet

# Below, digits of different shape begin to be taken for the same one.
MIN_SIMILARITY = 0.75
MAX_PAIRS = 200
MAX_QUERIES = 20_000
_SKETCH_DIM = 128
# A sketch's cosine is off by 1 / sqrt(128) at most cases, and by less near 1.
_SKETCH_SLACK = 0.1
_BLOCK_VALUES = 8_000_000


@dataclasses.dataclass(frozen=True)
class NearDuplicate:
    """Two images of different given labels."""

    first: int
    second: int
    similarity: float


def near_duplicates(
    features: FeatureSet,
    suspicion: np.ndarray,
    *,
    min_similarity: float = MIN_SIMILARITY,
    max_pairs: int = MAX_PAIRS,
    max_queries: int = MAX_QUERIES,
    progress: bool = True,
) -> list[NearDuplicate]:
    """Returns pairs of near duplicates with different labels, most alike first."""
    # Each of the most suspicious samples is compared with all samples of other labels.
    # A random projection to 128 numbers (Johnson and Lindenstrauss, 1984) finds its
    # most alike, the features themselves decide. The work grows with `n`, not with its
    # square; memory is 512 bytes a sample and one block of 32 MB.
    count = len(features)
    mean, variance = features.moments()
    scale = 1.0 / np.sqrt(variance)
    projection = None
    if features.dim > _SKETCH_DIM:
        rng = np.random.default_rng(0)
        projection = rng.normal(size=(features.dim, _SKETCH_DIM)).astype(np.float32)
    sketches = np.concatenate(
        [
            _unit(chunk if projection is None else chunk @ projection)
            for chunk in ((chunk - mean) * scale for chunk in features.chunks())
        ]
    )
    queries = np.argsort(-suspicion, kind="stable")[:max_queries]
    block = max(1, _BLOCK_VALUES // max(count, 1))
    found: list[NearDuplicate] = []
    with progress_bar(
        "Near duplicates", total=len(queries), unit="images", visible=progress
    ) as advance:
        for start in range(0, len(queries), block):
            rows = queries[start : start + block]
            cosines = sketches[rows] @ sketches.T
            cosines[features.labels[rows][:, None] == features.labels] = -1.0
            # One partner each, or a thousand black images would give a million pairs.
            likely = cosines.max(axis=1) >= min_similarity - _SKETCH_SLACK
            pairs = np.stack([rows, cosines.argmax(axis=1)], axis=1)[likely]
            step = max(1, _BLOCK_VALUES // (2 * features.dim))
            for first in range(0, len(pairs), step):
                one, other = (
                    _unit((features.views_of(part)[:, 0] - mean) * scale)
                    for part in pairs[first : first + step].T
                )
                exact = np.einsum("ij,ij->i", one, other)
                found += [
                    NearDuplicate(int(pair[0]), int(pair[1]), float(cosine))
                    for pair, cosine in zip(pairs[first:], exact, strict=False)
                    if cosine >= min_similarity
                ]
            advance(len(rows))
    taken: set[int] = set()
    most_alike: list[NearDuplicate] = []
    for pair in sorted(found, key=lambda one: (-one.similarity, one.first)):
        if len(most_alike) < max_pairs and taken.isdisjoint((pair.first, pair.second)):
            taken |= {pair.first, pair.second}
            most_alike.append(pair)
    return most_alike


def _unit(values: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.maximum(lengths, 1e-12)).astype(np.float32)
