"""Estimated against true accuracy, where every label that is seen may be wrong.

The digits of scikit-learn at 96 px and, with FOLDER, CIFAR-10N at 128 px; a frozen
EfficientNet-Lite0. A part of the samples is for training; noise is put into all labels.
Heads are trained with `auto` and without rejection, and judged on held-out samples by
`LabelQuality.accuracy`. Prints, over seeds, heads and draws of held-out samples (with
replacement, so that all held-out samples are what the draws are a sample of): the
percentage of wrong training labels and its estimate, the true accuracy, by how much the
accuracy by given labels is off, the estimate's mean absolute error and bias in points
against the right labels of the same samples, and how often its 95 % interval holds the
accuracy on all held-out samples. After the conditions, all of them together.

    python tests/benchmarks/judged.py [FOLDER] --seeds 10

FOLDER holds labels.csv with the columns path, split, random_label1 and clean_label.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np

import keras_rsft as rsft
from keras_rsft.data._labels import (
    asymmetric_noise,
    instance_noise,
    symmetric_noise,
    thumbnails_of,
)
from keras_rsft.training._features import SplitFeatures, open_features
from keras_rsft.training._head import head_probabilities, train_head

CONDITIONS = (
    ("clean", 0.0), ("symmetric", 0.2), ("symmetric", 0.4), ("symmetric", 0.6),
    ("asymmetric", 0.3), ("instance", 0.3), ("human", 0.0),
)  # fmt: skip
SIZES, DRAWS = (100, 300, 2000), 3
TRAINED_ON = 0.7


def conditions(arguments: argparse.Namespace) -> Iterator[tuple]:
    """Yields name, noise, rate, data, features and right labels of each condition."""
    sources = {"digits": ("digits", 96, {})}
    if arguments.folder is not None:
        columns = {"label_column": "random_label1", "clean_label_column": "clean_label"}
        sources["cifar10n"] = (str(arguments.folder / "labels.csv"), 128, columns)
    for name, (source, side, columns) in sources.items():
        kept = {} if columns else {"validation_fraction": 0.0, "test_fraction": 0.0}
        data = rsft.load_images(source, **columns, **kept)
        config = rsft.FeatureConfig(
            "efficientnet_lite0", image_size=side, cache_dir=arguments.cache_dir
        )
        features = open_features(data, config).features.train
        known = features.clean_labels is not None
        clean = features.clean_labels if known else features.labels
        features = dataclasses.replace(features, clean_labels=None)
        for kind, rate in CONDITIONS:
            if kind != "human" or known:
                yield name, kind, rate, data, features, clean


def noisy_labels(kind: str, rate: float, data, clean: np.ndarray, seed: int):
    """Returns the labels of a condition, for all samples."""
    if kind == "clean":
        return clean
    if kind == "human":
        return data.train.labels
    options = {"num_classes": data.num_classes, "rng": np.random.default_rng(seed)}
    if kind == "instance":
        thumbnails = thumbnails_of(data.train)
        return instance_noise(clean, rate, thumbnails=thumbnails, seed=seed, **options)
    noise = symmetric_noise if kind == "symmetric" else asymmetric_noise
    return noise(clean, rate, **options)


def judged(features, labels, clean, names, seed: int, epochs: int) -> Iterator[tuple]:
    """Yields for each head and draw what the table has: see above."""
    order = np.random.default_rng(seed).permutation(len(labels))
    cut = round(TRAINED_ON * len(labels))
    whole = dataclasses.replace(features, labels=labels.astype(np.int32))
    train, held_out = (whole.take(np.sort(part)) for part in (order[:cut], order[cut:]))
    right = clean[np.sort(order[cut:])]
    wrong = np.mean(train.labels != clean[np.sort(order[:cut])])
    nothing = held_out.take(np.arange(0))
    splits = SplitFeatures(train, nothing, nothing, names)
    quality = rsft.audit_labels(
        train, num_classes=len(names), held_out=[held_out], seed=seed, progress=False
    )
    for policy in ("auto", "accept-all"):
        settings = rsft.TrainConfig(
            policy=rsft.PolicyConfig(policy), epochs=epochs, seed=seed
        )
        trained = train_head(
            splits, settings, progress=False,
            label_quality=dataclasses.replace(quality, held_out=quality.held_out * 2),
        )  # fmt: skip
        predicted = head_probabilities(trained.model, held_out).argmax(axis=-1)
        whole_truth = np.mean(predicted == right)
        rng = np.random.default_rng(seed)
        for size in (one for one in SIZES if one <= len(right)):
            for _ in range(DRAWS):
                rows = rng.integers(len(right), size=size)
                found = part_of(quality.held_out[0], rows).accuracy(predicted[rows])
                truth = np.mean(predicted[rows] == right[rows])
                given = np.mean(predicted[rows] == held_out.labels[rows]) - truth
                if found is not None:
                    covered = found.low <= whole_truth <= found.high
                    error, rate = found.value - truth, quality.noise_rate
                    yield size, wrong, rate, whole_truth, given, error, covered


def part_of(quality: rsft.LabelQuality, rows: np.ndarray) -> rsft.LabelQuality:
    """Returns the label quality of some samples."""
    return dataclasses.replace(
        quality,
        out_of_sample=quality.out_of_sample[rows],
        right_probability=quality.right_probability[rows],
        labels=quality.labels[rows],
    )


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first-seed", type=int, default=100)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    print(
        f"{'data':9} {'noise':15} {'labels':>6} {'wrong':>6} {'found':>6} {'true':>6} "
        f"{'given':>7} {'error':>6} {'bias':>6} {'held':>5}"
    )
    everything, first = [], arguments.first_seed
    for name, kind, rate, data, features, clean in conditions(arguments):
        rows = []
        for seed in range(first, first + arguments.seeds):
            labels = noisy_labels(kind, rate, data, clean, seed)
            rows += judged(
                features, labels, clean, data.class_names, seed, arguments.epochs
            )
        print_lines(f"{name:9} {f'{kind} {rate:g}':15}", rows)
        everything += rows
    print_lines(f"{'all':25}", everything)


def print_lines(name: str, rows: list[tuple]) -> None:
    """Prints a line for each number of labels."""
    for size in SIZES:
        of_size = np.array([row for row in rows if row[0] == size], float)
        if len(of_size):
            _, wrong, rate, truth, given, error, covered = 100 * of_size.T
            print(
                f"{name} {size:6} {wrong.mean():6.1f} {rate.mean():6.1f} "
                f"{truth.mean():6.1f} {given.mean():+7.1f} "
                f"{np.abs(error).mean():6.2f} {error.mean():+6.2f} "
                f"{covered.mean():4.0f}%",
                flush=True,
            )


if __name__ == "__main__":
    main()
