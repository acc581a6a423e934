"""Writes LiteRT and ONNX files."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import types
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._storage import write_new_file
from keras_rsft.backbones._foreign import (
    OnnxInput,
    OnnxNetwork,
    describe_input,
    features_output,
    foreign_layers,
    freeze,
    open_session,
)
from keras_rsft.errors import InvalidArgument
from keras_rsft.export._places import check_file
from keras_rsft.export._saved_model import ForwardPass, check_class_names

if TYPE_CHECKING:
    import onnx


# LiteRT -------------------------------------------------------------------------------

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


# ONNX ---------------------------------------------------------------------------------

# Opsets that tf2onnx writes. The nodes added here mean the same in all from the first
# on, but for ReduceMean.
_OLDEST, _NEWEST_OF_TF2ONNX = 13, 18
_PREFIX = "base/"


def onnx_base(model: keras.Model) -> OnnxNetwork | None:
    """Returns the ONNX base of a model, or None."""
    found = [one for one in foreign_layers(model) if isinstance(one, OnnxNetwork)]
    return found[0] if found else None


def join_head(model: keras.Model) -> onnx.ModelProto:
    """Returns one ONNX model from `images` to `probabilities`."""
    import onnx
    from onnx import compose

    content = onnx_base(model).content
    session = open_session(content)
    taken = describe_input(session)
    base = onnx.load_model_from_string(content)
    opset = next(one.version for one in base.opset_import if not one.domain)
    if taken.batch is not None or opset < _OLDEST:
        raise InvalidArgument(
            "To be exported, an ONNX base must leave the number of images open and be "
            f"of opset {_OLDEST} or later. Received: {taken.batch or 'any number of'} "
            f"images, opset {opset}. `keras-rsft predict` takes the run as it is."
        )
    output, rank = features_output(session, model.input_shape[1:3])
    base = compose.add_prefix(base, _PREFIX)
    backbone, head = model.layers[-2:]
    _prepend(base, taken, backbone)
    _append(base, output, rank, channels_first=taken.channels_first, opset=opset)
    joined = compose.merge_models(
        base,
        _head_model(head, opset, base.ir_version),
        io_map=[("features", "head_features")],
        outputs=["probabilities"],
    )
    onnx.checker.check_model(joined)
    return joined


def _prepend(base: onnx.ModelProto, taken: OnnxInput, backbone: keras.Model) -> None:
    """Adds scaling and the order of the axes in front of the base."""
    from onnx import TensorProto, helper

    factor, offset = _scale_of(backbone)
    _add_constants(base, {"scale_factor": factor, "scale_offset": offset})
    nodes = [
        helper.make_node("Mul", ["images", "scale_factor"], ["multiplied"]),
        helper.make_node("Add", ["multiplied", "scale_offset"], ["scaled"]),
    ]
    if taken.channels_first:
        nodes.append(
            helper.make_node("Transpose", ["scaled"], ["turned"], perm=[0, 3, 1, 2])
        )
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(taken.dtype))
    last = nodes[-1].output[0]
    nodes.append(helper.make_node("Cast", [last], [_PREFIX + taken.name], to=kind))
    old = [*nodes, *base.graph.node]
    del base.graph.node[:]
    base.graph.node.extend(old)
    del base.graph.input[:]
    shape = ("batch", *backbone.input_shape[1:])
    base.graph.input.append(
        helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)
    )


def _append(
    base: onnx.ModelProto, output: str, rank: int, *, channels_first: bool, opset: int
) -> None:
    """Adds behind the base what `pooled` does."""
    from onnx import TensorProto, helper

    source = _PREFIX + output
    base.graph.node.append(
        helper.make_node("Cast", [source], ["floats"], to=TensorProto.FLOAT)
    )
    first = 2 if channels_first and rank == 4 else 1
    axes = list(range(first, first + rank - 2))
    if not axes:
        node = helper.make_node("Identity", ["floats"], ["features"])
    elif opset < 18:
        node = helper.make_node(
            "ReduceMean", ["floats"], ["features"], axes=axes, keepdims=0
        )
    else:
        _add_constants(base, {"axes": np.array(axes, np.int64)})
        node = helper.make_node("ReduceMean", ["floats", "axes"], ["features"])
        node.attribute.append(helper.make_attribute("keepdims", 0))
    base.graph.node.append(node)
    del base.graph.output[:]
    base.graph.output.append(
        helper.make_tensor_value_info("features", TensorProto.FLOAT, None)
    )


def _add_constants(base: onnx.ModelProto, values: dict[str, np.ndarray]) -> None:
    from onnx import numpy_helper

    tensors = [numpy_helper.from_array(value, name) for name, value in values.items()]
    base.graph.initializer.extend(tensors)


def _scale_of(backbone: keras.Model) -> tuple[np.ndarray, np.ndarray]:
    for layer in backbone.layers:
        if isinstance(layer, keras.layers.Rescaling):
            return np.float32(layer.scale), np.float32(layer.offset)
    return np.ones(3, np.float32), np.zeros(3, np.float32)


def _head_model(head: keras.Model, opset: int, ir_version: int) -> Any:
    import onnx
    import tf2onnx

    spec = tf.TensorSpec((None, head.input_shape[-1]), tf.float32, name="head_features")
    function = tf.function(
        lambda head_features: head(head_features, training=False), autograph=False
    )
    graph, (output,) = freeze(function.get_concrete_function(spec))
    converted, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=["head_features:0"],
        output_names=[output],
        opset=min(opset, _NEWEST_OF_TF2ONNX),
        tensors_to_rename={
            "head_features:0": "head_features",
            output: "probabilities",
        },
    )
    if opset > _NEWEST_OF_TF2ONNX:
        converted = onnx.version_converter.convert_version(converted, opset)
    # Domains that no node of the head uses.
    extra = [one for one in converted.opset_import if one.domain]
    for one in extra:
        converted.opset_import.remove(one)
    converted.ir_version = ir_version
    return converted


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
