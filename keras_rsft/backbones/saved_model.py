"""A SavedModel, from TensorFlow Hub or any other, as the network of a backbone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from keras_rsft.backbones.assembly import first_line
from keras_rsft.backbones.foreign import (
    ForeignNetwork,
    agreed_size,
    choose_output,
    digest_of,
    pooled,
)
from keras_rsft.errors import DataError, InvalidArgument, WeightsUnavailable

# Stateful by TensorFlow's account only because of what they might contain, which is
# looked at too.
_HARMLESS = {
    "Assert",
    "Case",
    "If",
    "PartitionedCall",
    "Placeholder",
    "StatefulPartitionedCall",
    "While",
    "XlaCallModule",
}
# Neither stateful nor given a text, yet they reach out of the graph.
_REACH_OUT = {"ImmutableConst", "PyFuncStateless"}
# To read a file, an operation must be told its name; to read records, have a source.
_NOT_NUMBERS = {tf.string.as_datatype_enum, tf.variant.as_datatype_enum}


def freeze(traced: Any) -> tuple[tf.compat.v1.GraphDef, list[str]]:
    """Returns a concrete function's graph with its variables as constants."""
    from tensorflow.python.framework.convert_to_constants import (
        convert_variables_to_constants_v2,
    )

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
    return graph, [output.name for output in frozen.outputs]


def impure_operations(graph: tf.compat.v1.GraphDef) -> list[str]:
    """Returns the operations of a graph that do more than compute, sorted."""
    # Those with a state (`WriteFile`, `PyFunc`, lookup tables, random numbers), those
    # on text (`ReadFile`), and those that this TensorFlow does not know.
    return sorted({node.op for node in _nodes(graph) if not _is_pure(node.op)})


def _nodes(graph: tf.compat.v1.GraphDef) -> Iterator[Any]:
    yield from graph.node
    for function in graph.library.function:
        yield from function.node_def


def _is_pure(operation: str) -> bool:
    from tensorflow.python.framework import op_def_registry

    known = op_def_registry.get(operation)
    if known is None or operation in _REACH_OUT:
        return False
    if operation in _HARMLESS:
        return True
    types = {one.type for one in (*known.input_arg, *known.output_arg)}
    return not (known.is_stateful or types & _NOT_NUMBERS)


_EXPECTED = (
    "A SavedModel backbone must map float images (batch, height, width, 3) to features."
)
_CHANNELS = 3
_IMAGE_RANK = 4
# No node of a SavedModel is called so: theirs lie in the scope of a call.
_OUTPUT = "keras_rsft_features"
_DEFAULT_SIGNATURE = "serving_default"
# What protobuf can hold.
_MOST_BYTES = 2**31 - 1

ImageFunction = Callable[[tf.Tensor], Any]


@keras.saving.register_keras_serializable(package="keras_rsft")
class GraphNetwork(ForeignNetwork):
    """A TensorFlow graph without variables as a layer; see `ForeignNetwork`."""

    file_name = "graph.pb"

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        features = self._function(images)
        features.set_shape((images.shape[0], self.dim))
        return features

    @functools.cached_property
    def _function(self) -> Callable[[tf.Tensor], tf.Tensor]:
        graph = tf.compat.v1.GraphDef.FromString(self.content)
        impure = impure_operations(graph)
        if impure:
            raise DataError(
                f"The graph does more than compute: {', '.join(impure)}. It is not run."
            )

        @tf.function(autograph=False)
        def run(images: tf.Tensor) -> tf.Tensor:
            return tf.graph_util.import_graph_def(
                graph, {"images:0": images}, [f"{_OUTPUT}:0"], name="network"
            )[0]

        return run


def build(path: Path, *, image_size: tuple[int, int] | None) -> keras.Model:
    """Loads the folder of a SavedModel."""
    if not (path / "saved_model.pb").is_file():
        raise InvalidArgument(
            f"A SavedModel is a folder with saved_model.pb in it. Received: {path}."
        )
    function, declared = _image_function(_load(path), path)
    size = agreed_size(declared, image_size, path)
    try:
        outputs = _named(function(tf.zeros((1, *size, _CHANNELS))))
        ranks = {name: value.shape.rank for name, value in outputs.items()}
        chosen = choose_output(ranks)
        if chosen is None or not 2 <= ranks[chosen] <= 4:
            shapes = {name: tuple(value.shape) for name, value in outputs.items()}
            raise InvalidArgument(
                "The features must be the SavedModel's only output, or its only one of "
                f"shape (batch, dim). Received: {path} with {shapes}."
            )
        shape = (None, *outputs[chosen].shape[1:])

        def features(images: tf.Tensor) -> tf.Tensor:
            values = _named(function(images))[chosen]
            values.set_shape(shape)
            return tf.cast(pooled(values), tf.float32)

        spec = tf.TensorSpec((None, *size, _CHANNELS), tf.float32, name="images")
        traced = tf.function(features, autograph=False).get_concrete_function(spec)
        graph, (output,) = freeze(traced)
        features_node = graph.node.add(name=_OUTPUT, op="Identity", input=[output])
        features_node.attr["T"].type = tf.float32.as_datatype_enum
        impure = impure_operations(graph)
        if impure:
            raise InvalidArgument(
                f"A backbone may only compute. Received: {path}, which also uses "
                f"{', '.join(impure)}."
            )
        if graph.ByteSize() > _MOST_BYTES:
            raise InvalidArgument(f"{path} is too large: a graph can hold 2 GB.")
        content, dim = graph.SerializeToString(deterministic=True), int(shape[-1])
    except (ValueError, TypeError, tf.errors.OpError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            f"{_EXPECTED} {path} does not run on images of {size[0]}x{size[1]}: "
            f"{first_line(error)}"
        ) from error
    images = keras.Input((*size, _CHANNELS), dtype="float32")
    layer = GraphNetwork(dim=dim, digest=_source_digest(path), content=content)
    return keras.Model(images, layer(images), name="savedmodel")


def _source_digest(path: Path) -> str:
    """Returns a digest of the files; a frozen graph has other names on each load."""
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [str(file.relative_to(path)).encode() for file in files]
    return digest_of(*names, *(file.read_bytes() for file in files))


def _load(path: Path) -> Any:
    try:
        return tf.saved_model.load(str(path))
    except (OSError, ValueError, KeyError, tf.errors.OpError) as error:
        raise WeightsUnavailable(
            f"The SavedModel {path} is damaged: {first_line(error)}."
        ) from error


def _image_function(
    loaded: Any, path: Path
) -> tuple[ImageFunction, tuple[int | None, int | None]]:
    """Returns the function, and the height and width that it fixes."""
    signatures = dict(loaded.signatures)
    ordered = sorted(signatures, key=lambda name: (name != _DEFAULT_SIGNATURE, name))
    for name in ordered:
        inputs = signatures[name].structured_input_signature[1]
        taken = next(iter(inputs), None)
        if len(inputs) == 1 and _takes_images(inputs[taken]):
            call = functools.partial(_call_signature, loaded, name, taken)
            return call, _sides(inputs[taken].shape)
    if callable(loaded):
        return functools.partial(_call_object, loaded), (None, None)
    found = ", ".join(_described(signatures)) or "no signature"
    raise InvalidArgument(f"{_EXPECTED} Received: {path} with {found}.")


def _takes_images(spec: tf.TensorSpec) -> bool:
    if spec.dtype != tf.float32:
        return False
    shape = spec.shape
    if shape.rank is None:
        return True
    return shape.rank == _IMAGE_RANK and shape[3] in (None, _CHANNELS)


def _sides(shape: tf.TensorShape) -> tuple[int | None, int | None]:
    return (None, None) if shape.rank is None else tuple(shape[1:3].as_list())


def _described(signatures: dict[str, Any]) -> Iterator[str]:
    for name, signature in sorted(signatures.items()):
        inputs = signature.structured_input_signature[1]
        specs = (f"{key} {one.dtype.name} {one.shape}" for key, one in inputs.items())
        yield f"{name}({', '.join(specs)})"


def _call_signature(loaded: Any, name: str, taken: str, images: tf.Tensor) -> Any:
    # Through the loaded object, which keeps the variables alive.
    return loaded.signatures[name](**{taken: images})


def _call_object(loaded: Any, images: tf.Tensor) -> Any:
    try:
        return loaded(images, training=False)
    except (TypeError, ValueError):  # It has no such argument.
        return loaded(images)


def _named(outputs: Any) -> dict[str, tf.Tensor]:
    if isinstance(outputs, dict):
        return {str(name): value for name, value in outputs.items()}
    if isinstance(outputs, (list, tuple)):
        return {str(number): value for number, value in enumerate(outputs)}
    return {"features": outputs}
