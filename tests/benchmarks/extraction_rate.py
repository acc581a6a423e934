"""The kept pass over image files against the bare forward pass of the base.

Writes random JPEG photos, then measures in turn: the base on the same images
already decoded in memory, and `extract_features` from the files. Prints both
rates and the ratio, round by round.

    python tests/benchmarks/extraction_rate.py --images 2200 --rounds 3
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import tensorflow as tf

import keras_rsft as rsft


def write_photos(folder: Path, count: int, width: int, height: int) -> None:
    """Writes smooth random JPEG photos of two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        small = rng.uniform(0, 255, size=(12, 16, 3))
        image = tf.image.resize(small, (height, width), method="bicubic")
        image = image + rng.normal(0, 6, size=(height, width, 3))
        encoded = tf.io.encode_jpeg(tf.cast(tf.clip_by_value(image, 0, 255), tf.uint8))
        target = folder / str(number % 2) / f"{number:05}.jpg"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(encoded.numpy())


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--width", type=int, default=500)
    parser.add_argument("--height", type=int, default=400)
    parser.add_argument("--backbone", default="resnet50")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    base = rsft.load_backbone(arguments.backbone, weights="none")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, arguments.images, arguments.width, arguments.height)
        split = rsft.load_images(
            str(folder), validation_fraction=0.01, test_fraction=0.01
        ).train
        size = base.input_shape[1:3]
        decoded = np.stack([image for _, image in split.images(size)])
        forward = tf.function(lambda images: base(images, training=False))
        batches = tf.data.Dataset.from_tensor_slices(decoded).batch(32).cache()
        rates: dict[str, list[float]] = {"bare": [], "kept": []}
        for round_number in range(arguments.rounds + 1):  # The first one compiles.
            for kind in rates:
                started = time.perf_counter()
                if kind == "bare":
                    for batch in batches:
                        forward(batch).numpy()
                else:
                    cache = folder / f"cache-{round_number}"
                    rsft.extract_features(base, split, cache_dir=cache, progress=False)
                if round_number:
                    seconds = time.perf_counter() - started
                    rates[kind].append(len(split) / seconds)
    ratios = [k / b for k, b in zip(rates["kept"], rates["bare"], strict=True)]
    print(f"{arguments.backbone}, {len(split)} JPEG files of "
          f"{arguments.width} x {arguments.height}")  # fmt: skip
    print(
        f"bare forward pass, decoded in memory {statistics.median(rates['bare']):8.1f}"
    )
    print(
        f"extract_features, from files         {statistics.median(rates['kept']):8.1f}"
    )
    print(f"ratio, median and range              {statistics.median(ratios):8.3f} "
          f"({min(ratios):.3f}-{max(ratios):.3f})")  # fmt: skip


if __name__ == "__main__":
    main()
