"""Uses a trained model on image files.

A room of its own since it is the one way back from a run or an export to
answers; it trains nothing and writes nothing.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.data import decode_image
from keras_rsft.errors import InvalidArgument
from keras_rsft.finetuning.run_folder import CLASSES_FILE, MODEL_FILE, read_class_names

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
        model: A run folder, a `.keras` file, or a SavedModel written by
            `export_saved_model` (its folder, or the folder of its versions).
        files: Image files.

    Raises:
        InvalidArgument: If the model cannot be found or is none of these.
    """
    classify = load_classifier(model)
    for start in range(0, len(files), BATCH_SIZE):
        yield from _predict_batch(classify, files[start : start + BATCH_SIZE])


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
    saved = _saved_model_folder(path)
    if saved is not None:
        return _saved_model_classifier(saved)
    raise InvalidArgument(
        "The model must be a run folder, a .keras file or an exported SavedModel. "
        f"Received: {model}{'' if path.exists() else ', which does not exist'}."
    )


def _keras_classifier(path: Path, class_names: Sequence[str] | None) -> Classifier:
    model = keras.saving.load_model(path, compile=False)
    size = model.input_shape[1:3]
    names = class_names or [str(i) for i in range(model.output_shape[-1])]

    def classify(encoded: list[bytes]) -> tuple[list[str], np.ndarray, list[bool]]:
        images = np.zeros((len(encoded), *size, 3), np.float32)
        valid = [True] * len(encoded)
        for i, one in enumerate(encoded):
            try:
                images[i] = decode_image(tf.constant(one), size)
            except tf.errors.InvalidArgumentError:
                valid[i] = False
        probabilities = np.asarray(model(images, training=False))
        labels = [names[best] for best in probabilities.argmax(axis=-1)]
        return labels, probabilities.max(axis=-1), valid

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
