"""Writes a model as a LiteRT file (`.tflite`), from decoded images.

The class names are appended to the file as an archive with `labels.txt` in it, as the
format's tools do: `unzip -p FILE labels.txt` shows them.
"""

from __future__ import annotations

import io
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from keras_rsft._storage import write_new_file
from keras_rsft.backend_in_use import require_tensorflow_backend
from keras_rsft.errors import InvalidArgument
from keras_rsft.export.places import check_file
from keras_rsft.export.saved_model import ForwardPass, check_class_names

LITERT_WEIGHT_DTYPES = ("float32", "float16", "int8")
LABELS_MEMBER = "labels.txt"


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    class_names: Sequence[str],
    weight_dtype: str = "float32",
) -> Path:
    """Writes a LiteRT model from `images` to `probabilities`.

    It takes float32 images `(batch, height, width, 3)` in [0, 255], at the size that
    the model was trained with, any batch after `resize_tensor_input`, and needs
    nothing but LiteRT's own operators.

    Args:
        model: Images in [0, 255] to probabilities, as `Run.model`.
        path: The file to write; it must not exist.
        class_names: Names in the order of the probabilities, kept in the file.
        weight_dtype: `"float32"`, `"float16"`, or `"int8"` for dynamic-range
            quantisation: weights in 8 bits, activations quantised as they come.
            Default float32.

    Returns:
        The file.

    Raises:
        InvalidArgument: If the file exists or an argument does not fit.
    """
    require_tensorflow_backend("`export_litert`")
    path = check_file(path, "tflite")
    check_class_names(model, class_names)
    if weight_dtype not in LITERT_WEIGHT_DTYPES:
        raise InvalidArgument(
            f"LiteRT's `weight_dtype` must be one of {', '.join(LITERT_WEIGHT_DTYPES)}."
            f" Received: {weight_dtype!r}."
        )
    forward = ForwardPass(model)
    module = tf.Module()
    module.forward = forward
    module.serve = tf.function(
        lambda images: {"probabilities": forward(images)},
        input_signature=[forward.images_spec()],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.serve.get_concrete_function()], module
    )
    if weight_dtype != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if weight_dtype == "float16":
        converter.target_spec.supported_types = [tf.float16]
    content = converter.convert()
    write_new_file(path, _with_labels(content, class_names))
    return path


def _with_labels(content: bytes, class_names: Sequence[str]) -> bytes:
    file = io.BytesIO(content)
    file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file, "a") as archive:
        # A fixed time, so that the same model gives the same file.
        member = zipfile.ZipInfo(LABELS_MEMBER, date_time=(1980, 1, 1, 0, 0, 0))
        archive.writestr(member, "\n".join(class_names) + "\n")
    return file.getvalue()
