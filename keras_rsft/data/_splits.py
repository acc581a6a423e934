"""Decides which sample goes to which split."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np

from keras_rsft.config import SPLITS
from keras_rsft.data._samples import Reader, SampleData
from keras_rsft.errors import DataError, InvalidArgument

# Longer names first.
_SPLIT_WORDS = {
    "train": ("training", "train"),
    "validation": ("validation", "valid", "val", "development", "dev"),
    "test": ("testing", "test", "evaluation", "eval", "holdout"),
}
SPLIT_ALIASES = {word: name for name, words in _SPLIT_WORDS.items() for word in words}
_SPLIT_WORD = re.compile(
    f"(?<![a-z])({'|'.join(SPLIT_ALIASES)})(?:[ _-]?set)?(?![a-z])"
)
TRAIN, VALIDATION, TEST = range(3)

# From this many samples of a class on, each split held out gets at least one.
_SMALLEST_CLASS_TO_CUT = 3
_NUMBER = re.compile(r"[+-]?[0-9]+(\.[0-9]+)?")
_ANY_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?")
# What shows nothing, and is neither a control nor a format character to Unicode.
_FILLERS = re.compile(
    r"[\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\ufe00-\ufe0f\uffa0]"
)
# What tables have where a value is missing.
_MISSING = {"nan", "NaN", "NA", "N/A", "#N/A", "<NA>", "None", "null", "NULL"}

Data = TypeVar("Data", bound=SampleData)


@dataclasses.dataclass(frozen=True)
class Cut:
    """How missing splits are held out from the training samples."""

    validation_fraction: float
    test_fraction: float
    seed: int

    def __post_init__(self) -> None:
        fractions = (self.validation_fraction, self.test_fraction)
        if not all(0 <= fraction < 1 for fraction in fractions) or sum(fractions) >= 1:
            raise InvalidArgument(
                "`validation_fraction` and `test_fraction` must be in [0, 1) and their "
                f"sum below 1. Received: validation_fraction={fractions[0]}, "
                f"test_fraction={fractions[1]}."
            )


def split_and_rest(name: str) -> tuple[str, str]:
    """Returns the split that a folder's name tells, or "", and the rest of the name."""
    word = _SPLIT_WORD.search(name.lower())
    if word is None:
        return "", name
    rest = name[: word.start()] + name[word.end() :]
    return SPLIT_ALIASES[word[1]], rest.strip(" _-.").lower()


class NamedSample(NamedTuple):
    """One sample as a folder or a table names it."""

    id: str
    label: str
    split: str
    clean_label: str | None = None


def data_of(
    data_type: type[Data],
    samples: Iterable[NamedSample],
    reader_of: Callable[[np.ndarray], Reader],
    cut: Cut,
    source: str,
    *,
    unread_files: dict[str, int] | None = None,
    notes: tuple[str, ...] = (),
) -> Data:
    """Sorts samples by id, numbers their classes and makes three splits of them."""
    samples = sorted(samples)
    names = sorted_names({s.label for s in samples if s.split == "train"})
    number = {name: position for position, name in enumerate(names)}
    refuse_stray(((s.label, s.split) for s in samples), number, source)
    clean = [s.clean_label for s in samples if s.clean_label is not None]
    refuse_stray(((name, "the clean labels") for name in clean), number, source)
    ids = np.array([s.id for s in samples], dtype=np.str_)
    whole = data_type.split_type(
        "all",
        ids,
        np.array([number[s.label] for s in samples], np.int32),
        np.array([number[name] for name in clean], np.int32) if clean else None,
        reader_of(ids),
    )
    return cut_splits(
        data_type(whole, whole, whole, names, source, unread_files or {}, notes),
        np.array([SPLITS.index(s.split) for s in samples], np.int8),
        cut,
    )


def cut_splits(data: Data, splits: np.ndarray, cut: Cut) -> Data:
    """Makes three splits of data whose splits are all samples."""
    whole, source = data.train, data.source
    trained = np.unique(whole.labels[splits == TRAIN])
    if not len(trained):
        raise DataError(f"There is no training sample in {source}.")
    stray = np.flatnonzero(~np.isin(whole.labels, trained))
    refuse_stray(
        ((data.class_names[whole.labels[i]], SPLITS[splits[i]]) for i in stray),
        {},
        source,
    )
    if len(trained) < 2:
        raise DataError(
            "Training needs samples of two classes or more. "
            f"Received: only {data.class_names[trained[0]]!r} in {source}."
        )
    splits = splits.copy()
    pool = np.flatnonzero(splits == TRAIN)
    if VALIDATION in splits:
        cut = dataclasses.replace(cut, validation_fraction=0.0)
    if TEST in splits:
        cut = dataclasses.replace(cut, test_fraction=0.0)
    made: tuple[str, ...] = ()
    if cut.validation_fraction or cut.test_fraction:
        groups = whole.reader.copy_names()
        splits[pool] = assign_splits(groups[pool], whole.labels[pool], cut)
        fractions = (0.0, cut.validation_fraction, cut.test_fraction)
        made = tuple(name for name, part in zip(SPLITS, fractions, strict=True) if part)
    parts: dict[str, Any] = {
        name: dataclasses.replace(whole.take(np.flatnonzero(splits == code)), name=name)
        for code, name in enumerate(SPLITS)
    }
    notes = (*data.notes, *_similar_names(data.class_names))
    return dataclasses.replace(data, **parts, cut=made, notes=notes)


def _similar_names(names: Sequence[str]) -> list[str]:
    """Returns sentences of classes that differ in nothing that one sees, or means."""
    alike: dict[Any, list[str]] = {}
    for name in names:
        plain = unicodedata.normalize("NFKC", _FILLERS.sub("", name)).casefold()
        seen = (one for one in plain if unicodedata.category(one) not in ("Cf", "Cc"))
        key = "".join(seen).strip("\"' \t")
        number = float(key) if _ANY_NUMBER.fullmatch(key) else None
        words = " ".join(re.split(r"[\s_-]+", key)).strip() or name
        alike.setdefault(words if number is None else number, []).append(name)
    groups = [
        " and ".join(map(ascii, group)) for group in alike.values() if len(group) > 1
    ]
    notes = []
    if groups:
        more = "" if len(groups) <= 10 else f", and {len(groups) - 10} more"
        notes.append(
            "Classes differ only in case, separators, quotes, invisible characters, "
            f"Unicode form or the form of a number: {'; '.join(groups[:10])}{more}. "
            "Give one name to what is one class."
        )
    if missing := [name for name in names if name in _MISSING]:
        notes.append(
            f"A class is called {' and '.join(missing)}. If the label is missing "
            "there, leave these samples out."
        )
    return notes


def assign_splits(groups: np.ndarray, labels: np.ndarray, cut: Cut) -> np.ndarray:
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
        hashlib.blake2b(f"{cut.seed}:{name}".encode(), digest_size=8).digest()
        for name in names
    )
    order = np.lexsort((np.frombuffer(digests, dtype="<u8"), classes))
    borders = np.flatnonzero(np.diff(classes[order])) + 1
    for members in np.split(order, borders) if len(order) else []:
        in_class = sizes[members].tolist()
        validation, test = split_counts(sum(in_class), cut)
        positions = range(len(members))
        tested = _take(in_class, positions, test, spare=2 if validation else 1)
        rest = sorted(set(positions).difference(tested), reverse=True)
        splits[members[tested]] = TEST
        splits[members[_take(in_class, rest, validation, spare=1)]] = VALIDATION
    # All samples of a class may be copies of those of smaller ones.
    for label in np.setdiff1d(labels, labels[splits[group_of] == TRAIN]):
        splits[group_of[labels == label].min()] = TRAIN
    return splits[group_of]


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


def split_counts(count: int, cut: Cut) -> tuple[int, int]:
    """Returns how many samples of a class go to validation and to test."""

    def share(fraction: float) -> int:
        wanted = fraction > 0 and count >= _SMALLEST_CLASS_TO_CUT
        return max(math.floor(count * fraction + 0.5), int(wanted))

    validation, test = share(cut.validation_fraction), share(cut.test_fraction)
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


def refuse_stray(
    labels: Iterable[tuple[str, str]], known: dict[str, int], source: str
) -> None:
    stray = sorted({pair for pair in labels if pair[0] not in known})[:10]
    if stray:
        listed = ", ".join(f"{label!r} in {split}" for label, split in stray)
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
    for label in np.argsort(shares - exact, kind="stable")[: count - shares.sum()]:
        shares[label] += 1
    rng = np.random.default_rng(seed)
    chosen = [
        rng.permutation(np.flatnonzero(labels == label))[:number]
        for label, number in zip(classes, shares, strict=True)
    ]
    return np.sort(np.concatenate(chosen)).astype(np.int64)
