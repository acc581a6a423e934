"""Checks an export against its run."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rsft._progress import progress_bar
from keras_rsft._storage import SAMPLES_FILE, read_csv
from keras_rsft.data._images import at_most_pixels, decode_images
from keras_rsft.data._samples import ImageData, ImageSplit
from keras_rsft.errors import DataError
from keras_rsft.export._export_run import Export, FinishedRun
from keras_rsft.export._runtimes import load_exported

MOST_IMAGES, BATCH_SIZE = 128, 32
TIMEOUT_SECONDS = 600

# Accuracy -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AccuracyCheck:
    """What narrower weights cost on the validation split."""

    run: float
    exported: float
    images: int
    largest_difference: float


def validation_split(run: FinishedRun, data: ImageData) -> ImageSplit:
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
    labels = _validation_labels(run)
    given = np.array([labels[sample_id] for sample_id in validation.ids.tolist()])
    exported = load_exported(export.path)
    hits, exported_hits, images, largest = 0, 0, 0, 0.0
    with progress_bar(
        "Validation", total=len(validation), unit="images", visible=progress
    ) as advance:
        batches = validation.images(run.model.input_shape[1:3]).batch(BATCH_SIZE)
        for index, batch in batches.as_numpy_iterator():
            expected = np.asarray(run.model.predict_on_batch(batch), np.float32)
            received = exported.probabilities(batch)
            hits += int(np.sum(expected.argmax(axis=-1) == given[index]))
            exported_hits += int(np.sum(received.argmax(axis=-1) == given[index]))
            images += len(index)
            largest = max(largest, float(np.abs(expected - received).max()))
            advance(len(index))
    if images == 0:
        raise DataError("none of the validation images can be read.")
    return AccuracyCheck(hits / images, exported_hits / images, images, largest)


def _validation_labels(run: FinishedRun) -> dict[str, int]:
    numbers = {name: number for number, name in enumerate(run.class_names)}
    samples = run.folder / SAMPLES_FILE
    return {
        row["id"]: numbers[row["given_label"]]
        for row in (read_csv(samples) if samples.is_file() else ())
        if row["split"] == "validation"
    }


# Verification -------------------------------------------------------------------------

SIZES = ((20, 30), (64, 64), (97, 61), (300, 400), (480, 640), (1200, 900))
ALLOWED = {"saved-model": 1e-5, "litert": 1e-3, "onnx": 1e-3}
_IMAGES, _ANSWERS = "images.npy", "answers.npz"


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a fresh process answered, against the run's model in this one."""

    images: int
    generated: bool
    same_labels: int
    largest_difference: float
    allowed_difference: float | None
    broken_refused: bool | None
    load_seconds: float

    @property
    def passed(self) -> bool:
        if self.broken_refused is False:
            return False
        if self.allowed_difference is None:
            return True
        close = self.largest_difference <= self.allowed_difference
        return close and self.same_labels == self.images


def verify_export(
    run: FinishedRun,
    export: Export,
    images: Sequence[bytes] | None = None,
    *,
    progress: bool = True,
) -> Verification:
    """Loads an export in a fresh process and compares its answers with the run's."""
    encoded = list(_generated_images() if images is None else images)
    encoded.append(encoded[0][: len(encoded[0]) // 2])
    size = run.model.input_shape[1:3]
    with at_most_pixels(export.settings.max_pixels):
        found_in = decode_images(tf.constant(encoded), size)
    decoded, valid = (one.numpy() for one in found_in)
    if not valid.any():
        raise DataError("None of the images to compare on can be decoded.")
    answers = []
    with (
        tempfile.TemporaryDirectory() as name,
        progress_bar(
            "The run", total=2 * len(encoded), unit="images", visible=progress
        ) as advance,
    ):
        folder = Path(name)
        for number, file in enumerate(encoded):
            (folder / f"{number:03}.image").write_bytes(file)
        np.save(folder / _IMAGES, decoded)
        for batch in _batches(decoded):
            answers.append(np.asarray(run.model.predict_on_batch(batch), np.float32))
            advance(len(batch))
        advance(0, "A fresh process")
        _run_fresh_process(export.path, folder)
        advance(len(encoded))
        with np.load(folder / _ANSWERS) as file:
            found = dict(file)
    expected, received = np.concatenate(answers), found["probabilities"]
    exact = export.settings.weight_dtype == "float32"
    same = expected[valid].argmax(axis=-1) == received[valid].argmax(axis=-1)
    refused = np.array_equal(found["valid"], valid) if "valid" in found else None
    return Verification(
        images=int(valid.sum()),
        generated=images is None,
        same_labels=int(same.sum()),
        largest_difference=float(np.abs(expected - received)[valid].max()),
        allowed_difference=ALLOWED[export.settings.file_format] if exact else None,
        broken_refused=refused,
        load_seconds=float(found["seconds"]),
    )


def sample_of(split: ImageSplit) -> list[bytes]:
    """Returns image files of a split, `MOST_IMAGES` at most, evenly spread."""
    count = min(len(split), MOST_IMAGES)
    encoded = []
    for index in np.linspace(0, len(split) - 1, count).round().astype(int):
        with contextlib.suppress(OSError):
            encoded.append(split.encoded(int(index)))
    return encoded


def _generated_images() -> list[bytes]:
    """Returns JPEG and PNG files of coloured patches, in each of `SIZES`."""
    rng = np.random.default_rng(0)
    files = []
    for height, width in SIZES:
        patches = rng.uniform(0, 255, (5, 6, 3)).astype("float32")
        smooth = tf.image.resize(patches, (height, width))
        pixels = tf.cast(tf.clip_by_value(smooth, 0, 255), tf.uint8)
        files += [tf.io.encode_jpeg(pixels).numpy(), tf.io.encode_png(pixels).numpy()]
    return files


def _batches(items: Any) -> Iterator[Any]:
    return (items[at : at + BATCH_SIZE] for at in range(0, len(items), BATCH_SIZE))


def _run_fresh_process(export: Path, folder: Path) -> None:
    try:
        result = subprocess.run(  # noqa: S603 - this very program, no shell.
            [sys.executable, "-m", __spec__.name, str(export), str(folder)],
            capture_output=True,
            text=True,
            check=False,
            timeout=TIMEOUT_SECONDS,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except subprocess.TimeoutExpired as error:
        raise DataError(
            f"{export} did not answer in a fresh process for {TIMEOUT_SECONDS} s."
        ) from error
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or [f"status {result.returncode}"]
        raise DataError(f"{export} failed in a fresh process: {lines[-1]}")


def _answer(export: Path, folder: Path) -> None:
    started = time.perf_counter()
    if export.is_dir():
        loaded = tf.saved_model.load(str(export))
        seconds = time.perf_counter() - started
        serve = loaded.signatures["serving_default"]
        files = [file.read_bytes() for file in sorted(folder.glob("*.image"))]
        answers = [serve(image_bytes=tf.constant(batch)) for batch in _batches(files)]
        names = ["probabilities", "valid"]
    else:
        exported = load_exported(export)
        seconds = time.perf_counter() - started
        images = np.load(folder / _IMAGES)
        batches = map(exported.probabilities, _batches(images))
        answers, names = [{"probabilities": one} for one in batches], ["probabilities"]
    found: dict[str, Any] = {"seconds": seconds}
    for name in names:
        found[name] = np.concatenate([one[name] for one in answers])
    np.savez(folder / _ANSWERS, **found)


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
