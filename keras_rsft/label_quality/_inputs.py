"""Reads what `audit_labels` takes: arrays and labels of many kinds, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from keras_rsft.config import nearest_name_hint
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._store import ArrayFeatures, FeatureSet

CHUNK_ROWS = 4096
# Of a row of probabilities: float16 adds up to 1 within less.
_MAX_SUM_ERROR = 0.01
_LEAST_PROBABILITY = 1e-6
# More classes than samples, and than this, are ids, or numbers of something else.
_MAX_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The samples of an audit. Class names are as the user has them; None: numbers."""

    features: FeatureSet
    held_out: tuple[FeatureSet, ...]
    num_classes: int
    class_names: tuple[Any, ...] | None


def read_inputs(
    features: Any,
    labels: Any,
    *,
    probabilities: Any,
    held_out: Sequence[Any],
    num_classes: int | None,
    class_names: Sequence[Any] | None,
    ids: Any,
    corrections: Any,
) -> Inputs:
    """Checks what `audit_labels` was given, before anything is computed."""
    if (features is None) == (probabilities is None):
        raise InvalidArgument(
            "Expected `features`, or `probabilities` instead. Received: "
            f"{'neither' if features is None else 'both'}."
        )
    name, first = "features", features
    if probabilities is not None:
        name, first = "probabilities", probabilities
    read = [_Part.of(name, "labels", first, labels)]
    for number, pair in enumerate(held_out):
        if isinstance(pair, FeatureSet):
            pair = pair, None
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise InvalidArgument(
                f"Expected `held_out` to be a list of pairs ({name}, labels). "
                f"Received at {number}: {type(pair).__name__}."
            )
        where = f"held_out[{number}]"
        read.append(_Part.of(f"{where}[0]", f"{where}[1]", *pair))
    widths = {part.width for part in read}
    if len(widths) > 1:
        raise InvalidArgument(
            f"Expected as many columns in `held_out` as in `{name}`. "
            f"Received: {' and '.join(map(str, sorted(widths)))}."
        )
    columns = 0 if probabilities is None else read[0].width
    numbered, num_classes, names = _number_classes(
        read, num_classes, class_names, columns
    )
    made: list[FeatureSet] = []
    for part, own in zip(read, numbered, strict=True):
        values, more = part.values, {}
        if isinstance(values, FeatureSet):
            made.append(values)
            continue
        if probabilities is not None:  # Are no features to find copies by.
            values = _log_probabilities(values, num_classes, part.name)
            start = sum(map(len, made))
            more["groups"] = np.arange(start, start + len(own))
        else:
            _require_finite(values, part.name)
        made.append(ArrayFeatures.of(values, own, **more))
    train = made[0]
    if ids is not None:
        train = dataclasses.replace(train, ids=_checked_ids(ids, read[0]))
    if corrections is not None:
        train = _corrected(train, corrections, names or range(num_classes))
    return Inputs(train, tuple(made[1:]), num_classes, names)


@dataclasses.dataclass(frozen=True)
class _Part:
    """One set of samples: labels are integers, or a list of names."""

    name: str
    label_name: str
    labels: np.ndarray | list[Any]
    values: np.ndarray | FeatureSet
    categories: tuple[Any, ...] | None = None
    least_classes: int = 0

    @property
    def width(self) -> int:
        if isinstance(self.values, FeatureSet):
            return self.values.dim
        return self.values.shape[1]

    @classmethod
    def of(cls, name: str, label_name: str, given: Any, labels: Any) -> _Part:
        if isinstance(given, FeatureSet):
            if labels is not None:
                raise InvalidArgument(
                    "A FeatureSet has labels of its own. Leave `labels` out, or use "
                    "its `with_labels`; `num_classes` is given by name. Received: "
                    f"labels={labels!r:.50}."
                )
            return cls(name, label_name, np.asarray(given.labels), given)
        if labels is None:
            raise InvalidArgument(f"Expected `{label_name}` for `{name}`.")
        values = _read_matrix(given, name)
        part = cls(name, label_name, values=values, **_read_labels(labels, label_name))
        if len(part.labels) != len(values):
            raise InvalidArgument(
                f"Expected one label for each row. Received: {len(values):,} rows in "
                f"`{name}` and {len(part.labels):,} labels in `{label_name}`."
            )
        return part


# Arrays -------------------------------------------------------------------------------


def _array_of(given: Any, name: str) -> np.ndarray:
    try:
        if hasattr(given, "detach"):  # PyTorch: off the graph, and off the GPU.
            given = given.detach().cpu()
        if callable(getattr(given, "numpy", None)):
            given = given.numpy()
        return np.asarray(given)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise InvalidArgument(
            f"`{name}` cannot be read as an array: {reason}. Give a NumPy array."
        ) from error


def _read_matrix(given: Any, name: str) -> np.ndarray:
    values = _array_of(given, name)
    received = f"Received: shape {values.shape}, dtype {values.dtype}"
    if values.dtype.kind not in "biuf" and values.dtype.name != "bfloat16":
        raise InvalidArgument(
            f"`{name}` must be numbers, in an array `(n, dim)` with rows of one "
            f"length. Received: {type(given).__name__}, dtype {values.dtype}. Convert "
            "it first, with np.stack for a list or column of arrays."
        )
    if not values.size:
        raise DataError(f"`{name}` is empty. {received}. Give at least one sample.")
    if values.ndim == 4:
        raise InvalidArgument(
            f"`{name}` must be embeddings, `(n, dim)`; these look like images. "
            f"{received}. Use rsft.finetune, or rsft.load_backbone and "
            "rsft.extract_features for their embeddings."
        )
    if values.ndim != 2:
        advice = "average the steps of each sample, or flatten with x.reshape(len(x), "
        advice = f"{advice}-1)" if values.ndim == 3 else "use x.reshape(-1, 1)"
        raise InvalidArgument(
            f"`{name}` must be an array `(n, dim)`. {received}. With {values.ndim} "
            f"dimensions, {advice}."
        )
    values = values.view()
    values.flags.writeable = False
    return values


def _chunks(values: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    for start in range(0, len(values), CHUNK_ROWS):
        with np.errstate(over="ignore"):
            yield start, values[start : start + CHUNK_ROWS].astype(np.float32)


def _require_finite(values: np.ndarray, name: str) -> None:
    bad = np.concatenate(
        [
            start + np.flatnonzero(~np.isfinite(chunk).all(axis=1))
            for start, chunk in _chunks(values)
        ]
    )
    if len(bad):
        raise DataError(
            f"{len(bad):,} of {len(values):,} rows of `{name}` have a NaN or infinite "
            f"value, {_examples(bad)}. Leave these samples out, their labels too, or "
            "compute their features again."
        )


def _examples(rows: np.ndarray) -> str:
    return f"the first in row {', '.join(map(str, rows[:3].tolist()))}"


def _log_probabilities(values: np.ndarray, classes: int, name: str) -> np.ndarray:
    if values.shape[1] != classes:
        raise InvalidArgument(
            f"Expected a column of `{name}` for each of the {classes} classes. "
            f"Received: {values.shape[1]} columns. Give `class_names` in the order of "
            "the columns, classes without a label too."
        )
    scores, bad = np.empty(values.shape, np.float32), []
    for start, chunk in _chunks(values):
        sums = chunk.sum(axis=1)
        valid = (np.abs(sums - 1) < _MAX_SUM_ERROR) & (chunk >= 0).all(axis=1)
        bad.append(start + np.flatnonzero(~valid))
        chunk = np.maximum(chunk, _LEAST_PROBABILITY)
        scores[start : start + len(chunk)] = np.log(chunk)
    rows = np.concatenate(bad)
    if len(rows):
        raise DataError(
            f"{len(rows):,} of {len(values):,} rows of `{name}` are not probabilities "
            f"that add up to 1, {_examples(rows)}. Put logits through a softmax first."
        )
    return scores


def _checked_ids(ids: Any, part: _Part) -> np.ndarray:
    if isinstance(part.values, FeatureSet):
        raise InvalidArgument("A FeatureSet has ids of its own. Leave `ids` out.")
    found = _array_of(ids, "ids")
    if found.shape != (len(part.labels),) or len(set(found.tolist())) < len(found):
        raise InvalidArgument(
            f"`ids` must be {len(part.labels):,} different ids, one for each row. "
            f"Received: shape {found.shape}, {len(set(found.ravel().tolist())):,} of "
            "them different."
        )
    return found


# Labels -------------------------------------------------------------------------------


def _read_labels(given: Any, name: str) -> dict[str, Any]:
    """Returns integers or a list of names, and which classes they tell of."""
    categorical = getattr(given, "cat", given)  # Of a column, or alone.
    if (categories := getattr(categorical, "categories", None)) is not None:
        codes = np.asarray(categorical.codes)
        _require_no_missing(codes < 0, name)
        known = tuple(np.asarray(categories).tolist())
        return {"labels": [known[code] for code in codes], "categories": known}
    if isinstance(given, (list, tuple)) and any(isinstance(o, str) for o in given):
        given = np.array(given, object)  # NumPy would make NaN a name.
    labels = _array_of(given, name)
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if not labels.size:
        raise DataError(f"`{name}` is empty. Give a label for each row.")
    if labels.ndim == 2 and labels.dtype.kind in "biuf":
        ones = labels == 1
        bad = np.flatnonzero((ones.sum(axis=1) != 1) | ((labels != 0) != ones).any(1))
        if len(bad):
            raise DataError(
                f"Labels in two dimensions must be one-hot, a 1 and else 0 in each "
                f"row. Received: {len(bad):,} of {len(labels):,} other rows in "
                f"`{name}`, {_examples(bad)}. Give one class for each sample."
            )
        return {"labels": ones.argmax(axis=1), "least_classes": labels.shape[1]}
    if labels.ndim != 1:
        raise InvalidArgument(
            f"`{name}` must have a label for each row, `(n,)`, or be one-hot, "
            f"`(n, classes)`. Received: shape {labels.shape}, dtype {labels.dtype}."
        )
    if labels.dtype.kind == "f":
        _require_no_missing(~np.isfinite(labels), name)
        are_whole = bool((labels == np.floor(labels)).all())
        raise InvalidArgument(
            f"`{name}` must be integers or names of classes. Received: dtype "
            f"{labels.dtype}, such as {labels[0]:g}. "
            + ("Convert with .astype(int)." if are_whole else "Sort them into classes.")
        )
    if labels.dtype.kind in "iu":
        if labels.min() < 0:
            bad = np.flatnonzero(labels < 0)
            raise DataError(
                f"{len(bad):,} of {len(labels):,} labels in `{name}` are negative, "
                f"{_examples(bad)}. Number the classes from 0, and leave out samples "
                "without a label."
            )
        return {"labels": labels}
    names = [one.decode() if isinstance(one, bytes) else one for one in labels.tolist()]
    if all(type(one) in (int, np.int64, np.int32) for one in names):
        return _read_labels(np.array(names, np.int64), name)
    kind = bool if labels.dtype.kind == "b" else str
    _require_no_missing(np.array([not isinstance(one, kind) for one in names]), name)
    return {"labels": names}


def _require_no_missing(missing: np.ndarray, name: str) -> None:
    if missing.any():
        rows = np.flatnonzero(missing)
        raise DataError(
            f"{len(rows):,} of {len(missing):,} labels in `{name}` are missing or not "
            f"of one kind, {_examples(rows)}. Leave these samples out; labels are "
            "integers or strings."
        )


def _number_classes(
    parts: Sequence[_Part],
    num_classes: int | None,
    class_names: Sequence[Any] | None,
    least: int,
) -> tuple[list[np.ndarray], int, tuple[Any, ...] | None]:
    """Returns int32 labels of each part, how many classes there are, their names."""
    names = None if class_names is None else tuple(np.asarray(class_names).tolist())
    if names is not None and len(set(names)) < len(names):
        raise InvalidArgument(f"`class_names` must be different. Received: {names}.")
    named = [part for part in parts if isinstance(part.labels, list)]
    if named and len(named) < len(parts):
        raise InvalidArgument(
            "The labels of all splits must be integers, or all names. Received: both."
        )
    if named and names is None:
        names = parts[0].categories or tuple(
            sorted({one for part in parts for one in part.labels})
        )
    if names is not None:
        least = len(names)
        if num_classes not in (None, least):
            raise InvalidArgument(
                f"`num_classes` must be the number of names. Received: "
                f"num_classes={num_classes} and {least} names: {names[:10]}."
            )
    if named and names is not None:
        numbered = [_numbered(part, names) for part in parts]
    else:
        numbered = [np.asarray(part.labels) for part in parts]
        found = max(int(one.max(initial=0)) + 1 for one in numbered)
        found = max(found, *(part.least_classes for part in parts))
        limit = num_classes or least or max(len(numbered[0]), _MAX_CLASSES)
        if found > limit:
            raise DataError(
                f"Expected labels from 0 to {limit - 1:,}, for {limit:,} classes. "
                f"Received: labels up to {found - 1:,}. Give another `num_classes`, or "
                "number them with np.unique(labels, return_inverse=True)."
            )
        least = least or found
    first = numbered[0]
    if not isinstance(parts[0].values, FeatureSet) and first.min() == first.max():
        only = int(first[0]) if names is None else names[first[0]]
        raise DataError(
            f"All {len(first):,} labels are {only!r}. An audit needs samples of at "
            "least two classes."
        )
    numbered = [one.astype(np.int32) for one in numbered]
    return numbered, num_classes or least, names


def _numbered(part: _Part, names: tuple[Any, ...]) -> np.ndarray:
    number = {name: at for at, name in enumerate(names)}
    unknown = sorted({str(one) for one in part.labels if one not in number})
    if unknown:
        hint = nearest_name_hint(unknown[0], [str(one) for one in names])
        raise DataError(
            f"{len(unknown)} names in `{part.label_name}` are none of the classes, "
            f"such as {unknown[0]!r}.{hint or f' The classes are {names[:10]}.'}"
        )
    return np.array([number[one] for one in part.labels])


def _corrected(
    features: FeatureSet, corrections: Any, class_names: Sequence[Any]
) -> FeatureSet:
    # Loads TensorFlow, which an audit of arrays needs for nothing else.
    from keras_rsft.data import _labels

    rows = _labels.read_corrections(corrections)
    if not rows:
        return features
    names = tuple(map(str, class_names))
    file = _labels.name_of(corrections)
    pairs = _labels.match_corrections(
        rows, {"train": features}, names, file, "`labels`"
    )
    return _labels.corrected_split(features, pairs["train"], names)
