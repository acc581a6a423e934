"""Parses the command line, runs one command, and turns errors into exit statuses."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import logging
import os
import shlex
import sys
from collections.abc import Callable, Sequence

from keras_rsft import __version__, _runtime, config, errors
from keras_rsft.cli import _commands as commands
from keras_rsft.cli import _options as options
from keras_rsft.cli._options import CommandParser, DataConfig, settings_of
from keras_rsft.cli._render import Output
from keras_rsft.config import option, rare
from keras_rsft.errors import InvalidArgument
from keras_rsft.report._summary import shown

USAGE_ERROR, FAILED, INTERRUPTED, TERMINATED, PIPE_CLOSED = 2, 1, 130, 143, 141
EXPECTED = (
    ImportError, errors.DataError, errors.TrainingStalled, errors.WeightsUnavailable,
    errors.WorkerLost,
)  # fmt: skip
TRACEBACK_VARIABLE = "KERAS_RSFT_TRACEBACK"


def run(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        _prepare_streams()
    # In another program's process, its Keras is left as it is.
    imports = _runtime.quick_imports() if argv is None else contextlib.nullcontext()
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = build_parser()
    arguments = parser.parse_args(argv)
    arguments.parser, arguments.argv = parser, argv
    arguments.command_line = shlex.join(["keras-rsft", *argv])
    try:
        with _runtime.termination_raises(), imports:
            backend = os.environ.get("KERAS_BACKEND", "tensorflow")
            if backend != "tensorflow":
                raise InvalidArgument(
                    "The command line needs Keras's TensorFlow backend. Received: "
                    f"KERAS_BACKEND={backend}. Leave it out: `RSFTModel` alone trains "
                    "under jax and torch, in a program of yours."
                )
            _silence_native_libraries()
            with Output(
                quiet=arguments.quiet,
                as_json=getattr(arguments, "json", False),
                command=arguments.command,
            ) as output:
                succeeded = arguments.work(arguments, output)
                return FAILED if succeeded is False else 0
    except KeyboardInterrupt as stop:
        status = TERMINATED if isinstance(stop, _runtime.Terminated) else INTERRUPTED
        text = " ".join(["Interrupted.", *getattr(stop, "__notes__", [])])
        command = f"\n  {arguments.command_line}"
        return _fail(status, f"{text} Run the same command again to resume:{command}")
    except BrokenPipeError:  # `| head` has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return PIPE_CLOSED
    except InvalidArgument as error:
        return _fail(USAGE_ERROR, str(error))
    except EXPECTED as error:
        return _fail(FAILED, str(error))
    except OSError as error:
        path = f": {error.filename}" if error.filename else ""
        return _fail(FAILED, f"{error.strerror or error}{path}")
    except Exception as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        if type(error).__name__ in ("MemoryError", "ResourceExhaustedError"):
            return _fail(FAILED, "There is not enough memory. Try smaller images.")
        return _fail(
            FAILED,
            f"{type(error).__name__}: {error}\nThis should not happen: please report "
            f"it with the traceback that {TRACEBACK_VARIABLE}=1 shows.",
        )


def _fail(status: int, message: str) -> int:
    print(f"keras-rsft: {shown(message)}", file=sys.stderr)
    return status


def _prepare_streams() -> None:
    """Has closed streams lead nowhere, and others take every character."""
    # The first files to be opened would get the numbers of closed streams, and what
    # libraries have to say would be written into them.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        continue
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def _silence_native_libraries() -> None:
    """Keeps TensorFlow's start-up chatter off the user's terminal."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # What is wrong with a file of TensorFlow is said once, and without a traceback.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
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
    encoding, on_error = sys.stderr.encoding, sys.stderr.errors
    sys.stderr = os.fdopen(
        os.dup(2), "w", buffering=1, encoding=encoding, errors=on_error
    )
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 2)


# === Options of the command line alone ===


_SPACE = dataclasses.asdict(config.SearchSpace())
_RANGES = ", ".join(
    name if _SPACE[name] is None else "{}={:g}:{:g}".format(name, *_SPACE[name])
    for name in config.RANGE_NAMES
)
_share = options.typed(
    options.split_at("/", int),
    "I/N, with I from 0 to N - 1, such as 0/8",
    lambda pair: len(pair) == 2 and 0 <= pair[0] < pair[1],
)
_port = options.typed(
    int, "a whole number in [0, 65535]", lambda port: 0 <= port < 2**16
)


@dataclasses.dataclass
class Options:
    """Options that belong to no configuration of the library."""

    data: str = option(
        None,
        "folder DIR/CLASS/*, folder DIR/{train,validation,test}/CLASS/*, CSV file, "
        "tfds:NAME, or digits; texts: a CSV file, or a folder of .txt files",
        positional=True,
        metavar="DATA",
    )
    quiet: bool = option(
        False, "print errors and the last line of the result only, no progress"
    )
    json: bool = option(
        False, "print the result as one JSON document, all else to standard error"
    )
    output: str | None = option(
        None,
        "new folder of the results, or that of a stopped run, to resume it; default: "
        "the next free runs/[COMMAND-]NAME-N",
        first=5,
        metavar="FOLDER",
    )
    worker_timeout: float = option(
        _runtime.DEFAULT_TIMEOUT,
        "how long to wait for a worker that does not respond",
        type=options.seconds,
    )
    strategy: str = option(
        "none",
        "none: one device; mirrored: all GPUs of this machine, or else its logical "
        "CPUs; multiworker: the workers in TF_CONFIG",
    )
    tensorboard: str | None = option(
        None,
        "write for TensorBoard, to a subfolder with the run's name",
        metavar="FOLDER",
    )
    dry_run: bool = option(
        False,
        "write no run: estimate from 1,000 samples how many labels are wrong, whether "
        "rejection is likely to help, and how long the run will take",
    )
    before: str | None = rare(
        None,
        "run to compare with on the corrected labels; default with --corrections: the "
        "latest of the same data and settings in the folder of the results",
    )
    with_plain: bool = rare(True, "train a plain head too, for the report's comparison")
    methods: tuple[str, ...] | None = option(
        None,
        f"out of {', '.join(config.METHOD_NAMES)}; plain is always among them; "
        "default: all that can run",
        first=2,
    )
    seeds: int = option(
        5, "how often to train each, from --seed on", first=3, type=options.positive
    )
    backbones: tuple[str, ...] = option(
        None, "as --backbone of fit takes them", first=1, required=True
    )
    sample: int = option(
        1000, "training samples to look at", first=2, type=options.positive
    )
    share: str | None = option(
        None,
        "compute the I-th of N shards, from 0 on, and wait for no other; default: all, "
        "or with TF_CONFIG this worker's, and wait for the others",
        type=_share,
        metavar="I/N",
    )
    range: tuple[str, ...] = option(
        (),
        f"search a number from LOW to HIGH; repeat it for another one; names and "
        f"defaults: {_RANGES}",
        first=4,
        type=options.named_range,
        action="append",
    )
    clean_validation: bool = option(
        False, "judge trials by the validation split's clean labels"
    )
    workers: int | None = option(
        None,
        "processes on this machine that share the trials; on several machines Keras "
        "Tuner's variables KERASTUNER_* name them; default: this one alone",
        type=options.positive,
    )
    run: str = option(
        None, "folder of a run or of a search", positional=True, metavar="RUN"
    )
    serve: bool = option(
        False, "show all samples, from a server that only this machine can reach"
    )
    port: int | None = option(None, "of --serve; default: the run's own", type=_port)
    no_browser: bool = option(False, "open nothing; print where the page is")
    name: str | None = option(
        None, "the model's name; default: that of the run folder", first=1
    )
    directory: str = option(
        "saved_models",
        "folder of exported models, each in a folder of its name",
        first=2,
        metavar="FOLDER",
    )
    verify: bool = option(
        False,
        "load the export in a fresh process and compare it with the run, on images of "
        "its validation split",
    )
    model: str = option(
        None,
        "run folder, .keras file, exported model, .tflite or .onnx file",
        positional=True,
        metavar="MODEL",
    )
    paths: tuple[str, ...] = option(
        (),
        "image files, folders, or quoted patterns such as 'new/**/*.jpg'; for a model "
        "of texts .txt files and CSV files",
        positional=True,
        metavar="PATH",
        nargs="+",
    )
    output_format: str = option(
        commands.OUTPUT_FORMATS[0],
        "tab-separated lines, CSV with a header, or a JSON object a line",
        choices=commands.OUTPUT_FORMATS,
    )


# === The parsers of the commands ===

# The help of each command, and which configurations it takes: whole, or with the names
# of fields, or after `-` without those.
_COMMANDS: dict[Callable[..., bool | None], tuple[str, dict[type, str]]] = {
    commands.demo: (
        "fine-tune on real digits with noisy labels, a minute",
        {Options: "output", config.FeatureConfig: "cache_dir",
         config.TrainConfig: "seed"},
    ),
    commands.fit: (
        "fine-tune on your own images or texts",
        {config.FeatureConfig: "", config.PolicyConfig: "", config.UnfreezeConfig: "",
         config.TrainConfig: "", DataConfig: "",
         Options: "data output before strategy tensorboard dry_run with_plain"},
    ),
    commands.audit: (
        "find wrong labels in all splits, without training",
        {config.FeatureConfig: "", config.TrainConfig: "seed", DataConfig: "",
         Options: "data output"},
    ),
    commands.compare: (
        "several methods side by side on your own data",
        {config.FeatureConfig: "", config.TrainConfig: "-early_stopping",
         config.PolicyConfig: "-policy level", DataConfig: "",
         Options: "data methods seeds output"},
    ),
    commands.rank: (
        "which backbone suits your own images or texts",
        {config.FeatureConfig: "image_size dtype cache_dir", config.TrainConfig: "seed",
         DataConfig: "-clean_splits", Options: "data backbones sample"},
    ),
    commands.features: (
        "extract and cache features, also by shards",
        {config.FeatureConfig: "", config.TrainConfig: "seed",
         DataConfig: "-clean_splits", Options: "data share worker_timeout"},
    ),
    commands.search: (
        "find policy, threshold and learning rate",
        {config.FeatureConfig: "", config.SearchSpace: "", config.SearchConfig: "",
         config.TrainConfig: "epochs batch_size seed",
         config.UnfreezeConfig: "-unfreeze", DataConfig: "",
         Options: "data range output clean_validation workers worker_timeout"},
    ),
    commands.review: (
        "look at a run and correct labels in the browser",
        {Options: "run serve port no_browser"},
    ),
    commands.export: (
        "write a model for TF Serving, LiteRT or ONNX",
        {Options: "run name directory verify", config.ExportConfig: ""},
    ),
    commands.predict: (
        "use a trained model on image files or texts; the exit status is 1 if some "
        "could not be read: they are listed on standard error, the others answered",
        {Options: "model paths output_format", config.FeatureConfig: "engine",
         DataConfig: "text_column"},
    ),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="keras-rsft",
        description="Fine-tune a pretrained Keras model on noisy labels, rejecting "
        "samples that are probably mislabelled.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for work, (help, takes) in _COMMANDS.items():
        common = " quiet" if work is commands.predict else " quiet json"
        takes = takes | {Options: takes[Options] + common}
        settings = [one for owner in takes for one in settings_of(owner, takes[owner])]
        command = subparsers.add_parser(work.__name__, help=help, description=help)
        command.add_settings(settings)
        command.set_defaults(work=work)
    return parser
