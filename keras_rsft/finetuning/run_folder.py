"""A run on disk: what `fit` leaves behind, and how `predict` finds it again."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_rsft._storage import (
    ACCEPTANCE_FILE,
    CLASSES_FILE,
    CONFIG_FILE,
    CORRECTIONS_FILE,
    HEAD_FILE,
    HISTOGRAMS_FILE,
    LEDGER_FILE,
    METRICS_FILE,
    MODEL_FILE,
    NEAR_DUPLICATES_FILE,
    RESULTS_FILE,
    SAMPLES_FILE,
    installed_versions,
    write_csv,
    write_json,
)
from keras_rsft.data import SampleData
from keras_rsft.data.corrections import COLUMNS as CORRECTION_COLUMNS
from keras_rsft.data.corrections import correction_cells
from keras_rsft.features import near_duplicates, write_excerpts, write_thumbnails
from keras_rsft.ledger import COLUMNS, HISTOGRAM_COLUMNS

if TYPE_CHECKING:
    from keras_rsft.finetuning.run import Run


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Returns the class names of a run folder."""
    return tuple(json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8")))


def fill_run_folder(
    folder: Path,
    run: Run,
    data: SampleData,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Writes all files of a run into an empty folder."""
    run.model.save(folder / MODEL_FILE)
    run.head.save(folder / HEAD_FILE)
    described = {"finding": run.finding, "versions": installed_versions()}
    write_json(folder / CONFIG_FILE, run.config | described)
    write_json(folder / RESULTS_FILE, results_of(run))
    write_json(folder / CLASSES_FILE, list(run.class_names))
    names = list(run.history)
    rows = zip(*(run.history[name] for name in names), strict=True)
    write_csv(
        folder / METRICS_FILE,
        ["epoch", *names],
        ([epoch, *row] for epoch, row in enumerate(rows, start=1)),
    )
    write_csv(
        folder / SAMPLES_FILE,
        ["id", "split", "given_label", "clean_label", "decision", "label_before"],
        _sample_rows(data),
    )
    if data.corrections is not None:
        cells = correction_cells(data.corrections.rows)
        write_csv(folder / CORRECTIONS_FILE, CORRECTION_COLUMNS, cells)
    trained = run.trained
    write_csv(folder / LEDGER_FILE, COLUMNS, trained.ledger.rows(run.class_names))
    write_csv(
        folder / ACCEPTANCE_FILE,
        ["epoch", *run.class_names],
        ([epoch, *row] for epoch, row in enumerate(trained.acceptance_by_class, 1)),
    )
    write_csv(
        folder / HISTOGRAMS_FILE,
        HISTOGRAM_COLUMNS,
        (
            row
            for epoch, histogram in enumerate(trained.loss_histograms, 1)
            for row in histogram.rows(epoch)
        ),
    )
    if run.features.unreadable:
        write_csv(folder / "unreadable.csv", ["id", "reason"], run.features.unreadable)
    # What a person looks at: pairs of near duplicates, and the samples.
    train, suspicion = run.features.train, run.trained.ledger.suspicion
    write_csv(
        folder / NEAR_DUPLICATES_FILE,
        ["id", "other_id", "similarity"],
        (
            [str(train.ids[pair.first]), str(train.ids[pair.second]),
             f"{pair.similarity:.4f}"]
            for pair in near_duplicates(train, suspicion, progress=progress)
        ),
    )  # fmt: skip
    by_id = dict(zip(map(str, train.ids), suspicion.tolist(), strict=True))
    if data.kind == "texts":
        write_excerpts(data.train, by_id, folder)
        return
    write_thumbnails(data.train, by_id, folder, cache_dir=cache_dir, progress=progress)


def results_of(run: Run) -> dict[str, Any]:
    """Returns what `results.json` holds."""
    found = run.overfitting
    results = run.results | {"overfitting": None}
    if found is not None:
        described = dataclasses.asdict(found) | {"sentence": found.sentence}
        results["overfitting"] = described
    if run.against_plain is None:
        return results
    return results | {"against_plain": dataclasses.asdict(run.against_plain)}


def _sample_rows(data: SampleData) -> Iterable[list[str]]:
    """Yields the samples that remain, with what was decided and what it replaced."""
    rows = () if data.corrections is None else data.corrections.rows
    decided = {row.id: [row.decision, row.given_label] for row in rows}
    for split in (data.train, data.validation, data.test):
        clean = split.labels if split.clean_labels is None else split.clean_labels
        known = split.clean_labels is not None
        for sample_id, given, right in zip(split.ids, split.labels, clean, strict=True):
            right_name = data.class_names[right] if known else ""
            names = [data.class_names[given], right_name]
            decision = decided.get(str(sample_id), ["", ""])
            yield [str(sample_id), split.name, *names, *decision]
