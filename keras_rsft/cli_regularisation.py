"""The options of `fit` against overfitting, beside `--weight-decay`.

Like `cli.py`, imports nothing heavy.
"""

from __future__ import annotations

import argparse
from typing import Any

from keras_rsft.cli_options import positive_int

PATIENCE = 5


def add_regularisation_options(parser: argparse.ArgumentParser) -> None:
    """Adds softer targets and early stopping."""
    group = parser.add_argument_group("against overfitting")
    group.add_argument(
        "--label-smoothing",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="take this share of the probability from the given class and spread it "
        "over all, such as 0.1; samples are judged by the plain loss; default: 0",
    )
    group.add_argument(
        "--mix-up",
        type=float,
        default=0.0,
        metavar="ALPHA",
        help="train the head on mixtures of features of accepted samples, with shares "
        "from Beta(ALPHA, ALPHA), such as 0.4; default: 0",
    )
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
    names = ("label_smoothing", "mix_up", "early_stopping")
    return {name: getattr(arguments, name) for name in names}
