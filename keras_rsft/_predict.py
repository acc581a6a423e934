"""Uses a trained model on files of images or texts."""

from __future__ import annotations

import collections
import dataclasses
import functools
import glob
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_rsft._storage import CLASSES_FILE, MODEL_FILE, read_class_names
from keras_rsft.backbones._build import UNREADABLE, first_line, load_keras_file
from keras_rsft.config import ENGINES, IMAGES, TEXTS, FeatureConfig, require_known
from keras_rsft.data import _sources
from keras_rsft.data._images import (
    decode_image,
    read_image,
    readable_reason,
    readable_suffixes,
    traced_image,
)
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._places import unusable_model
from keras_rsft.export._runtimes import load_exported
from keras_rsft.features._engines import FOLDER as ENGINES_FOLDER
from keras_rsft.features._extract import FrozenBackbone, default_cache_dir
from keras_rsft.model._rsft_model import RSFTModel

BATCH_SIZE = 32
# So many images are answered without tracing a graph first.
FEW = 4
# Fewer are answered before the engines have been measured.
MANY = 1000


@dataclasses.dataclass(frozen=True)
class Prediction:
    path: str
    label: str | None
    score: float | None
    error: str | None = None


# Labels, scores, and why a sample cannot be used, or None.
Answers = tuple[list[str], np.ndarray, list[str | None]]


@dataclasses.dataclass(frozen=True)
class Classifier:
    """Takes some samples, and how many there are in all."""

    takes: str
    classify: Callable[[list[bytes], int], Answers]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A file, or a text of a CSV file."""

    name: str
    content: bytes | None = None

    def read(self) -> tuple[bytes, str | None]:
        """Returns the bytes, and why they cannot be had, or None."""
        if self.content is not None:
            return self.content, None
        try:
            return read_image(self.name), None
        except DataError as error:
            return b"", str(error)
        except OSError as error:
            return b"", error.strerror or str(error)


def predict_files(
    model: str | os.PathLike,
    files: Sequence[str | os.PathLike],
    *,
    text_column: str = _sources.DEFAULT_TEXT_COLUMN,
    engine: str = "auto",
) -> Iterator[Prediction]:
    """Yields one prediction a file, in order; of a CSV file of texts one a row.

    Args:
        model: A run folder, a `.keras` file, a SavedModel written by
            `export_saved_model` (its folder, or the folder of its versions), or a
            `.tflite` or `.onnx` file.
        files: Image files; for a model that takes texts text files, and CSV files with
            a column of texts.
        text_column: That column's name. Default `text`.
        engine: What runs a Keras model of images, as in `FeatureConfig`. Default
            `"auto"`.

    Raises:
        InvalidArgument: If the model cannot be found or is none of these, or cannot be
            run by the engine, or this is not installed.
        DataError: If it cannot be read, an exported file has no class names, or a CSV
            file has no such column.
        ImportError: If the file's runtime is not installed.
    """
    classifier = load_classifier(model, engine=engine)
    samples = samples_in(files, classifier, text_column=text_column)
    yield from predict_samples(classifier, samples)


def samples_in(
    files: Sequence[str | os.PathLike], classifier: Classifier, *, text_column: str
) -> list[Sample]:
    """Returns the files themselves, or the rows of CSV files of texts."""
    samples = []
    for file in (os.fspath(file) for file in files):
        if classifier.takes != TEXTS or not file.lower().endswith(".csv"):
            samples.append(Sample(file))
            continue
        for line, row in _sources.read_table(file, [text_column]):
            content = row[text_column].encode("utf-8", "surrogatepass")
            samples.append(Sample(f"{file}:{line}", content))
    return samples


def predict_samples(
    classifier: Classifier, samples: Sequence[Sample]
) -> Iterator[Prediction]:
    for start in range(0, len(samples), BATCH_SIZE):
        batch = samples[start : start + BATCH_SIZE]
        encoded, unread = zip(*(sample.read() for sample in batch), strict=True)
        labels, scores, unusable = classifier.classify(list(encoded), len(samples))
        for sample, label, score, *errors in zip(
            batch, labels, scores, unread, unusable, strict=True
        ):
            error = errors[0] or errors[1]
            if error is not None:
                yield Prediction(sample.name, None, None, error)
            else:
                yield Prediction(sample.name, label, float(score))


def find_files(
    paths: Sequence[str | os.PathLike], kind: str
) -> tuple[list[str], collections.Counter[str]]:
    """Replaces folders and patterns by the image or text files in them, sorted.

    Also returns how many files in folders are not read, by their ending.
    """
    suffixes = _sources.TEXT_SUFFIXES if kind == TEXTS else readable_suffixes()
    found: dict[str, None] = {}
    skipped: collections.Counter[str] = collections.Counter()
    for path in (os.fspath(path) for path in paths):
        if os.path.isdir(path):
            names, others = _sources.files_below(path, "", suffixes)
            files = [str(Path(path, name)) for name in sorted(names)]
            skipped += others
        elif not os.path.lexists(path) and glob.has_magic(path):
            files = sorted(filter(os.path.isfile, glob.glob(path, recursive=True)))
        else:
            files = [path]
        if not files:
            more = f" {_sources.unread_sentence(skipped)}" if skipped else ""
            raise DataError(
                f"There is no {kind.removesuffix('s')} file in {path}.{more}"
            )
        found |= dict.fromkeys(files)
    return list(found), skipped


def load_classifier(
    model: str | os.PathLike,
    *,
    engine: str = "auto",
    on_note: Callable[[str], None] = lambda text: None,
) -> Classifier:
    """Loads what `predict_files` takes, for several calls of it."""
    FeatureConfig(engine=engine)  # Refuses one that is not there.
    path = Path(model)
    if (path / MODEL_FILE).is_file():
        path = path / MODEL_FILE
    if path.suffix == ".keras" and path.is_file():
        return _keras_classifier(path, engine, on_note)
    if path.is_dir() and not (path / "saved_model.pb").is_file():
        versions = [child for child in path.iterdir() if child.name.isdigit()]
        versions = [one for one in versions if (one / "saved_model.pb").is_file()]
        path = max(versions, key=lambda version: int(version.name), default=path)
    is_file = path.suffix in (".tflite", ".onnx") and path.is_file()
    if is_file or (path / "saved_model.pb").is_file():
        require_known("engine of an exported model", engine, ("auto",))
        exported = load_exported(path)
        return _images_classifier(
            exported.image_size,
            exported.class_names,
            lambda images, total: exported.probabilities(images),
        )
    raise unusable_model(model)


def _keras_classifier(
    path: Path, engine: str, on_note: Callable[[str], None]
) -> Classifier:
    try:
        model = load_keras_file(path)
    except InvalidArgument:
        raise
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read: {first_line(error)}.") from error
    if isinstance(model, RSFTModel):
        model = model.model
    count = model.output_shape[-1]
    names = tuple(map(str, range(count)))
    if path.name == MODEL_FILE or path.with_name(CLASSES_FILE).is_file():
        names = read_class_names(path.parent, count)
    if model.inputs[0].dtype == "string":
        require_known("engine of a model of texts", engine, ENGINES[:2])

        def classify(encoded: list[bytes], total: int) -> Answers:
            texts, errors = zip(*map(_text_or_error, encoded), strict=True)
            probabilities = model.predict_on_batch(tf.constant(texts, tf.string))
            return *_best(np.asarray(probabilities), names), list(errors)

        return Classifier(TEXTS, classify)
    if len(getattr(model, "input_shape", ())) != 4:
        raise InvalidArgument(
            f"The model must take images or texts. Received: {path}, which does not: "
            "a head takes features. Give the run folder instead."
        )

    @functools.cache
    def network(total: int) -> FrozenBackbone:
        used = "tensorflow" if engine == "auto" and total < MANY else engine
        return FrozenBackbone(model, num_images=total, engine=used, on_note=on_note)

    def probabilities(images: np.ndarray, total: int) -> np.ndarray:
        if total <= FEW:
            return np.asarray(model(images, training=False))
        batch = tf.constant(images)
        network(total).open_engine(default_cache_dir() / ENGINES_FOLDER, batch)
        return next(network(total).over([(None, batch)]))[1]

    return _images_classifier(tuple(model.input_shape[1:3]), names, probabilities)


def _text_or_error(encoded: bytes) -> tuple[bytes, str | None]:
    try:
        return _sources.text_of(encoded).encode(), None
    except DataError as error:
        return b"", str(error)


def _images_classifier(
    image_size: tuple[int, int],
    names: Sequence[str],
    probabilities: Callable[[np.ndarray, int], np.ndarray],
) -> Classifier:
    def classify(encoded: list[bytes], total: int) -> Answers:
        images = np.zeros((len(encoded), *image_size, 3), np.float32)
        errors: list[str | None] = [None] * len(encoded)
        # Tracing the graph that decodes takes longer than to decode some images.
        decode = decode_image if total <= FEW else traced_image

        def decode_one(row: int) -> None:
            try:
                images[row] = decode(tf.constant(encoded[row]), image_size)
            except tf.errors.OpError as error:
                errors[row] = readable_reason(error)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(decode_one, range(len(encoded))))
        return *_best(probabilities(images, total), names), errors

    return Classifier(IMAGES, classify)


def _best(
    probabilities: np.ndarray, names: Sequence[str]
) -> tuple[list[str], np.ndarray]:
    labels = [names[best] for best in probabilities.argmax(axis=-1)]
    return labels, probabilities.max(axis=-1)
