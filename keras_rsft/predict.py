"""Uses a trained model on image files.

A room of its own since it is the one way back from a run or an export to
answers; it trains nothing and writes nothing.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.data.decode_many import decode_images
from keras_rsft.data.folder import IMAGE_SUFFIXES
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export.places import unusable_model
from keras_rsft.export.runtimes import load_exported
from keras_rsft.finetuning.run_folder import read_class_names
from keras_rsft.run_files import CLASSES_FILE, MODEL_FILE

BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The answer for one file.

    Attributes:
        path: The file, as it was given.
        label: Most probable class, or None if the file cannot be read.
        score: Its probability in [0, 1], or None.
        error: Why the file cannot be read, or None.
    """

    path: str
    label: str | None
    score: float | None
    error: str | None = None


def predict_files(
    model: str | os.PathLike, files: Sequence[str | os.PathLike]
) -> Iterator[Prediction]:
    """Yields one prediction a file, in order.

    Args:
        model: A run folder, a `.keras` file, a SavedModel written by
            `export_saved_model` (its folder, or the folder of its versions), or a
            `.tflite` or `.onnx` file.
        files: Image files.

    Raises:
        InvalidArgument: If the model cannot be found or is none of these.
        DataError: If it cannot be read, or an exported file has no class names.
        ImportError: If the file's runtime is not installed.
    """
    classify = load_classifier(model)
    for start in range(0, len(files), BATCH_SIZE):
        yield from _predict_batch(classify, files[start : start + BATCH_SIZE])


def find_images(paths: Sequence[str | os.PathLike]) -> list[str]:
    """Replaces folders and patterns by the image files in them, sorted.

    Args:
        paths: Files, which are kept as they are; folders, searched to any depth for
            names with the suffix of an image; and patterns with `*`, `?`, `[...]`, or
            `**` for folders of any depth.

    Returns:
        The files, each once.

    Raises:
        DataError: If a folder or pattern has none.
    """
    found: dict[str, None] = {}
    for path in map(os.fspath, paths):
        if os.path.isdir(path):
            files = _images_below(path)
        elif not os.path.lexists(path) and glob.has_magic(path):
            matches = glob.glob(path, recursive=True)
            files = sorted(match for match in matches if os.path.isfile(match))
        else:
            files = [path]
        if not files:
            raise DataError(f"There is no image file in {path}.")
        found |= dict.fromkeys(files)
    return list(found)


def _images_below(folder: str) -> list[str]:
    files = (file for file in Path(folder).rglob("*") if file.is_file())
    return sorted(str(file) for file in files if file.suffix.lower() in IMAGE_SUFFIXES)


Classifier = Callable[[list[bytes]], tuple[list[str], np.ndarray, list[bool]]]


def load_classifier(model: str | os.PathLike) -> Classifier:
    """Returns a function from encoded images to labels, scores and validity."""
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
        return _saved_model_classifier(saved)
    raise unusable_model(model)


def _keras_classifier(path: Path, class_names: Sequence[str] | None) -> Classifier:
    try:
        model = keras.saving.load_model(path, compile=False)
    except (ValueError, TypeError, KeyError, OSError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise DataError(f"{path} cannot be read: {reason}") from error
    if len(getattr(model, "input_shape", ())) != 4:
        raise InvalidArgument(
            f"The model must take images. Received: {path}, which does not: a head "
            "takes features. Give the run folder instead."
        )
    names = class_names or [str(i) for i in range(model.output_shape[-1])]
    size = tuple(model.input_shape[1:3])
    return _images_classifier(size, names, model.predict_on_batch)


def _images_classifier(
    size: tuple[int, int],
    names: Sequence[str],
    probabilities_of: Callable[[np.ndarray], np.ndarray],
) -> Classifier:
    decode = tf.function(
        lambda encoded: decode_images(encoded, size),
        input_signature=[tf.TensorSpec((None,), tf.string)],
    )

    def classify(encoded: list[bytes]) -> tuple[list[str], np.ndarray, list[bool]]:
        images, valid = decode(tf.constant(encoded, tf.string))
        probabilities = np.asarray(probabilities_of(images.numpy()))
        labels = [names[best] for best in probabilities.argmax(axis=-1)]
        return labels, probabilities.max(axis=-1), valid.numpy().tolist()

    return classify


def _saved_model_folder(path: Path) -> Path | None:
    if (path / "saved_model.pb").is_file():
        return path
    if not path.is_dir():
        return None
    versions = [child for child in path.iterdir() if child.name.isdigit()]
    versions = [child for child in versions if (child / "saved_model.pb").is_file()]
    return max(versions, key=lambda child: int(child.name), default=None)


def _saved_model_classifier(folder: Path) -> Classifier:
    loaded = tf.saved_model.load(str(folder))
    serve = loaded.signatures.get("serving_default")
    inputs = {} if serve is None else serve.structured_input_signature[1]
    if "image_bytes" not in inputs:
        raise InvalidArgument(
            f"{folder} has no signature from `image_bytes`: "
            "it was not written by `export_saved_model`."
        )

    def classify(encoded: list[bytes]) -> tuple[list[str], np.ndarray, list[bool]]:
        served = serve(image_bytes=tf.constant(encoded, tf.string))
        labels = [label.decode() for label in served["label"].numpy()]
        return labels, served["score"].numpy(), served["valid"].numpy().tolist()

    return classify


def _predict_batch(
    classify: Classifier, files: Sequence[str | os.PathLike]
) -> Iterator[Prediction]:
    encoded, errors = zip(*(_read(file) for file in files), strict=True)
    labels, scores, valid = classify(list(encoded))
    for file, label, score, is_valid, error in zip(
        files, labels, scores, valid, errors, strict=True
    ):
        if error is None and not is_valid:
            error = "not an image that can be decoded"
        if error is not None:
            yield Prediction(str(file), None, None, error)
        else:
            yield Prediction(str(file), label, float(score))


def _read(file: str | os.PathLike) -> tuple[bytes, str | None]:
    try:
        return Path(file).read_bytes(), None
    except OSError as error:
        return b"", error.strerror or str(error)
