"""Writes a model as an ONNX file, from decoded images."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import tensorflow as tf

from keras_rsft.backbones.frozen_graph import freeze
from keras_rsft.backend_in_use import require_tensorflow_backend
from keras_rsft.export.onnx_join import join_head, onnx_base
from keras_rsft.export.places import check_file, write_new_file
from keras_rsft.export.saved_model import check_class_names
from keras_rsft.export.serving_graph import ForwardPass

if TYPE_CHECKING:
    import onnx

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
    require_tensorflow_backend("`export_onnx`")
    path = check_file(path, "onnx")
    check_class_names(model, class_names)
    require_tf2onnx()
    with _quiet("tf2onnx"):
        converted = (
            join_head(model) if onnx_base(model) else _converted(ForwardPass(model))
        )
    entry = converted.metadata_props.add()
    entry.key = CLASS_NAMES_KEY
    entry.value = json.dumps(list(class_names), ensure_ascii=False)
    write_new_file(path, converted.SerializeToString())
    return path


def require_tf2onnx() -> types.ModuleType:
    """Returns the converter."""
    try:
        import tf2onnx
    except ImportError as error:
        raise ImportError(
            'ONNX needs the package tf2onnx. Install it with: pip install "keras_rsft'
            '[onnx]".'
        ) from error
    return tf2onnx


def _converted(forward: ForwardPass) -> onnx.ModelProto:
    import tf2onnx

    function = tf.function(forward, input_signature=[forward.images_spec()])
    graph, (output,) = freeze(function.get_concrete_function())
    converted, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=["images:0"],
        output_names=[output],
        opset=OPSET,
        tensors_to_rename={"images:0": "images", output: "probabilities"},
    )
    return converted


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
