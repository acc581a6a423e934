"""Runs exported models of any format on decoded images."""

from __future__ import annotations

import dataclasses
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_rsft._runtime import import_extra
from keras_rsft._storage import bytes_of, understood
from keras_rsft.backbones._foreign import load_saved_model, require_pure
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._formats import CLASS_NAMES_KEY, LABELS_MEMBER


@dataclasses.dataclass(frozen=True)
class ExportedModel:
    image_size: tuple[int, int]
    class_names: tuple[str, ...]
    probabilities: Callable[[np.ndarray], np.ndarray]


def load_exported(path: str | os.PathLike) -> ExportedModel:
    """Loads a SavedModel's version, a `.tflite` or an `.onnx` file."""
    path, load = Path(path), None
    if path.suffix in _LOADERS and path.is_file():
        load = _LOADERS[path.suffix]
    elif (path / "saved_model.pb").is_file():
        load = _load_saved_model
    if load is None:
        raise InvalidArgument(
            "An exported model is the folder of a SavedModel's version, a .tflite or "
            f"an .onnx file. Received: {path}."
        )
    with understood(path):
        model = load(path)
        # Much of what is wrong in a file is noticed when it runs.
        answer = model.probabilities(np.zeros((1, *model.image_size, 3), np.float32))
        if answer.shape != (1, len(model.class_names)):
            raise ValueError(
                f"{len(model.class_names)} class names for an answer {answer.shape}"
            )
    return model


def _load_saved_model(path: Path) -> ExportedModel:
    loaded = load_saved_model(path)
    serve = loaded.signatures.get("serving_images")
    labels = path / "assets" / "labels.txt"
    if serve is None or not labels.is_file():
        raise DataError(f"{path} has no signature `serving_images`, or no labels.")
    require_pure(serve.graph.as_graph_def(), path)
    shape = serve.structured_input_signature[1]["images"].shape

    def probabilities(images: np.ndarray) -> np.ndarray:
        # Keeps the loaded object alive: a signature alone loses its variables.
        signature = loaded.signatures["serving_images"]
        return signature(images=tf.constant(images))["probabilities"].numpy()

    return ExportedModel(tuple(shape[1:3]), _lines(bytes_of(labels)), probabilities)


def _load_onnx(path: Path) -> ExportedModel:
    onnxruntime = import_extra("onnxruntime", "onnx", "Running an ONNX model")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    metadata = session.get_modelmeta().custom_metadata_map
    if CLASS_NAMES_KEY not in metadata:
        raise DataError(f"{path} has no class names in its metadata.")
    height, width = session.get_inputs()[0].shape[1:3]
    return ExportedModel(
        (height, width),
        tuple(json.loads(metadata[CLASS_NAMES_KEY])),
        lambda images: session.run(["probabilities"], {"images": images})[0],
    )


def _load_litert(path: Path) -> ExportedModel:
    module = import_extra(
        "ai_edge_litert.interpreter", "litert", "Running a LiteRT model"
    )
    try:
        with zipfile.ZipFile(path) as archive:
            names = _lines(archive.read(LABELS_MEMBER))
    except (zipfile.BadZipFile, KeyError) as error:
        raise DataError(f"{path} has no {LABELS_MEMBER} in it.") from error
    interpreter = module.Interpreter(model_path=str(path), num_threads=os.cpu_count())
    taken, given = interpreter.get_input_details()[0], interpreter.get_output_details()

    def probabilities(images: np.ndarray) -> np.ndarray:
        if tuple(interpreter.get_input_details()[0]["shape"]) != images.shape:
            interpreter.resize_tensor_input(taken["index"], images.shape)
        interpreter.allocate_tensors()
        interpreter.set_tensor(taken["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(given[0]["index"])

    height, width = (int(side) for side in taken["shape"][1:3])
    return ExportedModel((height, width), names, probabilities)


def _lines(encoded: bytes) -> tuple[str, ...]:
    return tuple(encoded.decode("utf-8").splitlines())


_LOADERS = {".tflite": _load_litert, ".onnx": _load_onnx}
