"""Damaged files through `serving_default` in one process: speed, memory, answers.

python tests/benchmarks/serving_fuzz.py

Takes one image of each kind that is read, changes, cuts and joins their bytes, and
sends them in batches with a good image at the end, which must be answered right each
time. A crash ends the process and a hang shows as the slowest batch.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parents[1]))

import keras
import numpy as np
import psutil
import tensorflow as tf
from test_decode import FILES, png_header

import keras_rsft as rsft

BATCH = 20


def damaged(rng: np.random.Generator, files: list[bytes]) -> bytes:
    """Returns bytes that began as an image of a known kind, or never were one."""
    content = bytearray(files[rng.integers(len(files))])
    way = rng.integers(5)
    if way == 0:
        return rng.bytes(int(rng.integers(0, 200)))
    if way == 1:  # Headers above all: the first bytes decide what is done.
        content[int(rng.integers(min(64, len(content))))] = rng.integers(256)
    elif way == 2:
        for at in rng.integers(len(content), size=rng.integers(1, 30)):
            content[at] = rng.integers(256)
    elif way == 3:
        other = files[rng.integers(len(files))]
        content[int(rng.integers(len(content))) :] = other[rng.integers(len(other)) :]
    return bytes(content[: rng.integers(len(content) + 1)] if way == 4 else content)


def export_tiny_model(folder: Path) -> Path:
    """Exports a model that takes no time, so that decoding is what is measured."""
    images = keras.Input((32, 32, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(images)
    scores = keras.layers.Dense(2, activation="softmax")(pooled)
    model = keras.Model(images, scores)
    return rsft.export_saved_model(model, folder / "x", class_names=["a", "b"])


def megabytes() -> float:
    """Returns the resident memory of this process."""
    return psutil.Process().memory_info().rss / 1e6


def main() -> None:
    """Sends the files and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    rng = np.random.default_rng(arguments.seed)
    files = [*FILES.values(), png_header(30_000, 30_000)]
    good = FILES["jpeg"]
    with tempfile.TemporaryDirectory() as folder:
        loaded = tf.saved_model.load(str(export_tiny_model(Path(folder))))
        serve = loaded.signatures["serving_default"]
        expected = serve(image_bytes=tf.constant([good]))["score"].numpy()[0]
        valid, wrong, slowest, memory = 0, 0, 0.0, []
        started = time.perf_counter()
        for number in range(-(-arguments.files // BATCH)):
            batch = [damaged(rng, files) for _ in range(BATCH)]
            began = time.perf_counter()
            served = serve(image_bytes=tf.constant([*batch, good]))
            slowest = max(slowest, time.perf_counter() - began)
            valid += int(served["valid"].numpy()[:-1].sum())
            wrong += int(not np.isclose(served["score"].numpy()[-1], expected))
            if number % 25 == 0:
                memory.append(megabytes())
        seconds = time.perf_counter() - started
    print(f"damaged files                   {arguments.files:>10}")
    print(f"still images                    {valid:>10}")
    print(f"wrong answers to the good image {wrong:>10}")
    print(f"files a second                  {arguments.files / seconds:>10.0f}")
    print(f"slowest batch of {BATCH + 1}             {slowest:>10.2f} s")
    for share in (0, 0.25, 0.5, 1):
        at = memory[int(share * (len(memory) - 1))]
        print(f"memory after {share:>4.0%}               {at:>10.0f} MB")


if __name__ == "__main__":
    main()
