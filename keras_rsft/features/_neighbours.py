"""Finds copies, and images that look the same and have different labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft.features._store import FeatureSet

# Below, digits of different shape begin to be taken for the same one.
MIN_SIMILARITY = 0.75
# From here on two photos are copies. Of 12,000 photos of 32 x 32 pixels six of the
# seven pairs above it are copies, mirrored or recoloured; of 1,797 digits none is.
COPY_SIMILARITY = 0.9
# From here on the pixels are looked at: a resized photo can be so unlike its copy.
PERHAPS_SIMILARITY = 0.6
MAX_PAIRS = 200
MAX_QUERIES = 20_000
_SKETCH_DIM = 128
# A sketch's cosine is off by 1 / sqrt(128) at most cases, and by less near 1.
_SKETCH_SLACK = 0.1
_BLOCK_VALUES = 8_000_000
# What rounding leaves of the similarity of equal photos.
_EQUAL = 1.0 - 1e-6
# A sample's links to its copies: all are reached through one another.
_MAX_LINKS = 8
# Of more samples only neighbours are compared: a million would take hours.
_MAX_ALL_PAIRS = 100_000
_NEIGHBOURHOOD, _OWNERS = 1000, 3
_MAX_ROWS = 256
_NEAR, _FAR = 10, 20
_MAX_SAMPLED = 500
# At most so often may two different samples be near enough by chance.
_CHANCE = 1e-4


@dataclasses.dataclass(frozen=True)
class NearDuplicate:
    """Two images, by their positions over all splits."""

    first: int
    second: int
    similarity: float


class _Pool:
    """The samples of several splits, standardised by the first, with sketches."""

    # A random projection to 128 numbers (Johnson and Lindenstrauss, 1984) finds what
    # is alike, the features themselves decide. 512 bytes a sample.

    def __init__(self, parts: Sequence[FeatureSet]):
        self._parts = [part for part in parts if len(part)]
        first = self._parts[0]
        self._mean, variance = first.moments()
        self._scale = 1.0 / np.sqrt(variance)
        self._starts = np.cumsum([0, *map(len, self._parts)])
        self.dim = first.dim
        self.labels = np.concatenate([part.labels for part in self._parts])
        projection = None
        if self.dim > _SKETCH_DIM:
            rng = np.random.default_rng(0)
            shape = (self.dim, _SKETCH_DIM)
            projection = rng.normal(size=shape).astype(np.float32)
        width = min(self.dim, _SKETCH_DIM)
        self.sketches = np.empty((int(self._starts[-1]), width), np.float32)
        start = 0
        chunks = (chunk for part in self._parts for chunk in part.chunks())
        for chunk in map(self._standardised, chunks):
            sketched = chunk if projection is None else chunk @ projection
            self.sketches[start : start + len(chunk)] = _unit(sketched)
            start += len(chunk)

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_finite(self) -> bool:
        return bool(np.isfinite(self.sketches).all())

    def block(self) -> int:
        """Returns how many rows of similarities to all samples to hold at once."""
        return max(1, _BLOCK_VALUES // len(self))

    def neighbourhoods(self) -> list[np.ndarray]:
        """Returns sets of samples, increasing positions, within which to look."""
        count = len(self)
        if count <= _MAX_ALL_PAIRS:
            return [np.arange(count)]
        # Around a thousandth of the samples; each belongs to the three nearest.
        rng = np.random.default_rng(0)
        centres = self.sketches[rng.permutation(count)[: count // _NEIGHBOURHOOD]]
        owners = np.empty((count, _OWNERS), np.int32)
        step = max(1, _BLOCK_VALUES // len(centres))
        for start in range(0, count, step):
            cosines = self.sketches[start : start + step] @ centres.T
            nearest = np.argpartition(-cosines, _OWNERS, axis=1)[:, :_OWNERS]
            owners[start : start + step] = nearest
        order = np.argsort(owners, axis=None, kind="stable")
        sizes = np.bincount(owners.ravel(), minlength=len(centres))
        return np.split(order // _OWNERS, np.cumsum(sizes)[:-1])

    def values_of(self, samples: np.ndarray) -> np.ndarray:
        values = np.empty((len(samples), self.dim), np.float32)
        owners = np.searchsorted(self._starts, samples, side="right") - 1
        for number in np.unique(owners):
            mine = owners == number
            views = self._parts[number].views_of(samples[mine] - self._starts[number])
            values[mine] = self._standardised(views[:, 0].astype(np.float32))
        return values

    def similarities(self, pairs: np.ndarray) -> np.ndarray:
        """Returns the cosines of pairs `(n, 2)`, less where the lengths differ."""
        found = np.empty(len(pairs))
        step = max(1, _BLOCK_VALUES // (2 * self.dim))
        for start in range(0, len(pairs), step):
            part = pairs[start : start + step]
            one, other = (self.values_of(side).astype(float) for side in part.T)
            lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
            squares = np.square(one - other).sum(axis=1)
            found[start : start + step] = 1 - squares / np.maximum(2 * lengths, 1e-12)
        return found

    def _standardised(self, values: np.ndarray) -> np.ndarray:
        return (values - self._mean) * self._scale


# Copies -------------------------------------------------------------------------------


def with_copies(
    parts: Sequence[FeatureSet],
    groups: np.ndarray | None = None,
    *,
    progress: bool = True,
) -> list[FeatureSet]:
    """Returns splits whose `groups` say which samples are copies of one another."""
    whole = before_reviews(parts)
    if groups is None:
        groups = copy_groups(whole, progress=progress)
    found = []
    for part, before in zip(parts, whole, strict=True):
        mine, groups = groups[: len(before)], groups[len(before) :]
        before = dataclasses.replace(before, groups=mine)
        if part.before_review is not None:
            rows = part.file_rows(np.arange(len(part)))
            mine = mine[np.searchsorted(before.file_rows(np.arange(len(before))), rows)]
            part = dataclasses.replace(part, before_review=before)
        found.append(dataclasses.replace(part, groups=mine))
    return found


def before_reviews(parts: Sequence[FeatureSet]) -> list[FeatureSet]:
    """Returns splits with what a review dropped: labels are judged by that too."""
    return [part.before_review or part for part in parts]


def copy_groups(
    parts: Sequence[FeatureSet],
    look_same: Callable[[np.ndarray], np.ndarray] | None = None,
    *,
    progress: bool = True,
) -> np.ndarray:
    """Returns of each sample of all parts the position of its first copy, or its own.

    `look_same` tells of pairs of positions, `(n, 2)`, which are copies by their pixels;
    it is asked about nearest neighbours that features alone cannot tell from copies.

    The work is 128 multiplications a pair. Of more than 100,000 samples only those near
    one another are compared, which misses about one in a hundred of the least alike
    copies (an inverted file: Jegou et al., "Product quantization for nearest neighbor
    search", 2011). Memory is 512 bytes a sample and one block of 32 MB.
    """
    count = sum(map(len, parts))
    if count < 2:
        return np.arange(count)
    pool = _Pool(parts)
    if not pool.is_finite:
        return np.arange(count)
    limit = _copy_limit(pool)
    slack = 1e-5
    if pool.dim > _SKETCH_DIM:  # Three standard deviations.
        slack += 3 * (1 - limit**2) / math.sqrt(_SKETCH_DIM)
    pairs = [np.empty((0, 2), np.int64)]
    nearest, best = np.arange(count), np.full(count, PERHAPS_SIMILARITY)
    sets = pool.neighbourhoods()
    with progress_bar(
        "Looking for copies",
        total=sum(map(len, sets)),
        unit="samples",
        visible=progress,
    ) as advance:
        for members in sets:
            sketches = pool.sketches[members]
            block = max(1, min(_BLOCK_VALUES // max(len(members), 1), _MAX_ROWS))
            for start in range(0, len(members), block):
                rows = sketches[start : start + block]
                cosines = rows @ sketches[start:].T
                # Of each pair the second: the first is its own neighbour.
                cosines[np.tril_indices(len(rows))] = -1.0
                for axis in (1, 0):
                    highest = cosines.max(axis=axis)
                    here = members[start : start + len(highest)]
                    nearer = np.flatnonzero(highest > best[here])
                    best[here[nearer]] = highest[nearer]
                    near = np.take(cosines, nearer, axis=1 - axis).argmax(axis=axis)
                    nearest[here[nearer]] = members[start + near]
                some = np.flatnonzero(cosines.max(axis=1) >= limit - slack)
                one, other = np.nonzero(cosines[some] >= limit - slack)
                before = np.searchsorted(one, one)  # Where a sample's links begin.
                few = np.arange(len(one)) - before < _MAX_LINKS
                linked = np.stack([some[one], other], axis=1)[few]
                pairs.append(members[start + linked])
                advance(len(rows))
    linked = np.unique(np.concatenate(pairs), axis=0)
    linked = linked[pool.similarities(linked) >= limit]
    groups = _joined(np.arange(count), linked)
    if look_same is None:
        return groups
    asked = np.flatnonzero(groups != groups[nearest])
    asked = asked[np.argsort(-best[asked], kind="stable")][:MAX_QUERIES]
    perhaps = np.unique(np.sort(np.stack([asked, nearest[asked]], 1), axis=1), axis=0)
    return _joined(groups, perhaps[look_same(perhaps)]) if len(perhaps) else groups


def _joined(groups: np.ndarray, linked: np.ndarray) -> np.ndarray:
    """Returns groups with those joined that pairs `(n, 2)` link."""
    while True:
        smallest = np.minimum(*groups[linked].T)
        joined = groups.copy()
        for side in groups[linked].T:
            np.minimum.at(joined, side, smallest)
        joined = joined[joined]
        if np.array_equal(joined, groups):
            return joined
        groups = joined


def _copy_limit(pool: _Pool) -> float:
    """Returns how alike copies are at least: more alike than neighbours by chance."""
    # The distances of the 10th and the 20th neighbour tell how many dimensions the
    # samples spread in (Levina and Bickel, "Maximum likelihood estimation of intrinsic
    # dimension", 2004); in few, many that are no copies lie near one another.
    if len(pool) <= _FAR + 1:
        return _EQUAL
    rng = np.random.default_rng(0)
    sampled = np.sort(rng.permutation(len(pool))[:_MAX_SAMPLED])
    near, far = [], []
    for start in range(0, len(sampled), pool.block()):
        rows = pool.sketches[sampled[start : start + pool.block()]]
        squares = np.maximum(2 - 2 * rows @ pool.sketches.T, 0)
        squares.partition([_NEAR, _FAR], axis=1)
        near.append(squares[:, _NEAR].copy())  # A view would keep the block.
        far.append(squares[:, _FAR].copy())
    near_squares, far_squares = np.concatenate(near), np.concatenate(far)
    spread = near_squares > 1 - _EQUAL  # Not among twenty copies.
    if not spread.any():
        return _EQUAL
    growth = np.log(far_squares[spread] / near_squares[spread]).mean() / 2
    dimensions = math.log(_FAR / _NEAR) / max(float(growth), 1e-6)
    share = (_CHANCE / _NEAR) ** (1 / dimensions)
    nearest = share**2 * float(np.quantile(near_squares[spread], 0.1))
    return min(max(COPY_SIMILARITY, 1 - nearest / 2), _EQUAL)


# Near duplicates with different labels ------------------------------------------------


def near_duplicates(
    parts: Sequence[FeatureSet],
    suspicion: np.ndarray,
    *,
    min_similarity: float = MIN_SIMILARITY,
    max_pairs: int = MAX_PAIRS,
    max_queries: int = MAX_QUERIES,
    progress: bool = True,
) -> list[NearDuplicate]:
    """Returns pairs of near duplicates with different labels, most alike first."""
    # Each of the most suspicious samples is compared with all samples of other labels.
    # The work grows with `n`, not with its square; memory is one block of 32 MB beside
    # the sketches.
    pool = _Pool(parts)
    queries = np.argsort(-suspicion, kind="stable")[:max_queries]
    block = pool.block()
    found: list[NearDuplicate] = []
    with progress_bar(
        "Near duplicates", total=len(queries), unit="images", visible=progress
    ) as advance:
        for start in range(0, len(queries), block):
            rows = queries[start : start + block]
            cosines = pool.sketches[rows] @ pool.sketches.T
            cosines[pool.labels[rows][:, None] == pool.labels] = -1.0
            # One partner each, or a thousand black images would give a million pairs.
            likely = cosines.max(axis=1) >= min_similarity - _SKETCH_SLACK
            pairs = np.stack([rows, cosines.argmax(axis=1)], axis=1)[likely]
            found += [
                NearDuplicate(first, second, similarity)
                for (first, second), similarity in zip(
                    pairs.tolist(), pool.similarities(pairs).tolist(), strict=True
                )
                if similarity >= min_similarity
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
