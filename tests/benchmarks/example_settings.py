"""Chooses rules and lengths for `examples/`, on pictures that they do not test on.

Each candidate trains on an example's training pictures and is scored after every second
epoch on its validation pictures: other digits, labelled wrongly as often as those of
training, since a user has no better. Printed are each candidate's best score and
the number of epochs that gave it. The examples take what is best here; their test
pictures play no part.

    python tests/benchmarks/example_settings.py
    python tests/benchmarks/example_settings.py segmentation detection
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import runpy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import keras_rsft as rsft

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
SEED = 100  # Of wrong labels and first weights; the examples' own begin at 0.
EVERY = 2
# Name, policy, and whether the labels are right.
WITHOUT_REJECTION = (
    ("plain", rsft.AcceptAll, False),
    ("right only", rsft.AcceptAll, True),
)


@dataclasses.dataclass(frozen=True)
class Task:
    """An example, ready to be trained and scored.

    Attributes:
        fit: Trains under a policy: `(policy, kind, epochs=, callbacks=)`.
        score: Scores a model on validation pictures; higher is better.
        candidates: `(name, policy, kind)`; the kind is what `fit` needs to know.
        longest: Epochs to train.
    """

    fit: Callable[..., Any]
    score: Callable[[keras.Model], float]
    candidates: list[tuple[str, Callable[[], rsft.Policy], Any]]
    longest: int


class Scores(keras.callbacks.Callback):
    """Notes the score after every second epoch."""

    def __init__(self, score: Callable[[keras.Model], float]):
        super().__init__()
        self.score, self.values = score, []

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if (epoch + 1) % EVERY == 0:
            self.values.append(self.score(self.model))


def read(name: str) -> SimpleNamespace:
    """Returns what an example defines."""
    return SimpleNamespace(**runpy.run_path(str(EXAMPLES / f"{name}.py")))


def pictures(example: SimpleNamespace, count: int, **digits_options: Any) -> tuple:
    """Returns training and validation pictures, each with what is right of them."""
    digits, names = load_digits(return_X_y=True, **digits_options)
    digits = digits.reshape(-1, 8, 8)
    return tuple(
        example.make_pictures(digits[part], names[part], count, seed)
        for part, seed in ((example.TRAIN, 0), (example.VALIDATION, 1))
    )


def segmentation() -> Task:
    example = read("segmentation")
    (train, right), (validation, answers) = pictures(example, 400, n_class=5)
    base = example.frozen_maps("imagenet")
    maps, others = (base.predict(x, verbose=0) for x in (train, validation))
    steps = math.ceil(400 / example.BATCH)

    def fit(policy, clean, **options):
        given = right if clean else example.spoil(right, SEED)
        example.train(policy, maps, given, SEED, **options)

    def score(model):
        found = model.predict(others, verbose=0).argmax(-1)
        return example.mean_iou(example.spoil(answers, SEED), found)

    def pixels(deviations):
        return lambda: rsft.RunningThreshold(
            deviations, num_classes=example.CLASSES, level="element",
            warmup_steps=3 * steps,
        )  # fmt: skip

    candidates = [
        *WITHOUT_REJECTION,
        samples_rejected(example, 3 * steps),
        *(
            (f"pixels rejected, {deviations} deviations", pixels(deviations), False)
            for deviations in (1.0, 2.0)
        ),
    ]  # fmt: skip
    return Task(fit, score, candidates, 20)


def detection() -> Task:
    example = read("detection")
    (train, *right), (validation, *answers) = pictures(example, 1000, n_class=5)
    base = example.frozen_map("imagenet")
    maps, others = (base.predict(x, verbose=0) for x in (train, validation))
    steps = math.ceil(1000 / example.BATCH)

    def fit(policy, clean, **options):
        given = right if clean else example.spoil(*right, SEED)[:2]
        example.train(policy, maps, *given, SEED, **options)

    def score(model):
        return example.f1_score(model, others, *example.spoil(*answers, SEED)[:2])

    def boxes(guesses):
        return lambda: rsft.LossThreshold(
            guesses * math.log(example.CLASSES), level="element",
            warmup_steps=4 * steps,
        )  # fmt: skip

    candidates = [
        *WITHOUT_REJECTION,
        samples_rejected(example, 4 * steps),
        *(
            (f"boxes rejected, {guesses} ln(classes)", boxes(guesses), False)
            for guesses in (1.0, 1.5)
        ),
    ]  # fmt: skip
    return Task(fit, score, candidates, 24)


def multi_label() -> Task:
    example = read("multi_label")
    (train, right), (validation, answers) = pictures(example, 1500)
    base = rsft.load_backbone("efficientnet_lite0", image_size=example.SIDE)
    features, others = (base.predict(x, verbose=0) for x in (train, validation))
    steps = math.ceil(1500 / example.BATCH)

    def fit(policy, clean, **options):
        given = right if clean else example.spoil(right, SEED)[0]
        example.train(policy, features, given, SEED, **options)

    def score(model):
        found = model.predict(others, verbose=0)
        return average_precision_score(example.spoil(answers, SEED)[0], found)

    def labels(kept):
        return lambda: rsft.RunningThreshold(
            percentile=kept, num_classes=2, level="element",
            warmup_steps=3 * steps,
        )  # fmt: skip

    candidates = [
        *WITHOUT_REJECTION,
        samples_rejected(example, 3 * steps),
        *(
            (f"labels rejected, percentile {kept}", labels(kept), False)
            for kept in (0.85, 0.9)
        ),
    ]  # fmt: skip
    return Task(fit, score, candidates, 40)


def regression() -> Task:
    example = read("regression")
    digits = load_digits().images
    train, right = example.make_pictures(digits[example.TRAIN], 1500, 0)
    validation, answers = example.make_pictures(digits[example.VALIDATION], 1500, 1)
    base = example.frozen_map("imagenet")
    maps, others = (base.predict(x, verbose=0) for x in (train, validation))
    steps = math.ceil(1500 / example.BATCH)

    def fit(policy, kind, **options):
        clean, loss = kind
        given = right if clean else example.spoil(right, SEED)[0]
        example.train(policy, loss, maps, given, SEED, **options)

    def score(model):
        given = example.spoil(answers, SEED)[0]
        errors = np.abs(model.predict(others, verbose=0)[:, 0] - given)
        return -example.MOST_DEGREES * float(errors.mean())

    candidates = [
        (f"{name}, {loss}", policy, (clean, loss))
        for loss in ("mse", "mae")
        for name, policy, clean in (
            *WITHOUT_REJECTION, samples_rejected(example, 5 * steps)
        )
    ]  # fmt: skip
    return Task(fit, score, candidates, 40)


def samples_rejected(example: SimpleNamespace, ramp_steps: int) -> tuple:
    """Returns what rejects whole pictures; how many are wrong is known."""

    def policy() -> rsft.Policy:
        return rsft.KeepFraction(1 - example.WRONG, ramp_steps=ramp_steps)

    return "pictures rejected", policy, False


TASKS = {
    task.__name__: task for task in (multi_label, segmentation, detection, regression)
}


def main() -> None:
    """Trains all candidates and prints what they score."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("examples", nargs="*", metavar="EXAMPLE")
    names = parser.parse_args().examples or [*TASKS]
    for name in names:
        if name not in TASKS:
            parser.error(f"EXAMPLE must be one of {', '.join(TASKS)}")
    for name in names:
        task = TASKS[name]()
        print(f"\n{name:42} best score  epochs", flush=True)
        for title, make_policy, kind in task.candidates:
            noted = Scores(task.score)
            task.fit(make_policy(), kind, epochs=task.longest, callbacks=[noted])
            best = int(np.argmax(noted.values))
            print(
                f"{title:42} {noted.values[best]:10.3f}  {EVERY * (best + 1):6}",
                flush=True,
            )


if __name__ == "__main__":
    main()
