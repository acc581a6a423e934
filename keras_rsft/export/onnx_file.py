"""Writes a model as an ONNX file, from decoded images."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path

import keras
import tensorflow as tf

from keras_rsft.export.places import check_file, write_new_file
from keras_rsft.export.saved_model import check_class_names
from keras_rsft.export.serving_graph import ForwardPass

OPSET = 17
CLASS_NAMES_KEY = "class_names"


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
    path = check_file(path, "onnx")
    check_class_names(model, class_names)
    tf2onnx = require_tf2onnx()
    graph, output = _frozen_graph(ForwardPass(model))
    with _quiet("tf2onnx"):
        converted, _ = tf2onnx.convert.from_graph_def(
            graph,
            input_names=["images:0"],
            output_names=[output],
            opset=OPSET,
            tensors_to_rename={"images:0": "images", output: "probabilities"},
        )
    _name_classes(converted, class_names)
    write_new_file(path, converted.SerializeToString())
    return path


def require_tf2onnx() -> types.ModuleType:
    """Returns the converter.

    Raises:
        ImportError: If the extra `onnx` is not installed.
    """
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError(
            'ONNX needs the package tf2onnx. Install it with: pip install "keras_rsft'
            '[onnx]".'
        ) from error
    return tf2onnx


def _frozen_graph(forward: ForwardPass) -> tuple[tf.compat.v1.GraphDef, str]:
    """Returns the forward pass without variables, and the name of its output."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

    function = tf.function(forward, input_signature=[forward.images_spec()])
    traced = function.get_concrete_function()
    frozen = convert_variables_to_constants_v2(traced, lower_control_flow=False)
    graph = frozen.graph.as_graph_def()
    # A layer's constants of 128 numbers and more (the means of the standardisation)
    # are further inputs of a traced function, which freezing leaves as they are.
    constants = {
        inner.op.name: tf.make_tensor_proto(outer.numpy())
        for outer, inner in traced.graph.captures
        if inner.dtype != tf.resource
    }
    for node in graph.node:
        if node.name in constants:
            value = constants[node.name]
            node.ClearField("attr")
            node.op = "Const"
            node.attr["dtype"].type = value.dtype
            node.attr["value"].tensor.CopyFrom(value)
    return graph, frozen.outputs[0].name


def _name_classes(converted, class_names: Sequence[str]) -> None:
    entry = converted.metadata_props.add()
    entry.key = CLASS_NAMES_KEY
    entry.value = json.dumps(list(class_names), ensure_ascii=False)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Keeps a library's progress notes off the terminal; errors still raise."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
