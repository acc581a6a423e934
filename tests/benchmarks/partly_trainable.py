"""What rejection saves where a part of a base learns, and what kept activations do.

Two tables, each as ratios within one run. First, at batch level, the time of a step
when no, every second or each batch is rejected, for the last block and for the whole
base. Then an epoch on kept activations against one that decodes the images and runs the
front again.

The base has random weights, which cost what others cost. Rounds are taken in turn and
the median is shown, without the first, which traces.

    python tests/benchmarks/partly_trainable.py --base resnet50 --image-size 96
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable

import keras
import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

import keras_rsft as rsft
from keras_rsft.backbones._blocks import TrainablePart, trainable_part
from keras_rsft.data._images import without_autotuning
from keras_rsft.features._batches import ImageBatches
from keras_rsft.features._extract import FrozenBackbone
from keras_rsft.training._unfreeze import FrozenFront

CLASSES = 10


class Scripted(rsft.Policy):
    """Accepts the first part of each batch, or every so many batches.

    `share` can be changed without a retrace.
    """

    def __init__(self, share: float, level: str):
        super().__init__()
        self.share = self.add_live_number("share", share)
        self.level = level

    def decide(self, batch):
        if self.level == "batch":  # Share of 0.5: every second one.
            before, after = (
                tf.floor(tf.cast(one, tf.float32) * self.share)
                for one in (batch.step, batch.step + 1)
            )
            return tf.fill(tf.shape(batch.losses), after > before)
        count = tf.size(batch.losses)
        accepted = tf.cast(tf.round(tf.cast(count, tf.float32) * self.share), tf.int32)
        return tf.range(count) < accepted


def body(part: TrainablePart) -> keras.Model:
    """Joins the rest of a base and a new head: from activations to probabilities."""
    head = rsft.build_head(part.rest.output_shape[-1], CLASSES)
    inputs = keras.Input(part.rest.input_shape[1:])
    return keras.Model(inputs, head(part.rest(inputs)))


class Fitted:
    """A model that is compiled and traced, and trains for some steps when called."""

    def __init__(self, model: keras.Model, level: str, data, steps: int):
        self.policy = Scripted(0.5, level)
        self._data, self._steps = data, steps
        self._model = rsft.RSFTModel(model, self.policy)
        self._model.compile(
            keras.optimizers.SGD(1e-4, momentum=0.9),
            "sparse_categorical_crossentropy",
            jit_compile=False,
        )
        started = time.perf_counter()
        self._train(2)
        self.tracing_seconds = time.perf_counter() - started

    def at(self, share: float) -> Callable:
        """Returns a training at this share of accepted samples or batches."""

        def run() -> None:
            self.policy.share.assign(share)
            self._train(self._steps)

        run()  # Once for nothing: what is new in it is prepared.
        return run

    def _train(self, steps: int) -> None:
        # The tuner of `tf.data` would be waited for at the end, for seconds.
        self._model.fit(without_autotuning(self._data.take(steps)), verbose=0)


def medians(runs: dict[str, Callable], rounds: int) -> dict[str, float]:
    """Returns seconds of each, measured in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in seconds.items()}


def repeated_batch(part: TrainablePart, batch_size: int) -> tf.data.Dataset:
    """Returns one batch of random activations, as often as it is asked for."""
    rng = np.random.default_rng(0)
    shape = (batch_size, part.rest.input_shape[-1])
    x = rng.uniform(0, 1, shape).astype("float32")
    y = rng.integers(0, CLASSES, batch_size).astype("int32")
    return tf.data.Dataset.from_tensors((x, y)).repeat(1000)


def batch_level(bases: dict, options: argparse.Namespace, console: Console) -> None:
    """Prints what rejected batches save."""
    table = Table(title="Batch level: time of a step", title_justify="left")
    for column in ("learns", "rejected", "ms a step", "of no rejection"):
        table.add_column(column, justify="right")
    for name, part in bases.items():
        data = repeated_batch(part, options.batch_size)
        model = body(part)
        steps = options.steps[name]
        model = Fitted(model, "batch", data, steps)
        runs = {
            f"{100 * (1 - share):.0f} %": model.at(share) for share in (1.0, 0.5, 0.0)
        }
        seconds = medians(runs, options.rounds)
        plain = next(iter(seconds.values()))
        for rejected, value in seconds.items():
            each, ratio = 1000 * value / steps, value / plain
            table.add_row(name, rejected, f"{each:.0f}", f"{ratio:.2f}")
    console.print(table)


def kept_or_anew(part: TrainablePart, options, console: Console) -> None:
    """Prints an epoch on kept activations and one that runs the front again."""
    split = rsft.load_images("digits").train
    split = split.take(np.arange(options.images))
    size = part.backbone.input_shape[1:3]
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        kept = rsft.extract_features(
            FrozenBackbone(part.front), split, cache_dir=cache, progress=False
        )
        passed = time.perf_counter() - started
        batches = rsft.TrainingBatches(kept, batch_size=options.batch_size, seed=0)
        anew = ImageBatches(split, kept, size, batch_size=options.batch_size, seed=0)
        images = keras.Input((*size, 3))
        rest = body(part)
        whole = keras.Model(images, rest(FrozenFront(part.front)(images)))
        steps = len(kept)
        from_images = anew.dataset.map(lambda x, y, _, index: (x, y))
        runs = {
            "kept": Fitted(rest, "sample", batches.dataset, steps),
            "anew": Fitted(whole, "sample", from_images, steps),
        }
        runs = {name: one.at(0.5) for name, one in runs.items()}
        seconds = medians(runs, options.rounds)
    table = Table(title="An epoch on kept activations", title_justify="left")
    for column in ("images", "kB an image", "the pass", "kept", "anew", "kept / anew"):
        table.add_column(column, justify="right")
    table.add_row(
        str(len(kept)),
        f"{kept.row_bytes / 1e3:.0f}",
        f"{passed:.1f} s",
        f"{seconds['kept']:.1f} s",
        f"{seconds['anew']:.1f} s",
        f"{seconds['kept'] / seconds['anew']:.2f}",
    )
    console.print(table)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="resnet50")
    parser.add_argument("--image-size", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--images", type=int, default=320)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tables", default="batch,kept")
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # That nothing is accepted is what is measured.
    console = Console(width=88)
    base = rsft.load_backbone(
        options.base, weights="none", image_size=options.image_size
    )
    bases = {"last block": trainable_part(base, 1), "all": trainable_part(base, "all")}
    options.steps = {"last block": 10, "all": 4}
    cut, batch_size = bases["last block"].cut, options.batch_size
    console.print(
        f"{options.base}, {options.image_size} pixels, batches of {batch_size}; "
        f"cut before {cut}"
    )
    wanted = options.tables.split(",")
    if "batch" in wanted:
        batch_level(bases, options, console)
    if "kept" in wanted:
        kept_or_anew(bases["last block"], options, console)


if __name__ == "__main__":
    main()
