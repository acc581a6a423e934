"""What TF Serving finds beside a SavedModel: warm-up requests and configurations.

The format of the requests is TensorFlow Serving's "SavedModel warmup": a TFRecord
file of `PredictionLog` messages. Their classes come with the extra `serving`.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import tensorflow as tf

from keras_rsft.export.places import BATCHING_CONFIG, MODELS_CONFIG, write_new_file

WARMUP_FILE = Path("assets.extra") / "tf_serving_warmup_requests"
WARMUP_BATCHES = (1, 8)
WARMUP_IMAGE_SIZE = (400, 500)
MAX_REQUEST, MAX_BATCH = 128, 32


def warmup_available() -> bool:
    """Says whether the extra `serving` is installed."""
    return importlib.util.find_spec("tensorflow_serving") is not None


def warmup_requests(model_name: str) -> list[bytes]:
    """Returns serialised `PredictionLog` messages for `serving_default`."""
    try:
        from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
    except ImportError as error:
        raise ImportError(
            "Warm-up requests need the package tensorflow-serving-api. Install it "
            'with: pip install "keras_rsft[serving]".'
        ) from error

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


def write_warmup(version: Path, requests: list[bytes]) -> None:
    """Writes the requests into a version's folder, where the server looks for them."""
    path = version / WARMUP_FILE
    path.parent.mkdir()
    with tf.io.TFRecordWriter(str(path)) as writer:
        for request in requests:
            writer.write(request)


def write_configs(directory: Path) -> None:
    """Writes the server's configurations of a model, where there are none yet."""
    contents = {
        MODELS_CONFIG: models_config(directory.name),
        BATCHING_CONFIG: batching_config(),
    }
    for name, content in contents.items():
        if not (directory / name).exists():  # The user may have changed it.
            write_new_file(directory / name, content.encode())


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
