"""The command `export`: its options, and what it calls and prints.

Like `cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from keras_rsft.cli_options import add_output_options, load_data, positive_int
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export.places import (
    FORMATS,
    WEIGHT_DTYPES,
    ExportSettings,
    check_run_folder,
    free_version,
    model_folder,
)

if TYPE_CHECKING:
    from rich.console import Console

    from keras_rsft.cli_output import Output
    from keras_rsft.data import ImageData, ImageSplit
    from keras_rsft.export.from_run import Export, FinishedRun
    from keras_rsft.export.verification import AccuracyCheck, Verification


def add_export(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    defaults = ExportSettings()
    export = commands.add_parser(
        "export", help="write a run's model for TF Serving, LiteRT or ONNX"
    )
    export.add_argument("run", metavar="RUN", help="run folder")
    export.add_argument(
        "--name", help="the model's name; default: that of the run folder"
    )
    export.add_argument(
        "--directory",
        metavar="FOLDER",
        default="saved_models",
        help="where exported models lie, each in a folder of its name; "
        "default: %(default)s",
    )
    export.add_argument(
        "--format",
        default=defaults.file_format,
        help=f"{', '.join(FORMATS)}; default: %(default)s",
    )
    export.add_argument(
        "--weight-dtype",
        default=defaults.weight_dtype,
        help=f"{', '.join(WEIGHT_DTYPES)}: how weights are stored; float16 for "
        "saved-model and litert, int8 for litert; default: %(default)s",
    )
    export.add_argument(
        "--model-version",
        type=positive_int,
        metavar="N",
        help="version of a saved-model; default: the next free one",
    )
    export.add_argument(
        "--top-k",
        type=positive_int,
        metavar="K",
        help="have a saved-model name the K most probable classes too",
    )
    export.add_argument(
        "--verify",
        action="store_true",
        help="load what was written in a fresh process and compare it with the run, "
        "on images of its validation split",
    )
    add_output_options(export)


def export_settings(arguments: argparse.Namespace) -> ExportSettings:
    """Returns what was asked for, if the run and the place are there for it.

    Raises:
        InvalidArgument: If the options do not fit each other, there is no such run,
            or the place cannot be used.
    """
    settings = ExportSettings(
        file_format=arguments.format,
        weight_dtype=arguments.weight_dtype,
        version=arguments.model_version,
        top_k=arguments.top_k,
    )
    check_run_folder(Path(arguments.run))
    target = model_folder(arguments.run, arguments.name, arguments.directory)
    if settings.file_format == "saved-model":
        free_version(target, settings.version)
    return settings


def run_export(
    arguments: argparse.Namespace,
    settings: ExportSettings,
    parser: argparse.ArgumentParser,
    output: Output,
) -> bool:
    """Exports, and compares with the run if asked to, or where weights were narrowed.

    Args:
        arguments: The parsed command.
        settings: What `export_settings` made of them.
        parser: Reads the command that made the run, for its data.
        output: Where words and the result go.

    Returns:
        False if the export was to be verified and is not as it must be.
    """
    from keras_rsft.cli_documents import export_document
    from keras_rsft.export.from_run import export_run, read_run

    run = read_run(arguments.run)
    export = export_run(
        run, name=arguments.name, directory=arguments.directory, settings=settings
    )
    _print_export(export, output.console)
    narrowed = settings.weight_dtype != "float32"
    accuracy = verification = None
    if narrowed or arguments.verify:
        images, missing = _validation_images(run, parser)
    if narrowed:
        accuracy = _check_accuracy(run, export, images, missing, output)
    if arguments.verify:
        verification = _verify(run, export, images, missing, output)
    output.finish(
        export_document(export, _serve_command(export), accuracy, verification),
        export.path,
    )
    return verification is None or verification.passed


def _serve_command(export: Export) -> str | None:
    return (
        docker_command(export) if export.settings.file_format == "saved-model" else None
    )


def _print_export(export: Export, console: Console) -> None:
    from rich.markup import escape

    share = export.num_bytes / export.weight_bytes
    lines = [
        f"Exported model: {export.path}",
        f"Size:           {export.num_bytes / 1e6:.1f} MB, {share:.2f} times the "
        "weights in float32",
    ]
    command = _serve_command(export)
    if command is not None:
        lines.append(f"Serve it:       {command}")
    console.print(escape("\n".join(lines)), soft_wrap=True)


def docker_command(export: Export) -> str:
    """Returns the command that serves the newest version on this machine only."""
    model, inside = export.path.parent, f"/models/{export.name}"
    return " ".join(
        [
            "docker run --rm -p 127.0.0.1:8500:8500 -p 127.0.0.1:8501:8501",
            f"-v {shlex.quote(f'{model}:{inside}:ro')} tensorflow/serving",
            f"--model_config_file={inside}/models.config --enable_batching",
            f"--batching_parameters_file={inside}/batching.config",
        ]
    )


def _validation_images(
    run: FinishedRun, parser: argparse.ArgumentParser
) -> tuple[ImageSplit | None, str]:
    """Returns what the run was validated on, or None and why that is gone."""
    from keras_rsft.export.verification import validation_split

    try:
        return validation_split(run, _data_of(run, parser)), ""
    except (DataError, InvalidArgument, ImportError, OSError) as error:
        return None, str(error)


def _check_accuracy(
    run: FinishedRun,
    export: Export,
    images: ImageSplit | None,
    missing: str,
    output: Output,
) -> AccuracyCheck | None:
    """Prints and returns the accuracy on the validation split, if it can be had."""
    from rich.markup import escape

    from keras_rsft.export.verification import check_accuracy

    try:
        if images is None:
            raise DataError(missing)
        check = check_accuracy(run, export, images, progress=output.progress)
    except (DataError, ImportError) as error:
        text = f"The accuracy on the validation split was not measured: {error}"
        output.console.print(escape(text), soft_wrap=True)
        return None
    output.console.print(
        f"Accuracy on the validation split ({check.images} images): "
        f"{100 * check.exported:.1f} %; in float32 {100 * check.run:.1f} %. "
        f"Largest difference of a probability: {check.largest_difference:.4f}",
        soft_wrap=True,
    )
    return check


def _verify(
    run: FinishedRun,
    export: Export,
    images: ImageSplit | None,
    missing: str,
    output: Output,
) -> Verification:
    """Verifies an export and prints what was found."""
    from rich.markup import escape

    from keras_rsft.export.verification import sample_of, verify_export

    encoded = None if images is None else sample_of(images)
    if not encoded:
        reason = missing or "their files are gone."
        text = f"The run's images cannot be read, so generated ones are used: {reason}"
        output.console.print(escape(text), soft_wrap=True)
    found = verify_export(run, export, encoded or None, progress=output.progress)
    _print_verification(found, output.console)
    return found


def _print_verification(found: Verification, console: Console) -> None:
    from rich.table import Table

    limit = found.allowed_difference
    allowed = "" if limit is None else f" (allowed: {limit:.0e})"
    table = Table(title="In a fresh process", show_header=False)
    of_what = (
        "generated" if found.generated else f"{found.images} of the validation split"
    )
    table.add_row("Images", of_what)
    table.add_row("Largest difference", f"{found.largest_difference:.1e}{allowed}")
    table.add_row("Same label", f"{found.same_labels} of {found.images} images")
    if found.broken_refused is not None:
        table.add_row("Broken image", "refused" if found.broken_refused else "MISTAKEN")
    table.add_row("Loaded in", f"{found.load_seconds:.1f} s")
    table.add_row("Verdict", "as the run" if found.passed else "NOT as the run")
    console.print(table)


def _data_of(run: FinishedRun, parser: argparse.ArgumentParser) -> ImageData:
    """Loads the images that the run was trained on, by the command it has kept."""
    from keras_rsft.data import load_images

    command = shlex.split(run.config.get("command") or "")[1:]
    if command[:1] in (["fit"], ["search"]):
        try:
            return load_data(parser.parse_args(command))
        except SystemExit as stop:  # argparse, at a command of another version.
            raise DataError("the run's command cannot be read.") from stop
    if "data" not in run.config:
        raise DataError("the run does not say what data it was trained on.")
    return load_images(run.config["data"])
