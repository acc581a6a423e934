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
from keras_rsft.backbones._build import leaf_layers
from keras_rsft.backbones._foreign import (
    OnnxNetwork,
    OnnxSession,
    freeze,
    pooled_axes,
)
from keras_rsft.config import ExportConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.export._places import check_file
from keras_rsft.export._saved_model import ForwardPass, check_class_names

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
    ExportConfig("litert", weight_dtype)
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
# Opsets that tf2onnx writes. The nodes added here mean the same in all from the first
# on, but for ReduceMean.
_OLDEST, _NEWEST_OF_TF2ONNX = 13, 18
_PREFIX = "backbone/"


def export_onnx(
    model: keras.Model, path: str | os.PathLike, *, class_names: Sequence[str]
) -> Path:
    """Writes an ONNX model from `images` to `probabilities`.

    It takes float32 images `(batch, height, width, 3)` in [0, 255], at the size that
    the model was trained with.

    Args:
        model: Images in [0, 255] to probabilities, as `Run.model`.
        path: The file to write; it must not exist.
        class_names: Names in the order of the probabilities; kept in the file's
            metadata as a JSON list, under `class_names`.

    Returns:
        The file.

    Raises:
        InvalidArgument: If the file exists or the names do not fit.
        ImportError: If the extra `onnx` is not installed.
    """
    require_tensorflow_backend("`export_onnx`")
    path = check_file(path, "onnx")
    check_class_names(model, class_names)
    require_tf2onnx()
    networks = [one for one in leaf_layers(model) if isinstance(one, OnnxNetwork)]
    # Its notes on its progress are of no use; errors still raise.
    logger = logging.getLogger("tf2onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        if networks:
            converted = _joined(model, networks[0].content)
        else:
            forward = ForwardPass(model)
            function = tf.function(forward, input_signature=[forward.images_spec()])
            converted = _converted(function, "images", "probabilities", OPSET)
    finally:
        logger.setLevel(level)
    entry = converted.metadata_props.add()
    entry.key = CLASS_NAMES_KEY
    entry.value = json.dumps(list(class_names), ensure_ascii=False)
    write_new_file(path, converted.SerializeToString())
    return path


def require_tf2onnx() -> Any:
    return import_extra("tf2onnx", "onnx", "Writing an ONNX file")


def _converted(function: Any, taken: str, given: str, opset: int) -> onnx.ModelProto:
    graph, output = freeze(function.get_concrete_function())
    converted, _ = require_tf2onnx().convert.from_graph_def(
        graph,
        input_names=[f"{taken}:0"],
        output_names=[output],
        opset=opset,
        tensors_to_rename={f"{taken}:0": taken, output: given},
    )
    return converted


def _joined(model: keras.Model, content: bytes) -> onnx.ModelProto:
    """Returns one ONNX model of an ONNX backbone and a head of Keras."""
    import onnx
    from onnx import compose

    session = OnnxSession(content)
    network = onnx.load_model_from_string(content)
    opset = next(one.version for one in network.opset_import if not one.domain)
    if session.batch is not None or opset < _OLDEST:
        raise InvalidArgument(
            "To be exported, an ONNX backbone must leave the number of images open and "
            f"be of opset {_OLDEST} or later. Received: {session.batch or 'any number'}"
            f" of images, opset {opset}. `keras-rsft predict` takes the run as it is."
        )
    network = compose.add_prefix(network, _PREFIX)
    backbone, head = model.layers[-2:]
    _prepend(network.graph, session, backbone)
    _append(network.graph, session, model.input_shape[1:], opset)
    spec = tf.TensorSpec((None, head.input_shape[-1]), tf.float32, name="head_features")
    function = tf.function(
        lambda head_features: head(head_features, training=False),
        autograph=False,
        input_signature=[spec],
    )
    of_tf2onnx = min(opset, _NEWEST_OF_TF2ONNX)
    converted = _converted(function, "head_features", "probabilities", of_tf2onnx)
    if opset > of_tf2onnx:
        converted = onnx.version_converter.convert_version(converted, opset)
    # Domains that no node of the head uses.
    for extra in [one for one in converted.opset_import if one.domain]:
        converted.opset_import.remove(extra)
    converted.ir_version = network.ir_version
    joined = compose.merge_models(
        network,
        converted,
        io_map=[("features", "head_features")],
        outputs=["probabilities"],
    )
    onnx.checker.check_model(joined)
    return joined


def _prepend(
    graph: onnx.GraphProto, session: OnnxSession, backbone: keras.Model
) -> None:
    """Adds scaling and the order of the axes in front of the network."""
    from onnx import TensorProto, helper

    factor, offset = np.ones(3, np.float32), np.zeros(3, np.float32)
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Rescaling):
            factor = np.asarray(layer.scale, np.float32)
            offset = np.asarray(layer.offset, np.float32)
    _add_constants(graph, scale_factor=factor, scale_offset=offset)
    nodes = [
        helper.make_node("Mul", ["images", "scale_factor"], ["multiplied"]),
        helper.make_node("Add", ["multiplied", "scale_offset"], ["scaled"]),
    ]
    if session.channels_first:
        nodes.append(
            helper.make_node("Transpose", ["scaled"], ["turned"], perm=[0, 3, 1, 2])
        )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(session.dtype))
    last = nodes[-1].output[0]
    nodes.append(helper.make_node("Cast", [last], [_PREFIX + session.name], to=kind))
    nodes += graph.node
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    shape = ("batch", *backbone.input_shape[1:])
    graph.input.append(
        helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    )


def _append(
    graph: onnx.GraphProto, session: OnnxSession, shape: tuple[int, ...], opset: int
) -> None:
    """Adds behind the network the mean over all but channels, as `OnnxNetwork` does."""
    from onnx import TensorProto, helper

    output, features = session.features(np.zeros((1, *shape), np.float32))
    axes = pooled_axes(features.ndim, channels_first=session.channels_first)
    source = _PREFIX + output
    graph.node.append(
        helper.make_node("Cast", [source], ["floats"], to=TensorProto.FLOAT)
    )
    if not axes:
        node = helper.make_node("Identity", ["floats"], ["features"])
    elif opset < 18:
        node = helper.make_node(
            "ReduceMean", ["floats"], ["features"], axes=axes, keepdims=0
        )
    else:
        _add_constants(graph, axes=np.array(axes, np.int64))
        node = helper.make_node("ReduceMean", ["floats", "axes"], ["features"])
        node.attribute.append(helper.make_attribute("keepdims", 0))
    graph.node.append(node)
    del graph.output[:]
    graph.output.append(
        helper.make_tensor_value_info("features", TensorProto.FLOAT, None)
    )


def _add_constants(graph: onnx.GraphProto, **values: np.ndarray) -> None:
    from onnx import numpy_helper

    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    graph.initializer.extend(tensors)
