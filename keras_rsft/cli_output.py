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
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keras_rsft.backbones.base_name import takes_texts
from keras_rsft.cli_documents import json_value
from keras_rsft.data import SampleData
from keras_rsft.result_words import (
    RESULT_NAMES,
    STRATEGY_HEADER,
    STRATEGY_NOTE,
    TUNINGS,
    comparison_note,
    interval_text,
    setting_text,
    share_text,
    strategy_texts,
)

if TYPE_CHECKING:
    from keras_rsft.comparing import Comparison
    from keras_rsft.demo import DemoResult
    from keras_rsft.finetuning import Run
    from keras_rsft.searching import Search

_SHOWN_TRIALS = 5


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


def print_run(run: Run, console: Console) -> None:
    """Prints the results of a run and what to do next."""
    unreadable = len(run.features.unreadable)
    if unreadable:
        kind = "texts" if takes_texts(run.config["backbone"]) else "images"
        console.print(
            f"[yellow]{unreadable} {kind} cannot be read and were left out; "
            "see unreadable.csv in the run folder.[/]"
        )
    if run.finding is not None:
        console.print(escape(run.finding), soft_wrap=True)
    table = Table(show_header=False)
    for key, name in RESULT_NAMES.items():
        if key in run.results:
            table.add_row(name, f"{100 * run.results[key]:.1f} %")
    for tuning, name in TUNINGS.items():
        if f"{tuning}_kept" in run.results:
            kept = run.results[f"{tuning}_kept"]
            table.add_row(name, "kept" if kept else "not kept: worse on validation")
    if "best_epoch" in run.results:
        epochs = "{best_epoch} of {epochs_trained}".format(**run.results)
        table.add_row("Epoch that was kept", epochs)
    table.add_row("Time", f"{run.results['seconds']:.1f} s")
    console.print(table)
    if run.overfitting is not None:
        sentence = escape(run.overfitting.sentence)
        console.print(f"[yellow]{sentence}[/]", soft_wrap=True)
    console.print(f"Run folder: {escape(str(run.folder))}", soft_wrap=True)
    folder = shlex.quote(str(run.folder))
    console.print(f"Look at it: keras-rsft review {escape(folder)}", soft_wrap=True)
    console.print(
        f"Use it:     keras-rsft predict {escape(folder)} FILE...", soft_wrap=True
    )


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Prints a row for each method, what was left out, and the verdict."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)  # Fits into 80 columns.
    table.add_column("Method", no_wrap=True)
    for header in ("Test", "To plain", "Accepted", "Recovered", "Seconds"):
        table.add_column(header, justify="right", no_wrap=header != "Test")
    for name, summary in comparison.summaries.items():
        accuracy = interval_text(summary.test_accuracy)
        if summary.stalled:
            accuracy = f"{accuracy}, {summary.stalled} stalled".removeprefix("-, ")
        difference = summary.difference_to_plain
        shares = (summary.acceptance_rate, summary.recovered)
        table.add_row(
            name,
            accuracy,
            interval_text(difference, sign="+"),
            *("-" if share is None else f"{100 * share:.0f} %" for share in shares),
            f"{summary.seconds:.1f}",
        )
    console.print(table)
    noise = comparison.config.get("noise")
    if noise is not None:
        console.print(
            f"Training and validation labels were made wrong on purpose ({noise}), "
            "other ones for each seed.",
            soft_wrap=True,
        )
    for note in comparison.notes:
        console.print(f"[yellow]{escape(note)}[/]", soft_wrap=True)
    seeds = len({outcome.seed for outcome in comparison.outcomes})
    console.print(comparison_note(seeds), soft_wrap=True)
    console.print(escape(comparison.verdict.sentence), soft_wrap=True)
    if comparison.folder is not None:
        console.print(f"Folder: {escape(str(comparison.folder))}", soft_wrap=True)


def print_search(found: Search, console: Console, *, data: str) -> None:
    """Prints the best trials, the choice beside plain fine-tuning, and what to do."""
    completed = [one for one in found.outcomes if one.metrics]
    better = sorted(completed, key=lambda one: -one.metrics["val_accuracy"])
    trials = Table(title=f"The best of {len(found.outcomes)} trials")
    for header in ("Trial", "Setting"):
        trials.add_column(header)
    for header in ("Validation", "Accepted"):
        trials.add_column(header, justify="right")
    for one in better[:_SHOWN_TRIALS]:
        shares = (one.metrics[name] for name in ("val_accuracy", "acceptance_rate"))
        values = escape(setting_text(one.values))
        trials.add_row(one.trial_id, values, *map(share_text, shares))
    console.print(trials)
    if "strategies" in found.results:
        _print_strategies(found.results["strategies"], console)
    table = Table()
    table.add_column("")
    for header in ("Validation", "Test", "Accepted"):
        table.add_column(header, justify="right")
    for key, title in {"chosen": "chosen", "plain": "plain fine-tuning"}.items():
        row = found.results[key]
        names = ("validation_accuracy", "test_accuracy", "acceptance_rate")
        table.add_row(title, *(share_text(row.get(name)) for name in names))
    console.print(table)
    failed = found.results["failed"]
    if failed:
        noun = "trial" if failed == 1 else "trials"
        console.print(f"[yellow]{failed} {noun} failed; see trials.csv.[/]")
    console.print(escape(found.choice.reason), soft_wrap=True)
    folder = escape(shlex.quote(str(found.folder)))
    console.print(f"Folder:      {escape(str(found.folder))}", soft_wrap=True)
    command = repeat_command(found, data)
    console.print(f"Look at it:  keras-rsft review {folder}", soft_wrap=True)
    console.print(f"Use it:      keras-rsft predict {folder} FILE...", soft_wrap=True)
    console.print("Train it again, with your options for data and base:")
    console.print(f"  {escape(command)}", soft_wrap=True)


def _print_strategies(rows: Sequence[dict[str, Any]], console: Console) -> None:
    table = Table(title="How much of the base to train", title_justify="left")
    for number, header in enumerate(STRATEGY_HEADER):
        table.add_column(header, justify="right" if 2 <= number <= 5 else "left")
    for row in rows:
        table.add_row(*map(escape, strategy_texts(row)))
    console.print(table)
    console.print(STRATEGY_NOTE, soft_wrap=True)


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
