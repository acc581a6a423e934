"""A run on disk: what `fit` leaves behind, and how `predict` finds it again.

`unfinished.py` has it written beside its final place and renamed, so that a run folder
is always whole. Nothing that exists is ever overwritten.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from keras_rsft.data import ImageData
from keras_rsft.errors import InvalidArgument
from keras_rsft.ledger import COLUMNS
from keras_rsft.result_folder import write_csv, write_json

if TYPE_CHECKING:
    from keras_rsft.finetuning.run import Run

MODEL_FILE = "model.keras"
HEAD_FILE = "head.keras"
CONFIG_FILE = "config.json"
RESULTS_FILE = "results.json"
CLASSES_FILE = "classes.json"
LEDGER_FILE = "ledger.csv"


def check_new_folder(output: str | os.PathLike) -> Path:
    """Returns the path of a run folder that can be made.

    Raises:
        InvalidArgument: If it exists, or its parent is a file.
    """
    folder = Path(output).absolute()
    if folder.exists():
        raise InvalidArgument(
            f"The run folder must not exist yet. Received: {output}. "
            "Nothing is overwritten: choose another `--output`."
        )
    blocked = next((p for p in folder.parents if p.exists() and not p.is_dir()), None)
    if blocked is not None:
        raise InvalidArgument(f"{blocked} is a file, so {output} cannot be made.")
    return folder


def next_run_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Returns the first of `ROOT/NAME-1`, `ROOT/NAME-2`, ... that does not exist."""
    number = 1
    while (folder := Path(root) / f"{name}-{number}").exists():
        number += 1
    return folder


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Returns the class names of a run folder."""
    return tuple(json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8")))


def fill_run_folder(folder: Path, run: Run, data: ImageData) -> None:
    """Writes all files of a run into an empty folder."""
    run.model.save(folder / MODEL_FILE)
    run.head.save(folder / HEAD_FILE)
    described = {"finding": run.finding, "versions": _versions()}
    write_json(folder / CONFIG_FILE, run.config | described)
    write_json(folder / RESULTS_FILE, run.results)
    write_json(folder / CLASSES_FILE, list(run.class_names))
    names = list(run.history)
    rows = zip(*(run.history[name] for name in names), strict=True)
    write_csv(
        folder / "metrics.csv",
        ["epoch", *names],
        ([epoch, *row] for epoch, row in enumerate(rows, start=1)),
    )
    write_csv(
        folder / "samples.csv",
        ["id", "split", "given_label", "clean_label"],
        _sample_rows(data),
    )
    trained = run.trained
    write_csv(folder / LEDGER_FILE, COLUMNS, trained.ledger.rows(run.class_names))
    write_csv(
        folder / "acceptance_by_class.csv",
        ["epoch", *run.class_names],
        ([epoch, *row] for epoch, row in enumerate(trained.acceptance_by_class, 1)),
    )
    if run.features.unreadable:
        write_csv(folder / "unreadable.csv", ["id", "reason"], run.features.unreadable)


def _sample_rows(data: ImageData) -> Iterable[list[str]]:
    for split in (data.train, data.validation, data.test):
        clean = split.labels if split.clean_labels is None else split.clean_labels
        known = split.clean_labels is not None
        for sample_id, given, right in zip(split.ids, split.labels, clean, strict=True):
            right_name = data.class_names[right] if known else ""
            yield [str(sample_id), split.name, data.class_names[given], right_name]


def _versions() -> dict[str, str]:
    packages = ("keras_rsft", "keras", "tensorflow", "numpy")
    return {name: version(name) for name in packages} | {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
    }
