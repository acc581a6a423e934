"""Layers that keep a file: tokenizers, and networks of SavedModel and ONNX files."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError
from tensorflow.python.framework import op_def_registry
from tensorflow.python.ops import (
    gen_linalg_ops,
    gen_math_ops,
    gen_nn_ops,
    gen_spectral_ops,
)
from tensorflow.python.saved_model.loader_impl import parse_saved_model

from keras_rsft._runtime import import_extra
from keras_rsft.backbones._build import agreed_size, first_line, leaf_layers
from keras_rsft.errors import DataError, InvalidArgument, WeightsUnavailable

# What all have in common --------------------------------------------------------------


class KeptFile(keras.Layer):
    """A layer that keeps a file's bytes, which a `.keras` file carries along."""

    file_name = "content"
    # Why it cannot be part of a SavedModel, where it cannot.
    not_tensorflow = ""

    def __init__(self, *, digest: str, content: bytes | None = None, **options: Any):
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

    def check_content(self) -> None:
        """Refuses a file that may not be used."""

    def save_assets(self, directory: str) -> None:
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / self.file_name).write_bytes(self.content)

    def load_assets(self, directory: str) -> None:
        self._content = (Path(directory) / self.file_name).read_bytes()


class ForeignNetwork(KeptFile):
    """A frozen network from images to features."""

    run: Callable[[tf.Tensor], tf.Tensor]

    def __init__(self, *, dim: int, **options: Any):
        super().__init__(**options)
        self.dim = dim

    def call(self, images: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        features = self.run(images)
        features.set_shape((images.shape[0], self.dim))
        return features

    def compute_output_spec(self, inputs, training=None) -> keras.KerasTensor:
        return keras.KerasTensor((inputs.shape[0], self.dim), dtype="float32")

    def get_config(self) -> dict:
        return super().get_config() | {"dim": self.dim}


def digest_of(*parts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def _features_of(outputs: dict[str, Any]) -> str:
    """Chooses the features among a network's outputs; returns their name."""
    ranks = {name: len(value.shape) for name, value in outputs.items()}
    vectors = [name for name, rank in ranks.items() if rank == 2 or len(ranks) == 1]
    if len(vectors) != 1 or not 2 <= ranks[vectors[0]] <= 4:
        shapes = {name: tuple(value.shape) for name, value in outputs.items()}
        raise InvalidArgument(
            "The features must be the network's only output, or its only one of "
            f"shape (batch, dim). Received: {shapes}."
        )
    return vectors[0]


def pooled_axes(rank: int, *, channels_first: bool = False) -> tuple[int, ...]:
    first = 2 if channels_first and rank == 4 else 1
    return tuple(range(first, first + rank - 2))


def require_tensorflow(model: keras.Model) -> None:
    for layer in leaf_layers(model):
        if isinstance(layer, KeptFile) and layer.not_tensorflow:
            raise InvalidArgument(layer.not_tensorflow)


def weights_bytes(model: keras.Model) -> int:
    """Returns the size of a model's weights, those of foreign networks with them."""
    sizes = [math.prod(v.shape) * np.dtype(v.dtype).itemsize for v in model.variables]
    networks = [one for one in leaf_layers(model) if isinstance(one, ForeignNetwork)]
    return sum(sizes) + sum(len(network.content) for network in networks)


def _model_of(layer: ForeignNetwork, size: tuple[int, int], name: str) -> keras.Model:
    images = keras.Input((*size, 3), dtype="float32")
    return keras.Model(images, layer(images), name=name)


# Texts --------------------------------------------------------------------------------

PADDING = 0
# More than 256 pieces in all but made-up texts, and little enough to be cut at once.
MAX_CHARACTERS = 32_768


@keras.saving.register_keras_serializable(package="keras_rsft")
class TextTokens(KeptFile):
    """Cuts texts into the pieces that an encoder knows, and numbers them."""

    file_name = "tokenizer.json"
    not_tensorflow = (
        "A model that takes texts cannot be exported: its tokenizer is not made of "
        "TensorFlow's operations. `keras-rsft predict` takes the run as it is."
    )

    def __init__(self, *, max_tokens: int, **options: Any):
        super().__init__(**options)
        self.max_tokens = max_tokens

    def call(self, texts: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        tokens = tf.numpy_function(self.tokens_of, [texts], tf.int32, stateful=False)
        tokens.set_shape((texts.shape[0], None))
        return tokens

    def tokens_of(self, texts: np.ndarray) -> np.ndarray:
        """Returns the pieces' numbers, int32 `(batch, longest)`, padded with 0."""
        # One by one: in batches the library starts threads, which a fork would lose.
        decoded = (text.decode("utf-8", "replace") for text in texts.tolist())
        rows = [self._tokenizer.encode(text[:MAX_CHARACTERS]).ids for text in decoded]
        longest = max(map(len, rows), default=0)
        tokens = np.full((len(rows), longest), PADDING, np.int32)
        for padded, row in zip(tokens, rows, strict=True):
            padded[: len(row)] = row
        return tokens

    @functools.cached_property
    def _tokenizer(self) -> Any:
        tokenizers = import_extra("tokenizers", "text", "A text encoder")
        try:
            content = json.dumps(json.loads(self.content))
            tokenizer = tokenizers.Tokenizer.from_str(content)
        except Exception as error:  # The library's errors have no class of their own.
            raise WeightsUnavailable(
                "The tokenizer.json of the text encoder is damaged: "
                f"{first_line(error)}."
            ) from error
        tokenizer.encode_special_tokens = True
        tokenizer.enable_truncation(self.max_tokens)
        tokenizer.no_padding()
        return tokenizer

    def compute_output_spec(self, texts, training=None) -> keras.KerasTensor:
        return keras.KerasTensor((texts.shape[0], None), dtype="int32")

    def get_config(self) -> dict:
        return super().get_config() | {"max_tokens": self.max_tokens}


# SavedModel ---------------------------------------------------------------------------

# All that a graph from a file may do: compute numbers. Of TensorFlow's 1,500 operations
# others read and write files, open connections, wait for what never comes or end the
# process, and each version brings more. Of these modules of it all are allowed, ...
_FAMILIES = (gen_linalg_ops, gen_math_ops, gen_nn_ops, gen_spectral_ops)
# ... and of arrays, images, control flow and the like:
_NAMES = """
AdjustContrastv2 AdjustHue AdjustSaturation Assert BatchToSpace BatchToSpaceND Bitcast
BitwiseAnd BitwiseOr BitwiseXor BroadcastArgs BroadcastGradientArgs BroadcastTo Case
CheckNumerics CheckNumericsV2 CombinedNonMaxSuppression Concat ConcatOffset ConcatV2
ConjugateTranspose Const ControlTrigger CropAndResize DepthToSpace Dequantize Diag
DiagPart DynamicPartition DynamicStitch EnsureShape ExpandDims ExtractImagePatches
FakeQuantWithMinMaxArgs FakeQuantWithMinMaxVars FakeQuantWithMinMaxVarsPerChannel Fill
Gather GatherNd GatherV2 HSVToRGB Identity IdentityN If ImageProjectiveTransformV2
ImageProjectiveTransformV3 Invert InvertPermutation LeftShift LowerBound MatrixBandPart
MatrixDiag MatrixDiagPart MatrixDiagPartV2 MatrixDiagPartV3 MatrixDiagV2 MatrixDiagV3
MatrixSetDiag MatrixSetDiagV2 MatrixSetDiagV3 Merge MirrorPad NoOp NonMaxSuppressionV3
NonMaxSuppressionV4 NonMaxSuppressionV5 OneHot OnesLike Pack Pad PadV2 ParallelConcat
ParallelDynamicStitch PartitionedCall Placeholder PlaceholderWithDefault PreventGradient
QuantizeAndDequantizeV2 QuantizeAndDequantizeV3 QuantizeAndDequantizeV4 QuantizeV2
RGBToHSV Rank ReadVariableOp Reshape ResizeArea ResizeBicubic ResizeBilinear
ResizeNearestNeighbor ResourceGather Reverse ReverseSequence ReverseV2 RightShift Roll
ScaleAndTranslate ScatterNd Shape ShapeN Size Slice Snapshot SpaceToBatch SpaceToBatchND
SpaceToDepth Split SplitV Squeeze StatefulPartitionedCall StatelessCase StatelessIf
StatelessMultinomial StatelessRandomGetKeyCounter StatelessRandomNormal
StatelessRandomNormalV2 StatelessRandomUniform StatelessRandomUniformV2
StatelessTruncatedNormal StatelessTruncatedNormalV2 StatelessWhile StopGradient
StridedSlice Switch TensorListFromTensor TensorListGetItem TensorListLength
TensorListReserve TensorListSetItem TensorListStack TensorScatterAdd TensorScatterMax
TensorScatterMin TensorScatterSub TensorScatterUpdate TensorStridedSliceUpdate Tile
Transpose Unique UniqueV2 UniqueWithCounts Unpack UnravelIndex UpperBound Where While
ZerosLike
"""
_ALLOWED = frozenset(
    name for family in _FAMILIES for name in dir(family) if name[0].isupper()
).union(_NAMES.split())
# While a SavedModel is loaded, its tables of constants are filled, and nothing is
# called or repeated.
_ALLOWED_ON_LOADING = frozenset(
    ("Const", "HashTableV2", "Identity", "LookupTableImportV2", "MutableHashTableV2",
     "NoOp", "Placeholder")
)  # fmt: skip
_RUN_ON_LOADING = {"_create_resource", "_initialize", "_destroy_resource"}
_EXPECTED = (
    "A SavedModel backbone must map float images (batch, height, width, 3) to features."
)
# No node of a SavedModel is called so: theirs lie in the scope of a call.
_OUTPUT = "keras_rsft_features"
# What protobuf can hold.
_MOST_BYTES = 2**31 - 1


def freeze(traced: Any) -> tuple[tf.compat.v1.GraphDef, str]:
    """Returns a function's graph with its variables as constants, and its output."""
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
    return graph, frozen.outputs[0].name


def to_onnx(traced: Any, output: str, opset: int) -> Any:
    """Converts a concrete function of one input and one output to an ONNX model."""
    import tf2onnx

    graph, source = freeze(traced)
    (spec,) = traced.structured_input_signature[0]
    converted, _ = tf2onnx.convert.from_graph_def(
        graph,
        input_names=[f"{spec.name}:0"],
        output_names=[source],
        opset=opset,
        tensors_to_rename={f"{spec.name}:0": spec.name, source: output},
    )
    return converted


def impure_operations(graph: tf.compat.v1.GraphDef) -> list[str]:
    inner = {one.signature.name: one.node_def for one in graph.library.function}
    used = {node.op for node in itertools.chain(graph.node, *inner.values())}
    # A function can be called by its name alone.
    return sorted(
        used - _ALLOWED - {n for n in inner if op_def_registry.get(n) is None}
    )


def load_saved_model(path: Path) -> Any:
    """Loads a SavedModel, unless that would do more than compute."""
    try:
        odd = [one for one in path.rglob("*") if not (one.is_file() or one.is_dir())]
        if odd:
            raise OSError(f"{odd[0]} is neither a file nor a folder")
        parts = parse_saved_model(str(path)).meta_graphs
        if len(parts) != 1 or not parts[0].HasField("object_graph_def"):
            raise ValueError("it was not saved by `tf.saved_model.save`")
        objects = parts[0].object_graph_def.nodes
        run = [
            child.node_id
            for node in objects
            for child in node.children
            if child.local_name in _RUN_ON_LOADING
        ]
        for node in objects:
            run += [one.restore_function for one in node.saveable_objects.values()]
        names = {objects[n].bare_concrete_function.concrete_function_name for n in run}
        names |= {one for n in run for one in objects[n].function.concrete_functions}
        library = parts[0].graph_def.library.function
        bodies = [one.node_def for one in library if one.signature.name in names]
        operations = {node.op for body in bodies for node in body}
        _require_none(sorted(operations - _ALLOWED_ON_LOADING), path)
        return tf.saved_model.load(str(path))
    except InvalidArgument:
        raise
    except (OSError, LookupError, TypeError, ValueError, tf.errors.OpError) as error:
        raise WeightsUnavailable(
            f"The SavedModel {path} is damaged: {first_line(error)}."
        ) from error


def require_pure(
    graph: tf.compat.v1.GraphDef, source: str | Path
) -> tf.compat.v1.GraphDef:
    _require_none(impure_operations(graph), source)
    return graph


def _require_none(operations: Sequence[str], source: str | Path) -> None:
    if operations:
        raise InvalidArgument(
            f"A graph from a file may only compute. Received: {source}, which uses "
            f"{', '.join(operations)} too. It is not run."
        )


@keras.saving.register_keras_serializable(package="keras_rsft")
class GraphNetwork(ForeignNetwork):
    file_name = "graph.pb"

    def run(self, images: tf.Tensor) -> tf.Tensor:
        return self._function(images)

    def check_content(self) -> None:
        self._graph  # noqa: B018 -- Read and refused, before the model is used.

    @functools.cached_property
    def _graph(self) -> tf.compat.v1.GraphDef:
        try:
            graph = tf.compat.v1.GraphDef.FromString(self.content)
        except DecodeError as error:
            raise DataError(
                f"The graph of the layer {self.name!r} is damaged."
            ) from error
        return require_pure(graph, f"the layer {self.name!r}")

    @functools.cached_property
    def _function(self) -> Callable[[tf.Tensor], tf.Tensor]:
        graph = self._graph

        @tf.function(autograph=False)
        def run(images: tf.Tensor) -> tf.Tensor:
            return tf.graph_util.import_graph_def(
                graph, {"images:0": images}, [f"{_OUTPUT}:0"], name="network"
            )[0]

        return run


def build_saved_model(path: Path, *, image_size: tuple[int, int] | None) -> keras.Model:
    if not (path / "saved_model.pb").is_file():
        raise InvalidArgument(
            f"A SavedModel is a folder with saved_model.pb in it. Received: {path}."
        )
    loaded = load_saved_model(path)
    function, declared = _image_function(loaded, path)
    size = agreed_size(declared, image_size, path)
    try:
        one = tf.TensorSpec((1, *size, 3), tf.float32)
        tried = tf.function(function, autograph=False).get_concrete_function(one)
        require_pure(tried.graph.as_graph_def(), path)  # Before it is run at all.
        outputs = function(tf.zeros(one.shape))
        chosen = _features_of(outputs)
        shape = (None, *outputs[chosen].shape[1:])

        def features(images: tf.Tensor) -> tf.Tensor:
            values = function(images)[chosen]
            values.set_shape(shape)
            pooled = tf.reduce_mean(values, axis=pooled_axes(len(shape)))
            return tf.cast(pooled, tf.float32)

        spec = tf.TensorSpec((None, *size, 3), tf.float32, name="images")
        traced = tf.function(features, autograph=False).get_concrete_function(spec)
        graph, output = freeze(traced)
        features_node = graph.node.add(name=_OUTPUT, op="Identity", input=[output])
        features_node.attr["T"].type = tf.float32.as_datatype_enum
        require_pure(graph, path)
        if graph.ByteSize() > _MOST_BYTES:
            raise InvalidArgument(f"{path} is too large: a graph can hold 2 GB.")
        content, dim = graph.SerializeToString(deterministic=True), int(shape[-1])
    except InvalidArgument:
        raise
    except (ValueError, TypeError, tf.errors.OpError) as error:
        raise InvalidArgument(
            f"{_EXPECTED} {path} does not run on images of {size[0]}x{size[1]}: "
            f"{first_line(error)}"
        ) from error
    # Of the files: a frozen graph has other names on each load.
    files = sorted(file for file in path.rglob("*") if file.is_file())
    names = [str(file.relative_to(path)).encode() for file in files]
    digest = digest_of(*names, *(file.read_bytes() for file in files))
    layer = GraphNetwork(dim=dim, digest=digest, content=content)
    return _model_of(layer, size, "savedmodel")


def _image_function(
    loaded: Any, path: Path
) -> tuple[Callable[[tf.Tensor], dict[str, tf.Tensor]], list[int | None]]:
    """Returns a function of images, and the height and width that it fixes."""
    found, default = [], "serving_default"
    for name in sorted(loaded.signatures, key=lambda one: (one != default, one)):
        inputs = loaded.signatures[name].structured_input_signature[1]
        for key, spec in inputs.items():
            shape = [None] * 4 if spec.shape.rank is None else spec.shape.as_list()
            is_image = len(shape) == 4 and shape[3] in (None, 3)
            if len(inputs) == 1 and spec.dtype == tf.float32 and is_image:
                return functools.partial(_call, loaded, name, key), shape[1:3]
        specs = (f"{key} {one.dtype.name} {one.shape}" for key, one in inputs.items())
        found.append(f"{name}({', '.join(specs)})")
    if callable(loaded):
        return functools.partial(_call, loaded, "", ""), [None, None]
    raise InvalidArgument(
        f"{_EXPECTED} Received: {path} with {', '.join(found) or 'no signature'}."
    )


def _call(
    loaded: Any, signature: str, key: str, images: tf.Tensor
) -> dict[str, tf.Tensor]:
    if signature:  # Through the loaded object, which keeps the variables alive.
        return loaded.signatures[signature](**{key: images})
    try:
        outputs = loaded(images, training=False)
    except (TypeError, ValueError):  # It has no such argument.
        outputs = loaded(images)
    if isinstance(outputs, (list, tuple)):
        return {str(number): value for number, value in enumerate(outputs)}
    return outputs if isinstance(outputs, dict) else {"features": outputs}


# ONNX ---------------------------------------------------------------------------------

_EXPECTED_ONNX = (
    "An ONNX backbone must map float images (batch, 3, height, width) or "
    "(batch, height, width, 3) to features."
)
_DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_FASTEST_FIRST = ("CUDAExecutionProvider", "CPUExecutionProvider")
_ONLY_ERRORS = 3


class OnnxSession:
    """An ONNX file in ONNX Runtime, and how it takes images; on a GPU if it can."""

    def __init__(self, content: bytes):
        onnxruntime = import_extra("onnxruntime", "onnx", "An ONNX backbone")
        available = onnxruntime.get_available_providers()
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ONLY_ERRORS
        self._session = onnxruntime.InferenceSession(
            content, options, providers=[p for p in _FASTEST_FIRST if p in available]
        )
        inputs = self._session.get_inputs()
        one = inputs[0]
        dims = [d if isinstance(d, int) else None for d in one.shape or ()]
        known = len(inputs) == 1 and len(dims) == 4 and one.type in _DTYPES
        if not known or 3 not in (dims[1], dims[3]):
            found = ", ".join(f"{one.name} {one.type} {one.shape}" for one in inputs)
            raise InvalidArgument(f"{_EXPECTED_ONNX} Received: {found}.")
        self.name, self.dtype, self.batch = one.name, _DTYPES[one.type], dims[0]
        self.channels_first = dims[1] == 3
        self.size = dims[2:] if self.channels_first else dims[1:3]

    def features(self, images: np.ndarray) -> tuple[str, np.ndarray]:
        """Returns the features of scaled images as they come, with their name."""
        values = images.astype(self.dtype)
        if self.channels_first:
            values = np.ascontiguousarray(values.transpose(0, 3, 1, 2))
        names = [output.name for output in self._session.get_outputs()]
        values = self._session.run(names, {self.name: values})
        outputs = dict(zip(names, values, strict=True))
        name = _features_of(outputs)
        return name, outputs[name]

    def run(self, images: np.ndarray) -> np.ndarray:
        """Returns the features of scaled images, float32 `(batch, dim)`."""
        count = max(len(images), 1)
        step, parts = self.batch or count, []
        for start in range(0, count, step):
            part = images[start : start + step]
            missing = step - len(part)
            part = np.pad(part, [(0, missing), (0, 0), (0, 0), (0, 0)])
            values = self.features(part)[1]
            axes = pooled_axes(values.ndim, channels_first=self.channels_first)
            parts.append(values.mean(axis=axes).astype(np.float32))
        return np.concatenate(parts)[: len(images)]


@keras.saving.register_keras_serializable(package="keras_rsft")
class OnnxNetwork(ForeignNetwork):
    file_name = "model.onnx"
    not_tensorflow = (
        "A model on an ONNX backbone runs in ONNX Runtime, so that it cannot become a "
        "SavedModel or a LiteRT file. Export it with `--format onnx`; "
        "`keras-rsft predict` takes the run as it is."
    )

    def run(self, images: tf.Tensor) -> tf.Tensor:
        return tf.numpy_function(self.session.run, [images], tf.float32, stateful=False)

    @functools.cached_property
    def session(self) -> OnnxSession:
        return OnnxSession(self.content)


def build_onnx(path: Path, *, image_size: tuple[int, int] | None) -> keras.Model:
    onnx = import_extra("onnx", "onnx", "An ONNX backbone")
    try:
        content = onnx.load(path).SerializeToString()
    except Exception as error:  # Those of protobuf, of onnx, and of files.
        raise WeightsUnavailable(
            f"The backbone file {path} is damaged, not an ONNX file, or the weights "
            f"beside it are missing: {first_line(error)}."
        ) from error
    try:
        session = OnnxSession(content)
        size = agreed_size(session.size, image_size, path)
        features = session.run(np.zeros((1, *size, 3), np.float32))
    except (ImportError, InvalidArgument):
        raise
    except Exception as error:  # ONNX Runtime's errors have no common class.
        raise InvalidArgument(
            f"{_EXPECTED_ONNX} {path} does not run: {first_line(error)}"
        ) from error
    layer = OnnxNetwork(
        dim=features.shape[1], digest=digest_of(content), content=content
    )
    return _model_of(layer, size, "onnx")
