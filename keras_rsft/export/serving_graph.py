"""The graph that a server runs: encoded images in, labels out.

Owns the signatures and how weights are stored. Decoding and resizing are the very
functions that training used, so that served images are seen as in training.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones.foreign import require_tensorflow
from keras_rsft.data.decode_many import decode_images

MAX_FLOAT16 = float(np.finfo(np.float16).max)
# A variable costs about 3 kB of graph, to read, to save and to restore it. A network
# has many small ones (BatchNorm has four a layer), which would make a small model a
# tenth larger, so they share one. As constants they would be folded into their
# neighbours, which changes the answers in the fifth digit.
MAX_PACKED_BYTES = 16_384

Outputs = dict[str, tf.Tensor]


class ForwardPass(tf.Module):
    """A Keras model as a function of images, with each weight held once."""

    def __init__(
        self, model: keras.Model, *, float16: bool = False, pack: bool = False
    ):
        super().__init__()
        require_tensorflow(model)
        self.image_size = tuple(model.input_shape[1:3])
        stored = [(v, _as_stored(v.value, float16)) for v in model.variables]
        small = [one for one in stored if pack and _is_small(one[1])]
        packed = {id(v) for v, _ in small}
        alone = [one for one in stored if id(one[0]) not in packed]
        packs = _packs(small)
        self._weights = [kept for _, kept in alone] + [one.values for one in packs]

        # A closure: what is an attribute of a module is saved with it, and tracking
        # the Keras model would store every weight twice.
        def predict(images: tf.Tensor) -> tf.Tensor:
            state = alone + [pair for one in packs for pair in one.unpacked()]
            widened = [(v, tf.cast(kept, v.dtype)) for v, kept in state]
            with keras.StatelessScope(state_mapping=widened):
                return tf.cast(model(images, training=False), tf.float32)

        self._predict = predict

    def __call__(self, images: tf.Tensor) -> tf.Tensor:
        """Returns probabilities, float32 `(batch, classes)`."""
        return self._predict(images)

    def images_spec(self, batch: int | None = None) -> tf.TensorSpec:
        """Returns what the pass takes: float32 `(batch, height, width, 3)`."""
        return tf.TensorSpec((batch, *self.image_size, 3), tf.float32, name="images")


@dataclasses.dataclass(frozen=True)
class _Pack:
    """Small weights of one type, end to end in one variable."""

    variables: tuple[keras.Variable, ...]
    values: tf.Variable

    def unpacked(self) -> list[tuple[keras.Variable, tf.Tensor]]:
        """Returns each weight with its part of the values."""
        shapes = [tuple(variable.shape) for variable in self.variables]
        parts = tf.split(self.values, [math.prod(shape) for shape in shapes])
        shaped = (
            part if len(shape) == 1 else tf.reshape(part, shape)
            for part, shape in zip(parts, shapes, strict=True)
        )
        return list(zip(self.variables, shaped, strict=True))


def _packs(small: Sequence[tuple[keras.Variable, tf.Variable]]) -> list[_Pack]:
    by_type: dict[tf.DType, list[tuple[keras.Variable, tf.Variable]]] = {}
    for pair in small:
        by_type.setdefault(pair[1].dtype, []).append(pair)
    return [
        _Pack(
            tuple(variable for variable, _ in pairs),
            tf.Variable(tf.concat([tf.reshape(kept, [-1]) for _, kept in pairs], 0)),
        )
        for pairs in by_type.values()
    ]


def _is_small(stored: tf.Variable) -> bool:
    return stored.shape.num_elements() * stored.dtype.size <= MAX_PACKED_BYTES


def _as_stored(weight: tf.Variable, float16: bool) -> tf.Variable:
    if float16 and _fits_float16(weight):
        return tf.Variable(tf.cast(weight, tf.float16))
    return weight


def _fits_float16(weight: tf.Variable) -> bool:
    # Vectors (biases, BatchNorm, standardisation) weigh little and may hold variances
    # far outside the range.
    if weight.dtype != tf.float32 or weight.shape.rank < 2:
        return False
    return bool(tf.reduce_max(tf.abs(weight)) <= MAX_FLOAT16)


class ServingGraph(tf.Module):
    """The functions that TF Serving calls, with what they need."""

    def __init__(
        self,
        forward: ForwardPass,
        class_names: Sequence[str],
        labels_file: Path,
        *,
        top_k: int | None = None,
    ):
        super().__init__()
        self._labels_asset = tf.saved_model.Asset(str(labels_file))
        self._forward = forward
        self._class_names = list(class_names)
        self._top_k = top_k

    def signatures(self) -> dict[str, tf.types.experimental.ConcreteFunction]:
        """Traces `serving_default` and `serving_images`."""
        encoded = tf.TensorSpec((None,), tf.string, name="image_bytes")
        images = self._forward.images_spec()
        # Not attributes: those would be traced, and saved, once more.
        serve_images = tf.function(
            self._serve_images, input_signature=[images]
        ).get_concrete_function()
        serve_bytes = tf.function(
            lambda image_bytes: self._serve_bytes(image_bytes, serve_images),
            input_signature=[encoded],
        ).get_concrete_function()
        return {"serving_default": serve_bytes, "serving_images": serve_images}

    def _serve_images(self, images: tf.Tensor) -> Outputs:
        # Some kernels refuse an empty batch: one blank image is added, then cut.
        count = tf.shape(images)[0]
        padding = tf.cast(count == 0, tf.int32)
        padded = tf.pad(images, [[0, padding], [0, 0], [0, 0], [0, 0]])
        probabilities = self._forward(padded)[:count]
        # A constant, not a lookup table: a table would need an initialisation step.
        names = tf.constant(self._class_names)
        best = tf.argmax(probabilities, axis=-1, output_type=tf.int32)
        served = {
            "label": tf.gather(names, best),
            "score": tf.reduce_max(probabilities, axis=-1),
            "probabilities": probabilities,
        }
        if self._top_k is not None:
            scores, positions = tf.math.top_k(probabilities, k=self._top_k)
            served |= {"top_labels": tf.gather(names, positions), "top_scores": scores}
        return served

    def _serve_bytes(
        self, image_bytes: tf.Tensor, serve_images: Callable[..., Outputs]
    ) -> Outputs:
        images, valid = decode_images(image_bytes, self._forward.image_size)
        served = serve_images(images=images)  # A call: one copy of the model.
        blanked = {name: _blank(value, valid) for name, value in served.items()}
        return blanked | {"valid": valid}


def _blank(value: tf.Tensor, valid: tf.Tensor) -> tf.Tensor:
    """Returns empty text or zeros where an image is not valid."""
    mask = tf.reshape(valid, [-1] + [1] * (value.shape.rank - 1))
    return tf.where(mask, value, tf.zeros([], value.dtype))
