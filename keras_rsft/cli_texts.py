"""The options for data that are texts, and what is made of them.

Like `cli.py`, imports nothing heavy until a command runs.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from keras_rsft.backbones.base_name import TEXT_ENCODERS, takes_texts
from keras_rsft.errors import InvalidArgument

if TYPE_CHECKING:
    from keras_rsft.data import TextData

DEFAULT_TEXT_COLUMN = "text"
_DEFAULT_BASE = "resnet50"
_SPLIT_OPTIONS = (
    "label_column",
    "split_column",
    "clean_label_column",
    "validation_fraction",
    "test_fraction",
    "split_seed",
)


def add_text_options(group: argparse._ArgumentGroup) -> None:
    """Adds what `load_texts` needs beside what `load_images` does."""
    group.add_argument(
        "--text-column",
        metavar="COLUMN",
        help="the data are texts, in this column of a CSV file; default with the base "
        f"{TEXT_ENCODERS[0]}: {DEFAULT_TEXT_COLUMN}",
    )
    group.add_argument(
        "--id-column",
        metavar="COLUMN",
        help="CSV column of the texts' ids; default: ids are made of the texts",
    )


def chosen_backbone(arguments: argparse.Namespace) -> str:
    """Returns the base that was asked for, or the default one for such data."""
    default = _DEFAULT_BASE if arguments.text_column is None else TEXT_ENCODERS[0]
    return arguments.backbone or default


def are_texts(arguments: argparse.Namespace) -> bool:
    """Says whether the data of a command are texts, by its bases and its options.

    Raises:
        InvalidArgument: If some bases take texts and others do not.
    """
    one = getattr(arguments, "backbone", None)
    names = getattr(arguments, "backbones", ()) or ([one] if one else [])
    kinds = {takes_texts(name) for name in names}
    if len(kinds) > 1:
        raise InvalidArgument(
            "Bases for images and bases for texts cannot be ranked on the same data. "
            f"Received: {', '.join(names)}."
        )
    return arguments.text_column is not None or True in kinds


def load_asked_texts(arguments: argparse.Namespace) -> TextData:
    """Returns the texts that were asked for, without noise or corrections."""
    from keras_rsft.data import load_texts

    return load_texts(
        arguments.data,
        text_column=arguments.text_column or DEFAULT_TEXT_COLUMN,
        id_column=arguments.id_column,
        **split_options(arguments),
    )


def split_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `load_images` and `load_texts` are both told."""
    return {name: getattr(arguments, name) for name in _SPLIT_OPTIONS}
