"""Parses the command line, calls the rooms, prints what they return.

Imports nothing heavy until a command runs, so that `--help` and typing errors
answer at once. Turns the user's mistakes into one message and an exit status:
2 for a command that cannot be run as given, 1 for a run that failed.
"""

from __future__ import annotations

import argparse
import logging
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from keras_rsft import __version__
from keras_rsft.errors import (
    DataError,
    InvalidArgument,
    TrainingStalled,
    WeightsUnavailable,
)
from keras_rsft.policy_choice import LEVELS, POLICY_NAMES, PolicyChoice

USAGE_ERROR, FAILED, INTERRUPTED = 2, 1, 130
TRACEBACK_VARIABLE = "KERAS_RSFT_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name. Default: the process's.

    Returns:
        The exit status: 0, 1 for a failed run, 2 for a usage error, 130 when
        interrupted.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["keras-rsft", *argv])
    try:
        return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt:
        return _fail(INTERRUPTED, "Interrupted. Run the same command again to go on.")
    except InvalidArgument as error:
        return _fail(USAGE_ERROR, str(error))
    except (DataError, TrainingStalled, WeightsUnavailable, ImportError) as error:
        return _fail(FAILED, str(error))
    except OSError as error:
        place = f": {error.filename}" if error.filename else ""
        return _fail(FAILED, f"{error.strerror or error}{place}")
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        return _fail(
            FAILED,
            f"{type(error).__name__}: {error}\nThis should not happen: please report "
            f"it with the traceback that {TRACEBACK_VARIABLE}=1 shows.",
        )


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = argparse.ArgumentParser(
        prog="keras-rsft",
        description="Fine-tune a pretrained Keras model only on the samples that "
        "their loss says are worth learning from.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    _add_fit(commands)
    _add_predict(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo", help="fine-tune on real digits with wrong labels, in about a minute"
    )
    demo.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")
    demo.add_argument("--output", metavar="FOLDER", help="default: runs/demo-N")
    _add_cache_dir(demo)


def _add_fit(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser("fit", help="fine-tune on your own images")
    fit.add_argument(
        "data",
        metavar="DATA",
        help="folder DIR/CLASS/*, folder DIR/{train,validation,test}/CLASS/*, "
        "CSV file, tfds:NAME, or digits",
    )
    _add_data_options(fit.add_argument_group("data"))
    _add_base_options(fit.add_argument_group("base"))
    _add_policy_options(fit.add_argument_group("rejection"))
    _add_training_options(fit.add_argument_group("training"))
    fit.add_argument(
        "--output", metavar="FOLDER", help="run folder; default: runs/NAME-N"
    )
    _add_cache_dir(fit)


def _add_data_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--path-column", default="path", help="default: %(default)s")
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
        help="make training labels wrong on purpose, e.g. symmetric:0.3",
    )
    for split in ("validation", "test"):
        group.add_argument(
            f"--{split}-fraction",
            type=_fraction,
            default=0.15,
            help=f"share cut off where there is no {split} split; default: %(default)s",
        )
    group.add_argument(
        "--split-seed", type=_seed, default=0, help="seed of the cut; default: 0"
    )


def _add_base_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--backbone",
        default="resnet50",
        help="any model of keras.applications, efficientnet_lite0, or a .keras file; "
        "default: %(default)s",
    )
    group.add_argument(
        "--weights",
        default="imagenet",
        help="imagenet, none or a file; default: imagenet",
    )
    group.add_argument(
        "--image-size", type=_positive_int, help="pixels; default: the base's own"
    )
    group.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of the base's pass; auto takes bfloat16 where the hardware has it",
    )
    group.add_argument(
        "--views",
        type=_positive_int,
        default=1,
        help="views kept of each training image, flipped and cropped; default: 1",
    )


def _add_policy_options(group: argparse._ArgumentGroup) -> None:
    defaults = PolicyChoice()
    group.add_argument(
        "--policy",
        default=defaults.name,
        help=f"{', '.join(POLICY_NAMES)}; default: %(default)s",
    )
    group.add_argument(
        "--threshold",
        type=float,
        help="loss below which loss-threshold accepts; default: 0.65 ln(classes)",
    )
    group.add_argument(
        "--keep-fraction",
        type=float,
        default=defaults.keep_fraction,
        help="share that keep-fraction keeps; default: %(default)s",
    )
    group.add_argument(
        "--level",
        default=defaults.level,
        help=f"judge each {' or each '.join(LEVELS)}; default: %(default)s",
    )
    group.add_argument(
        "--warmup-epochs",
        type=float,
        default=defaults.warmup_epochs,
        help="epochs before rejection sets in; default: %(default)s",
    )


def _add_training_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--epochs", type=_positive_int, default=20, help="default: 20")
    group.add_argument(
        "--batch-size", type=_positive_int, default=32, help="default: 32"
    )
    group.add_argument(
        "--learning-rate", type=float, default=1e-3, help="default: %(default)s"
    )
    group.add_argument(
        "--optimizer",
        default="sgd",
        help="a Keras optimizer; default: sgd, momentum 0.9",
    )
    group.add_argument("--seed", type=_seed, default=0, help="default: %(default)s")


def _add_predict(commands: argparse._SubParsersAction) -> None:
    predict = commands.add_parser("predict", help="use a trained model on image files")
    predict.add_argument(
        "model", metavar="MODEL", help="run folder, .keras file or exported model"
    )
    predict.add_argument("files", metavar="FILE", nargs="+", help="image files")


def _add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--cache-dir", metavar="FOLDER", help="where features are kept between runs"
    )


def _run_demo(arguments: argparse.Namespace) -> int:
    _silence_native_libraries()
    from keras_rsft.cli_output import print_demo
    from keras_rsft.demo import run_demo

    print(
        "Real handwritten digits from scikit-learn. 30 % of the training labels are "
        f"now replaced by wrong ones (seed {arguments.seed}).",
        flush=True,
    )
    print_demo(
        run_demo(
            seed=arguments.seed,
            output=arguments.output,
            cache_dir=arguments.cache_dir,
            command=arguments.command_line,
        )
    )
    return 0


def _run_fit(arguments: argparse.Namespace) -> int:
    choice = _policy_choice(arguments)  # Refused before anything heavy is imported.
    _silence_native_libraries()
    from keras_rsft.cli_output import print_data, print_run
    from keras_rsft.data import add_label_noise, load_images
    from keras_rsft.finetuning import TrainingSettings, finetune
    from keras_rsft.finetuning.run_folder import check_new_folder, next_run_folder

    settings = TrainingSettings(
        policy=choice,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        optimizer=arguments.optimizer,
        seed=arguments.seed,
    )
    if arguments.output is not None:
        check_new_folder(arguments.output)  # Before the work, not after it.
    data = load_images(
        arguments.data,
        path_column=arguments.path_column,
        label_column=arguments.label_column,
        split_column=arguments.split_column,
        clean_label_column=arguments.clean_label_column,
        label_key=arguments.label_key,
        clean_label_key=arguments.clean_label_key,
        validation_fraction=arguments.validation_fraction,
        test_fraction=arguments.test_fraction,
        split_seed=arguments.split_seed,
        data_dir=arguments.data_dir,
    )
    if arguments.noise is not None:
        data = add_label_noise(data, arguments.noise, seed=arguments.seed)
    print_data(data, noise=arguments.noise)
    name = Path(arguments.data.removeprefix("tfds:")).stem or "run"
    print_run(
        finetune(
            data,
            backbone=arguments.backbone,
            weights=arguments.weights,
            image_size=arguments.image_size,
            precision=arguments.precision,
            views=arguments.views,
            settings=settings,
            output=arguments.output or next_run_folder(name),
            cache_dir=arguments.cache_dir,
            command=arguments.command_line,
        )
    )
    return 0


def _run_predict(arguments: argparse.Namespace) -> int:
    _silence_native_libraries()
    from keras_rsft.cli_output import print_predictions
    from keras_rsft.predict import predict_files

    unreadable = print_predictions(predict_files(arguments.model, arguments.files))
    return FAILED if unreadable == len(arguments.files) else 0


_COMMANDS = {"demo": _run_demo, "fit": _run_fit, "predict": _run_predict}


def _policy_choice(arguments: argparse.Namespace) -> PolicyChoice:
    return PolicyChoice(
        name=arguments.policy,
        threshold=arguments.threshold,
        keep_fraction=arguments.keep_fraction,
        level=arguments.level,
        warmup_epochs=arguments.warmup_epochs,
    )


def _silence_native_libraries() -> None:
    """Keeps TensorFlow's start-up chatter off the user's terminal.

    Its C++ code writes to file descriptor 2, whatever the log level; Python's
    own standard error moves to a copy of it, which still is the terminal.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # Off by default on processors where it still is the faster choice.
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")
    if os.environ.get(TRACEBACK_VARIABLE):
        return
    try:
        descriptor = sys.stderr.fileno()
    except (OSError, ValueError):  # Captured: nothing native writes to it.
        return
    if descriptor != 2:
        return
    sys.stderr.flush()
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding=sys.stderr.encoding)
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)


def _fail(status: int, message: str) -> int:
    print(f"keras-rsft: {message}", file=sys.stderr)
    return status


def _positive_int(text: str) -> int:
    return _parsed(text, int, lambda value: value >= 1, "a whole number, at least 1")


def _seed(text: str) -> int:
    return _parsed(
        text, int, lambda value: 0 <= value < 2**31, "a whole number in [0, 2**31)"
    )


def _fraction(text: str) -> float:
    return _parsed(text, float, lambda value: 0 < value < 1, "a number in (0, 1)")


def _parsed(text: str, kind: type, holds, expected: str):
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, received {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
