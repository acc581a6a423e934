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
    parts = []
    for chunk in features.chunks():
        values = (chunk - mean) * scale
        parts.append(_unit(values if projection is None else values @ projection))
    sketches = np.concatenate(parts)
    queries = np.argsort(-suspicion, kind="stable")[:max_queries]
    block = max(1, _BLOCK_VALUES // max(count, 1))
    limit = min_similarity - _SKETCH_SLACK
    found: list[NearDuplicate] = []
    with progress_bar(
        "Near duplicates", total=len(queries), unit="images", visible=progress
    ) as advance:
        for start in range(0, len(queries), block):
            rows = queries[start : start + block]
            cosines = sketches[rows] @ sketches.T
            cosines[features.labels[rows][:, None] == features.labels] = -1.0
            partners = cosines.argmax(axis=1)  # One each, or a thousand black images
            likely = cosines.max(axis=1) >= limit  # would give a million pairs.
            found += _verified(
                features,
                (mean, scale),
                rows[likely],
                partners[likely],
                min_similarity,
            )
            advance(len(rows))
    return _most_alike(found, max_pairs)


def _verified(
    features: FeatureSet,
    moments: tuple[np.ndarray, np.ndarray],
    firsts: np.ndarray,
    seconds: np.ndarray,
    min_similarity: float,
) -> list[NearDuplicate]:
    mean, scale = moments
    found = []
    step = max(1, _BLOCK_VALUES // (2 * features.dim))
    for start in range(0, len(firsts), step):
        pairs = np.stack([firsts[start : start + step], seconds[start : start + step]])
        one, other = (
            _unit((features.views_of(rows)[:, 0] - mean) * scale) for rows in pairs
        )
        cosines = np.einsum("ij,ij->i", one, other)
        found += [
            NearDuplicate(int(first), int(second), float(cosine))
            for first, second, cosine in zip(*pairs, cosines, strict=True)
            if cosine >= min_similarity
        ]
    return found


def _most_alike(found: list[NearDuplicate], max_pairs: int) -> list[NearDuplicate]:
    taken: set[int] = set()
    kept = []
    for pair in sorted(found, key=lambda one: (-one.similarity, one.first)):
        members = {pair.first, pair.second}
        if len(kept) == max_pairs:
            break
        if taken.isdisjoint(members):
            taken |= members
            kept.append(pair)
    return kept


def _unit(values: np.ndarray) -> np.ndarray:
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.maximum(lengths, 1e-12)).astype(np.float32)
