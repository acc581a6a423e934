"""Writes LiteRT and ONNX files."""

from __future__ import annotations

import io
import json
import logging
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft._runtime import import_extra, require_tensorflow_backend
from keras_rsft._storage import write_new_file
from keras_rsft.backbones import _foreign
from keras_rsft.backbones._build import leaf_layers
from keras_rsft.config import ExportConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.export._places import check_file
from keras_rsft.export._saved_model import ForwardPass, checked_model

if TYPE_CHECKING:
    import onnx


# LiteRT -------------------------------------------------------------------------------

LABELS_MEMBER = "labels.txt"


def export_litert(
    model: keras.Model,
    path: str | os.PathLike,
    *,
    class_names: Sequence[str],
    weight_dtype: str = "float32",
) -> Path:
    """Writes a LiteRT model from `images` to `probabilities`."""
    require_tensorflow_backend("`export_litert`")
    path = check_file(path, "tflite")
    model = checked_model(model, class_names)
    ExportConfig("litert", weight_dtype)
    forward = ForwardPass(model)
    module = tf.Module()
    module.forward = forward
    module.serve = tf.function(
        lambda images: {"probabilities": forward.predict(images)},
        input_signature=[forward.images_spec],
    )
    converter = tf.lite.TFLiteConverter.from_concrete_functions(
        [module.serve.get_concrete_function()], module
    )
    if weight_dtype != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if weight_dtype == "float16":
        converter.target_spec.supported_types = [tf.float16]
    file = io.BytesIO(converter.convert())
    file.seek(0, os.SEEK_END)
    with zipfile.ZipFile(file, "a") as archive:
        # A fixed time, so that the same model gives the same file.
        member = zipfile.ZipInfo(LABELS_MEMBER, date_time=(1980, 1, 1, 0, 0, 0))
        archive.writestr(member, "\n".join(class_names) + "\n")
    write_new_file(path, file.getvalue())
    return path


# ONNX ---------------------------------------------------------------------------------

OPSET = 17
CLASS_NAMES_KEY = "class_names"
# Opsets that tf2onnx writes.
_OLDEST, _NEWEST_OF_TF2ONNX = 13, 18
_PREFIX = "backbone/"


def export_onnx(
    model: keras.Model, path: str | os.PathLike, *, class_names: Sequence[str]
) -> Path:
    """Writes an ONNX model from `images` to `probabilities`."""
    require_tensorflow_backend("`export_onnx`")
    path = check_file(path, "onnx")
    model = checked_model(model, class_names)
    require_tf2onnx()
    found = [one for one in leaf_layers(model) if isinstance(one, _foreign.OnnxNetwork)]
    # Its notes on its progress are of no use; errors still raise.
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if found:
            converted = _joined(model, found[0].content)
        else:
            forward = ForwardPass(model)
            spec = forward.images_spec
            converted = _converted(forward.predict, spec, "probabilities", OPSET)
    finally:
        logger.setLevel(level)
    entry = converted.metadata_props.add()
    entry.key = CLASS_NAMES_KEY
    entry.value = json.dumps(list(class_names), ensure_ascii=False)
    write_new_file(path, converted.SerializeToString())
    return path


def require_tf2onnx() -> Any:
    return import_extra("tf2onnx", "onnx", "Writing an ONNX file")


def _converted(
    function: Any, spec: tf.TensorSpec, output: str, opset: int
) -> onnx.ModelProto:
    traced = tf.function(function, input_signature=[spec], autograph=False)
    return _foreign.to_onnx(traced.get_concrete_function(), output, opset)


def _joined(model: keras.Model, content: bytes) -> onnx.ModelProto:
    """Returns one ONNX model of an ONNX backbone and a head of Keras."""
    import onnx
    from onnx import compose

    session = _foreign.OnnxSession(content)
    network = onnx.load_model_from_string(content)
    opset = next(one.version for one in network.opset_import if not one.domain)
    if session.batch is not None or opset < _OLDEST:
        raise InvalidArgument(
            "To be exported, an ONNX backbone must leave the number of images open and "
            f"be of opset {_OLDEST} or later. Received: {session.batch or 'any number'}"
            f" of images, opset {opset}. `keras-rsft predict` takes the run as it is."
        )
    shape = model.input_shape[1:]
    output, features = session.features(np.zeros((1, *shape), np.float32))
    axes = _foreign.pooled_axes(features.ndim, channels_first=session.channels_first)
    backbone, head = model.layers[-2:]

    def before(images: tf.Tensor) -> tf.Tensor:
        for layer in backbone.layers:
            if isinstance(layer, keras.layers.Rescaling):
                images = layer(images)
        if session.channels_first:
            images = tf.transpose(images, [0, 3, 1, 2])
        return tf.cast(images, session.dtype)

    def after(features: tf.Tensor) -> tf.Tensor:
        values = tf.cast(features, tf.float32)
        values = tf.reduce_mean(values, axes) if axes else values
        return head(values, training=False)

    def converted(function: Any, spec: tf.TensorSpec, output: str) -> onnx.ModelProto:
        def named(values: tf.Tensor) -> tf.Tensor:
            with tf.name_scope(output):  # No name may be in both parts.
                return function(values)

        part = _converted(named, spec, output, min(opset, _NEWEST_OF_TF2ONNX))
        if opset > _NEWEST_OF_TF2ONNX:
            part = onnx.version_converter.convert_version(part, opset)
        for unused in [one for one in part.opset_import if one.domain]:
            part.opset_import.remove(unused)
        part.ir_version = network.ir_version
        return part

    spec = tf.TensorSpec((None, *features.shape[1:]), features.dtype, name="features")
    joined = compose.merge_models(
        compose.add_prefix(network, _PREFIX),
        converted(after, spec, "probabilities"),
        io_map=[(_PREFIX + output, "features")],
        outputs=["probabilities"],
    )
    images = tf.TensorSpec((None, *shape), tf.float32, name="images")
    joined = compose.merge_models(
        converted(before, images, "pixels"),
        joined,
        io_map=[("pixels", _PREFIX + session.name)],
    )
    onnx.checker.check_model(joined)
    return joined
