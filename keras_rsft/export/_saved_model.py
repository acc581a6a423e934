"""Writes a SavedModel for TensorFlow Serving."""

from __future__ import annotations

import importlib.util
import math
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft._runtime import import_extra, require_tensorflow_backend
from keras_rsft._storage import write_new_file, written_whole
from keras_rsft.backbones._foreign import require_tensorflow
from keras_rsft.config import ExportConfig
from keras_rsft.data._images import at_most_pixels, decode_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.export import _places
from keras_rsft.model._rsft_model import RSFTModel

# The graph ----------------------------------------------------------------------------

MAX_FLOAT16 = float(np.finfo(np.float16).max)
# A variable costs about 3 kB of graph, to read, to save and to restore it. A network
# has many small ones (BatchNorm has four a layer), which would make a small model a
# tenth larger, so they share one. As constants they would be folded into their
# neighbours, which changes the answers in the fifth digit.
MAX_PACKED_BYTES = 16_384


class ForwardPass(tf.Module):
    """A Keras model as a function of images, with each weight held once."""

    def __init__(
        self, model: keras.Model, *, float16: bool = False, pack: bool = False
    ):
        super().__init__()
        require_tensorflow(model)
        self.image_size = size = tuple(model.input_shape[1:3])
        self.images_spec = tf.TensorSpec((None, *size, 3), tf.float32, name="images")
        alone: list[tuple[keras.Variable, tf.Tensor]] = []
        small: dict[tf.DType, list[tuple[keras.Variable, tf.Tensor]]] = {}
        for variable in model.variables:
            value = variable.value
            if float16 and _fits_float16(value):
                value = tf.Variable(tf.cast(value, tf.float16))
            is_small = value.shape.num_elements() * value.dtype.size <= MAX_PACKED_BYTES
            together = small.setdefault(value.dtype, []) if pack and is_small else alone
            together.append((variable, value))
        packs = []  # Small weights of one type, end to end in one variable.
        for pairs in small.values():
            flat = [tf.reshape(value, [-1]) for _, value in pairs]
            packs.append(([v for v, _ in pairs], tf.Variable(tf.concat(flat, 0))))
        self._weights = [value for _, value in alone] + [values for _, values in packs]

        # A closure: what is an attribute of a module is saved with it, and tracking
        # the Keras model would store every weight twice.
        def predict(images: tf.Tensor) -> tf.Tensor:
            state = list(alone)
            for variables, values in packs:
                sizes = [math.prod(variable.shape) for variable in variables]
                for v, part in zip(variables, tf.split(values, sizes), strict=True):
                    one_axis = len(v.shape) == 1
                    state.append((v, part if one_axis else tf.reshape(part, v.shape)))
            widened = [(v, tf.cast(kept, v.dtype)) for v, kept in state]
            with keras.StatelessScope(state_mapping=widened):
                return tf.cast(model(images, training=False), tf.float32)

        self.predict = predict


def _fits_float16(weight: tf.Variable) -> bool:
    # Vectors (biases, BatchNorm, standardisation) weigh little and may hold variances
    # far outside the range.
    if weight.dtype != tf.float32 or weight.shape.rank < 2:
        return False
    return bool(tf.reduce_max(tf.abs(weight)) <= MAX_FLOAT16)


def serving_graph(
    forward: ForwardPass,
    class_names: Sequence[str],
    labels_file: Path,
    top_k: int | None,
    max_pixels: int | None = None,
) -> tuple[tf.Module, dict[str, Any]]:
    module = tf.Module()
    module.labels = tf.saved_model.Asset(str(labels_file))
    module.forward = forward

    @tf.function(input_signature=[forward.images_spec])
    def serve_images(images: tf.Tensor) -> dict[str, tf.Tensor]:
        # Some kernels refuse an empty batch: one blank image is added, then cut.
        count = tf.shape(images)[0]
        padding = tf.cast(count == 0, tf.int32)
        padded = tf.pad(images, [[0, padding], [0, 0], [0, 0], [0, 0]])
        probabilities = forward.predict(padded)[:count]
        # A constant, not a lookup table: a table would need an initialisation step.
        names = tf.constant(list(class_names))
        best = tf.argmax(probabilities, axis=-1, output_type=tf.int32)
        served = {
            "label": tf.gather(names, best),
            "score": tf.reduce_max(probabilities, axis=-1),
            "probabilities": probabilities,
        }
        if top_k is not None:
            scores, positions = tf.math.top_k(probabilities, k=top_k)
            served |= {"top_labels": tf.gather(names, positions), "top_scores": scores}
        return served

    # Not attributes: those would be traced, and saved, once more.
    images_signature = serve_images.get_concrete_function()

    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def serve_bytes(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        with at_most_pixels(max_pixels):
            images, valid = decode_images(image_bytes, forward.image_size)
        served = images_signature(images=images)  # A call: one copy of the model.
        # Empty text or zeros where an image is not valid.
        for name, value in served.items():
            mask = tf.reshape(valid, [-1] + [1] * (value.shape.rank - 1))
            served[name] = tf.where(mask, value, tf.zeros([], value.dtype))
        return served | {"valid": valid}

    return module, {
        "serving_default": serve_bytes.get_concrete_function(),
        "serving_images": images_signature,
    }


# For the server -----------------------------------------------------------------------

WARMUP_FILE = Path("assets.extra") / "tf_serving_warmup_requests"
WARMUP_BATCHES = (1, 8)
WARMUP_IMAGE_SIZE = (400, 500)
MAX_REQUEST, MAX_BATCH = 128, 32


def warmup_available() -> bool:
    return importlib.util.find_spec("tensorflow_serving") is not None


def warmup_requests(model_name: str) -> list[bytes]:
    """Returns serialised `PredictionLog` messages for `serving_default`."""
    import_extra("tensorflow_serving.apis", "serving", "Writing warm-up requests")
    from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

    height, width = WARMUP_IMAGE_SIZE
    down = tf.linspace(0.0, 3.0, height)[:, None, None]
    right = tf.linspace(0.0, 3.0, width)[None, :, None]
    colour = tf.constant([1.0, 1.7, 2.3])
    waves = 127.5 + 60.0 * (tf.sin(down * colour) + tf.cos(right * colour * colour))
    pixels = tf.cast(waves, tf.uint8)
    # A few kilobytes: they are stored once for each image of each request.
    image = tf.io.encode_jpeg(pixels, quality=20, optimize_size=True).numpy()
    logs = []
    for count in WARMUP_BATCHES:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model_name
        request.model_spec.signature_name = "serving_default"
        request.inputs["image_bytes"].CopyFrom(
            tf.make_tensor_proto([image] * count, tf.string)
        )
        log = prediction_log_pb2.PredictionLog()
        log.predict_log.request.CopyFrom(request)
        logs.append(log.SerializeToString(deterministic=True))
    return logs


def models_config(name: str) -> str:
    """Returns a `ModelServerConfig` that serves the newest version of one model."""
    return f"""\
model_config_list {{
  config {{
    name: "{name}"
    base_path: "/models/{name}"
    model_platform: "tensorflow"
  }}
}}
"""


def batching_config() -> str:
    """Returns `BatchingParameters`: requests that arrive together are run together."""
    return f"""\
max_batch_size {{ value: {MAX_REQUEST} }}
enable_large_batch_splitting {{ value: true }}
max_execution_batch_size {{ value: {MAX_BATCH} }}
batch_timeout_micros {{ value: 2000 }}
max_enqueued_batches {{ value: 100 }}
"""


# Writing ------------------------------------------------------------------------------


def export_saved_model(
    model: keras.Model,
    directory: str | os.PathLike,
    *,
    class_names: Sequence[str],
    version: int | None = None,
    top_k: int | None = None,
    weight_dtype: str = "float32",
    max_pixels: int | None = None,
    warmup: bool | None = None,
    model_card: str | None = None,
) -> Path:
    """Writes `DIRECTORY/VERSION` as a SavedModel with two signatures.

    `serving_default` takes `image_bytes`, a vector of encoded images, and gives
    `label` (string), `score` (float32), `probabilities` (float32,
    `(batch, classes)`) and `valid` (bool); with `top_k` also `top_labels` and
    `top_scores`, `(batch, top_k)`, the most probable first. An image that cannot be
    decoded is not valid, has empty labels and zero probabilities, and leaves the
    others alone. `serving_images` takes `images`, float32
    `(batch, height, width, 3)` in [0, 255], and gives all but `valid`. An empty batch
    gives empty results.

    The class names are in the graph and in `assets/labels.txt`. `models.config` and
    `batching.config` for TF Serving are written into `DIRECTORY` once.

    Args:
        model: Images in [0, 255] to probabilities, as `Run.model`; or an `RSFTModel`
            around such a model.
        directory: Folder named after the model; made if it does not exist.
        class_names: Names in the order of the probabilities.
        version: Number of the version, at least 1. Default: one more than the
            highest that the folder holds, or 1.
        top_k: In [1, classes]. Default: no `top_labels`.
        weight_dtype: `"float32"`, or `"float16"` for half the size: kernels are
            stored in float16 and widened when the graph runs. Default float32.
        max_pixels: Refuse encoded images of more pixels, at least 1: they cost time
            and memory however small their files are. Default: 100,000,000, which
            takes 300 MB.
        warmup: Write requests that the server runs before it answers, in
            `assets.extra/`. Default: where the extra `serving` is installed.
        model_card: Markdown, written as the version's `README.md`. Default: none.

    Returns:
        The folder that was written; it appears whole.

    Raises:
        InvalidArgument: If that version exists, the folder holds something else or
            cannot be written to, or another argument does not fit.
        ImportError: If `warmup` is True and the extra `serving` is not installed.
    """
    require_tensorflow_backend("`export_saved_model`")
    directory = _places.check_model_folder(directory)
    _places.check_name(directory.name)
    model = checked_model(model, class_names)
    ExportConfig("saved-model", weight_dtype, version, top_k, max_pixels)
    if top_k is not None and top_k > len(class_names):
        raise InvalidArgument(
            f"`top_k` must be in [1, {len(class_names)}], the number of classes. "
            f"Received: {top_k}."
        )
    _places.free_version(directory, version)  # Refused before the work.
    if warmup is None:
        warmup = warmup_available()
    requests = warmup_requests(directory.name) if warmup else []
    forward = ForwardPass(model, float16=weight_dtype == "float16", pack=True)
    with _places.turn_in(directory):
        target = directory / str(_places.free_version(directory, version))
        # TF Serving looks for folders that are numbers: the hidden one it never sees.
        with written_whole(target) as partial, tempfile.TemporaryDirectory() as assets:
            labels = Path(assets) / "labels.txt"
            labels.write_text("\n".join(class_names) + "\n", encoding="utf-8")
            module, signatures = serving_graph(
                forward, class_names, labels, top_k, max_pixels
            )
            tf.saved_model.save(module, str(partial), signatures=signatures)
            if requests:
                (partial / WARMUP_FILE).parent.mkdir()
                with tf.io.TFRecordWriter(str(partial / WARMUP_FILE)) as writer:
                    for request in requests:
                        writer.write(request)
            if model_card is not None:
                (partial / "README.md").write_text(model_card, encoding="utf-8")
        for name, content in (
            (_places.MODELS_CONFIG, models_config(directory.name)),
            (_places.BATCHING_CONFIG, batching_config()),
        ):
            if not (directory / name).exists():  # The user may have changed it.
                write_new_file(directory / name, content.encode())
    return target


def checked_model(model: keras.Model, class_names: Sequence[str]) -> keras.Model:
    """Returns the model that answers, for these classes: of an RSFTModel its own."""
    if isinstance(model, RSFTModel):
        model = model.model
    if len(class_names) != model.output_shape[-1]:
        raise InvalidArgument(
            f"The model has {model.output_shape[-1]} classes. "
            f"Received: {len(class_names)} class names."
        )
    for name in class_names:
        if len(name.splitlines()) != 1:
            raise InvalidArgument(
                f"A class name must be one line of text. Received: {name!r}."
            )
    return model
