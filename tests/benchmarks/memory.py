"""Peak memory of a fit on 200,000 synthetic feature rows of 2,048 (1.6 GB).

python tests/benchmarks/memory.py
"""

from __future__ import annotations

import argparse
import resource
import sys
import tempfile
import time
from pathlib import Path

from training_step import POLICIES, compiled, make_features

import keras_rsft as rsft


def peak_gigabytes() -> float:
    """Returns this process's peak resident memory."""
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--epochs", type=int, default=2)
    arguments = parser.parse_args()
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
