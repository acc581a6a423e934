"""A comparison on disk: written beside its final place and renamed, never over."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_rsft.comparing.intervals import Interval
from keras_rsft.comparing.summary import Outcome

if TYPE_CHECKING:
    from keras_rsft.comparing.comparison import Comparison
    from keras_rsft.data import ImageData

TABLE_FILE = "comparison.csv"
SUMMARY_FILE = "summary.json"
LABELS_FILE = "labels.csv"
CONFIG_FILE = "config.json"


def write_comparison(comparison: Comparison) -> None:
    """Writes a folder at `comparison.folder`, whole or not at all."""
    target = comparison.folder
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        partial.chmod(0o755)
        _fill(partial, comparison)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _fill(folder: Path, comparison: Comparison) -> None:
    fields = [field.name for field in dataclasses.fields(Outcome)]
    _write_csv(
        folder / TABLE_FILE,
        fields,
        (dataclasses.astuple(outcome) for outcome in comparison.outcomes),
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
    _write_json(folder / SUMMARY_FILE, summary)
    _write_json(folder / CONFIG_FILE, comparison.config)
    if comparison.noisy_data:
        _write_csv(
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


def _write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows(rows)
