"""Decides which sample goes to which split."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np

from keras_rsft.data._samples import ImageData, Reader, SampleData
from keras_rsft.errors import DataError, InvalidArgument

SPLITS = ("train", "validation", "test")
SPLIT_ALIASES = {
    "train": "train",
    "validation": "validation",
    "valid": "validation",
    "val": "validation",
    "test": "test",
}
TRAIN, VALIDATION, TEST = range(3)

# With so many samples of a class, each split that is cut gets at least one.
_SMALLEST_CLASS_TO_CUT = 3
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
    """All samples of a source, before the missing splits are cut."""

    ids: np.ndarray
    labels: np.ndarray
    clean_labels: np.ndarray | None
    splits: np.ndarray
    class_names: tuple[str, ...]
    reader: Reader
    source: str
    ignored_files: int = 0
    groups: np.ndarray | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class NamedSample:
    """One sample as a folder or a table names it; `split` is one of `SPLITS`."""

    id: str
    label: str
    split: str = "train"
    clean_label: str | None = None


def list_named(
    samples: Sequence[NamedSample],
    reader_of: Callable[[np.ndarray], Reader],
    *,
    source: str,
    ignored_files: int = 0,
) -> Listing:
    """Sorts samples by id and numbers their classes."""
    samples = sorted(samples, key=lambda sample: sample.id)
    names = sorted_names({s.label for s in samples if s.split == "train"})
    number = {name: position for position, name in enumerate(names)}
    _refuse_stray(((s.label, s.split) for s in samples), number, source)
    clean_labels = None
    if samples and samples[0].clean_label is not None:
        clean = ((s.clean_label, "the clean labels") for s in samples)
        _refuse_stray(clean, number, source)
        clean_labels = np.array([number[s.clean_label] for s in samples], np.int32)
    ids = np.array([s.id for s in samples], dtype=np.str_)
    return Listing(
        ids=ids,
        labels=np.array([number[s.label] for s in samples], np.int32),
        clean_labels=clean_labels,
        splits=np.array([SPLITS.index(s.split) for s in samples], np.int8),
        class_names=names,
        reader=reader_of(ids),
        source=source,
        ignored_files=ignored_files,
    )


def cut_splits(
    listing: Listing,
    *,
    validation_fraction: float,
    test_fraction: float,
    split_seed: int,
    data_type: type[SampleData] = ImageData,
) -> SampleData:
    """Makes three splits of a listing; a split that it has is left alone."""
    check_fractions(validation_fraction, test_fraction)
    trained = set(np.unique(listing.labels[listing.splits == TRAIN]).tolist())
    if not trained:
        raise DataError(f"There is no training sample in {listing.source}.")
    pairs = zip(listing.labels.tolist(), listing.splits.tolist(), strict=True)
    stray = {pair for pair in pairs if pair[0] not in trained}
    _refuse_stray(
        ((listing.class_names[label], SPLITS[split]) for label, split in stray),
        {},
        listing.source,
    )
    if len(trained) < 2:
        only = listing.class_names[trained.pop()]
        raise DataError(
            "Training needs samples of two classes or more. "
            f"Received: only {only!r} in {listing.source}."
        )
    splits = listing.splits.copy()
    pool = np.flatnonzero(splits == TRAIN)
    groups = listing.ids if listing.groups is None else listing.groups
    splits[pool] = assign_splits(
        groups[pool],
        listing.labels[pool],
        validation_fraction=0.0 if VALIDATION in splits else validation_fraction,
        test_fraction=0.0 if TEST in splits else test_fraction,
        split_seed=split_seed,
    )
    whole = data_type.split_type(
        "all", listing.ids, listing.labels, listing.clean_labels, listing.reader
    )
    parts = {
        name: dataclasses.replace(whole.take(np.flatnonzero(splits == code)), name=name)
        for code, name in enumerate(SPLITS)
    }
    return data_type(
        **parts,
        class_names=listing.class_names,
        source=listing.source,
        ignored_files=listing.ignored_files,
    )


def assign_splits(
    groups: np.ndarray,
    labels: np.ndarray,
    *,
    validation_fraction: float,
    test_fraction: float,
    split_seed: int,
) -> np.ndarray:
    """Assigns samples to splits, class by class, and copies of one together."""
    # The groups of a class are ordered by a hash of seed and name; the first go to
    # test, the last to validation. So a sample's split depends neither on the order of
    # the samples nor, but for those at the borders, on which others there are. A group
    # with several labels counts as one of the smallest.
    names, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    classes = np.full(len(names), np.iinfo(np.int64).max)
    np.minimum.at(classes, group_of, labels)
    splits = np.full(len(names), TRAIN, np.int8)
    digests = b"".join(
        hashlib.blake2b(f"{split_seed}:{name}".encode(), digest_size=8).digest()
        for name in names
    )
    order = np.lexsort((np.frombuffer(digests, dtype="<u8"), classes))
    borders = np.flatnonzero(np.diff(classes[order])) + 1
    for members in np.split(order, borders) if len(order) else []:
        test, validation = _cut(
            sizes[members].tolist(), validation_fraction, test_fraction
        )
        splits[members[test]] = TEST
        splits[members[validation]] = VALIDATION
    # All samples of a class may be copies of those of smaller ones.
    for label in np.setdiff1d(labels, labels[splits[group_of] == TRAIN]):
        splits[group_of[np.flatnonzero(labels == label)[0]]] = TRAIN
    return splits[group_of]


def _cut(
    sizes: list[int], validation_fraction: float, test_fraction: float
) -> tuple[list[int], list[int]]:
    """Returns which groups of a class go to test and which to validation."""
    validation, test = split_counts(sum(sizes), validation_fraction, test_fraction)
    positions = range(len(sizes))
    tested = _take(sizes, positions, test, spare=2 if validation else 1)
    rest = sorted(set(positions).difference(tested), reverse=True)
    return tested, _take(sizes, rest, validation, spare=1)


def _take(
    sizes: list[int], positions: Sequence[int], wanted: int, *, spare: int
) -> list[int]:
    """Returns the groups, taken in order, that have nearest to `wanted` samples."""
    taken: list[int] = []
    missing = wanted
    for position in positions:
        nearer = abs(missing - sizes[position]) < missing
        if nearer and len(taken) < len(positions) - spare:
            taken.append(position)
            missing -= sizes[position]
    if wanted and not taken and len(sizes) >= _SMALLEST_CLASS_TO_CUT:
        return [min(positions, key=sizes.__getitem__)]
    return taken


def split_counts(
    count: int, validation_fraction: float, test_fraction: float
) -> tuple[int, int]:
    """Returns how many samples of a class go to validation and to test."""
    validation, test = (
        _share(count, fraction) for fraction in (validation_fraction, test_fraction)
    )
    while validation + test >= count and validation + test > 0:
        if validation >= test:
            validation -= 1
        else:
            test -= 1
    return validation, test


def sorted_names(names: Iterable[str]) -> tuple[str, ...]:
    """Sorts class names: by value if all are numbers, else as strings."""
    names = sorted(names)
    if all(_NUMBER.fullmatch(name) for name in names):
        names.sort(key=float)
    return tuple(names)


def check_fractions(validation_fraction: float, test_fraction: float) -> None:
    """Refuses fractions that cannot be cut."""
    fractions = (validation_fraction, test_fraction)
    if not all(0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
        raise InvalidArgument(
            "`validation_fraction` and `test_fraction` must be in [0, 1) and their "
            f"sum below 1. Received: validation_fraction={validation_fraction}, "
            f"test_fraction={test_fraction}."
        )


def _share(count: int, fraction: float) -> int:
    rounded = math.floor(count * fraction + 0.5)
    wanted = fraction > 0 and count >= _SMALLEST_CLASS_TO_CUT
    return max(rounded, 1) if wanted else rounded


def _refuse_stray(
    labels: Iterable[tuple[str, str]], known: dict[str, int], source: str
) -> None:
    stray = {(label, place) for label, place in labels if label not in known}
    if not stray:
        return
    listed = ", ".join(f"{label!r} in {place}" for label, place in sorted(stray)[:10])
    raise DataError(
        f"Every class must have a sample in the training split of {source}. "
        f"Without one: {listed}. Add training samples, or leave these out."
    )


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
