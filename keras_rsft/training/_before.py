"""Compares a run after a review with the one before, on the same corrected labels."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft import _storage
from keras_rsft.data._samples import ImageSplit, SampleData
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.label_quality._audit import Estimate, LabelQuality
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import HELD_OUT, head_probabilities, judge_of

COLUMNS = ("id", "split", "given_label", "predicted_label")
# What of a run's configuration may differ between the runs before and after a review.
_NOT_SETTINGS = ("command", "finding", "versions", "corrections", "engine")


# Ids and predicted labels of a split that was not trained on, by the split's name.
Predictions = dict[str, tuple[np.ndarray, np.ndarray]]


def predictions_of_head(head: keras.Model, features: SplitFeatures) -> Predictions:
    parts = {name: getattr(features, name) for name in HELD_OUT}
    return {
        name: (part.ids, head_probabilities(head, part).argmax(axis=-1))
        for name, part in parts.items()
        if len(part)
    }


def predictions_of_model(model: keras.Model, data: SampleData) -> Predictions:
    """Returns those of a model of images, for the images that can be read."""
    found: Predictions = {}
    for name in HELD_OUT:
        split: ImageSplit = getattr(data, name)
        size, pairs = model.input_shape[1:3], []
        for index, images in split.images(size).batch(32):
            pairs.append((index.numpy(), tf.argmax(model(images, training=False), -1)))
        if pairs:
            index, predicted = (np.concatenate(one) for one in zip(*pairs, strict=True))
            found[name] = split.ids[index], predicted
    return found


@dataclasses.dataclass(frozen=True)
class AgainstBefore:
    """Both runs' accuracies on the corrected labels, and their paired difference."""

    run: str
    samples: int
    splits: tuple[str, ...]
    before: Estimate
    after: Estimate
    gain: Estimate

    @property
    def sentence(self) -> str:
        before, after = 100 * self.before.value, 100 * self.after.value
        gain, low, high = (100 * value for value in self.gain)
        return (
            f"Before the review {before:.1f} %, after it {after:.1f} % ({gain:+.1f}, "
            f"95 % interval {low:+.1f} to {high:+.1f}), on the corrected labels of "
            f"{self.samples:,} {' and '.join(self.splits)} samples. Before: "
            f"{Path(self.run).name}."
        )


@dataclasses.dataclass(frozen=True)
class RunBefore:
    """What an earlier run predicted for the samples that it was not trained on."""

    folder: Path
    predicted: dict[str, int]

    def against(
        self, predictions: Predictions, features: SplitFeatures, quality: LabelQuality
    ) -> AgainstBefore | None:
        """Compares it with a later run; None where nothing can be judged.

        Judged are the samples that neither run was trained on.
        """
        judges, ours, theirs, splits = [], [], [], []
        for name in HELD_OUT:
            judge = judge_of(features, name, quality)
            if judge is None or name not in predictions:
                continue
            part, (ids, predicted) = getattr(features, name), predictions[name]
            ours_of = dict(zip(ids.tolist(), predicted.tolist(), strict=True))
            names = part.ids.tolist()
            rows = [at for at, one in enumerate(names) if one in self.predicted]
            rows = [at for at in rows if names[at] in ours_of]
            if not rows:
                continue
            judges.append((judge, np.array(rows)))
            ours += [ours_of[names[at]] for at in rows]
            theirs += [self.predicted[names[at]] for at in rows]
            splits.append(name)
        if not judges:
            return None
        judge, after, before = joined(judges), np.array(ours), np.array(theirs)
        found = [judge.accuracy(before), judge.accuracy(after)]
        gain = judge.gain(after, before)
        if found[0] is None or found[1] is None or gain is None:
            return None
        return AgainstBefore(
            str(self.folder), len(ours), tuple(splits), found[0], found[1], gain
        )


def joined(parts: Sequence[tuple[LabelQuality, np.ndarray]]) -> LabelQuality:
    """Returns the label quality of some rows of several splits as that of one."""
    first = parts[0][0]
    names = ("out_of_sample", "right_probability", "labels")
    together: dict[str, Any] = {
        name: np.concatenate([getattr(one, name)[rows] for one, rows in parts])
        for name in names
    }
    if any(one.reviewed is not None for one, _ in parts):
        together["reviewed"] = np.concatenate(
            [
                np.zeros(len(rows), bool)
                if one.reviewed is None
                else one.reviewed[rows]
                for one, rows in parts
            ]
        )
    return dataclasses.replace(first, **together, held_out=())


# --- Which run was before -----------------------------------------------------------


def read_before(folder: str | Path, data: SampleData) -> RunBefore:
    """Reads the run that is named as the one before."""
    folder = Path(folder).absolute()
    path = folder / _storage.PREDICTIONS_FILE
    if not path.is_file():
        raise InvalidArgument(
            "Expected the folder of the run before the review, with "
            f"{_storage.PREDICTIONS_FILE}. Received: {folder}. Leave out `before`, "
            "or train that run again."
        )
    try:
        before = _read_before(folder, data)
    except (ValueError, LookupError, TypeError) as error:
        raise DataError(f"{path} is not as `keras-rsft` wrote it: {error}.") from error
    if before is None:
        raise InvalidArgument(
            f"{folder} was trained on other samples, or under other labels, than "
            f"{data.source} before its corrections. Name the run that was reviewed, or "
            "leave out `before`."
        )
    return before


def find_before(
    root: Path, data: SampleData, config: dict[str, Any]
) -> RunBefore | None:
    """Returns the latest run in a folder that differs by its corrections alone."""
    rows = data.corrections.rows if data.corrections is not None else ()
    mine, found = {row.id: row for row in rows}, []
    for path in root.glob(f"*/{_storage.PREDICTIONS_FILE}"):
        folder = path.parent
        other = _storage.read_json(folder / _storage.CONFIG_FILE)
        if not isinstance(other, dict) or _settings(other) != _settings(config):
            continue
        try:
            decided = _decisions(folder)
            fewer = decided.keys() <= mine.keys() and decided != {
                key: (row.decision, row.new_label) for key, row in mine.items()
            }
            before = _read_before(folder, data) if fewer else None
        except (OSError, ValueError, LookupError, TypeError):  # Not one of ours.
            continue
        if before is not None:
            found.append((path.stat().st_mtime_ns, folder.name, before))
    return max(found, key=lambda one: one[:2])[2] if found else None


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    plain = json.loads(json.dumps(config, default=str))
    return {name: one for name, one in plain.items() if name not in _NOT_SETTINGS}


def _decisions(folder: Path) -> dict[str, tuple[str, str]]:
    path = folder / _storage.CORRECTIONS_FILE
    rows = _storage.read_csv(path) if path.exists() else ()
    return {row["id"]: (row["decision"], row["new_label"]) for row in rows}


def _read_before(folder: Path, data: SampleData) -> RunBefore | None:
    """Reads an earlier run; None where its labels are not those of these data."""
    labels = {name: label for label, name in enumerate(data.class_names)}
    rows = list(_storage.read_csv(folder / _storage.PREDICTIONS_FILE))
    predicted = {row["id"]: labels[row["predicted_label"]] for row in rows}
    given = {row["id"]: labels[row["given_label"]] for row in rows}
    decided = {row.id for row in data.corrections.rows} if data.corrections else set()
    shared = 0
    for name in HELD_OUT:
        split = getattr(data, name)
        for sample_id, label in zip(split.ids.tolist(), split.labels, strict=True):
            if sample_id in given:
                shared += 1
                if sample_id not in decided and given[sample_id] != label:
                    return None
    return RunBefore(folder, predicted) if shared else None
