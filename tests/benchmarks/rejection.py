"""What rejection gains against the baselines, on real images with wrong labels.

For each condition: test accuracy (mean and 95 % interval over seeds), paired
difference to plain, the share recovered of what wrong labels cost, and whether
`auto` is below any baseline by more than the interval. Recovered is measured against
the samples whose label is right, and for `auto` also against all samples with right
labels; above 1, its head is better than a plain one that had them. Frozen
EfficientNet-Lite0; the digits of scikit-learn at 96 px for 30 epochs, with wrong labels
put into the training and validation splits; a folder of CIFAR-10N images at 128 px for
20 epochs, with the wrong labels that people gave.

    python tests/benchmarks/rejection.py
    python tests/benchmarks/rejection.py --cifar10n FOLDER --no-digits
    python tests/benchmarks/rejection.py --cifar10n FOLDER --unseen

FOLDER holds labels.csv with the columns path, split, random_label1, aggre_label and
clean_label. `--unseen` measures conditions that had no part in the design of `auto`:
other wrong labels, and digits that are split in another way.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from keras_rsft._stats import paired_right_interval
from keras_rsft.cli._render import Output
from keras_rsft.comparison._compare import Comparison, compare
from keras_rsft.comparison._methods import recovered_share
from keras_rsft.config import AUTO, CLEAN_SUBSET, PLAIN, FeatureConfig, TrainConfig
from keras_rsft.data._labels import trust_splits
from keras_rsft.data._samples import ImageData
from keras_rsft.data._sources import load_images
from keras_rsft.report._summary import comparison_summary

BACKBONE = "efficientnet_lite0"
BASELINES = ("gce", "co-teaching", "early-stopping", "cleanlab")
MIN_SEEDS = 5


@dataclasses.dataclass(frozen=True)
class Condition:
    """What to compare on.

    Attributes:
        source: `"digits"`, or the column of CIFAR-10N whose labels are given.
        noise: What is made wrong on purpose, as in `compare`.
        split_seed: How the digits are split.
    """

    source: str
    noise: str | None = None
    split_seed: int = 0

    @property
    def is_digits(self) -> bool:
        return self.source == "digits"

    @property
    def right(self) -> Condition:
        """The same samples, all with their right labels."""
        source = self.source if self.is_digits else "clean_label"
        return dataclasses.replace(self, source=source, noise=None)

    def load(self, folder: Path) -> ImageData:
        """Returns the images; `folder` holds those of CIFAR-10N."""
        if self.is_digits:
            digits = load_images("digits", split_seed=self.split_seed)
            return trust_splits(digits, ["test"])
        return load_images(
            folder / "labels.csv",
            label_column=self.source,
            clean_label_column=None if self.noise else "clean_label",
        )


CONDITIONS = (
    *(
        Condition("digits", noise)
        for noise in (
            None, "symmetric:0.2", "symmetric:0.4", "symmetric:0.6", "asymmetric:0.3",
        )
    ),
    *(Condition(name) for name in ("random_label1", "aggre_label", "clean_label")),
)  # fmt: skip
UNSEEN_NOISE = ("symmetric:0.3", "asymmetric:0.4", "instance:0.3")
UNSEEN_CONDITIONS = (
    *(Condition("digits", noise, split_seed=1) for noise in (None, *UNSEEN_NOISE)),
    *(Condition("clean_label", noise) for noise in UNSEEN_NOISE),
)


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar10n", type=Path, metavar="FOLDER")
    parser.add_argument("--no-digits", action="store_true")
    parser.add_argument("--unseen", action="store_true")
    parser.add_argument("--seeds", type=int, default=MIN_SEEDS)
    parser.add_argument("--methods", help="A,B,C; default: all that can run")
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    if arguments.seeds < MIN_SEEDS:
        parser.error(f"fewer than {MIN_SEEDS} seeds tell too little")
    for condition in UNSEEN_CONDITIONS if arguments.unseen else CONDITIONS:
        skipped = arguments.no_digits if condition.is_digits else not arguments.cifar10n
        if not skipped:
            measure(condition, arguments)


def measure(condition: Condition, arguments: argparse.Namespace) -> None:
    """Compares the methods in one condition, and prints what came out."""
    data = condition.load(arguments.cifar10n)
    train = data.train
    given_wrong = condition.noise or (
        train.clean_labels is not None and (train.labels != train.clean_labels).any()
    )
    methods = arguments.methods and arguments.methods.split(",")
    if methods and not given_wrong:  # The right labels are all of them.
        methods = [name for name in methods if name != CLEAN_SUBSET]
    result = compared(condition, data, methods, arguments)
    wrong = condition.noise or "no wrong labels"
    if train.clean_labels is not None:
        wrong = f"{100 * (train.labels != train.clean_labels).mean():.1f} % wrong"
    report(f"{condition.source}, {wrong}", result)
    if given_wrong and AUTO in result.summaries:
        data = condition.right.load(arguments.cifar10n)
        right = compared(condition.right, data, [PLAIN], arguments)
        of_auto, of_plain = accuracy_of(result, AUTO), accuracy_of(result, PLAIN)
        of_right = accuracy_of(right, PLAIN)
        share = recovered_share(of_auto, of_plain, of_right)
        found = "wrong labels cost nothing" if share is None else f"auto: {share:.2f}"
        print(f"Plain, all labels right: {100 * of_right:.1f}. Recovered, {found}.")


def compared(
    condition: Condition,
    data: ImageData,
    methods: Sequence[str] | None,
    arguments: argparse.Namespace,
) -> Comparison:
    """Compares the methods on the data of one condition."""
    return compare(
        data,
        features=FeatureConfig(
            BACKBONE,
            image_size=96 if condition.is_digits else 128,
            cache_dir=arguments.cache_dir,
        ),
        methods=methods,
        seeds=arguments.seeds,
        noise=condition.noise,
        settings=TrainConfig(epochs=30 if condition.is_digits else 20),
    )


def accuracy_of(result: Comparison, method: str) -> float:
    """Returns a method's mean test accuracy; NaN where every seed stalled."""
    accuracy = result.summaries[method].test_accuracy
    return math.nan if accuracy is None else accuracy.mean


def report(title: str, result: Comparison) -> None:
    """Prints one condition."""
    print(f"\n{title}", flush=True)
    Output().show(comparison_summary(result), plain=True)
    if AUTO not in result.summaries:
        print("auto did not run.", flush=True)
        return
    behind = {}
    for name in BASELINES:
        auto, other = (right_of(result, method) for method in (AUTO, name))
        if auto is not None and other is not None:
            low, high = paired_right_interval(auto, other)
            if high < 0:
                behind[name] = (low, high)
    for name, (low, high) in behind.items():
        print(f"auto is BELOW {name}: {100 * low:+.1f} to {100 * high:+.1f} points")
    if not behind:
        print("auto is below no baseline by more than the interval.", flush=True)


def right_of(result: Comparison, method: str) -> np.ndarray | None:
    """Returns `(seeds, n)`: what a method gets right; None where a seed stalled."""
    right = [o.test_right for o in result.outcomes if o.method == method]
    return None if not right or any(one is None for one in right) else np.stack(right)


if __name__ == "__main__":
    main()
