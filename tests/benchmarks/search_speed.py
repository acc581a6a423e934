"""Many trials trained together against a few of them one by one.

On synthetic features of the size of 10,000 photos. Trains `--trials` heads together,
compilation included, then `--alone` of the same trials through `model.fit`, one after
another, and compares the two heads of each. Each round repeats both; the machine's
speed drifts, so the ratio is of one round. Then the memory: the highest resident size
of a process that trains all heads together, above what it had before.

    python tests/benchmarks/search_speed.py --trials 64 --alone 4
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import keras_tuner
import numpy as np
import tensorflow as tf

import keras_rsft as rsft
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import best_of_all_epochs
from keras_rsft.tuning._batched import BatchedHeads
from keras_rsft.tuning._space import settings_of_values, values_of

CLASSES, COMPARED_EPOCHS = 10, 5


def make_features(folder: Path, rows: int, dim: int) -> SplitFeatures:
    """Writes clusters that overlap, a fifth of the training labels wrong."""
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(CLASSES, dim)).astype("float32") * 0.12

    def part(name: str, count: int, wrong: float) -> rsft.FeatureSet:
        clean = rng.integers(0, CLASSES, count).astype("int32")
        values = centres[clean] + rng.normal(size=(count, dim)).astype("float32")
        path = folder / f"{name}.bin"
        values.tofile(path)
        other = rng.integers(0, CLASSES, count)
        labels = np.where(rng.random(count) < wrong, other, clean).astype("int32")
        return rsft.FeatureSet(path, labels, np.arange(count).astype(str), dim)

    names = tuple(map(str, range(CLASSES)))
    train, others = part("train", rows, 0.2), rows // 6
    return SplitFeatures(train, part("val", others, 0.2), part("test", 0, 0), names)


def sampled_settings(count: int, given: rsft.TrainConfig, optimizers: tuple):
    """Samples trials as the random oracle does; every policy occurs."""
    space = rsft.SearchSpace(
        policies=("accept-all", "loss-threshold", "keep-fraction"),
        optimizers=optimizers,
    )
    rng = np.random.default_rng(0)
    settings = []
    for number in range(count):
        hp = keras_tuner.HyperParameters()
        hp.values = {"policy": space.policies[number % len(space.policies)]}
        values_of(space, hp)
        for one in hp.space:
            if one.name != "policy":
                hp.values[one.name] = one.random_sample(int(rng.integers(2**31)))
        settings.append(settings_of_values(values_of(space, hp), given))
    return settings


def train_together(features, settings) -> dict[int, np.ndarray]:
    """Trains all heads, group by group; returns each head's kernel."""
    kernels = {}
    heads = BatchedHeads(features, settings[0])
    for rule in ("sgd", "adam"):
        rows = [i for i, s in enumerate(settings) if s.optimizer.startswith(rule)]
        if rows:
            trained = heads.train([settings[i] for i in rows])
            kernels |= dict(zip(rows, trained.kernels, strict=True))
    return kernels


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--dim", type=int, default=1280)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--alone", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--optimizers", nargs="+", default=["sgd", "adamw"])
    parser.add_argument("--memory-only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    given = rsft.TrainConfig(epochs=arguments.epochs, batch_size=arguments.batch_size)
    settings = sampled_settings(arguments.trials, given, tuple(arguments.optimizers))
    # Some trials are meant to accept nothing for a while.
    warnings.filterwarnings("ignore", message=".*accepted no sample")
    with tempfile.TemporaryDirectory() as folder:
        features = make_features(Path(folder), arguments.rows, arguments.dim)
        if arguments.memory_only:
            _print_memory(features, settings)
            return
        _measure_time(features, settings, arguments)
    sys.stdout.flush()
    subprocess.run([sys.executable, *sys.argv, "--memory-only"], check=True)


def _measure_time(features, settings, arguments) -> None:
    alone = [settings[i] for i in range(arguments.alone)]
    print(
        f"{'round':>5} {'':8} {'together':>10} {'alone':>10} {'together / alone':>17}"
    )
    for number in range(1, arguments.rounds + 1):
        # As in a process that has just begun: every program is compiled anew.
        _forget_programs()
        _, *together = _timed(lambda: train_together(features, settings))
        _, *one_by_one = _timed(lambda: [_fit_alone(features, one) for one in alone])
        for name, one, other in zip(
            ("seconds", "of CPU"), together, one_by_one, strict=True
        ):
            print(f"{number:5} {name:8} {one:10.2f} {other:10.2f} {one / other:17.2f}")
        sys.stdout.flush()
    print(f"{arguments.trials} heads together, {arguments.alone} of them alone.")
    # A step more or less is a question of rounding where the loss is near a bound, so
    # that long trainings part company: few epochs show whether the steps are the same.
    few = [dataclasses.replace(one, epochs=COMPARED_EPOCHS) for one in settings]
    kernels = train_together(features, few)
    for place in range(arguments.alone):
        best = best_of_all_epochs("val_accuracy", "max", epochs=COMPARED_EPOCHS)
        kernel = _fit_alone(features, few[place], best).get_weights()[0]
        difference = np.abs(kernel - kernels[place]).max()
        print(
            f"trial {place}, {few[place].policy.name}, {few[place].optimizer}: largest "
            f"difference of a weight after {COMPARED_EPOCHS} epochs {difference:.1e}"
        )


def _timed(work) -> tuple:
    """Returns what the work gives, its seconds, and the processor's seconds.

    The latter say more where a machine is shared.
    """
    started = time.perf_counter(), time.process_time()
    result = work()
    ended = time.perf_counter(), time.process_time()
    return result, *(end - start for start, end in zip(started, ended, strict=True))


def _fit_alone(features, settings, *callbacks):
    """Trains through `model.fit`, without a ledger and what comes after training."""
    hypermodel = rsft.RSFTHyperModel(
        features,
        settings=settings,
        space=lambda hp: {"momentum": hp.Choice("momentum", [settings.momentum, 0.0])},
    )
    hp = keras_tuner.HyperParameters()
    model = hypermodel.build(hp)
    hypermodel.fit(hp, model, callbacks=callbacks)
    return model.model.get_layer("scores")


def _forget_programs() -> None:
    from keras_rsft.tuning import _batched as batched_heads

    for name in ("run_block", "score_block"):
        program = getattr(batched_heads, name)
        python = program.python_function
        setattr(
            batched_heads, name, tf.function(python, jit_compile=True, autograph=False)
        )


def _print_memory(features, settings) -> None:
    before = _resident("VmRSS")
    train_together(features, settings)
    print(
        f"resident memory before training: {before} MiB; at most "
        f"{_resident('VmHWM') - before} MiB more with {len(settings)} heads"
    )


def _resident(name: str) -> int:
    """Returns MiB out of /proc/self/status: resident now, or at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{name}:"))
    return int(line.split()[1]) // 2**10


if __name__ == "__main__":
    main()
