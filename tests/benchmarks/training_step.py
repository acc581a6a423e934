"""`RSFTModel.fit` of a head on kept features against stock Keras `fit`.

Stock Keras is given the features as arrays, as it is used, and once more through
our `TrainingBatches`, which leaves the cost of the training step alone. Prints
steps a second for each policy and the ratios to both, round by round in turn, as
median and range of the ratios: the machine's speed drifts. Then what a ledger
costs, epoch by epoch of one fit, without the first, which compiles.

    python tests/benchmarks/training_step.py --rows 10000 --dim 2048
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import keras
import numpy as np

import keras_rsft as rsft

ON_ARRAYS = "stock Keras, arrays"
POLICIES = {
    ON_ARRAYS: None,
    "stock Keras": None,
    "AcceptAll": lambda steps: rsft.AcceptAll(),
    "LossThreshold": lambda steps: rsft.LossThreshold(2.5, warmup_steps=steps),
    "batch level": lambda steps: rsft.LossThreshold(1e9, level="batch"),
    "KeepFraction": lambda steps: rsft.KeepFraction(0.7, ramp_steps=steps),
}


def make_features(folder: Path, rows: int, dim: int) -> rsft.FeatureSet:
    """Writes synthetic features and opens them."""
    rng = np.random.default_rng(0)
    path = folder / "features.bin"
    with path.open("wb") as file:
        for start in range(0, rows, 10_000):
            count = min(10_000, rows - start)
            file.write(rng.normal(size=(count, dim)).astype("float32").data)
    labels = rng.integers(0, 10, rows).astype("int32")
    return rsft.FeatureSet(path, labels, np.arange(rows).astype(str), dim)


def compiled(policy, dim: int, steps: int, steps_per_execution: int) -> keras.Model:
    """Builds a head, wrapped under a policy or plain, ready to fit."""
    head = rsft.build_head(dim, 10)
    model = head if policy is None else rsft.RSFTModel(head, policy(steps))
    model.compile(
        keras.optimizers.SGD(1e-3, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        steps_per_execution=steps_per_execution,
    )
    return model


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps-per-execution", type=int, nargs="+", default=[1, 53])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        features = make_features(Path(folder), arguments.rows, arguments.dim)
        for steps_per_execution in arguments.steps_per_execution:
            _measure(features, arguments, steps_per_execution)
        _measure_ledger(features, arguments)


def _measure(features, arguments, steps_per_execution: int) -> None:
    batches = rsft.TrainingBatches(features, batch_size=arguments.batch_size, seed=0)
    steps = -(-len(features) // arguments.batch_size)
    models = {
        name: compiled(policy, features.dim, steps, steps_per_execution)
        for name, policy in POLICIES.items()
    }
    rates: dict[str, list[float]] = {name: [] for name in models}
    arrays = {"x": np.array(features.features), "y": features.labels}
    own = {"x": batches.dataset, "shuffle": False}
    for round_number in range(arguments.rounds + 1):  # The first one compiles.
        for name, model in models.items():
            data = own
            if name == ON_ARRAYS:
                data = arrays | {"batch_size": arguments.batch_size}
            started = time.perf_counter()
            model.fit(**data, epochs=2, verbose=0)
            if round_number:
                rates[name].append(2 * steps / (time.perf_counter() - started))
    print(f"\nsteps_per_execution={steps_per_execution}, {steps} steps an epoch")
    print(f"{'':20} {'steps/s':>8} {'to stock, arrays':>18} {'to stock':>18}")
    for name, values in rates.items():
        arrays, same = (_ratio(values, rates[s]) for s in (ON_ARRAYS, "stock Keras"))
        print(f"{name:20} {statistics.median(values):8.0f} {arrays:>18} {same:>18}")


def _ratio(values: list[float], stock: list[float]) -> str:
    ratios = [a / b for a, b in zip(values, stock, strict=True)]
    return f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


class _EpochTimes(keras.callbacks.Callback):
    """Notes when epochs end."""

    def __init__(self):
        super().__init__()
        self.ends: list[float] = []

    def on_epoch_end(self, epoch, logs=None):
        self.ends.append(time.perf_counter())


def _measure_ledger(features, arguments) -> None:
    steps = -(-len(features) // arguments.batch_size)
    steps_per_execution = arguments.steps_per_execution[-1]
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for _ in range(arguments.rounds):
        for ledger, times in seconds.items():
            batches = rsft.TrainingBatches(
                features, batch_size=arguments.batch_size, seed=0, sample_index=True
            )
            model = compiled(
                POLICIES["LossThreshold"], features.dim, steps, steps_per_execution
            )
            epochs, callbacks = _EpochTimes(), [batches.callback]
            if ledger:
                callbacks.append(rsft.RejectionLedger(features.ids, features.labels))
            model.fit(
                batches.dataset, epochs=6, verbose=0, shuffle=False,
                callbacks=[*callbacks, epochs],
            )  # fmt: skip
            times.append((epochs.ends[-1] - epochs.ends[0]) / (len(epochs.ends) - 1))
    ratios = [b / a for a, b in zip(*seconds.values(), strict=True)]
    print("\nLossThreshold with a ledger, time of an epoch against without:")
    print(f"{statistics.median(ratios):.3f} ({min(ratios):.2f}-{max(ratios):.2f})")


if __name__ == "__main__":
    main()
