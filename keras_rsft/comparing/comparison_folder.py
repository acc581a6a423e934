"""A comparison on disk: the files of its folder."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_rsft._storage import write_csv, write_json
from keras_rsft.comparing.summary import Outcome
from keras_rsft.intervals import Interval

if TYPE_CHECKING:
    from keras_rsft.comparing.comparison import Comparison
    from keras_rsft.data import ImageData

TABLE_FILE = "comparison.csv"
SUMMARY_FILE = "summary.json"
LABELS_FILE = "labels.csv"
CONFIG_FILE = "config.json"


def fill_comparison(folder: Path, comparison: Comparison) -> None:
    """Writes all files of a comparison into an empty folder."""
    columns = [field.name for field in dataclasses.fields(Outcome)]
    columns[columns.index("test_right")] = "test_accuracy"
    write_csv(
        folder / TABLE_FILE,
        columns,
        ([getattr(one, name) for name in columns] for one in comparison.outcomes),
    )
    summary = {
        "verdict": dataclasses.asdict(comparison.verdict),
        "methods": {
            name: {
                field.name: _plain_value(getattr(summary, field.name))
                for field in dataclasses.fields(summary)
            }
            for name, summary in comparison.summaries.items()
        },
        "notes": list(comparison.notes),
    }
    write_json(folder / SUMMARY_FILE, summary)
    write_json(folder / CONFIG_FILE, comparison.config)
    if comparison.noisy_data:
        write_csv(
            folder / LABELS_FILE,
            ["seed", "id", "split", "given_label", "clean_label"],
            _label_rows(comparison.noisy_data),
        )


def _plain_value(value: Any) -> Any:
    """Returns what JSON can hold; the width for a single seed becomes null."""
    if not isinstance(value, Interval):
        return value
    finite = math.isfinite(value.half_width)
    return {
        "mean": value.mean,
        "half_width": value.half_width if finite else None,
    }


def _label_rows(noisy_data: dict[int, ImageData]) -> Iterable[tuple]:
    for seed, data in noisy_data.items():
        names = data.class_names
        for split in (data.train, data.validation):
            for sample_id, given, clean in zip(
                split.ids, split.labels, split.clean_labels, strict=True
            ):
                yield seed, sample_id, split.name, names[given], names[clean]
