"""Networks that are not made of Keras layers: SavedModel and ONNX files."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones._build import first_line
from keras_rsft.errors import DataError, InvalidArgument, WeightsUnavailable

# What both have in common -------------------------------------------------------------


class KeptFile(keras.Layer):
    """A layer that keeps a file's bytes, which a `.keras` file carries along."""

    file_name = "content"
    # Whether it can be part of a SavedModel, and if not, what to say.
    is_tensorflow = True
    not_tensorflow = ""

    def __init__(self, *, digest: str, content: bytes | None = None, **options):
        super().__init__(trainable=False, dtype="float32", **options)
        self.supports_jit = False
        self.digest = digest
        self._content = content

    @property
    def content(self) -> bytes:
        if self._content is None:
            raise DataError(
                f"The layer {self.name!r} was made without its {self.file_name}, which "
                "only a `.keras` file brings. Load the whole model."
            )
        return self._content

    def get_config(self) -> dict:
        config = super().get_config()
        for fixed in ("trainable", "dtype"):
            config.pop(fixed, None)
        return config | {"digest": self.digest}

    def save_assets(self, directory: str) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self.content)

    def load_assets(self, directory: str) -> None:
        self._content = (Path(directory) / self.file_name).read_bytes()


class ForeignNetwork(KeptFile):
    """A frozen network from images to features, kept as bytes."""

    file_name = "network"

    def __init__(
        self, *, dim: int, digest: str, content: bytes | None = None, **options
    ):
        super().__init__(digest=digest, content=content, **options)
        self.dim = dim

    @property
    def num_bytes(self) -> int:
        return len(self.content)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (input_shape[0], self.dim)

    def compute_output_spec(self, inputs, training=None) -> keras.KerasTensor:
        return keras.KerasTensor((inputs.shape[0], self.dim), dtype="float32")

    def get_config(self) -> dict:
        return super().get_config() | {"dim": self.dim}


def digest_of(*parts: bytes) -> str:
    """Returns 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def choose_output(shapes: dict[str, int | None]) -> str | None:
    """Chooses the features among a network's outputs."""
    if len(shapes) == 1:
        return next(iter(shapes))
    vectors = [name for name, rank in shapes.items() if rank == 2]
    return vectors[0] if len(vectors) == 1 else None


def pooled(values: tf.Tensor | np.ndarray, *, channels_first: bool = False):
    """Averages feature maps and tokens to one vector an image."""
    rank = len(values.shape)
    if rank == 4:
        axes = (2, 3) if channels_first else (1, 2)
    else:
        axes = tuple(range(1, rank - 1))
    if not axes:
        return values
    if isinstance(values, np.ndarray):
        return values.mean(axis=axes)
    return tf.reduce_mean(values, axis=axes)


def agreed_size(
    declared: tuple[int | None, int | None],
    wanted: tuple[int, int] | None,
    source: str | Path,
) -> tuple[int, int]:
    """Returns the image size that a file fixes, or else the one that was asked for."""
    if wanted is None and None in declared:
        raise InvalidArgument(
            f"{source} leaves the image size open: give `image_size` (--image-size)."
        )
    size = wanted or declared
    if any(d not in (None, s) for d, s in zip(declared, size, strict=True)):
        raise InvalidArgument(
            f"`image_size` must be {declared[0]}x{declared[1]} for {source}. "
            f"Received: {size[0]}x{size[1]}"
        )
    return size


def require_tensorflow(model: keras.Model) -> None:
    """Refuses a model that cannot be part of a SavedModel."""
    for layer in layers_of(model, KeptFile):
        if not layer.is_tensorflow:
            raise InvalidArgument(layer.not_tensorflow)


def foreign_layers(model: keras.Model) -> list[ForeignNetwork]:
    """Returns the layers of a model, at any depth, that hold such a network."""
    return layers_of(model, ForeignNetwork)


def layers_of(model: keras.Model, kind: type[keras.Layer]) -> list[keras.Layer]:
    """Returns the layers of a kind in a model, at any depth."""
    found: list[keras.Layer] = []
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            found += layers_of(layer, kind)
        elif isinstance(layer, kind):
            found.append(layer)
    return found


def weights_bytes(model: keras.Model) -> int:
    """Returns the size of a model's weights, those of foreign networks with them."""
    own = sum(
        int(np.prod(v.shape)) * np.dtype(v.dtype).itemsize for v in model.variables
    )
    return own + sum(layer.num_bytes for layer in foreign_layers(model))


# SavedModel ---------------------------------------------------------------------------

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


# ONNX ---------------------------------------------------------------------------------

_EXPECTED_ONNX = (
    "An ONNX backbone must map float images (batch, 3, height, width) or "
    "(batch, height, width, 3) to features."
)
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_FASTEST_FIRST = ("CUDAExecutionProvider", "CPUExecutionProvider")
_ONLY_ERRORS = 3


@dataclasses.dataclass(frozen=True)
class OnnxInput:
    """How a file takes images."""

    name: str
    dtype: type
    channels_first: bool
    size: tuple[int | None, int | None]
    batch: int | None


@keras.saving.register_keras_serializable(package="keras_rsft")
class OnnxNetwork(ForeignNetwork):
    """A whole ONNX model, with its weights, as a layer; see `ForeignNetwork`."""

    file_name = "model.onnx"
    is_tensorflow = False
    not_tensorflow = (
        "A model on an ONNX base runs in ONNX Runtime, so that it cannot become a "
        "SavedModel or a LiteRT file. Export it with `--format onnx`; "
        "`keras-rsft predict` takes the run as it is."
    )

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        features = tf.numpy_function(self._run, [images], tf.float32, stateful=False)
        features.set_shape((images.shape[0], self.dim))
        return features

    @functools.cached_property
    def _session(self) -> Any:
        return open_session(self.content)

    def _run(self, images: np.ndarray) -> np.ndarray:
        return run_session(self._session, images)


def build_onnx(path: Path, *, image_size: tuple[int, int] | None) -> keras.Model:
    """Loads an ONNX file, with its weights where these lie beside it."""
    if not path.is_file():
        raise InvalidArgument(f"There is no backbone file {path}.")
    content = _whole_file(path)
    try:
        session = open_session(content)
        taken = describe_input(session)
        height, width = agreed_size(taken.size, image_size, path)
        features = run_session(session, np.zeros((1, height, width, 3), np.float32))
    except (ImportError, InvalidArgument):
        raise
    except Exception as error:  # ONNX Runtime's errors have no common class.
        raise InvalidArgument(
            f"{_EXPECTED_ONNX} {path} does not run: {first_line(error)}"
        ) from error
    images = keras.Input((height, width, _CHANNELS), dtype="float32")
    layer = OnnxNetwork(
        dim=features.shape[1], digest=digest_of(content), content=content
    )
    return keras.Model(images, layer(images), name="onnx")


def open_session(content: bytes) -> Any:
    """Returns an ONNX Runtime session; on a GPU where the runtime has it."""
    try:
        import onnxruntime
    except ImportError as error:
        raise ImportError(
            "An ONNX backbone needs the package onnxruntime. Install it with: "
            'pip install "keras_rsft[onnx]".'
        ) from error
    available = onnxruntime.get_available_providers()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _ONLY_ERRORS
    return onnxruntime.InferenceSession(
        content, options, providers=[p for p in _FASTEST_FIRST if p in available]
    )


def describe_input(session: Any) -> OnnxInput:
    """Returns how a session takes images."""
    inputs = session.get_inputs()
    found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
    one = inputs[0]
    dims = [d if isinstance(d, int) else None for d in one.shape or ()]
    if len(inputs) == 1 and len(dims) == 4 and one.type in _DTYPES:
        for channels_first, channels, sides in (
            (True, dims[1], dims[2:]),
            (False, dims[3], dims[1:3]),
        ):
            if channels == _CHANNELS:
                dtype = _DTYPES[one.type]
                return OnnxInput(one.name, dtype, channels_first, tuple(sides), dims[0])
    raise InvalidArgument(f"{_EXPECTED_ONNX} Received: {found or 'no input'}.")


def run_session(session: Any, images: np.ndarray) -> np.ndarray:
    """Returns the features of scaled images."""
    taken = describe_input(session)
    values = images.astype(taken.dtype)
    if taken.channels_first:
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
    step = taken.batch or max(len(values), 1)
    parts = [
        _run_part(session, taken, values[start : start + step], step)
        for start in range(0, max(len(values), 1), step)
    ]
    return np.concatenate(parts)[: len(values)]


def features_output(session: Any, size: tuple[int, int]) -> tuple[str, int]:
    """Returns the output that is the features, and its rank."""
    taken = describe_input(session)
    shape = (1, 3, *size) if taken.channels_first else (1, *size, 3)
    outputs = _outputs(session, taken, np.zeros(shape, taken.dtype))
    return _chosen_output(outputs), np.ndim(outputs[_chosen_output(outputs)])


def _run_part(
    session: Any, taken: OnnxInput, values: np.ndarray, step: int
) -> np.ndarray:
    missing = step - len(values)
    if missing:
        values = np.pad(values, [(0, missing), (0, 0), (0, 0), (0, 0)])
    outputs = _outputs(session, taken, values)
    features = outputs[_chosen_output(outputs)]
    features = pooled(features, channels_first=taken.channels_first)
    return np.ascontiguousarray(features, np.float32)


def _outputs(
    session: Any, taken: OnnxInput, values: np.ndarray
) -> dict[str, np.ndarray]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {taken.name: values}), strict=True))


def _chosen_output(outputs: dict[str, np.ndarray]) -> str:
    ranks = {name: np.ndim(value) for name, value in outputs.items()}
    chosen = choose_output(ranks)
    if chosen is None or not 2 <= ranks[chosen] <= 4:
        shapes = {name: np.shape(value) for name, value in outputs.items()}
        raise InvalidArgument(
            "The features must be the network's only output, or its only one of "
            f"shape (batch, dim). Received: {shapes}."
        )
    return chosen


def _whole_file(path: Path) -> bytes:
    try:
        import onnx
    except ImportError as error:
        raise ImportError(
            "An ONNX backbone needs the package onnx. Install it with: "
            'pip install "keras_rsft[onnx]".'
        ) from error
    try:
        return onnx.load(path).SerializeToString()
    except Exception as error:  # Those of protobuf, of onnx, and of files.
        raise WeightsUnavailable(
            f"The backbone file {path} is damaged, not an ONNX file, or the weights "
            f"beside it are missing: {first_line(error)}."
        ) from error
