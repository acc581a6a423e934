"""What a review finds and gains: static, live and cleanlab's order of the labels.

The digits of scikit-learn at 96 px and, with FOLDER, photos of CIFAR-10N at 128 px; a
frozen EfficientNet-Lite0. Wrong labels are in all splits. Somebody who makes no mistake
looks at one sample after the other: by the first audit's suspicion, by an audit that is
run again after every ten decisions (`keras-rsft review --serve`), or by cleanlab's
self-confidence from out-of-fold probabilities of plain heads. Prints

- the share of the wrong labels that is found after looking at half as many samples as
  labels are wrong, at as many, and at half as many again;
- what a review in the live order gains: heads trained with `auto` before and after, on
  the held-out samples, by right labels and as `fit --corrections` estimates it, with
  half of the 95 % interval over seeds, and how often the estimate's interval holds the
  gain by right labels.

    python tests/benchmarks/review_round.py [FOLDER] --noise symmetric:0.3 --seeds 5

FOLDER holds labels.csv with the columns path, split, random_label1 and clean_label.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import numpy as np
from cleanlab.rank import get_label_quality_scores

import keras_rsft as rsft
from keras_rsft._stats import mean_interval
from keras_rsft.comparison._methods import out_of_fold_probabilities
from keras_rsft.data._labels import asymmetric_noise, parse_noise, symmetric_noise
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.training._before import joined
from keras_rsft.training._features import SplitFeatures, open_features
from keras_rsft.training._head import audit_splits, head_probabilities, train_head

# Samples looked at, in multiples of how many labels are wrong.
LOOKED = (0.5, 1.0, 1.5)
SPLITS = ("train", "validation", "test")
FRACTIONS = (0.7, 0.15, 0.15)


def splits_of(whole: FeatureSet, names: tuple[str, ...], seed: int) -> SplitFeatures:
    """Cuts samples into the three splits at random."""
    order = np.random.default_rng(seed).permutation(len(whole))
    cuts = np.cumsum([round(one * len(whole)) for one in FRACTIONS[:2]])
    parts = (whole.take(np.sort(part)) for part in np.split(order, cuts))
    return SplitFeatures(*parts, names)


def reviewed(features: SplitFeatures, looked: np.ndarray) -> SplitFeatures:
    """Returns the samples after a person has looked at some of them."""
    changed, start = {}, 0
    for name in SPLITS:
        part = getattr(features, name)
        seen = looked[start : start + len(part)]
        start += len(part)
        if seen.any():
            labels = np.where(seen, part.clean_labels, part.labels)
            changed[name] = dataclasses.replace(
                part, labels=labels, reviewed=seen, before_review=part
            )
    return dataclasses.replace(features, **changed)


def of_all(quality: LabelQuality) -> np.ndarray:
    """Returns the suspicion of the samples of all splits."""
    return np.concatenate([one.suspicion for one in (quality, *quality.held_out)])


def live_order(features: SplitFeatures, most: int, every: int, seed: int) -> np.ndarray:
    """Returns the samples as one looks at them, sorted anew after so many decisions."""
    total = sum(len(getattr(features, name)) for name in SPLITS)
    looked, order = np.zeros(total, bool), []
    while len(order) < min(most, total):
        quality = audit_splits(reviewed(features, looked), seed, progress=False)
        suspicion = np.where(looked, -1.0, of_all(quality))
        following = np.argsort(-suspicion, kind="stable")[:every].tolist()
        order += following
        looked[following] = True
    return np.array(order)


def cleanlab_order(whole: FeatureSet, names: tuple[str, ...], seed: int) -> np.ndarray:
    """Returns the samples by cleanlab's score, the lowest first."""
    nothing = whole.take(np.arange(0))
    settings = rsft.TrainConfig(policy=rsft.PolicyConfig("accept-all"), seed=seed)
    plain = out_of_fold_probabilities(
        SplitFeatures(whole, nothing, nothing, names), settings
    )
    scores = get_label_quality_scores(whole.labels, plain, method="self_confidence")
    return np.argsort(scores, kind="stable")


def gain(features: SplitFeatures, looked: np.ndarray, seed: int) -> tuple:
    """Returns the gain of a review by right labels, and as it is estimated."""
    after, settings = reviewed(features, looked), rsft.TrainConfig(seed=seed)
    quality = audit_splits(after, seed, progress=False)
    heads = [
        train_head(one, settings, progress=False).model for one in (after, features)
    ]
    parts = [(after.validation, 0), (after.test, 1)]
    predicted = [
        np.concatenate([head_probabilities(head, one).argmax(1) for one, _ in parts])
        for head in heads
    ]
    clean = np.concatenate([one.clean_labels for one, _ in parts])
    truth = np.mean(predicted[0] == clean) - np.mean(predicted[1] == clean)
    judges = [(one, np.arange(len(one.labels))) for one in quality.held_out]
    estimate = joined(judges).gain(*predicted)
    return truth, estimate, np.mean(predicted[1] == clean)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--noise", default="symmetric:0.3")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=3000)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    columns = {"label_column": "random_label1", "clean_label_column": "clean_label"}
    source, side, noise = "digits", 96, arguments.noise
    options = {"validation_fraction": 0.0, "test_fraction": 0.0}
    if arguments.folder is not None:
        source, side, noise = str(arguments.folder / "labels.csv"), 128, "human"
        options = columns
    data = rsft.load_images(source, **options)
    config = rsft.FeatureConfig(
        "efficientnet_lite0", image_size=side, cache_dir=arguments.cache_dir
    )
    whole, names = open_features(data, config).features.train, data.class_names
    found: dict[str, list] = {"static": [], "live": [], "cleanlab": [], "perfect": []}
    gains: dict[float, list] = {n: [] for n in LOOKED}
    for seed in range(arguments.seeds):
        if arguments.folder is None:
            kind, rate = parse_noise(noise)
            made = symmetric_noise if kind == "symmetric" else asymmetric_noise
            rng = np.random.default_rng(seed)
            labels = made(whole.labels, rate, num_classes=len(names), rng=rng)
            features = whole.with_labels(labels, whole.labels)
        else:
            rows = np.random.default_rng(seed).permutation(len(whole))
            features = whole.take(np.sort(rows[: arguments.samples]))
        splits = splits_of(features, names, seed)
        parts = [getattr(splits, name) for name in SPLITS]
        wrong = np.concatenate([one.labels != one.clean_labels for one in parts])
        counts = {n: round(n * wrong.sum()) for n in LOOKED}
        # Cleanlab judges all samples as one split, in the order of the file.
        ids = np.concatenate([one.ids for one in parts])
        at = {name: place for place, name in enumerate(ids.tolist())}
        by_file = cleanlab_order(features, names, seed)
        live = live_order(splits, counts[LOOKED[-1]], arguments.every, seed)
        orders = {
            "static": np.argsort(-of_all(audit_splits(splits, seed, progress=False))),
            "live": live,
            "cleanlab": np.array([at[one] for one in features.ids[by_file].tolist()]),
            "perfect": np.argsort(~wrong, kind="stable"),
        }
        for name, order in orders.items():
            shares = np.cumsum(wrong[order]) / max(wrong.sum(), 1)
            found[name].append([shares[n - 1] for n in counts.values()])
        for n, count in counts.items():
            looked = np.zeros(len(wrong), bool)
            looked[live[:count]] = True
            gains[n].append(gain(splits, looked, seed))
        print(
            f"seed {seed}: {wrong.sum()} of {len(wrong)} labels are wrong", flush=True
        )
    print_tables(f"{source}, {noise}, {arguments.seeds} seeds", found, gains)


def print_tables(title: str, found: dict[str, list], gains: dict[float, list]) -> None:
    """Prints what is found, and what it gains."""
    print(f"{Path(title).name}\n{'wrong labels found':18}", end="")
    print("".join(f"{f'{n:g} x wrong':>14}" for n in LOOKED))
    for name, rows in found.items():
        cells = [mean_interval(list(values)) for values in np.transpose(rows)]
        shown = [f"{100 * c.mean:.1f} ± {100 * c.half_width:.1f}" for c in cells]
        print(f"{name:18}" + "".join(f"{text:>14}" for text in shown))
    print(f"{'reviewed':>8} {'before':>7} {'gain':>14} {'estimated':>14} {'held':>6}")
    for n, rows in gains.items():
        truth, estimates, before = zip(*rows, strict=True)
        true, estimated = (
            mean_interval(list(values))
            for values in (truth, [one.value for one in estimates])
        )
        held = [
            one.low <= value <= one.high
            for one, value in zip(estimates, truth, strict=True)
        ]
        print(
            f"{f'{n:g} x':>8} {100 * np.mean(before):6.1f}% "
            f"{100 * true.mean:+7.1f} ± {100 * true.half_width:.1f} "
            f"{100 * estimated.mean:+7.1f} ± {100 * estimated.half_width:.1f} "
            f"{100 * np.mean(held):5.0f}%"
        )


if __name__ == "__main__":
    main()
