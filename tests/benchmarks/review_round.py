"""What a review gains: the most suspicious labels are set right, and trained again.

The digits of scikit-learn at 96 px, a frozen EfficientNet-Lite0, wrong labels put into
the training split. After a first run with `auto`, somebody who makes no mistake looks
at the most suspicious training labels; then both `auto` and plain fine-tuning train on
the corrected labels. Prints test accuracies (mean and half of the 95 % interval over
seeds), how many labels are still wrong, and how many of them the label_quality expects.

    python tests/benchmarks/review_round.py --noise symmetric:0.3 --seeds 5
"""

from __future__ import annotations

import argparse
import dataclasses

import numpy as np

from keras_rsft._stats import mean_interval, paired_interval
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.data._labels import add_label_noise
from keras_rsft.data._sources import load_images
from keras_rsft.features._store import FeatureSet
from keras_rsft.training._features import SplitFeatures, open_features
from keras_rsft.training._head import train_head

REVIEWED = (0, 50, 100, 200, 400)
POLICIES = ("auto", "accept-all")


def corrected(train: FeatureSet, suspicion: np.ndarray, count: int) -> FeatureSet:
    """Returns the labels after a review of the most suspicious ones."""
    if count == 0:
        return train
    looked = np.zeros(len(train), bool)
    looked[np.argsort(-suspicion, kind="stable")[:count]] = True
    labels = np.where(looked, train.clean_labels, train.labels)
    return dataclasses.replace(
        train, labels=labels, reviewed=looked, before_review=train
    )


def measured(features: SplitFeatures, seed: int) -> dict[tuple[int, str], tuple]:
    """Returns accuracy, wrong labels and expected wrong labels, by row of the table."""
    settings = TrainConfig(epochs=30, seed=seed)
    first = train_head(features, settings, progress=False)
    rows = {}
    for count in REVIEWED:
        train = corrected(features.train, first.ledger.suspicion, count)
        for policy in POLICIES:
            trained = train_head(
                dataclasses.replace(features, train=train),
                dataclasses.replace(settings, policy=PolicyConfig(policy)),
                progress=False,
            )
            wrong = np.mean(train.labels != train.clean_labels)
            expected = trained.results.get("estimated_wrong_labels", np.nan)
            rows[count, policy] = trained.results["test_accuracy"], wrong, expected
    return rows


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--noise", default="symmetric:0.3")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    opened = open_features(
        load_images("digits"),
        FeatureConfig(
            "efficientnet_lite0", image_size=96, cache_dir=arguments.cache_dir
        ),
    )
    by_seed = []
    for seed in range(arguments.seeds):
        noisy = add_label_noise(opened.data, arguments.noise, seed=seed).train
        train = opened.features.train.with_labels(noisy.labels, noisy.clean_labels)
        features = dataclasses.replace(opened.features, train=train)
        by_seed.append(measured(features, seed))
    print(f"digits, {arguments.noise} in training, {arguments.seeds} seeds")
    print(f"{'reviewed':>8} {'wrong':>7} {'expected':>9}  test accuracy, and the gain")
    for count in REVIEWED:
        for policy in POLICIES:
            print_row(count, policy, by_seed)


def print_row(count: int, policy: str, by_seed: list[dict]) -> None:
    """Prints what one policy makes of a review of so many labels."""
    found = np.array([rows[count, policy] for rows in by_seed])
    before = [rows[0, policy][0] for rows in by_seed]
    accuracy, gain = mean_interval(found[:, 0]), paired_interval(found[:, 0], before)
    wrong, expected = found[:, 1].mean(), found[:, 2].mean()
    shown = "" if np.isnan(expected) else f"{100 * expected:.1f} %"
    print(
        f"{count:8} {100 * wrong:5.1f} % {shown:>9}  {policy:10} "
        f"{100 * accuracy.mean:.1f} ± {100 * accuracy.half_width:.1f} %, "
        f"{100 * gain.mean:+.1f} ± {100 * gain.half_width:.1f} points"
    )


if __name__ == "__main__":
    main()
