"""Uses a trained model on files of images or texts."""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_rsft._storage import CLASSES_FILE, MODEL_FILE
from keras_rsft.data._images import decode_images
from keras_rsft.data._sources import (
    DEFAULT_TEXT_COLUMN,
    IMAGE_SUFFIXES,
    TEXT_SUFFIXES,
    read_table,
    text_of,
)
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._places import unusable_model
from keras_rsft.export._runtimes import load_exported
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training._run import read_class_names

BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one sample."""

    path: str
    label: str | None
    score: float | None
    error: str | None = None


Answers = tuple[list[str], np.ndarray, list[str | None]]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """A model, ready to answer."""

    takes: str
    classify: Callable[[list[bytes]], Answers]


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is asked about."""

    name: str
    content: bytes | None = None

    def read(self) -> tuple[bytes, str | None]:
        """Returns the bytes, and why they cannot be had, or None."""
        if self.content is not None:
            return self.content, None
        try:
            return Path(self.name).read_bytes(), None
        except OSError as error:
            return b"", error.strerror or str(error)


def predict_files(
    model: str | os.PathLike,
    files: Sequence[str | os.PathLike],
    *,
    text_column: str = DEFAULT_TEXT_COLUMN,
) -> Iterator[Prediction]:
    """Yields one prediction a file, in order; of a CSV file of texts one a row.

    Args:
        model: A run folder, a `.keras` file, a SavedModel written by
            `export_saved_model` (its folder, or the folder of its versions), or a
            `.tflite` or `.onnx` file.
        files: Image files; for a model that takes texts text files, and CSV files with
            a column of texts.
        text_column: That column's name. Default `text`.

    Raises:
        InvalidArgument: If the model cannot be found or is none of these.
        DataError: If it cannot be read, an exported file has no class names, or a CSV
            file has no such column.
        ImportError: If the file's runtime is not installed.
    """
    classifier = load_classifier(model)
    samples = samples_in(files, classifier, text_column=text_column)
    yield from predict_samples(classifier, samples)


def samples_in(
    files: Sequence[str | os.PathLike], classifier: Classifier, *, text_column: str
) -> list[Sample]:
    """Returns what the files hold: themselves, or the rows of CSV files of texts."""
    samples = [Sample(os.fspath(file)) for file in files]
    if classifier.takes != "texts":
        return samples
    return list(_text_samples(samples, text_column))


def predict_samples(
    classifier: Classifier, samples: Sequence[Sample]
) -> Iterator[Prediction]:
    """Yields one prediction a sample, in order."""
    for start in range(0, len(samples), BATCH_SIZE):
        yield from _predict_batch(classifier, samples[start : start + BATCH_SIZE])


def _text_samples(files: Sequence[Sample], text_column: str) -> Iterator[Sample]:
    for file in files:
        if not file.name.lower().endswith(".csv"):
            yield file
            continue
        for line, row in read_table(file.name, [text_column]):
            content = row[text_column].encode("utf-8", "surrogatepass")
            yield Sample(f"{file.name}:{line}", content)


def find_images(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Returns `find_files` of image files."""
    return find_files(paths, IMAGE_SUFFIXES, "image")


def find_texts(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Returns `find_files` of text files."""
    return find_files(paths, TEXT_SUFFIXES, "text")


def find_files(
    paths: Sequence[str | os.PathLike], suffixes: frozenset[str], kind: str
) -> list[str]:
    """Replaces folders and patterns by the files in them, sorted."""
    found: dict[str, None] = {}
    for path in map(os.fspath, paths):
        if os.path.isdir(path):
            files = _files_below(path, suffixes)
        elif not os.path.lexists(path) and glob.has_magic(path):
            matches = glob.glob(path, recursive=True)
            files = sorted(match for match in matches if os.path.isfile(match))
        else:
            files = [path]
        if not files:
            raise DataError(f"There is no {kind} file in {path}.")
        found |= dict.fromkeys(files)
    return list(found)


def _files_below(folder: str, suffixes: frozenset[str]) -> list[str]:
    found = []
    for file in Path(folder).rglob("*"):
        hidden = any(part[0] == "." for part in file.relative_to(folder).parts)
        if not hidden and file.suffix.lower() in suffixes and file.is_file():
            found.append(str(file))
    return sorted(found)


def load_classifier(model: str | os.PathLike) -> Classifier:
    """Loads what `predict_files` takes, for several calls of it."""
    path = Path(model)
    if (path / MODEL_FILE).is_file():
        return _keras_classifier(path / MODEL_FILE, read_class_names(path))
    if path.suffix == ".keras" and path.is_file():
        beside = path.with_name(CLASSES_FILE)
        names = read_class_names(path.parent) if beside.is_file() else None
        return _keras_classifier(path, names)
    if path.suffix in (".tflite", ".onnx") and path.is_file():
        exported = load_exported(path)
        return _images_classifier(
            exported.image_size, exported.class_names, exported.probabilities
        )
    saved = _saved_model_folder(path)
    if saved is not None:
        loaded = tf.saved_model.load(str(saved))
        serve = loaded.signatures.get("serving_default")
        inputs = {} if serve is None else serve.structured_input_signature[1]
        if "image_bytes" not in inputs:
            raise InvalidArgument(
                f"{saved} has no signature from `image_bytes`: "
                "it was not written by `export_saved_model`."
            )

        def classify(encoded: list[bytes]) -> Answers:
            served = serve(image_bytes=tf.constant(encoded, tf.string))
            labels = [label.decode() for label in served["label"].numpy()]
            return labels, served["score"].numpy(), _image_errors(served["valid"])

        return Classifier("images", classify)
    raise unusable_model(model)


def _keras_classifier(path: Path, class_names: Sequence[str] | None) -> Classifier:
    try:
        model = keras.saving.load_model(path, compile=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{path} cannot be read: {reason}") from error
    if isinstance(model, RSFTModel):
        model = model.model
    names = class_names or [str(i) for i in range(model.output_shape[-1])]
    if model.inputs[0].dtype == "string":

        def classify(encoded: list[bytes]) -> Answers:
            texts, errors = zip(*map(_text_or_error, encoded), strict=True)
            probabilities = np.asarray(
                model.predict_on_batch(tf.constant(texts, tf.string))
            )
            labels = [names[best] for best in probabilities.argmax(axis=-1)]
            return labels, probabilities.max(axis=-1), list(errors)

        return Classifier("texts", classify)
    if len(getattr(model, "input_shape", ())) != 4:
        raise InvalidArgument(
            f"The model must take images or texts. Received: {path}, which does not: "
            "a head takes features. Give the run folder instead."
        )
    size = tuple(model.input_shape[1:3])
    return _images_classifier(size, names, model.predict_on_batch)


def _text_or_error(encoded: bytes) -> tuple[bytes, str | None]:
    try:
        return text_of(encoded).encode(), None
    except DataError as error:
        return b"", str(error)


def _images_classifier(
    size: tuple[int, int],
    names: Sequence[str],
    probabilities_of: Callable[[np.ndarray], np.ndarray],
) -> Classifier:
    decode = tf.function(
        lambda encoded: decode_images(encoded, size),
        input_signature=[tf.TensorSpec((None,), tf.string)],
    )

    def classify(encoded: list[bytes]) -> Answers:
        images, valid = decode(tf.constant(encoded, tf.string))
        probabilities = np.asarray(probabilities_of(images.numpy()))
        labels = [names[best] for best in probabilities.argmax(axis=-1)]
        return labels, probabilities.max(axis=-1), _image_errors(valid)

    return Classifier("images", classify)


def _image_errors(valid: tf.Tensor) -> list[str | None]:
    error = "not an image that can be decoded"
    return [None if one else error for one in valid.numpy().tolist()]


def _saved_model_folder(path: Path) -> Path | None:
    if (path / "saved_model.pb").is_file():
        return path
    if not path.is_dir():
        return None
    versions = [child for child in path.iterdir() if child.name.isdigit()]
    versions = [child for child in versions if (child / "saved_model.pb").is_file()]
    return max(versions, key=lambda child: int(child.name), default=None)


def _predict_batch(
    classifier: Classifier, samples: Sequence[Sample]
) -> Iterator[Prediction]:
    encoded, unread = zip(*(sample.read() for sample in samples), strict=True)
    labels, scores, unusable = classifier.classify(list(encoded))
    for sample, label, score, *errors in zip(
        samples, labels, scores, unread, unusable, strict=True
    ):
        error = errors[0] or errors[1]
        if error is not None:
            yield Prediction(sample.name, None, None, error)
        else:
            yield Prediction(sample.name, label, float(score))
