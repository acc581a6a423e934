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

from keras_rsft import __version__
from keras_rsft.cli_export import add_export, export_settings, run_export
from keras_rsft.cli_features import add_features, features_cluster, run_features
from keras_rsft.cli_fit import add_fit, run_fit
from keras_rsft.cli_options import (
    add_base_options,
    add_cache_dir,
    add_data_argument,
    add_data_options,
    add_output_options,
    add_policy_numbers,
    add_seed,
    add_training_options,
    base_options,
    data_name,
    load_corrected,
    policy_choice,
    positive_int,
    training_settings,
)
from keras_rsft.cli_parser import CommandParser
from keras_rsft.cli_predict import add_predict, run_predict
from keras_rsft.cli_rank import add_rank, run_rank
from keras_rsft.cli_review import add_review, run_review
from keras_rsft.cli_search import (
    add_search,
    check_part,
    run_search,
    search_options,
)
from keras_rsft.comparing.method_names import METHOD_NAMES, check_methods
from keras_rsft.errors import (
    DataError,
    InvalidArgument,
    TrainingStalled,
    WeightsUnavailable,
    WorkerLost,
)
from keras_rsft.interruption import Terminated, termination_raises
from keras_rsft.strategy_choice import check_strategy

USAGE_ERROR, FAILED, INTERRUPTED, TERMINATED, PIPE_CLOSED = 2, 1, 130, 143, 141
TRACEBACK_VARIABLE = "KERAS_RSFT_TRACEBACK"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name. Default: the process's.

    Returns:
        The exit status: 0, 1 for a failed run, 2 for a usage error, 130 when
        interrupted, 143 when terminated, 141 where nobody reads the output any more.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    arguments = build_parser().parse_args(argv)
    arguments.argv = argv
    arguments.command_line = shlex.join(["keras-rsft", *argv])
    try:
        with termination_raises():
            _check_backend()
            return _COMMANDS[arguments.command](arguments)
    except KeyboardInterrupt as stop:
        status = TERMINATED if isinstance(stop, Terminated) else INTERRUPTED
        kept = " ".join(["Interrupted.", *getattr(stop, "__notes__", [])])
        return _fail(status, f"{kept} Run the same command again to go on.")
    except BrokenPipeError:  # `| head` has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except InvalidArgument as error:
        return _fail(USAGE_ERROR, str(error))
    except (
        DataError,
        ImportError,
        TrainingStalled,
        WeightsUnavailable,
        WorkerLost,
    ) as error:
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


def _check_backend() -> None:
    """Refuses another backend than TensorFlow, before anything heavy is imported."""
    backend = os.environ.get("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise InvalidArgument(
            "The command line needs Keras's TensorFlow backend. Received: "
            f"KERAS_BACKEND={backend}. Leave it out: `RSFTModel` alone trains under "
            "jax and torch, in a program of yours."
        )


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the whole command line."""
    parser = CommandParser(
        prog="keras-rsft",
        description="Fine-tune a pretrained Keras model only on the samples that "
        "their loss says are worth learning from.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_demo(commands)
    add_fit(commands)
    _add_compare(commands)
    add_rank(commands)
    add_features(commands)
    add_search(commands)
    add_review(commands)
    add_export(commands)
    add_predict(commands)
    return parser


def _add_demo(commands: argparse._SubParsersAction) -> None:
    demo = commands.add_parser(
        "demo", help="fine-tune on real digits with wrong labels, in about a minute"
    )
    add_seed(demo)
    demo.add_argument("--output", metavar="FOLDER", help="default: runs/demo-N")
    add_cache_dir(demo)
    add_output_options(demo)


def _add_compare(commands: argparse._SubParsersAction) -> None:
    compare = commands.add_parser(
        "compare", help="several methods side by side on your own images or texts"
    )
    add_data_argument(compare)
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
    add_output_options(compare)


def _run_demo(arguments: argparse.Namespace) -> int:
    _silence_native_libraries()
    from keras_rsft.cli_documents import demo_document
    from keras_rsft.cli_output import output_of, print_demo
    from keras_rsft.demo import run_demo
    from keras_rsft.report import write_report

    with output_of(arguments) as output:
        output.console.print(
            "Real handwritten digits from scikit-learn. 30 % of the training labels "
            f"are now replaced by wrong ones (seed {arguments.seed}).",
            soft_wrap=True,
        )
        demo = run_demo(
            seed=arguments.seed,
            output=arguments.output,
            cache_dir=arguments.cache_dir,
            progress=output.progress,
            command=arguments.command_line,
        )
        write_report(demo.run)
        print_demo(demo, output.console)
        output.finish(demo_document(demo), demo.run.folder)
    return 0


def _run_fit(arguments: argparse.Namespace) -> int:
    choice = policy_choice(arguments)  # Refused before anything heavy is imported.
    check_strategy(arguments.strategy)
    _silence_native_libraries()
    run_fit(arguments, choice)
    return 0


def _run_compare(arguments: argparse.Namespace) -> int:
    methods = arguments.methods
    if methods is not None:  # Refused before anything heavy is imported.
        methods = check_methods([name.strip() for name in methods.split(",")])
    numbers = policy_choice(arguments)
    _silence_native_libraries()
    from keras_rsft._storage import check_new_folder
    from keras_rsft.cli_documents import comparison_document
    from keras_rsft.cli_output import output_of, print_comparison, print_data
    from keras_rsft.comparing import compare
    from keras_rsft.data.noise import parse_noise
    from keras_rsft.finetuning import NumberedFolder

    settings = training_settings(arguments, numbers)
    if arguments.noise is not None:
        parse_noise(arguments.noise)
    if arguments.output is not None:
        check_new_folder(arguments.output)
    name = f"compare-{data_name(arguments)}"
    folder = arguments.output or NumberedFolder(name)
    with output_of(arguments) as output:
        data = load_corrected(arguments)
        print_data(data, output.console)
        comparison = compare(
            data,
            methods=methods,
            seeds=arguments.seeds,
            noise=arguments.noise,
            **base_options(arguments),
            settings=settings,
            output=folder,
            progress=output.progress,
            command=arguments.command_line,
        )
        print_comparison(comparison, output.console)
        output.finish(comparison_document(comparison), comparison.folder)
    return 0


def _run_export(arguments: argparse.Namespace) -> int:
    settings = export_settings(arguments)  # Refused before anything heavy is imported.
    _silence_native_libraries()
    from keras_rsft.cli_output import output_of

    with output_of(arguments) as output:
        return 0 if run_export(arguments, settings, build_parser(), output) else FAILED


def _run_search(arguments: argparse.Namespace) -> int:
    # Refused before anything heavy is imported.
    options = search_options(arguments)
    check_part(arguments)
    _silence_native_libraries()
    run_search(arguments, options)
    return 0


def _run_predict(arguments: argparse.Namespace) -> int:
    _silence_native_libraries()
    return 0 if run_predict(arguments) else FAILED


def _run_review(arguments: argparse.Namespace) -> int:
    run_review(arguments)
    return 0


def _run_rank(arguments: argparse.Namespace) -> int:
    _silence_native_libraries()
    run_rank(arguments)
    return 0


def _run_features(arguments: argparse.Namespace) -> int:
    cluster = features_cluster(arguments)  # Refused before anything heavy is imported.
    _silence_native_libraries()
    run_features(arguments, cluster)
    return 0


_COMMANDS = {
    "demo": _run_demo,
    "fit": _run_fit,
    "compare": _run_compare,
    "export": _run_export,
    "search": _run_search,
    "predict": _run_predict,
    "review": _run_review,
    "rank": _run_rank,
    "features": _run_features,
}


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
