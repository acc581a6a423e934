"""The command `predict`: its options, and how answers are written.

Like `cli.py`, imports nothing heavy until the command runs.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from keras_rsft.predict import Prediction

from keras_rsft._storage import guarded_cell
from keras_rsft.cli_options import add_output_options
from keras_rsft.cli_texts import DEFAULT_TEXT_COLUMN
from keras_rsft.export.places import check_exists

OUTPUT_FORMATS = ("tsv", "csv", "jsonl")
_ESCAPES = str.maketrans({"\\": "\\\\", "\t": "\\t", "\n": "\\n", "\r": "\\r"})


def add_predict(commands: argparse._SubParsersAction) -> None:
    """Adds the command and its options."""
    predict = commands.add_parser(
        "predict",
        help="use a trained model on image files or texts",
        epilog="Exit status: 0 if every file was answered, 1 if some could not be read "
        "(they are listed on standard error, and the others are answered), 2 for a "
        "command that cannot be run.",
    )
    predict.add_argument(
        "model",
        metavar="MODEL",
        help="run folder, .keras file, exported model, .tflite or .onnx file",
    )
    predict.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="image files, folders, or quoted patterns such as 'new/**/*.jpg'; for a "
        "model of texts .txt files and CSV files",
    )
    predict.add_argument(
        "--text-column",
        metavar="COLUMN",
        default=DEFAULT_TEXT_COLUMN,
        help="column of the texts in a CSV file; default: %(default)s",
    )
    predict.add_argument(
        "--output-format",
        choices=OUTPUT_FORMATS,
        default=OUTPUT_FORMATS[0],
        help="tab-separated lines, CSV with a header, or a JSON object a line; "
        "default: %(default)s",
    )
    add_output_options(predict, json=False)


def run_predict(arguments: argparse.Namespace) -> bool:
    """Prints an answer for each sample that can be read, and lists the others.

    Returns:
        Whether every file was answered.

    Raises:
        InvalidArgument: If there is no such model.
    """
    check_exists(arguments.model)  # Before anything heavy is imported.
    from keras_rsft.predict import (
        find_images,
        find_texts,
        load_classifier,
        predict_samples,
        samples_in,
    )
    from keras_rsft.progress import progress_bar

    classifier = load_classifier(arguments.model)
    find = find_texts if classifier.takes == "texts" else find_images
    files = find(arguments.paths)
    samples = samples_in(files, classifier, text_column=arguments.text_column)
    write = answer_writer(arguments.output_format, sys.stdout)
    unreadable = []
    # Answers and a bar on the same terminal would write over each other.
    visible = not (arguments.quiet or sys.stdout.isatty())
    with progress_bar(
        "Predicting", total=len(samples), unit=classifier.takes, visible=visible
    ) as advance:
        for prediction in predict_samples(classifier, samples):
            if prediction.error is None:
                write(prediction)
            else:
                unreadable.append(prediction)
            advance(1)
    for prediction in unreadable:
        print(f"{prediction.path}: {prediction.error}", file=sys.stderr)
    sys.stdout.flush()  # A pipe that nobody reads any more fails here, not at exit.
    return not unreadable


def answer_writer(output_format: str, file: TextIO) -> Callable[[Prediction], None]:
    r"""Returns a function that writes one answer.

    A name stays in its cell: a CSV has a quote before what a spreadsheet would run as a
    formula, tab-separated lines have `\t`, `\n`, `\r` and `\\` for a tab, the ends of
    lines and a backslash.

    Args:
        output_format: One of `OUTPUT_FORMATS`.
        file: Where to; a CSV's header is written at once.
    """
    if output_format == "csv":
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["path", "label", "score"])
        return lambda one: writer.writerow(
            [guarded_cell(one.path), guarded_cell(one.label), f"{one.score:.6f}"]
        )
    if output_format == "jsonl":

        def write_json(one: Prediction) -> None:
            answer = {"path": one.path, "label": one.label, "score": one.score}
            print(json.dumps(answer, ensure_ascii=False), file=file)

        return write_json

    def write_line(one: Prediction) -> None:
        names = (name.translate(_ESCAPES) for name in (one.path, one.label))
        print(*names, f"{one.score:.4f}", sep="\t", file=file)

    return write_line
