"""Audits a run's labels again while they are reviewed, from its cached features."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft import _storage
from keras_rsft.errors import DataError
from keras_rsft.features._store import FEATURES_FILE, FeatureSet, open_features
from keras_rsft.label_quality._audit import LabelQuality, audit_labels
from keras_rsft.report._record import RunRecord

# Of each sample decided on by now, its label; None where it is to be dropped.
Decided = dict[str, int | None]


class LiveAudit:
    """Sorts a run's samples anew by what a review has found so far.

    Raises:
        DataError: If the features are no longer cached, or not those of the run.
    """

    def __init__(self, record: RunRecord):
        self._record = record
        self._row_of = {name: row for row, name in enumerate(record.ledger.ids)}
        places = _storage.read_json(record.folder / _storage.CACHED_FEATURES_FILE)
        if not isinstance(places, dict):
            raise DataError(f"{record.folder} does not say where its features are.")
        try:
            self._parts = {
                name: self._opened(name, **place) for name, place in places.items()
            }
            self._parts["train"]
        except DataError:
            raise
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{_storage.CACHED_FEATURES_FILE} in {record.folder} cannot be read "
                f"({type(error).__name__})."
            ) from error

    def __call__(self, decided: Decided) -> dict[str, Any]:
        """Returns the samples that are left, the most suspicious first."""
        parts = {name: self._after(part, decided) for name, part in self._parts.items()}
        held_out = {name: part for name, part in parts.items() if name != "train"}
        quality = audit_labels(
            parts["train"],
            class_names=self._record.class_names,
            held_out=list(held_out.values()),
            seed=int(self._record.config.get("seed") or 0),
            progress=False,
        )
        judged = [(parts["train"], quality)]
        judged += zip(held_out.values(), quality.held_out, strict=True)
        return self._sorted([self._left(*pair, decided) for pair in judged], quality)

    def _left(
        self, part: FeatureSet, found: LabelQuality, decided: Decided
    ) -> dict[str, np.ndarray]:
        """Returns what is known of the samples that nobody has looked at."""
        unseen = np.array([one not in decided for one in part.ids.tolist()], bool)
        if part.reviewed is not None:
            unseen &= ~part.reviewed
        rows = [self._row_of[one] for one in part.ids[unseen].tolist()]
        return {
            "row": np.array(rows, int),
            "suspicion": found.suspicion[unseen],
            "wrong": found.looks_wrong[unseen],
            "right": found.right_probability[unseen],
            "predicted": found.out_of_sample.argmax(axis=1)[unseen],
            "probability": found.out_of_sample.max(axis=1)[unseen],
        }

    def _sorted(
        self, left: list[dict[str, np.ndarray]], quality: LabelQuality
    ) -> dict[str, Any]:
        columns = {
            name: np.concatenate([part[name] for part in left]) for name in left[0]
        }
        order = np.argsort(-columns["suspicion"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        right = columns.pop("right")
        columns["wrong"] &= quality.can_judge
        listed = {
            name: np.round(values.astype(float), 4).tolist()
            if values.dtype.kind == "f"
            else values.tolist()
            for name, values in columns.items()
        }
        expected = float(np.sum(1.0 - right)) if quality.can_judge else None
        return {"samples": listed, "expected": expected}

    def _opened(
        self,
        name: str,
        folder: str,
        rows: list[int] | None,
        dropped: dict[str, int],
        clean: bool,
        checksums: dict[str, str],
    ) -> FeatureSet:
        place, ledger = Path(folder), self._record.ledger
        if not (place / FEATURES_FILE).exists():
            raise DataError(
                f"The features of this run are no longer cached in {place.parent}."
            )
        meta = open_features(place)
        # The run may be somebody else's: it must know what it wants to be read.
        if meta.pop("checksums") != checksums:
            raise DataError(f"The features in {folder} are not those of this run.")
        count = int(meta.pop("rows"))
        mine = [row for row, split in enumerate(ledger.split) if split == name]
        at = np.arange(count) if rows is None else np.array(rows, int)
        at = np.sort(at) if rows is not None else np.delete(at, [*dropped.values()])
        known = np.sort(np.concatenate([at, np.array([*dropped.values()], int)]))
        inside = not len(known) or 0 <= known[0] <= known[-1] < count
        if len(at) != len(mine) or not inside or np.any(np.diff(known) <= 0):
            raise DataError(f"The features in {folder} are not those of this run.")
        ids = np.full(count, "", dtype=object)
        given, before = np.zeros((2, count), np.int32)
        ids[at], given[at] = [ledger.ids[row] for row in mine], ledger.given[mine]
        ids[[*dropped.values()]] = [*dropped]
        for row in known.tolist():
            before[row] = self._before.get(ids[row], given[row])
        groups = np.array([self._groups.get(one, -1) for one in ids], np.int64)
        alone = groups < 0  # Dropped, so that nobody knows of what it was a copy.
        groups[alone] = len(self._groups) + np.flatnonzero(alone)
        whole = FeatureSet(
            place / FEATURES_FILE, before, ids.astype(str), groups=groups, **meta
        )
        if len(known) < count:
            whole = whole.take(known)
        reviewed = ledger.reviewed[mine] | clean
        if not dropped and not reviewed.any():
            return whole
        part = whole.take(np.searchsorted(known, at)) if dropped else whole
        return dataclasses.replace(
            part, labels=given[at], reviewed=reviewed, before_review=whole
        )

    @functools.cached_property
    def _groups(self) -> dict[str, int]:
        """The number of the group of copies that each sample is in."""
        rows = list(_storage.read_csv(self._record.folder / _storage.SAMPLES_FILE))
        numbers: dict[str, int] = {}
        first = {row["id"]: row.get("copy_of") or row["id"] for row in rows}
        return {
            name: numbers.setdefault(one, len(numbers)) for name, one in first.items()
        }

    @functools.cached_property
    def _before(self) -> dict[str, int]:
        """Labels before the corrections that the run was trained with, by id."""
        path = self._record.folder / _storage.CORRECTIONS_FILE
        label = {name: at for at, name in enumerate(self._record.class_names)}
        rows = _storage.read_csv(path) if path.exists() else ()
        return {row["id"]: label[row["given_label"]] for row in rows}

    def _after(self, part: FeatureSet, decided: Decided) -> FeatureSet:
        ids = part.ids.tolist()
        seen = np.array([one in decided for one in ids], bool)
        if not seen.any():
            return part
        labels = np.array([decided.get(one, -1) or 0 for one in ids], np.int32)
        remains = np.array([decided.get(one, 0) is not None for one in ids], bool)
        before = part if part.before_review is None else part.before_review
        reviewed = seen if part.reviewed is None else seen | part.reviewed
        changed = dataclasses.replace(
            part, labels=np.where(seen, labels, part.labels), reviewed=reviewed
        )
        if not remains.all():
            changed = changed.take(np.flatnonzero(remains))
        return dataclasses.replace(changed, before_review=before)
