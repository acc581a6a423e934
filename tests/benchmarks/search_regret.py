"""How far the setting that `search` chooses is from the best that it tried.

The digits of scikit-learn at 96 px and, with FOLDER, CIFAR-10N at 128 px; a frozen
EfficientNet-Lite0. Noise is put into the training and the validation labels; the test
labels are the right ones. Prints, over seeds, in percent: the test accuracy of the best
trial and of the chosen one; the regret, which is their difference, in the mean and at
its highest; by how much the chosen one is better than `auto` and than plain
fine-tuning, both with the defaults of `fit`; and the policies that were chosen.

    python tests/benchmarks/search_regret.py [FOLDER] --seeds 3

FOLDER holds labels.csv with the columns path, split, random_label1 and clean_label.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import sys
import tempfile
from pathlib import Path

import numpy as np
from judged import conditions, noisy_labels

import keras_rsft as rsft
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import predicted_classes, train_head
from keras_rsft.tuning._search import search_features

VALIDATION_SIZES = (270, 1000)
# Of the samples that are not for validation.
TRAINED_ON, MOST_TRAINED_ON, MOST_TESTED_ON = 0.65, 2000, 4000


def splits_of(features, labels, clean, names, size: int, seed: int) -> SplitFeatures:
    """Returns a training, a validation and a test split, the last with right labels."""
    order = np.random.default_rng(seed).permutation(len(labels))
    count = min(round(TRAINED_ON * (len(labels) - size)), MOST_TRAINED_ON)
    given = dataclasses.replace(features, labels=labels.astype(np.int32))
    right = dataclasses.replace(features, labels=clean.astype(np.int32))
    validation, train, test, _ = np.split(
        order, [size, size + count, size + count + MOST_TESTED_ON]
    )
    return SplitFeatures(
        given.take(np.sort(train)),
        given.take(np.sort(validation)),
        right.take(np.sort(test)),
        names,
    )


def searched(features: SplitFeatures, seed: int, trials: int) -> tuple:
    """Returns the test accuracies of all trials, of the choice, and of the defaults."""
    settings = rsft.TrainConfig(seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        found = search_features(
            features,
            output=Path(folder, "search"),
            options=rsft.SearchConfig(max_trials=trials),
            settings=settings,
            progress=False,
        )
        accuracies = {
            one.trial_id: float(
                np.mean(found.tuner.test_predicted(one) == features.test.labels)
            )
            for one in found.outcomes
            if one.completed
        }
        defaults = []
        for policy in ("auto", "accept-all"):
            plainly = dataclasses.replace(settings, policy=rsft.PolicyConfig(policy))
            trained = train_head(
                features,
                plainly,
                progress=False,
                label_quality=found.tuner.hypermodel.label_quality,
            )
            right = predicted_classes(trained.model, features.test)
            defaults.append(float(np.mean(right == features.test.labels)))
    chosen = found.choice.chosen
    best = max(accuracies.values())
    return best, accuracies[chosen.trial_id], *defaults, chosen.settings.policy.name


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    print(
        f"{'data':9} {'noise':15} {'labels':>6} {'best':>6} {'chosen':>6} "
        f"{'regret':>6} {'worst':>6} {'- auto':>6} {'- plain':>7}  policies"
    )
    everything = []
    for name, kind, rate, data, features, clean in conditions(arguments):
        for size in VALIDATION_SIZES:
            rows, policies = [], collections.Counter()
            for seed in range(arguments.seeds):
                labels = noisy_labels(kind, rate, data, clean, seed)
                splits = splits_of(
                    features, labels, clean, data.class_names, size, seed
                )
                *row, policy = searched(splits, seed, arguments.trials)
                rows.append(row)
                policies[policy] += 1
            everything += rows
            chosen_ones = ", ".join(f"{k} {v}" for k, v in policies.most_common())
            print(f"{name:9} {f'{kind} {rate:g}':15} {size:6} ", end="")
            print(f"{numbers(rows)}  {chosen_ones}", flush=True)
    print(f"{'all':32} {numbers(everything)}")
    sys.stdout.flush()


def numbers(rows: list[list[float]]) -> str:
    """Returns the columns of some searches."""
    best, chosen, auto, plain = 100 * np.array(rows).T
    regret = best - chosen
    return (
        f"{best.mean():6.1f} {chosen.mean():6.1f} {regret.mean():6.2f} "
        f"{regret.max():6.2f} {(chosen - auto).mean():+6.2f} "
        f"{(chosen - plain).mean():+7.2f}"
    )


if __name__ == "__main__":
    main()
