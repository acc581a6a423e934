"""Checks a finished export: loaded in a fresh process, compared with its run.

The images are generated, of several sizes and kinds, with a broken one among them, so
that a check needs no data. Run as a program, this module is that fresh process.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_rsft.data.decode_many import decode_images
from keras_rsft.errors import DataError
from keras_rsft.export.from_run import Export, FinishedRun
from keras_rsft.export.runtimes import load_exported

SIZES = ((20, 30), (64, 64), (97, 61), (300, 400), (480, 640), (1200, 900))
ALLOWED = {"saved-model": 1e-5, "litert": 1e-3, "onnx": 1e-3}
TIMEOUT_SECONDS = 600
_IMAGES, _PROBABILITIES, _VALID, _SECONDS = (
    f"{name}.npy" for name in ("images", "probabilities", "valid", "seconds")
)


@dataclasses.dataclass(frozen=True)
class Verification:
    """What a fresh process answered, against the run's model in this one.

    Attributes:
        images: Number of images that can be decoded.
        same_labels: How many of them got the label that the run's model gives.
        largest_difference: Largest difference of any probability.
        allowed_difference: What the format may differ by; None where weights were
            narrowed, which a difference cannot judge.
        broken_refused: Whether the broken image was found not valid and the others
            valid; None for a format that takes decoded images.
        load_seconds: How long the fresh process took to load the export.
    """

    images: int
    same_labels: int
    largest_difference: float
    allowed_difference: float | None
    broken_refused: bool | None
    load_seconds: float

    @property
    def passed(self) -> bool:
        """Whether all is as it must be."""
        if self.broken_refused is False:
            return False
        if self.allowed_difference is None:
            return True
        close = self.largest_difference <= self.allowed_difference
        return close and self.same_labels == self.images


def verify_export(run: FinishedRun, export: Export) -> Verification:
    """Loads an export in a fresh process and compares its answers with the run's.

    Raises:
        DataError: If the fresh process fails; the message has its last line.
    """
    encoded = generated_images()
    files = tf.constant([*encoded, encoded[0][: len(encoded[0]) // 2]])
    images, valid = decode_images(files, tuple(run.model.input_shape[1:3]))
    expected = np.asarray(run.model.predict_on_batch(images.numpy()))
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        for number, file in enumerate(files.numpy()):
            (place / f"{number:02}.image").write_bytes(file)
        np.save(place / _IMAGES, images.numpy())
        _run_fresh_process(export.path, place)
        received = np.load(place / _PROBABILITIES)
        seconds = float(np.load(place / _SECONDS))
        refused = None
        if (place / _VALID).exists():
            refused = np.array_equal(np.load(place / _VALID), valid.numpy())
    good = valid.numpy()
    exact = export.settings.weight_dtype == "float32"
    same = expected[good].argmax(axis=-1) == received[good].argmax(axis=-1)
    return Verification(
        images=int(good.sum()),
        same_labels=int(same.sum()),
        largest_difference=float(np.abs(expected - received)[good].max()),
        allowed_difference=ALLOWED[export.settings.file_format] if exact else None,
        broken_refused=refused,
        load_seconds=seconds,
    )


def generated_images() -> list[bytes]:
    """Returns JPEG and PNG files of coloured patches, in each of `SIZES`."""
    rng = np.random.default_rng(0)
    files = []
    for height, width in SIZES:
        patches = rng.uniform(0, 255, (5, 6, 3)).astype("float32")
        smooth = tf.image.resize(patches, (height, width))
        pixels = tf.cast(tf.clip_by_value(smooth, 0, 255), tf.uint8)
        files += [tf.io.encode_jpeg(pixels).numpy(), tf.io.encode_png(pixels).numpy()]
    return files


def _run_fresh_process(export: Path, place: Path) -> None:
    try:
        result = subprocess.run(  # noqa: S603 - this very program, no shell.
            [sys.executable, "-m", __spec__.name, str(export), str(place)],
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


def _answer(export: Path, place: Path) -> None:
    started = time.perf_counter()
    if not export.is_dir():
        exported = load_exported(export)
        np.save(place / _SECONDS, time.perf_counter() - started)
        images = np.load(place / _IMAGES)
        np.save(place / _PROBABILITIES, exported.probabilities(images))
        return
    loaded = tf.saved_model.load(str(export))
    np.save(place / _SECONDS, time.perf_counter() - started)
    files = [file.read_bytes() for file in sorted(place.glob("*.image"))]
    served = loaded.signatures["serving_default"](image_bytes=tf.constant(files))
    np.save(place / _PROBABILITIES, served["probabilities"].numpy())
    np.save(place / _VALID, served["valid"].numpy())


if __name__ == "__main__":
    _answer(Path(sys.argv[1]), Path(sys.argv[2]))
