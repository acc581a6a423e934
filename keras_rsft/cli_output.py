"""Prints results as tables: the half of the command line that needs a terminal.

Apart from `cli.py` so that parsing imports nothing. Computes nothing. `Output` says
where words go; the documents of `--json` are made in `cli_documents.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import sys
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keras_rsft.cli_documents import json_value
from keras_rsft.data import SampleData
from keras_rsft.report.summary import (
    Summary,
    comparison_summary,
    run_summary,
    search_summary,
)

if TYPE_CHECKING:
    from keras_rsft.comparing import Comparison
    from keras_rsft.demo import DemoResult
    from keras_rsft.finetuning import Run
    from keras_rsft.searching import Search


class Output:
    """Where a command's words go, for a person, a script or a program.

    A context in which a command runs. Tables and sentences go to standard output:
    coloured on a terminal, unless `NO_COLOR` is set, and plain elsewhere. With
    `--quiet` there are none, no progress bar and no warning; the last line of the
    result is all. With `--json` standard output has one JSON document and nothing
    else; tables go to standard error. Errors always go there.

    Args:
        quiet: Whether `--quiet` was given.
        as_json: Whether `--json` was given.

    Attributes:
        console: Where tables and sentences are printed.
        progress: Whether to show progress bars.
    """

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

    def finish(self, document: Mapping[str, Any], last_line: object) -> None:
        """Gives the result to a program or a script that asked for it.

        Args:
            document: What `--json` prints; NaN and infinity become null.
            last_line: What `--quiet` prints: a path, as a rule.
        """
        if self._as_json:
            text = json.dumps(json_value(document), ensure_ascii=False, indent=2)
            print(text, file=self._answer, flush=True)
        elif self._quiet:
            print(last_line, file=self._answer, flush=True)


def _as_a_sentence(message: Warning | str, *place: Any, **_: Any) -> None:
    """Prints a warning without the place in the code, which tells a user nothing."""
    print(f"Warning: {message}", file=sys.stderr, flush=True)


def output_of(arguments: argparse.Namespace) -> Output:
    """Returns where the words of a command go."""
    return Output(quiet=arguments.quiet, as_json=getattr(arguments, "json", False))


def print_data(data: SampleData, console: Console, *, noise: str | None = None) -> None:
    """Prints what was found: classes and the size of each split; and corrections."""
    sizes = ", ".join(
        f"{len(split)} {split.name}"
        for split in (data.train, data.validation, data.test)
    )
    text = f"{data.num_classes} classes; {data.kind}: {sizes}."
    if noise is not None:
        wrong = int(np.sum(data.train.labels != data.train.clean_labels))
        state = "made wrong" if data.corrections is None else "are still wrong"
        text += f" {wrong} training labels {state} ({noise})."
    console.print(escape(text), soft_wrap=True)
    if data.corrections is not None:
        console.print(escape(data.corrections.describe()), soft_wrap=True)


def print_summary(
    summary: Summary, console: Console, *, table_box: Any = box.HEAVY_HEAD
) -> None:
    """Prints the tables of a result, its warnings and its notes."""
    for one in summary.tables:
        table = Table(
            box=table_box,
            pad_edge=table_box is box.HEAVY_HEAD,
            show_header=any(one.columns),
            title=one.title or None,
            title_justify="left",
        )
        for number, header in enumerate(one.columns):
            is_text = number < one.text_columns or not any(one.columns)
            table.add_column(
                header,
                justify="left" if is_text else "right",
                no_wrap=not is_text,
                overflow="fold",
            )
        for row in one.rows:
            table.add_row(*map(escape, row))
        console.print(table)
        if one.note:
            console.print(one.note, soft_wrap=True)
    for warning in summary.warnings:
        console.print(f"[yellow]{escape(warning)}[/]", soft_wrap=True)
    for note in summary.notes:
        console.print(escape(note), soft_wrap=True)


def print_run(run: Run, console: Console) -> None:
    """Prints the results of a run and what to do next."""
    print_summary(run_summary(run), console)
    console.print(f"Run folder: {escape(str(run.folder))}", soft_wrap=True)
    folder = shlex.quote(str(run.folder))
    console.print(f"Look at it: keras-rsft review {escape(folder)}", soft_wrap=True)
    console.print(
        f"Use it:     keras-rsft predict {escape(folder)} FILE...", soft_wrap=True
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints a row for each method, what was left out, and the verdict."""
    # Fits into 80 columns.
    print_summary(comparison_summary(comparison), console, table_box=box.SIMPLE_HEAD)
    if comparison.folder is not None:
        console.print(f"Folder: {escape(str(comparison.folder))}", soft_wrap=True)


def print_search(found: Search, console: Console, *, data: str) -> None:
    """Prints the best trials, the choice beside plain fine-tuning, and what to do."""
    print_summary(search_summary(found), console)
    folder = escape(shlex.quote(str(found.folder)))
    console.print(f"Folder:      {escape(str(found.folder))}", soft_wrap=True)
    command = repeat_command(found, data)
    console.print(f"Look at it:  keras-rsft review {folder}", soft_wrap=True)
    console.print(f"Use it:      keras-rsft predict {folder} FILE...", soft_wrap=True)
    console.print("Train it again, with your options for data and base:")
    console.print(f"  {escape(command)}", soft_wrap=True)


def repeat_command(found: Search, data: str) -> str:
    """Returns the command that trains as chosen; options of data and base apart."""
    settings = found.settings
    num_classes = found.head.model.output_shape[-1]
    policy = settings.policy
    threshold = policy.threshold or policy.relative_threshold * math.log(num_classes)
    numbers = {
        "loss-threshold": {"level": policy.level, "threshold": threshold},
        "self-paced": {"threshold": threshold},
        "keep-fraction": {"keep-fraction": policy.keep_fraction},
    }
    given = {"policy": policy.name, **numbers.get(policy.name, {})}
    if policy.name not in ("auto", "accept-all"):
        given["warmup-epochs"] = policy.warmup_epochs
    given |= {
        "epochs": settings.epochs,
        "batch-size": settings.batch_size,
        "learning-rate": settings.learning_rate,
        "optimizer": settings.optimizer,
        "weight-decay": settings.weight_decay,
        "seed": settings.seed,
    }
    if settings.unfreeze is not None:
        given |= {
            "unfreeze": settings.unfreeze.layers,
            "base-epochs": settings.unfreeze.epochs,
            "base-learning-rate": settings.unfreeze_rate,
        }
    options = [f"--{name}={v}" for name, v in given.items() if v is not None]
    if settings.unfreeze is not None and settings.unfreeze.batch_norm:
        options.append("--train-batch-norm")
    return shlex.join(["keras-rsft", "fit", data, *options])


def print_demo(demo: DemoResult, console: Console) -> None:
    """Prints plain fine-tuning and RSFT side by side, and two commands to try."""
    console.print(
        f"{demo.wrong_labels} of {demo.train_size} training labels were wrong; "
        f"the {demo.test_size} test labels are right."
    )
    table = Table()
    table.add_column("Head trained with", no_wrap=True)
    columns = {
        "test_accuracy": "Test accuracy",
        "acceptance_rate": "Accepted",
        "wrong_labels_rejected": "Wrong rejected",
        "right_labels_rejected": "Right rejected",
    }
    for header in columns.values():
        table.add_column(header, justify="right")
    titles = {
        "plain": "plain fine-tuning",
        "rsft": "rejection (RSFT)",
        "right labels only": "right labels only",
    }
    for key, title in titles.items():
        shown = (demo.results[key].get(column) for column in columns)
        table.add_row(
            title,
            *("-" if value is None else f"{100 * value:.1f} %" for value in shown),
        )
    console.print(table)
    console.print(f"What it found:  {escape(demo.run.finding)}", soft_wrap=True)
    console.print(f"Run folder:     {escape(str(demo.run.folder))}", soft_wrap=True)
    console.print(f"Exported model: {escape(str(demo.exported))}", soft_wrap=True)
    paths = (demo.run.folder, demo.sample_image)
    folder, image = (escape(shlex.quote(str(path))) for path in paths)
    console.print("Try next:")
    console.print(f"  keras-rsft review {folder}", soft_wrap=True)
    console.print(f"  keras-rsft predict {folder} {image}", soft_wrap=True)
    console.print(
        "  keras-rsft fit PHOTOS --backbone efficientnet_lite0", soft_wrap=True
    )
