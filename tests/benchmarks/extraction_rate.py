"""The pass over image files against the bare forward pass, engine by engine.

Writes random JPEG photos, then measures in turn, for each engine that is installed: the
backbone on the same images already decoded in memory, and `extract_features` from the
files. Prints images a second, the ratio of both, and each engine's pass against
TensorFlow's, round by round in turns.

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
from keras_rsft.config import ENGINES, missing_packages
from keras_rsft.features._extract import FrozenBackbone


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
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    base = rsft.load_backbone(arguments.backbone, weights="none", dtype=arguments.dtype)
    engines = ["tensorflow"]
    if arguments.dtype == "float32":
        engines += [one for one in ENGINES[2:] if not missing_packages(one)]
    rates: dict[str, dict[str, list[float]]] = {
        engine: {"bare": [], "files": []} for engine in engines
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, arguments.images, arguments.width, arguments.height)
        split = rsft.load_images(
            str(folder), validation_fraction=0.01, test_fraction=0.01
        ).train
        size = base.input_shape[1:3]
        decoded = np.stack([image for _, image in split.images(size)])
        batches = list(tf.data.Dataset.from_tensor_slices(decoded).batch(32))
        opened = {}
        for engine in engines:
            opened[engine] = FrozenBackbone(
                base, num_images=len(split), engine=engine, on_note=print
            )
            opened[engine].open_engine(folder / "engines", batches[0])
        for round_number in range(arguments.rounds + 1):  # The first one compiles.
            for engine, kinds in rates.items():
                for kind in kinds:
                    started = time.perf_counter()
                    if kind == "bare":
                        for _ in opened[engine].over(enumerate(batches)):
                            pass
                    else:
                        cache = folder / f"cache-{engine}-{round_number}"
                        rsft.extract_features(
                            opened[engine], split, cache_dir=cache, progress=False
                        )
                    if round_number:
                        seconds = time.perf_counter() - started
                        kinds[kind].append(len(split) / seconds)
    print(f"{arguments.backbone}, {arguments.dtype}, {len(split)} JPEG files of "
          f"{arguments.width} x {arguments.height}")  # fmt: skip
    print("engine        bare  files  files/bare (range)   files/TensorFlow's (range)")
    reference = rates["tensorflow"]["files"]
    for engine, kinds in rates.items():
        own, gain = (
            [one / other for one, other in zip(kinds["files"], others, strict=True)]
            for others in (kinds["bare"], reference)
        )
        bare, files = (statistics.median(kinds[kind]) for kind in ("bare", "files"))
        print(
            f"{engine:12} {bare:5.1f} {files:6.1f}  {statistics.median(own):.3f} "
            f"({min(own):.3f}-{max(own):.3f})  {statistics.median(gain):.3f} "
            f"({min(gain):.3f}-{max(gain):.3f})"
        )


if __name__ == "__main__":
    main()
