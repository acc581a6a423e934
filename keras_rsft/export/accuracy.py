"""What narrower weights cost: an export against its run on the validation images."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import keras
import numpy as np

from keras_rsft.data import ImageData, ImageSplit
from keras_rsft.errors import DataError
from keras_rsft.export.from_run import Export, FinishedRun
from keras_rsft.export.runtimes import load_exported
from keras_rsft.progress import progress_bar
from keras_rsft.result_folder import read_csv

BATCH_SIZE = 32


@dataclasses.dataclass(frozen=True)
class AccuracyCheck:
    """What narrower weights cost on the validation split."""

    run: float
    exported: float
    images: int
    largest_difference: float


def validation_split(run: FinishedRun, data: ImageData) -> ImageSplit:
    """Returns the images that the run was validated on."""
    known, found = set(_validation_labels(run)), data.validation.ids.tolist()
    if not known or not known <= set(found):
        raise DataError(
            f"the run was validated on {len(known)} images, and the data now have "
            f"{len(found)} with other ids."
        )
    # Corrections may have dropped some.
    return data.validation.take(np.flatnonzero([one in known for one in found]))


def check_accuracy(
    run: FinishedRun, export: Export, validation: ImageSplit, *, progress: bool = True
) -> AccuracyCheck:
    """Compares an export with its run on the validation images and their labels."""
    labels = _validation_labels(run)
    given = np.array([labels[sample_id] for sample_id in validation.ids.tolist()])
    exported = load_exported(export.path)
    forward = _forward_of(run.model)
    hits, exported_hits, images, largest = 0, 0, 0, 0.0
    with progress_bar(
        "Validation", total=len(validation), unit="images", visible=progress
    ) as advance:
        batches = validation.images(run.model.input_shape[1:3]).batch(BATCH_SIZE)
        for index, batch in batches.as_numpy_iterator():
            expected, received = forward(batch), exported.probabilities(batch)
            hits += int(np.sum(expected.argmax(axis=-1) == given[index]))
            exported_hits += int(np.sum(received.argmax(axis=-1) == given[index]))
            images += len(index)
            largest = max(largest, float(np.abs(expected - received).max()))
            advance(len(index))
    if images == 0:
        raise DataError("none of the validation images can be read.")
    return AccuracyCheck(hits / images, exported_hits / images, images, largest)


def _forward_of(model: keras.Model) -> Callable[[np.ndarray], np.ndarray]:
    return lambda images: np.asarray(model.predict_on_batch(images), np.float32)


def _validation_labels(run: FinishedRun) -> dict[str, int]:
    numbers = {name: number for number, name in enumerate(run.class_names)}
    samples = run.folder / "samples.csv"
    if not samples.is_file():
        return {}
    return {
        row["id"]: numbers[row["given_label"]]
        for row in read_csv(samples)
        if row["split"] == "validation"
    }
