"""Prints results as tables: the half of the command line that needs a terminal.

Apart from `cli.py` so that parsing imports nothing. Computes nothing.
"""

from __future__ import annotations

import math
import shlex
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from keras_rsft.data import ImageData

if TYPE_CHECKING:
    from keras_rsft.comparing import Comparison
    from keras_rsft.comparing.intervals import Interval
    from keras_rsft.demo import DemoResult
    from keras_rsft.finetuning import Run, TrainingSettings
    from keras_rsft.searching import Search

RESULT_NAMES = {
    "test_accuracy": "Accuracy on the test split",
    "validation_accuracy": "Accuracy on the validation split",
    "head_test_accuracy": "Head alone, test split",
    "head_validation_accuracy": "Head alone, validation split",
    "stage2_test_accuracy": "Last block fine-tuned, test split",
    "stage2_validation_accuracy": "Last block fine-tuned, validation split",
    "acceptance_rate": "Accepted in the last epoch",
    "estimated_wrong_labels": "Labels that look wrong",
    "wrong_labels": "Wrong training labels",
    "wrong_labels_rejected": "Wrong labels rejected",
    "right_labels_rejected": "Right labels rejected",
}

_SHOWN_TRIALS = 5


def print_data(data: ImageData, *, noise: str | None = None) -> None:
    """Prints what was found: classes and the size of each split."""
    sizes = ", ".join(
        f"{len(split)} {split.name}"
        for split in (data.train, data.validation, data.test)
    )
    text = f"{data.num_classes} classes; images: {sizes}."
    if noise is not None:
        wrong = int(np.sum(data.train.labels != data.train.clean_labels))
        text += f" {wrong} training labels made wrong ({noise})."
    _console().print(escape(text))


def print_run(run: Run) -> None:
    """Prints the results of a run and what to do next."""
    console = _console()
    unreadable = len(run.features.unreadable)
    if unreadable:
        console.print(
            f"[yellow]{unreadable} images cannot be read and were left out; "
            "see unreadable.csv in the run folder.[/]"
        )
    if run.finding is not None:
        console.print(escape(run.finding))
    table = Table(show_header=False)
    for key, name in RESULT_NAMES.items():
        if key in run.results:
            table.add_row(name, f"{100 * run.results[key]:.1f} %")
    if "stage2_kept" in run.results:
        kept = "kept" if run.results["stage2_kept"] else "not kept: worse on validation"
        table.add_row("Last block fine-tuned", kept)
    table.add_row("Time", f"{run.results['seconds']:.1f} s")
    console.print(table)
    console.print(f"Run folder: {escape(str(run.folder))}", soft_wrap=True)
    folder = shlex.quote(str(run.folder))
    console.print(f"Look at it: keras-rsft review {escape(folder)}", soft_wrap=True)
    console.print(
        f"Use it:     keras-rsft predict {escape(folder)} FILE...", soft_wrap=True
    )


def print_comparison(comparison: Comparison) -> None:
    """Prints a row for each method, what was left out, and the verdict."""
    console = _console()
    table = Table()
    table.add_column("Method", no_wrap=True)
    for header in ("Test", "To plain", "Accepted", "Recovered", "Seconds"):
        table.add_column(header, justify="right", no_wrap=header != "Test")
    for name, summary in comparison.summaries.items():
        accuracy = _percent(summary.test_accuracy)
        if summary.stalled:
            accuracy = f"{accuracy}, {summary.stalled} stalled".removeprefix("-, ")
        difference = summary.difference_to_plain
        shares = (summary.acceptance_rate, summary.recovered)
        table.add_row(
            name,
            accuracy,
            _percent(difference, sign="+"),
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
    spread = f", mean of {seeds} seeds ± half of its 95 % interval" if seeds > 1 else ""
    console.print(
        f"Test accuracy in percent{spread}; differences to plain are paired by seed.",
        soft_wrap=True,
    )
    console.print(escape(comparison.verdict.sentence), soft_wrap=True)
    if comparison.folder is not None:
        console.print(f"Folder: {escape(str(comparison.folder))}", soft_wrap=True)


def print_search(found: Search, *, data: str) -> None:
    """Prints the best trials, the choice beside plain fine-tuning, and what to do."""
    console = _console()
    completed = [one for one in found.outcomes if one.metrics]
    better = sorted(completed, key=lambda one: -one.metrics["val_accuracy"])
    trials = Table(title=f"The best of {len(found.outcomes)} trials")
    for header in ("Trial", "Setting"):
        trials.add_column(header)
    for header in ("Validation", "Accepted"):
        trials.add_column(header, justify="right")
    for one in better[:_SHOWN_TRIALS]:
        values = ", ".join(f"{k} {_short(v)}" for k, v in one.values.items())
        shares = (one.metrics[name] for name in ("val_accuracy", "acceptance_rate"))
        trials.add_row(one.trial_id, escape(values), *map(_share, shares))
    console.print(trials)
    table = Table()
    table.add_column("")
    for header in ("Validation", "Test", "Accepted"):
        table.add_column(header, justify="right")
    for key, title in {"chosen": "chosen", "plain": "plain fine-tuning"}.items():
        row = found.results[key]
        names = ("validation_accuracy", "test_accuracy", "acceptance_rate")
        table.add_row(title, *(_share(row.get(name)) for name in names))
    console.print(table)
    failed = found.results["failed"]
    if failed:
        console.print(f"[yellow]{failed} trials failed; see trials.csv.[/]")
    console.print(escape(found.choice.reason), soft_wrap=True)
    folder = escape(shlex.quote(str(found.folder)))
    console.print(f"Folder:      {escape(str(found.folder))}", soft_wrap=True)
    classes = found.head.model.output_shape[-1]
    command = _fit_command(found.settings, data, classes)
    console.print(f"Look at it:  keras-rsft review {folder}", soft_wrap=True)
    console.print(f"Use it:      keras-rsft predict {folder} FILE...", soft_wrap=True)
    console.print("Train it again, with your options for data and base:")
    console.print(f"  {escape(command)}", soft_wrap=True)


def _fit_command(settings: TrainingSettings, data: str, num_classes: int) -> str:
    """Returns the command that trains with a setting; data and base options apart."""
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
    options = [f"--{name}={v}" for name, v in given.items() if v is not None]
    return shlex.join(["keras-rsft", "fit", data, *options])


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _percent(interval: Interval | None, sign: str = "") -> str:
    if interval is None:
        return "-"
    mean = f"{100 * interval.mean:{sign}.1f}"
    if math.isinf(interval.half_width):  # One seed.
        return mean
    return f"{mean} ± {100 * interval.half_width:.1f}"


def print_demo(demo: DemoResult) -> None:
    """Prints plain fine-tuning and RSFT side by side, and two commands to try."""
    console = _console()
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
    console.print(f"What it found:  {demo.run.finding}", soft_wrap=True)
    console.print(f"Run folder:     {demo.run.folder}", soft_wrap=True)
    console.print(f"Exported model: {demo.exported}", soft_wrap=True)
    folder, image = (shlex.quote(str(p)) for p in (demo.run.folder, demo.sample_image))
    console.print("Try next:")
    console.print(f"  keras-rsft review {folder}", soft_wrap=True)
    console.print(f"  keras-rsft predict {folder} {image}", soft_wrap=True)
    console.print(
        "  keras-rsft fit PHOTOS --backbone efficientnet_lite0", soft_wrap=True
    )


def _console() -> Console:
    return Console(highlight=False)
