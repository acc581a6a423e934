"""Shows results: as tables on a terminal, as one JSON document for a program.

Computes nothing. Documents' keys, in `_commands.py`, may be added to and are not
renamed. Shares and accuracies are in [0, 1]; what is not known is null, and so is a
number that is NaN or infinite.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keras_rsft._storage import json_value
from keras_rsft.config import IMAGES, TrainConfig
from keras_rsft.report._summary import Summary, about, share_text
from keras_rsft.report._summary import Table as Summarised

if TYPE_CHECKING:
    from keras_rsft.cli._demo import DemoResult
    from keras_rsft.data._samples import SampleData
    from keras_rsft.export._export_run import Export
    from keras_rsft.export._verify import AccuracyCheck, Verification
    from keras_rsft.training._features import SplitFeatures
    from keras_rsft.training._pilot import Pilot

_SHOWN_CLASSES = 5


class Output:
    """Where a command's words go, for a person, a script or a program."""

    def __init__(self, *, quiet: bool = False, as_json: bool = False):
        self.progress = not quiet
        self.console = Console(
            highlight=False, emoji=False, quiet=quiet, stderr=as_json
        )
        self._quiet, self._as_json = quiet, as_json
        self._answer = sys.stdout
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Output:
        self._stack.enter_context(warnings.catch_warnings())
        if self._quiet:
            warnings.simplefilter("ignore")
        else:
            warnings.showwarning = _as_a_sentence
        if self._as_json:  # Whatever a library prints must not get into the document.
            self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        elif self._quiet:
            nothing = self._stack.enter_context(open(os.devnull, "w"))
            self._stack.enter_context(contextlib.redirect_stdout(nothing))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a sentence, or a line that can be pasted: nothing breaks it."""
        self.console.print(escape(text), style=style, soft_wrap=True)

    def warn(self, text: str) -> None:
        """Prints a sentence that stands out."""
        self.say(text, style="yellow")

    def next_command(self, title: str, command: str) -> None:
        """Prints a command to go on with, whole, to be pasted."""
        self.say(f"{title}:\n  {command}")

    def show(self, summary: Summary, *, plain: bool = False) -> None:
        """Prints a result: tables, warnings, notes; a plain table fits 80 columns."""
        for one in summary.tables:
            self.table(one, plain=plain)
        for text in summary.warnings:
            self.warn(text)
        for text in summary.notes:
            self.say(text)

    def table(self, one: Summarised, *, plain: bool = False) -> None:
        """Prints a table; where no column has a name, all of them are text."""
        named = any(one.columns)
        table = Table(
            title=one.title or None,
            title_justify="left",
            show_header=named,
            box=box.SIMPLE_HEAD if plain else box.HEAVY_HEAD,
            pad_edge=not plain,
        )
        for index, name in enumerate(one.columns):
            is_number = named and index >= one.text_columns
            table.add_column(
                name,
                justify="right" if is_number else "left",
                no_wrap=is_number,
                overflow="fold",
            )
        for row in one.rows:
            table.add_row(*map(escape, row))
        self.console.print(table)
        if one.note:
            self.say(one.note)

    def rows(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints a table of names and values."""
        self.table(Summarised(("", ""), tuple(rows), title))

    def finish(self, document: Mapping[str, Any], last_line: object) -> None:
        """Gives the result to a program (`--json`) or a script (`--quiet`)."""
        if self._as_json:
            text = json.dumps(json_value(document), ensure_ascii=False, indent=2)
            print(text, file=self._answer, flush=True)
        elif self._quiet:
            print(last_line, file=self._answer, flush=True)


def _as_a_sentence(message: Warning | str, *place: Any, **_: Any) -> None:
    """Prints a warning without its line of code, which tells a user nothing."""
    print(f"Warning: {message}", file=sys.stderr, flush=True)


def output_of(arguments: argparse.Namespace) -> Output:
    """Returns where the words of a command go."""
    return Output(quiet=arguments.quiet, as_json=getattr(arguments, "json", False))


# === Data ===


def show_data(output: Output, data: SampleData, noise: str | None = None) -> None:
    """Prints classes, the size of each split, wrong labels and corrections."""
    splits = (data.train, data.validation, data.test)
    sizes = ", ".join(f"{len(split)} {split.name}" for split in splits)
    names = list(data.class_names[:_SHOWN_CLASSES])
    if data.num_classes > len(names):
        names.append("...")
    text = f"{data.num_classes} classes ({', '.join(names)}); {data.kind}: {sizes}."
    if noise is not None:
        wrong = int(np.sum(data.train.labels != data.train.clean_labels))
        state = "made wrong" if data.corrections is None else "are still wrong"
        text += f" {wrong} training labels {state} ({noise})."
    output.say(text)
    if data.corrections is not None:
        output.say(data.corrections.describe())


# === Results ===


def show_pilot(output: Output, pilot: Pilot, settings: TrainConfig, kind: str) -> None:
    """Prints what a sample tells about a run to come, and the verdict."""
    share, low, high = (100 * value for value in pilot.noise_rate)
    (largest, most), (smallest, fewest) = pilot.largest_class, pilot.smallest_class
    rows = [
        ("Largest class", f"{largest}: {most:,}"),
        ("Smallest class", f"{smallest}: {fewest:,}"),
        ("Labels that look wrong", f"{share:.0f} % ({low:.0f} to {high:.0f} %)"),
        ("Agrees with held-out labels, plain", f"{100 * pilot.plain_accuracy:.1f} %"),
    ]
    if pilot.policy_accuracy is not None:
        name = f"Agrees with held-out labels, {pilot.policy}"
        rows.append((name, f"{100 * pilot.policy_accuracy:.1f} %"))
    extraction = "cached from before"
    if pilot.images_left:
        extraction = f"{pilot.images_left:,} {kind}, {about(pilot.pass_seconds)}"
    rows.append(("Feature extraction", extraction))
    training = f"{settings.epochs} epochs, {about(pilot.training_seconds)}"
    if settings.unfreeze is not None:
        training += ", without the backbone"
    rows.append(("Training", training))
    output.rows(f"From {pilot.num_images} training {kind}", rows)
    output.say(pilot.verdict)


def show_features(output: Output, features: SplitFeatures, kind: str) -> dict[str, Any]:
    """Prints what is cached of each split, and returns it for `--json`."""
    splits = {}
    for name in ("train", "validation", "test"):
        part = getattr(features, name)
        text = f"{name}: {len(part):,} {kind}, {part.dim:,} features each"
        if part.views > 1:
            text += f", {part.views} augmentations"
        output.say(f"{text}, {part.num_bytes / 1e6:,.1f} MB in {part.path}")
        splits[name] = {
            "images": len(part),
            "unreadable": len(part.unreadable),
            "dim": part.dim,
            "views": part.views,
            "precision": part.precision,
            "bytes": part.num_bytes,
            "path": part.path,
        }
    if features.unreadable:
        output.say(f"{len(features.unreadable):,} {kind} could not be read.")
    return splits


def show_demo(output: Output, demo: DemoResult) -> None:
    """Prints plain fine-tuning and RSFT side by side."""
    output.say(
        f"{demo.wrong_labels} of {demo.train_size} training labels were wrong; "
        f"the {demo.test_size} test labels are right."
    )
    columns = {
        "test_accuracy": "Test accuracy",
        "acceptance_rate": "Accepted",
        "wrong_labels_rejected": "Wrong rejected",
        "right_labels_rejected": "Right rejected",
    }
    titles = {"plain": "plain fine-tuning", "rsft": "rejection (RSFT)"}
    rows = [
        (titles.get(key, key), *(share_text(results.get(name)) for name in columns))
        for key, results in demo.results.items()
    ]
    header = ("Head trained with", *columns.values())
    output.table(Summarised(header, tuple(rows)))
    output.say(f"Found:          {demo.run.finding}")
    output.say(f"Run folder:     {demo.run.folder}")
    output.say(f"Exported model: {demo.exported}")


def show_export(output: Output, export: Export) -> str | None:
    """Prints where the model is, its size, and how to serve it on this machine."""
    share = export.num_bytes / export.weight_bytes
    output.say(
        f"Exported model: {export.path}\nSize:           {export.num_bytes / 1e6:.1f} "
        f"MB, {share:.2f} times the weights in float32"
    )
    if export.settings.file_format != "saved-model":
        return None
    model, inside = export.path.parent, f"/models/{export.name}"
    command = (
        "docker run --rm -p 127.0.0.1:8500:8500 -p 127.0.0.1:8501:8501 "
        f"-v {shlex.quote(f'{model}:{inside}:ro')} tensorflow/serving "
        f"--model_config_file={inside}/models.config --enable_batching "
        f"--batching_parameters_file={inside}/batching.config"
    )
    output.next_command("Serve it", command)
    return command


def show_accuracy(output: Output, check: AccuracyCheck) -> None:
    """Prints what narrower weights cost."""
    output.say(
        f"Accuracy on the validation split ({check.images} {IMAGES}): "
        f"{100 * check.exported:.1f} %; in float32 {100 * check.run:.1f} %. "
        f"Largest difference of a probability: {check.largest_difference:.4f}"
    )


def show_verification(output: Output, found: Verification) -> None:
    """Prints how an export in a fresh process compares with its run."""
    limit = found.allowed_difference
    allowed = "" if limit is None else f" (allowed: {limit:.0e})"
    images = (
        "generated" if found.generated else f"{found.images} of the validation split"
    )
    rows = [
        ("Images", images),
        ("Largest difference", f"{found.largest_difference:.1e}{allowed}"),
        ("Same label", f"{found.same_labels} of {found.images} images"),
    ]
    if found.broken_refused is not None:
        rows.append(("Broken image", "refused" if found.broken_refused else "MISTAKEN"))
    rows.append(("Loaded in", f"{found.load_seconds:.1f} s"))
    rows.append(("Verdict", "as the run" if found.passed else "NOT as the run"))
    output.rows("In a fresh process", rows)
