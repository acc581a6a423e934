"""The options that commands share: how they are parsed, and what is made of them.

Like `cli.py`, imports nothing heavy: the functions at the end, which load data and
build settings, import where they are called.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from keras_rsft.backbones.base_name import TEXT_ENCODERS, parse_base_name
from keras_rsft.cli_texts import (
    add_text_options,
    are_texts,
    chosen_backbone,
    load_asked_texts,
    split_options,
)
from keras_rsft.errors import InvalidArgument
from keras_rsft.policy_choice import (
    DEFAULT_KEEP_FRACTION,
    LEVELS,
    POLICY_NAMES,
    PolicyChoice,
    require_used,
)
from keras_rsft.trainable_choice import STAGE2

# A file system takes 255 bytes; before and after the name of the data comes more.
_MAX_NAME_BYTES = 200

if TYPE_CHECKING:
    from keras_rsft.data import SampleData
    from keras_rsft.finetuning import TrainingSettings


def add_data_argument(parser: argparse.ArgumentParser) -> None:
    """Adds the data set, which comes first."""
    parser.add_argument(
        "data",
        metavar="DATA",
        help="folder DIR/CLASS/*, folder DIR/{train,validation,test}/CLASS/*, "
        "CSV file, tfds:NAME, or digits; texts: a CSV file, or a folder of .txt files",
    )


def add_data_options(group: argparse._ArgumentGroup) -> None:
    """Adds what `load_images` and `add_label_noise` need."""
    group.add_argument("--path-column", default="path", help="default: %(default)s")
    add_text_options(group)
    group.add_argument("--label-column", default="label", help="default: %(default)s")
    group.add_argument("--split-column", default="split", help="default: %(default)s")
    group.add_argument("--clean-label-column", help="CSV column of the right labels")
    group.add_argument(
        "--label-key",
        default="label",
        help="label of a tfds: set; default: %(default)s",
    )
    group.add_argument("--clean-label-key", help="right label of a tfds: set")
    group.add_argument("--data-dir", help="where tfds: data lies")
    group.add_argument(
        "--noise",
        metavar="KIND:RATE",
        help="make labels wrong on purpose: symmetric:RATE, asymmetric:RATE or "
        "instance:RATE",
    )
    add_corrections(group)
    for split in ("validation", "test"):
        group.add_argument(
            f"--{split}-fraction",
            type=fraction,
            default=0.15,
            help=f"share cut off where there is no {split} split; default: %(default)s",
        )
    group.add_argument(
        "--split-seed", type=seed_number, default=0, help="seed of the cut; default: 0"
    )


def add_base_options(group: argparse._ArgumentGroup) -> None:
    """Adds what `load_backbone` and `extract_all` need."""
    group.add_argument(
        "--backbone",
        type=backbone_name,
        help="any model of keras.applications, efficientnet_lite0, a .keras file, "
        "hub:PRESET, savedmodel:FOLDER@SCALE or onnx:FILE@SCALE, with a SCALE such as "
        f"0:1 or imagenet; for texts {TEXT_ENCODERS[0]}; default: resnet50, for "
        f"--text-column {TEXT_ENCODERS[0]}",
    )
    group.add_argument(
        "--weights",
        default="imagenet",
        help="imagenet, none or a file; of minilm a folder; default: the published "
        "ones",
    )
    add_pass_options(group)
    group.add_argument(
        "--feature-precision",
        choices=("float32", "float16"),
        default="float32",
        help="of the features on disk; float16 halves them; default: %(default)s",
    )
    group.add_argument(
        "--views",
        type=positive_int,
        default=1,
        help="views kept of each training image, flipped and cropped; default: 1",
    )


def add_pass_options(group: argparse._ArgumentGroup, *, base: str = "the base") -> None:
    """Adds how images go through a base.

    Args:
        group: Where they are added.
        base: What it is called: several bases are "each base".
    """
    group.add_argument(
        "--image-size", type=positive_int, help=f"pixels; default: {base}'s own"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help=f"of {base}'s pass; auto takes bfloat16 where the hardware has it",
    )


def add_policy_options(group: argparse._ArgumentGroup) -> None:
    """Adds the choice of one policy, its numbers, and what is done with its choice."""
    defaults = PolicyChoice()
    group.add_argument(
        "--policy",
        help=f"{', '.join(POLICY_NAMES)}; default: the one that a number below belongs "
        "to, else auto",
    )
    group.add_argument(
        "--level",
        default=defaults.level,
        help=f"judge each {' or each '.join(LEVELS)}; default: %(default)s",
    )
    add_policy_numbers(group)
    group.add_argument(
        "--stage2",
        action="store_true",
        help="then fine-tune the last block of the base on the accepted images, for "
        f"{STAGE2.epochs} epochs; kept where validation is no worse",
    )


def add_policy_numbers(group: argparse._ArgumentGroup) -> None:
    """Adds the numbers of the policies, for one policy or for several."""
    defaults = PolicyChoice()
    group.add_argument(
        "--threshold",
        type=float,
        help="loss below which loss-threshold accepts; default: 0.65 ln(classes)",
    )
    group.add_argument(
        "--keep-fraction",
        type=float,
        help=f"share that keep-fraction keeps; default: {DEFAULT_KEEP_FRACTION}",
    )
    group.add_argument(
        "--class-floor",
        type=float,
        default=defaults.class_floor,
        help="least share of each class in a batch to accept; default: %(default)s",
    )
    group.add_argument(
        "--warmup-epochs",
        type=float,
        default=defaults.warmup_epochs,
        help="epochs before rejection sets in; default: %(default)s",
    )


def add_loop_options(group: argparse._ArgumentGroup) -> None:
    """Adds how long and in which order a head is trained."""
    group.add_argument("--epochs", type=positive_int, default=20, help="default: 20")
    group.add_argument(
        "--batch-size", type=positive_int, default=32, help="default: 32"
    )
    add_seed(group)


def add_seed(group: argparse._ArgumentGroup | argparse.ArgumentParser) -> None:
    """Adds the seed."""
    group.add_argument(
        "--seed", type=seed_number, default=0, help="default: %(default)s"
    )


def add_training_options(group: argparse._ArgumentGroup) -> None:
    """Adds what `TrainingSettings` needs beside a policy."""
    add_loop_options(group)
    group.add_argument(
        "--learning-rate", type=float, default=1e-3, help="default: %(default)s"
    )
    group.add_argument(
        "--optimizer",
        default="sgd",
        help="a Keras optimizer; default: sgd, momentum 0.9",
    )
    group.add_argument(
        "--weight-decay",
        type=float,
        help="of the kernels, decoupled: an accepted step takes so much of them, times "
        "the learning rate; default: the optimizer's own",
    )


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    """Adds where features are kept."""
    parser.add_argument(
        "--cache-dir", metavar="FOLDER", help="where features are kept between runs"
    )


def add_output_options(parser: argparse.ArgumentParser, *, json: bool = True) -> None:
    """Adds how a command answers."""
    parser.add_argument(
        "--quiet",
        action="store_true",
        help="print errors and the last line of the result only, no progress",
    )
    if json:
        parser.add_argument(
            "--json",
            action="store_true",
            help="print the result as one JSON document, all else to standard error",
        )


def add_corrections(group: argparse._ArgumentGroup) -> None:
    """Adds what `apply_corrections` needs."""
    group.add_argument(
        "--corrections",
        metavar="CSV",
        action="append",
        default=[],
        help="what a review decided: columns id, given_label, decision (keep, relabel, "
        "drop), new_label; again for a later review",
    )


def backbone_name(text: str) -> str:
    """Checks what of a base's name can be checked without loading anything."""
    try:
        parse_base_name(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def positive_int(text: str) -> int:
    """Parses a whole number, at least 1."""
    return parsed(text, int, lambda value: value >= 1, "a whole number, at least 1")


def name_list(text: str) -> tuple[str, ...]:
    """Parses names that commas separate."""
    return parsed(
        text,
        lambda given: tuple(part.strip() for part in given.split(",")),
        all,
        "names separated by commas",
    )


def seed_number(text: str) -> int:
    """Parses a seed."""
    return parsed(
        text, int, lambda value: 0 <= value < 2**31, "a whole number in [0, 2**31)"
    )


def fraction(text: str) -> float:
    """Parses a number between 0 and 1."""
    return parsed(text, float, lambda value: 0 < value < 1, "a number in (0, 1)")


def positive_seconds(text: str) -> float:
    """Parses a time."""
    return parsed(
        text, float, lambda value: 0 < value < math.inf, "seconds, more than 0"
    )


def parsed(text: str, kind: Callable, holds: Callable, expected: str) -> Any:
    """Returns what an option's text means, or raises what `argparse` shows."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, received {text!r}")
    return value


def policy_choice(arguments: argparse.Namespace) -> PolicyChoice:
    """Returns the policy that was asked for, or the default one with the numbers.

    Raises:
        InvalidArgument: If a name or number cannot be used.
    """
    choice = PolicyChoice(
        name=getattr(arguments, "policy", None),
        threshold=arguments.threshold,
        keep_fraction=arguments.keep_fraction,
        class_floor=arguments.class_floor,
        level=getattr(arguments, "level", PolicyChoice().level),
        warmup_epochs=arguments.warmup_epochs,
    )
    if hasattr(arguments, "policy"):  # Else several are tried, with all numbers.
        require_used(choice.name, vars(arguments))
    return choice


def training_settings(
    arguments: argparse.Namespace, policy: PolicyChoice
) -> TrainingSettings:
    """Returns how to train, as was asked for."""
    from keras_rsft.finetuning import TrainingSettings

    return TrainingSettings(
        policy=policy,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        optimizer=arguments.optimizer,
        weight_decay=arguments.weight_decay,
        seed=arguments.seed,
        unfreeze=STAGE2 if getattr(arguments, "stage2", False) else None,
    )


def base_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns what `finetune`, `compare` and `search` are told about the base."""
    names = (
        "backbone",
        "weights",
        "image_size",
        "precision",
        "views",
        "feature_precision",
        "cache_dir",
    )
    options = {name: getattr(arguments, name) for name in names}
    return options | {"backbone": chosen_backbone(arguments)}


def load_corrected(
    arguments: argparse.Namespace, *, noisy_splits: tuple[str, ...] = ()
) -> SampleData:
    """Returns the data that were asked for, labels made wrong and then corrected.

    Args:
        arguments: The parsed command.
        noisy_splits: Where `--noise` makes labels wrong.
    """
    from keras_rsft.data import add_label_noise, apply_corrections
    from keras_rsft.data.corrections import read_corrections

    for file in arguments.corrections:
        read_corrections(file)  # Refused before the images are listed.
    data = load_data(arguments)
    if noisy_splits and arguments.noise is not None:
        data = add_label_noise(
            data, arguments.noise, seed=arguments.seed, splits=noisy_splits
        )
    return apply_corrections(data, arguments.corrections)


def load_data(arguments: argparse.Namespace) -> SampleData:
    """Returns the data that were asked for, without noise or corrections."""
    from keras_rsft.data import load_images

    if are_texts(arguments):
        return load_asked_texts(arguments)
    return load_images(
        arguments.data,
        path_column=arguments.path_column,
        label_key=arguments.label_key,
        clean_label_key=arguments.clean_label_key,
        data_dir=arguments.data_dir,
        **split_options(arguments),
    )


def data_name(arguments: argparse.Namespace) -> str:
    """Returns what a folder for the results is named after."""
    name = os.fsencode(Path(arguments.data.removeprefix("tfds:")).stem)
    return name[:_MAX_NAME_BYTES].decode(errors="ignore") or "run"
