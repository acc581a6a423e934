"""The options of `fit` against overfitting, beside `--weight-decay`.

Like `cli.py`, imports nothing heavy.
"""

from __future__ import annotations

import argparse
from typing import Any

from keras_rsft.cli_options import positive_int

PATIENCE = 5


def add_regularisation_options(parser: argparse.ArgumentParser) -> None:
    """Adds early stopping."""
    group = parser.add_argument_group("against overfitting")
    group.add_argument(
        "--early-stopping",
        nargs="?",
        type=positive_int,
        const=PATIENCE,
        metavar="PATIENCE",
        help="end the head's training after so many epochs without a better validation "
        f"accuracy ({PATIENCE} if no number follows), and keep the best weights",
    )


def regularisation_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `TrainingSettings` is told about it."""
    return {"early_stopping": arguments.early_stopping}
