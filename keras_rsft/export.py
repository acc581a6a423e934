"""A trained model -> what TF Serving loads: encoded images in, labels out.

Owns the serving graph and its signatures. Decoding and resizing are the very
functions that training used, so that served images are seen as in training.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from keras_rsft.data import decode_image
from keras_rsft.errors import InvalidArgument


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    class_names: Sequence[str],
    version: int | None = None,
) -> Path:
    """Writes `DIRECTORY/VERSION` as a SavedModel with two signatures.

    `serving_default` takes `image_bytes`, a vector of encoded images, and gives
    `label` (string), `score` (float32), `probabilities` (float32,
    `(batch, classes)`) and `valid` (bool). An image that cannot be decoded is
    not valid, has an empty label and zero probabilities, and leaves the others
    alone. `serving_images` takes `images`, float32
    `(batch, height, width, 3)` in [0, 255], and gives the first three.

    Args:
        model: Images in [0, 255] to probabilities, as `Run.model`.
        directory: Folder named after the model; made if it does not exist.
        class_names: Names in the order of the probabilities.
        version: Number of the version, at least 1. Default: one more than the
            highest that the folder holds, or 1.

    Returns:
        The folder that was written.

    Raises:
        InvalidArgument: If that version exists, or the names do not fit.
    """
    directory = Path(directory)
    if len(class_names) != model.output_shape[-1]:
        raise InvalidArgument(
            f"The model has {model.output_shape[-1]} classes. "
            f"Received: {len(class_names)} class names."
        )
    version = _next_version(directory) if version is None else version
    target = directory / str(version)
    if version < 1 or target.exists():
        raise InvalidArgument(
            "The version must be a number of at least 1 that does not exist yet. "
            f"Received: {version}, in {directory}."
        )
    directory.mkdir(parents=True, exist_ok=True)
    # TF Serving looks for folders that are numbers: it never sees this one.
    partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory))
    try:
        with tempfile.TemporaryDirectory() as assets:
            labels = Path(assets) / "labels.txt"
            labels.write_text("\n".join(class_names) + "\n", encoding="utf-8")
            module = _ServingModule(model, class_names, labels)
            tf.saved_model.save(module, str(partial), signatures=module.signatures())
        partial.chmod(0o755)
        partial.rename(target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return target


def _next_version(directory: Path) -> int:
    if not directory.is_dir():
        return 1
    versions = [int(path.name) for path in directory.iterdir() if path.name.isdigit()]
    return max(versions, default=0) + 1


class _ServingModule(tf.Module):
    """Holds the variables, once, and the functions that TF Serving calls."""

    def __init__(self, model: keras.Model, class_names: Sequence[str], labels: Path):
        super().__init__()
        # Tracking the Keras model instead would store every weight twice.
        self._weights = [variable.value for variable in model.variables]
        self._labels_asset = tf.saved_model.Asset(str(labels))
        self._height, self._width = model.input_shape[1:3]
        self._class_names = list(class_names)
        self._forward = lambda images: model(images, training=False)

    def signatures(self) -> dict[str, tf.types.experimental.ConcreteFunction]:
        image_shape = (None, self._height, self._width, 3)
        encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")
        images = tf.TensorSpec(image_shape, tf.float32, name="images")
        self.serve_bytes = tf.function(self._serve_bytes, input_signature=[encoded])
        self.serve_images = tf.function(self._serve_images, input_signature=[images])
        return {
            "serving_default": self.serve_bytes.get_concrete_function(),
            "serving_images": self.serve_images.get_concrete_function(),
        }

    def _serve_images(self, images: tf.Tensor) -> dict[str, tf.Tensor]:
        # Some kernels refuse an empty batch: one blank image is added, then cut.
        count = tf.shape(images)[0]
        padding = tf.cast(count == 0, tf.int32)
        padded = tf.pad(images, [[0, padding], [0, 0], [0, 0], [0, 0]])
        probabilities = tf.cast(self._forward(padded), tf.float32)[:count]
        best = tf.argmax(probabilities, axis=-1, output_type=tf.int32)
        return {
            "label": tf.gather(tf.constant(self._class_names), best),
            "score": tf.reduce_max(probabilities, axis=-1),
            "probabilities": probabilities,
        }

    def _serve_bytes(self, image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        images, valid = self._decode(image_bytes)
        served = self._serve_images(images)
        return {
            "label": tf.where(valid, served["label"], ""),
            "score": tf.where(valid, served["score"], 0.0),
            "probabilities": tf.where(valid[:, None], served["probabilities"], 0.0),
            "valid": valid,
        }

    def _decode(self, image_bytes: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Decodes what can be decoded; the rest is blank and not valid."""
        count = tf.size(image_bytes, tf.int64)
        size = (self._height, self._width)
        decoded = (
            tf.data.Dataset.from_tensor_slices(image_bytes)
            .enumerate()
            .map(
                lambda index, one: (index, decode_image(one, size)),
                num_parallel_calls=tf.data.AUTOTUNE,
            )
            .ignore_errors()
            .batch(tf.maximum(count, 1))
        )
        nothing = (tf.zeros((0,), tf.int64), tf.zeros((0, *size, 3), tf.float32))
        index, images = decoded.reduce(nothing, lambda _, batch: batch)
        shape = tf.stack([count, *(tf.constant(n, tf.int64) for n in (*size, 3))])
        images = tf.scatter_nd(index[:, None], images, shape)
        valid = tf.scatter_nd(index[:, None], tf.ones_like(index), count[None]) > 0
        return tf.ensure_shape(images, (None, *size, 3)), valid
