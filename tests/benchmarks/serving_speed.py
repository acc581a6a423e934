"""Images a second through `serving_default` against the bare forward pass.

python tests/benchmarks/serving_speed.py

The forward pass gets images that are decoded already; what `serving_default` takes
longer is decoding, resizing and the handling of broken images. Rounds of the two take
turns, and the table has the medians: images a second, and how much more time and how
much more processor time the first way takes. Other work on the machine disturbs the
second less.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import keras_rsft as rsft
from keras_rsft.backbones._build import build_classifier
from keras_rsft.data._images import decode_image

CLASSES = 10


def photos(count: int, height: int, width: int) -> list[bytes]:
    """Returns JPEG files with the detail of photos, about 60 kB each."""
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(count):
        coarse = rng.uniform(0, 255, (height // 16, width // 16, 3)).astype("float32")
        smooth = tf.image.resize(coarse, (height, width), method="bicubic")
        noisy = smooth + rng.normal(0, 6, (height, width, 3))
        pixels = tf.cast(tf.clip_by_value(noisy, 0, 255), tf.uint8)
        encoded.append(tf.io.encode_jpeg(pixels, quality=85).numpy())
    return encoded


def seconds_of(call) -> tuple[float, float]:
    """Returns how long one call takes, and its processor time on all cores."""
    started, used = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - started, time.process_time() - used


def measure(
    signatures, encoded: list[bytes], size: tuple[int, int], rounds: int
) -> dict[str, np.ndarray]:
    """Returns the medians of both ways: seconds and processor seconds a call."""
    images = tf.stack([decode_image(tf.constant(one), size) for one in encoded])
    batch = tf.constant(encoded)
    calls = {
        "bytes": lambda: signatures["serving_default"](image_bytes=batch),
        "images": lambda: signatures["serving_images"](images=images),
    }
    taken = {name: [] for name in calls}
    for name in [*calls] + rounds * [*calls]:
        taken[name].append(seconds_of(calls[name]))
    # The first round of each is its warm-up.
    return {name: np.median(times[1:], axis=0) for name, times in taken.items()}


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--weights", default="none", help="speed needs no right ones")
    parser.add_argument("--image-size", type=int)
    parser.add_argument("--height", type=int, default=400)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    keras.utils.set_random_seed(0)
    base = rsft.load_backbone(
        arguments.backbone, weights=arguments.weights, image_size=arguments.image_size
    )
    model = build_classifier(base, CLASSES)
    size = tuple(base.input_shape[1:3])
    with tempfile.TemporaryDirectory() as folder:
        version = rsft.export_saved_model(
            model,
            Path(folder) / "model",
            class_names=[str(number) for number in range(CLASSES)],
        )
        signatures = tf.saved_model.load(str(version)).signatures
        print(f"{arguments.backbone}, {size[0]} x {size[1]} pixels, from JPEG files of")
        print(f"{arguments.width} x {arguments.height} pixels, {os.cpu_count()} cores")
        print("batch   bytes/s  pixels/s  more time  more processor time")
        for count in (1, 8, 32):
            encoded = photos(count, arguments.height, arguments.width)
            rounds = max(5, arguments.rounds // (1 + count // 16))
            median = measure(signatures, encoded, size, rounds)
            rates = [count / median[name][0] for name in ("bytes", "images")]
            more = median["bytes"] / median["images"] - 1
            print(
                f"{count:>5} {rates[0]:>9.1f} {rates[1]:>9.1f} {more[0]:>10.1%}"
                f" {more[1]:>20.1%}"
            )


if __name__ == "__main__":
    main()
