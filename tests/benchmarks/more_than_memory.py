"""Training on features that exceed memory: rate and memory against rows in memory.

Trains a head on synthetic float16 rows from disk, then on as many of them as fit,
from memory, in the same process. The classes lie one after the other in the file, as
in a folder of images. Memory is what the process itself has (anonymous), the highest
of samples taken ten times a second; the system's page cache, which it can take back at
any time, is not counted. Then the accuracy after one epoch with a full shuffle and
with one by stretches, on the same rows and seeds. Before a pass from disk the system
is asked to forget what it has of the file.

    python tests/benchmarks/more_than_memory.py --rows 200000
    python tests/benchmarks/more_than_memory.py --rows 2000000   # 8 GB of disk
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import threading
import time
from pathlib import Path

import keras
import numpy as np
import psutil

import keras_rsft as rsft
from keras_rsft.features import _batches as batches
from keras_rsft.training._head import head_probabilities

CLASSES = 100
BATCH = 128
SEEDS = 5


def anonymous_gigabytes() -> float:
    """Returns this process's memory that is not of a file."""
    memory = psutil.Process().memory_info()
    return (memory.rss - memory.shared) / 1e9


class PeakMemory:
    """The highest anonymous memory while the context is open, above its start."""

    def __enter__(self) -> PeakMemory:
        self.start = self.peak = anonymous_gigabytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.1):
            self.peak = max(self.peak, anonymous_gigabytes())

    @property
    def added(self) -> float:
        return self.peak - self.start


def make_features(folder: Path, rows: int, dim: int, spread: float) -> rsft.FeatureSet:
    """Writes rows of overlapping classes, one class after the other.

    Args:
        folder: Where to.
        rows: Number of rows.
        dim: Features of a row.
        spread: Distance of the classes' centres, in deviations of a feature.
    """
    rng = np.random.default_rng(0)
    centres = (spread * rng.normal(size=(CLASSES, dim))).astype(np.float32)
    labels = np.sort(rng.integers(0, CLASSES, rows)).astype(np.int32)
    noise = rng.normal(size=(4096, dim)).astype(np.float32)  # Drawing 8 GB takes long.
    path = folder / f"{rows}.bin"
    with path.open("wb") as file:
        for start in range(0, rows, 4096):
            part = labels[start : start + 4096]
            rolled = np.roll(noise, rng.integers(dim), axis=1)[rng.permutation(4096)]
            file.write((centres[part] + rolled[: len(part)]).astype(np.float16).data)
    ids = np.arange(rows).astype(str)
    return rsft.FeatureSet(path, labels, ids, dim, dtype="float16")


def first_rows(features: rsft.FeatureSet, rows: int) -> rsft.FeatureSet:
    """Returns the first rows of a set; reading stops there."""
    path = features.path.with_name("first.bin")
    with path.open("wb") as file:
        file.write(np.fromfile(features.path, np.float16, rows * features.dim).data)
    return dataclasses.replace(
        features, path=path, labels=features.labels[:rows], ids=features.ids[:rows]
    )


def forget(path: Path) -> None:
    """Has a file leave the system's page cache, where the system can do that."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def compiled(features: rsft.FeatureSet, moments, seed: int = 0) -> rsft.RSFTModel:
    """Builds a head that rejects from the thousandth step on."""
    head = rsft.build_head(features.dim, CLASSES, moments=moments)
    model = rsft.RSFTModel(head, rsft.LossThreshold(4.0, warmup_steps=1000))
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        "sparse_categorical_crossentropy",
        steps_per_execution=64,
    )
    return model


def rows_a_second(features: rsft.FeatureSet, moments, epochs: int) -> float:
    """Trains and returns the rate, without the first call, which compiles."""
    fed = rsft.TrainingBatches(features, batch_size=BATCH, seed=0)
    model = compiled(features, moments)
    model.fit(fed.dataset.take(64), verbose=0, shuffle=False)
    started = time.perf_counter()
    model.fit(
        fed.dataset, epochs=epochs, callbacks=[fed.callback], verbose=0, shuffle=False
    )
    return epochs * len(features) / (time.perf_counter() - started)


def accuracies(features: rsft.FeatureSet, test: rsft.FeatureSet) -> list[float]:
    """Trains one epoch a seed; returns the accuracies on other rows."""
    moments, found = features.moments(), []
    for seed in range(SEEDS):
        fed = rsft.TrainingBatches(features, batch_size=BATCH, seed=seed)
        model = compiled(features, moments, seed)
        model.fit(fed.dataset, callbacks=[fed.callback], verbose=0, shuffle=False)
        right = np.argmax(head_probabilities(model, test), axis=1) == test.labels
        found.append(100 * float(np.mean(right)))
    return found


def compare_shuffles(rows: int, dim: int) -> None:
    """Prints the accuracies of both ways to shuffle."""
    one_window = batches.WINDOW_BYTES
    with tempfile.TemporaryDirectory() as folder:
        features, test = (
            make_features(Path(folder), count, dim, 0.06) for count in (rows, 20_000)
        )
        stretched = accuracies(features, test)
        batches.WINDOW_BYTES = 2**40
        fully = accuracies(features, test)
        batches.WINDOW_BYTES = one_window
    differences = [b - a for a, b in zip(fully, stretched, strict=True)]
    windows = -(-2 * rows * dim // one_window)
    print(f"rows; windows in an epoch             {rows:10,}; {windows}")
    print(f"accuracy, full shuffle                {statistics.mean(fully):10.2f} %")
    print(f"accuracy, by stretches                {statistics.mean(stretched):10.2f} %")
    print(
        f"difference, {SEEDS} seeds                   "
        f"{statistics.mean(differences):+10.2f} ± {statistics.stdev(differences):.2f}"
    )


def compare_rates(rows: int, dim: int, few: int) -> None:
    """Prints the rates from disk and from memory, and the memory that it takes."""
    with tempfile.TemporaryDirectory() as folder:
        features = make_features(Path(folder), rows, dim, 0.06)
        with PeakMemory() as memory:
            forget(features.path)
            started = time.perf_counter()
            moments = features.moments()
            seconds = time.perf_counter() - started
            forget(features.path)
            from_disk = rows_a_second(features, moments, epochs=1)
        print(f"rows a second, from disk              {from_disk:10,.0f}", flush=True)
        most = batches.MAX_BYTES_IN_MEMORY, batches.WINDOW_BYTES
        batches.MAX_BYTES_IN_MEMORY = batches.WINDOW_BYTES = 2**40
        epochs = max(1, min(4, rows // few))
        in_memory = rows_a_second(first_rows(features, few), moments, epochs)
        batches.MAX_BYTES_IN_MEMORY, batches.WINDOW_BYTES = most
    print(
        f"rows; on disk                         {rows:10,}; {2e-9 * rows * dim:.2f} GB"
    )
    print(f"highest memory above start-up         {memory.added:10.2f} GB")
    print(f"mean and variance of the features     {seconds:10.1f} s")
    print(f"rows a second, {few:>7,} in memory      {in_memory:10,.0f}")
    print(f"ratio                                 {from_disk / in_memory:10.2f}")


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--rows-in-memory", type=int, default=100_000)
    parser.add_argument(
        "--accuracy-rows", type=int, default=300_000, help="0: not at all"
    )
    arguments = parser.parse_args()
    few = min(arguments.rows, arguments.rows_in_memory)
    compare_rates(arguments.rows, arguments.dim, few)
    if arguments.accuracy_rows:
        compare_shuffles(arguments.accuracy_rows, arguments.dim)


if __name__ == "__main__":
    main()
