"""The options `--explain` and `--dry-run` of `fit`, and what they print.

Like `cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from keras_rsft.cli_options import base_options
from keras_rsft.result_words import about

if TYPE_CHECKING:
    from rich.console import Console

    from keras_rsft.cli_output import Output
    from keras_rsft.data import ImageData
    from keras_rsft.finetuning import TrainingSettings
    from keras_rsft.finetuning.pilot import Pilot


def add_explain_options(parser: argparse.ArgumentParser) -> None:
    """Adds both options."""
    parser.add_argument(
        "--explain",
        action="store_true",
        help="first say what 1,000 of the samples tell about the labels, whether "
        "rejection is likely to help, and how long it will take; then train",
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="like --explain, but stop before training",
    )


def explain_if_asked(
    arguments: argparse.Namespace,
    data: ImageData,
    settings: TrainingSettings,
    output: Output,
) -> bool:
    """Prints what a pilot says where that was asked for.

    Returns:
        Whether to go on and train.
    """
    if not (arguments.explain or arguments.dry_run):
        return True
    from keras_rsft.cli_documents import pilot_document
    from keras_rsft.finetuning.pilot import run_pilot

    pilot = run_pilot(
        data,
        **base_options(arguments),
        settings=settings,
        with_plain=arguments.with_plain,
        progress=output.progress,
    )
    print_pilot(pilot, settings, output.console, kind=data.kind)
    if arguments.dry_run:
        output.console.print(
            "Nothing was trained. The same command without --dry-run trains."
        )
        output.finish(pilot_document(pilot), pilot.verdict)
    return not arguments.dry_run


def print_pilot(
    pilot: Pilot,
    settings: TrainingSettings,
    console: Console,
    *,
    kind: str = "images",
) -> None:
    """Prints a table and the verdict."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        title=f"From {pilot.num_images} training {kind}",
        title_justify="left",
        show_header=False,
    )
    for name, text in _rows(pilot, settings, kind):
        table.add_row(name, escape(text))
    console.print(table)
    console.print(escape(pilot.verdict), soft_wrap=True)


def _rows(pilot: Pilot, settings: TrainingSettings, kind: str) -> list[tuple[str, str]]:
    share, low, high = (100 * value for value in pilot.noise_rate)
    sizes = [
        f"{name}: {n:,}" for name, n in (pilot.largest_class, pilot.smallest_class)
    ]
    rows = [
        ("Largest class", sizes[0]),
        ("Smallest class", sizes[1]),
        ("Labels that look wrong", f"{share:.0f} % ({low:.0f} to {high:.0f} %)"),
        ("Agrees with held-out labels, plain", f"{100 * pilot.plain_accuracy:.1f} %"),
    ]
    if pilot.policy_accuracy is not None:
        name = f"Agrees with held-out labels, {pilot.policy}"
        rows.append((name, f"{100 * pilot.policy_accuracy:.1f} %"))
    if pilot.images_left:
        images = f"{pilot.images_left:,} {kind}, {about(pilot.pass_seconds)}"
    else:
        images = "kept from before"
    rows.append(("Pass of the base", images))
    training = f"{settings.epochs} epochs, {about(pilot.training_seconds)}"
    if settings.unfreeze is not None:
        training += ", without the base"
    rows.append(("Training", training))
    return rows
