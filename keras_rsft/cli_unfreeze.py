"""The options that let a part of the base learn: of `fit`, and how it does of `search`.

Like `cli.py`, imports nothing heavy.
"""

from __future__ import annotations

import argparse
from typing import Any

from keras_rsft.cli_options import positive_int
from keras_rsft.errors import InvalidArgument
from keras_rsft.trainable_choice import Unfreeze, UnfreezeConfig, parse_unfreeze

BASE_EPOCHS = 5


def add_unfreeze_options(parser: argparse.ArgumentParser) -> None:
    """Adds which part of the base learns, and how."""
    group = parser.add_argument_group("base that learns")
    group.add_argument(
        "--unfreeze",
        metavar="N|all|LAYER[,LAYER...]",
        type=trainable_part,
        help="once the head is trained, for --epochs, train it together with the last "
        "N blocks of the base, all of it, or these layers; kept where validation is "
        "no worse",
    )
    add_base_training_options(
        group, default_rate="a tenth of --learning-rate, which stays the head's"
    )


def add_base_training_options(
    group: argparse._ArgumentGroup, *, default_rate: str
) -> None:
    """Adds how the base learns.

    Args:
        group: Where they are added.
        default_rate: Its learning rate where none is given, in words.
    """
    group.add_argument(
        "--base-epochs",
        type=positive_int,
        help=f"epochs in which the base learns too; default: {BASE_EPOCHS}",
    )
    group.add_argument(
        "--base-learning-rate",
        type=float,
        help=f"default: {default_rate}",
    )
    group.add_argument(
        "--train-batch-norm",
        action="store_true",
        help="have its BatchNorm layers learn and normalise by the batch; default: "
        "they stay as they are",
    )


def trainable_part(text: str) -> Unfreeze:
    """Parses what `--unfreeze` is given."""
    try:
        return parse_unfreeze(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def unfreeze_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `TrainingSettings` is told about the base.

    Raises:
        InvalidArgument: If an option belongs to a base that shall not learn.
    """
    asked = arguments.unfreeze is not None
    how = base_training_settings(arguments, asked=asked, option="--unfreeze")
    if not asked:
        return {}
    if getattr(arguments, "stage2", False):
        raise InvalidArgument(
            "`--stage2` and `--unfreeze` both train the base after the head. Give one "
            "of them."
        )
    return {"unfreeze": UnfreezeConfig(arguments.unfreeze, **how)}


def base_training_settings(
    arguments: argparse.Namespace, *, asked: bool, option: str
) -> dict[str, Any]:
    """Returns what `UnfreezeConfig` is told beside the layers.

    Args:
        arguments: The parsed command.
        asked: Whether a part of it shall.
        option: What asks for it.

    Raises:
        InvalidArgument: If an option belongs to a base that shall not learn.
    """
    given = {
        "--base-epochs": arguments.base_epochs is not None,
        "--base-learning-rate": arguments.base_learning_rate is not None,
        "--train-batch-norm": arguments.train_batch_norm,
    }
    for name, is_given in given.items():
        if is_given and not asked:
            raise InvalidArgument(
                f"`{name}` says how the base learns. Say which part of it with "
                f"`{option}`."
            )
    return {
        "epochs": arguments.base_epochs or BASE_EPOCHS,
        "learning_rate": arguments.base_learning_rate,
        "batch_norm": arguments.train_batch_norm,
    }
