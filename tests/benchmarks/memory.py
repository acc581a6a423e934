"""Peak memory of a fit on 200,000 synthetic feature rows of 2,048 (1.6 GB).

    python tests/benchmarks/memory.py

And of an audit of a million embeddings of 768 numbers in a memory map (3.1 GB), a fifth
of their labels wrong, one in a hundred a copy; Linux only:

    python tests/benchmarks/memory.py --audit --rows 1000000 --dim 768
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from training_step import POLICIES, compiled, make_features

import keras_rsft as rsft
from keras_rsft.data._labels import symmetric_noise

CLASSES = 10


def peak_gigabytes() -> float:
    """Returns this process's peak resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def anonymous_gigabytes() -> float:
    """Returns this process's resident memory without what files are mapped to."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1e6
    raise OSError("/proc/self/status has no RssAnon.")


def make_embeddings(path: Path, rows: int, dim: int) -> tuple[np.ndarray, np.ndarray]:
    """Writes embeddings; returns them as a memory map, and their classes."""
    rng = np.random.default_rng(0)
    spread = rng.normal(size=(64, dim)) / 4
    centres = rng.normal(size=(CLASSES, 64)) @ spread * 1.5
    right = rng.integers(CLASSES, size=rows)
    x = np.memmap(path, np.float32, "w+", shape=(rows, dim))
    for start in range(0, rows, 10_000):
        classes = right[start : start + 10_000]
        noise = rng.normal(size=(len(classes), dim)) / 4
        x[start : start + 10_000] = (
            centres[classes] + rng.normal(size=(len(classes), 64)) @ spread + noise
        )
    copies = rows // 100
    x[-copies:], right[-copies:] = x[:copies], right[:copies]
    x.flush()
    return np.memmap(path, np.float32, "r", shape=(rows, dim)), right


def audit_memory(rows: int, dim: int) -> None:
    """Measures an audit and prints the table."""
    with tempfile.TemporaryDirectory() as folder:
        x, right = make_embeddings(Path(folder) / "x.bin", rows, dim)
        rng = np.random.default_rng(1)
        y = symmetric_noise(right, 0.2, num_classes=CLASSES, rng=rng)
        seen, ended = [anonymous_gigabytes()], threading.Event()

        def watch() -> None:
            while not ended.wait(0.02):
                seen.append(anonymous_gigabytes())

        watching = threading.Thread(target=watch)
        watching.start()
        started = time.perf_counter()
        quality = rsft.audit_labels(x, y)
        seconds = time.perf_counter() - started
        ended.set()
        watching.join()
    wrong = y != right
    print(f"embeddings in the map       {x.nbytes / 1e9:8.2f} GB")
    print(f"memory added by the audit   {max(seen) - seen[0]:8.2f} GB above the map")
    print(f"rows a second               {rows / seconds:8.0f}")
    print(f"wrong labels, estimated     {quality.expected_wrong:8.0f} of {wrong.sum()}")
    print(f"wrong ones of `.wrong`      {100 * wrong[quality.wrong].mean():8.1f} %")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--audit", action="store_true", help="audit, do not fit")
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.audit:
        audit_memory(arguments.rows, arguments.dim)
        return
    with tempfile.TemporaryDirectory() as folder:
        features = make_features(Path(folder), arguments.rows, arguments.dim)
        at_start = peak_gigabytes()
        features.moments()
        batches = rsft.TrainingBatches(features, batch_size=128, seed=0)
        steps = -(-len(features) // 128)
        model = compiled(POLICIES["LossThreshold"], arguments.dim, steps, 63)
        started = time.perf_counter()
        model.fit(
            batches.dataset, epochs=arguments.epochs, verbose=0, shuffle=False,
            callbacks=[batches.callback],
        )  # fmt: skip
        seconds = time.perf_counter() - started
    rows = arguments.rows * arguments.epochs
    print(f"features on disk            {4e-9 * features.dim * len(features):8.2f} GB")
    print(f"peak memory at start-up     {at_start:8.2f} GB")
    print(f"peak memory added by fit    {peak_gigabytes() - at_start:8.2f} GB")
    print(f"rows a second               {rows / seconds:8.0f}")


if __name__ == "__main__":
    main()
