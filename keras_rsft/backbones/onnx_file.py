"""An ONNX file as the network of a backbone, run by ONNX Runtime."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones.assembly import first_line
from keras_rsft.backbones.foreign import (
    ForeignNetwork,
    agreed_size,
    choose_output,
    digest_of,
    pooled,
)
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

_EXPECTED = (
    "An ONNX backbone must map float images (batch, 3, height, width) or "
    "(batch, height, width, 3) to features."
)
_CHANNELS = 3
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


def build(path: Path, *, image_size: tuple[int, int] | None) -> keras.Model:
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
            f"{_EXPECTED} {path} does not run: {first_line(error)}"
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
    raise InvalidArgument(f"{_EXPECTED} Received: {found or 'no input'}.")


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
