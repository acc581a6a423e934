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
from keras_rsft.cli_export import add_export, export_settings, run_export
from keras_rsft.cli_options import (
    add_base_options,
    add_cache_dir,
    add_data_options,
    add_loop_options,
    add_policy_numbers,
    add_policy_options,
    add_training_options,
    load_data,
    policy_choice,
    positive_int,
    seed_number,
    training_settings,
)
from keras_rsft.cli_predict import add_predict, run_predict
from keras_rsft.cli_search import (
    add_search_options,
    add_space_options,
    search_options,
    search_space,
)
from keras_rsft.comparing.method_names import METHOD_NAMES, check_methods
from keras_rsft.errors import (
    DataError,
    InvalidArgument,
    TrainingStalled,
    WeightsUnavailable,
)
from keras_rsft.interruption import Terminated, termination_raises

USAGE_ERROR, FAILED, INTERRUPTED, TERMINATED = 2, 1, 130, 143
TRACEBACK_VARIABLE = "KERAS_RSFT_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name. Default: the process's.

    Returns:
        The exit status: 0, 1 for a failed run, 2 for a usage error, 130 when
        interrupted, 143 when terminated.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    arguments.command_line = shlex.join(["keras-rsft", *argv])
    try:
        with termination_raises():
            return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt as stop:
        status = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        kept = " ".join(["Interrupted.", *getattr(stop, "__notes__", [])])
        return _fail(status, f"{kept} Run the same command again to go on.")
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
    _add_compare(commands)
    _add_search(commands)
    add_export(commands)
    add_predict(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo", help="fine-tune on real digits with wrong labels, in about a minute"
    )
    demo.add_argument(
        "--seed", type=seed_number, default=0, help="default: %(default)s"
    )
    demo.add_argument("--output", metavar="FOLDER", help="default: runs/demo-N")
    add_cache_dir(demo)


def _add_fit(commands: argparse._SubParsersAction) -> None:
    fit = commands.add_parser("fit", help="fine-tune on your own images")
    _add_data_argument(fit)
    add_data_options(fit.add_argument_group("data"))
    add_base_options(fit.add_argument_group("base"))
    add_policy_options(fit.add_argument_group("rejection"))
    add_training_options(fit.add_argument_group("training"))
    fit.add_argument(
        "--output", metavar="FOLDER", help="run folder; default: runs/NAME-N"
    )
    add_cache_dir(fit)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare", help="several methods side by side on your own images"
    )
    _add_data_argument(compare)
    methods = compare.add_argument_group("comparison")
    methods.add_argument(
        "--methods",
        metavar="A,B,C",
        help=f"out of {', '.join(METHOD_NAMES)}; plain is always among them; "
        "default: all that can run",
    )
    methods.add_argument(
        "--seeds",
        type=positive_int,
        default=5,
        metavar="N",
        help="how often to train each, from --seed on; default: %(default)s",
    )
    add_data_options(compare.add_argument_group("data"))
    add_base_options(compare.add_argument_group("base"))
    add_policy_numbers(compare.add_argument_group("rejection"))
    add_training_options(compare.add_argument_group("training"))
    compare.add_argument(
        "--output", metavar="FOLDER", help="default: runs/compare-NAME-N"
    )
    add_cache_dir(compare)


def _add_search(commands: argparse._SubParsersAction) -> None:
    search = commands.add_parser(
        "search", help="find the policy, its threshold and the learning rate"
    )
    _add_data_argument(search)
    add_search_options(search.add_argument_group("search"))
    add_space_options(search.add_argument_group("space"))
    add_data_options(search.add_argument_group("data"))
    add_base_options(search.add_argument_group("base"))
    add_loop_options(search.add_argument_group("training"))
    search.add_argument(
        "--output",
        metavar="FOLDER",
        help="of a new search, or of a stopped one to go on with; default: "
        "runs/search-NAME-N",
    )
    add_cache_dir(search)


def _add_data_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "data",
        metavar="DATA",
        help="folder DIR/CLASS/*, folder DIR/{train,validation,test}/CLASS/*, "
        "CSV file, tfds:NAME, or digits",
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
    choice = policy_choice(arguments)  # Refused before anything heavy is imported.
    _silence_native_libraries()
    from keras_rsft.cli_output import print_data, print_run
    from keras_rsft.data import add_label_noise
    from keras_rsft.finetuning import NumberedFolder, finetune
    from keras_rsft.finetuning.run_folder import check_new_folder

    settings = training_settings(arguments, choice)
    if arguments.output is not None:
        check_new_folder(arguments.output)  # Before the work, not after it.
    data = load_data(arguments)
    if arguments.noise is not None:
        data = add_label_noise(data, arguments.noise, seed=arguments.seed)
    print_data(data, noise=arguments.noise)
    print_run(
        finetune(
            data,
            backbone=arguments.backbone,
            weights=arguments.weights,
            image_size=arguments.image_size,
            precision=arguments.precision,
            views=arguments.views,
            feature_precision=arguments.feature_precision,
            settings=settings,
            output=arguments.output or NumberedFolder(_data_name(arguments)),
            cache_dir=arguments.cache_dir,
            command=arguments.command_line,
            announce=lambda line: print(line, flush=True),
        )
    )
    return 0


def _run_compare(arguments: argparse.Namespace) -> int:
    methods = arguments.methods
    if methods is not None:  # Refused before anything heavy is imported.
        methods = check_methods([name.strip() for name in methods.split(",")])
    numbers = policy_choice(arguments)
    _silence_native_libraries()
    from keras_rsft.cli_output import print_comparison, print_data
    from keras_rsft.comparing import compare
    from keras_rsft.data.noise import parse_noise
    from keras_rsft.finetuning.run_folder import check_new_folder, next_run_folder

    settings = training_settings(arguments, numbers)
    if arguments.noise is not None:
        parse_noise(arguments.noise)
    if arguments.output is not None:
        check_new_folder(arguments.output)
    data = load_data(arguments)
    print_data(data)
    print_comparison(
        compare(
            data,
            methods=methods,
            seeds=arguments.seeds,
            noise=arguments.noise,
            backbone=arguments.backbone,
            weights=arguments.weights,
            image_size=arguments.image_size,
            precision=arguments.precision,
            views=arguments.views,
            feature_precision=arguments.feature_precision,
            settings=settings,
            output=arguments.output
            or next_run_folder(f"compare-{_data_name(arguments)}"),
            cache_dir=arguments.cache_dir,
            command=arguments.command_line,
        )
    )
    return 0


def _run_export(arguments: argparse.Namespace) -> int:
    settings = export_settings(arguments)  # Refused before anything heavy is imported.
    _silence_native_libraries()
    return 0 if run_export(arguments, settings, build_parser()) else FAILED


def _run_search(arguments: argparse.Namespace) -> int:
    options = search_options(arguments)  # Refused before anything heavy is imported.
    _silence_native_libraries()
    from keras_rsft.cli_output import print_data, print_search
    from keras_rsft.data import add_label_noise
    from keras_rsft.finetuning import TrainingSettings
    from keras_rsft.searching import search
    from keras_rsft.searching.search_folder import next_search_folder

    space = search_space(arguments)
    settings = TrainingSettings(
        epochs=arguments.epochs, batch_size=arguments.batch_size, seed=arguments.seed
    )
    data = load_data(arguments)
    if arguments.noise is not None:
        data = add_label_noise(
            data, arguments.noise, seed=arguments.seed, splits=("train", "validation")
        )
    print_data(data, noise=arguments.noise)
    print_search(
        search(
            data,
            output=arguments.output or next_search_folder(_data_name(arguments)),
            options=options,
            space=space,
            clean_validation=arguments.clean_validation,
            backbone=arguments.backbone,
            weights=arguments.weights,
            image_size=arguments.image_size,
            precision=arguments.precision,
            views=arguments.views,
            feature_precision=arguments.feature_precision,
            settings=settings,
            cache_dir=arguments.cache_dir,
            command=arguments.command_line,
        ),
        data=arguments.data,
    )
    return 0


def _run_predict(arguments: argparse.Namespace) -> int:
    _silence_native_libraries()
    return 0 if run_predict(arguments) else FAILED


_COMMANDS = {
    "demo": _run_demo,
    "fit": _run_fit,
    "compare": _run_compare,
    "export": _run_export,
    "search": _run_search,
    "predict": _run_predict,
}


def _data_name(arguments: argparse.Namespace) -> str:
    return Path(arguments.data.removeprefix("tfds:")).stem or "run"


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


if __name__ == "__main__":
    sys.exit(main())
