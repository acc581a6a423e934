"""What rejection gains against the baselines, on real images with wrong labels.

For each condition: test accuracy (mean and 95 % interval over seeds), paired
difference to plain, the share recovered of what wrong labels cost, and whether
`auto` is below any baseline by more than the interval. Frozen EfficientNet-Lite0;
the digits of scikit-learn at 96 px for 30 epochs, with wrong labels put into the
training and validation splits; a folder of CIFAR-10N images at 128 px for 20
epochs, with the wrong labels that people gave.

    python tests/benchmarks/rejection.py
    python tests/benchmarks/rejection.py --cifar10n FOLDER --no-digits

FOLDER holds labels.csv with the columns path, split, random_label1, aggre_label and
clean_label.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from keras_rsft.cli_output import print_comparison
from keras_rsft.comparing import Comparison, compare
from keras_rsft.comparing.intervals import paired_interval
from keras_rsft.comparing.method_names import AUTO, CLEAN_SUBSET
from keras_rsft.data import load_images
from keras_rsft.finetuning import TrainingSettings

BACKBONE = "efficientnet_lite0"
DIGITS_NOISE = (
    None, "symmetric:0.2", "symmetric:0.4", "symmetric:0.6", "asymmetric:0.3",
)  # fmt: skip
CIFAR10N_LABELS = ("random_label1", "aggre_label", "clean_label")
BASELINES = ("gce", "co-teaching", "early-stopping", "cleanlab")
MIN_SEEDS = 5


def main() -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cifar10n", type=Path, metavar="FOLDER")
    parser.add_argument("--no-digits", action="store_true")
    parser.add_argument("--seeds", type=int, default=MIN_SEEDS)
    parser.add_argument("--methods", help="A,B,C; default: all that can run")
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    if arguments.seeds < MIN_SEEDS:
        parser.error(f"fewer than {MIN_SEEDS} seeds tell too little")
    options = {
        "backbone": BACKBONE,
        "seeds": arguments.seeds,
        "methods": arguments.methods and arguments.methods.split(","),
        "cache_dir": arguments.cache_dir,
    }
    if not arguments.no_digits:
        for noise in DIGITS_NOISE:
            known = options
            if noise is None and options["methods"]:  # No right labels to train on.
                methods = [m for m in options["methods"] if m != CLEAN_SUBSET]
                known = options | {"methods": methods}
            result = compare(
                load_images("digits"),
                noise=noise,
                image_size=96,
                settings=TrainingSettings(epochs=30),
                **known,
            )
            report(f"digits, {noise or 'no noise'}", result)
    for column in CIFAR10N_LABELS if arguments.cifar10n else ():
        data = load_images(
            arguments.cifar10n / "labels.csv",
            label_column=column,
            clean_label_column="clean_label",
        )
        result = compare(
            data, image_size=128, settings=TrainingSettings(epochs=20), **options
        )
        wrong = (data.train.labels != data.train.clean_labels).mean()
        report(f"cifar10n {column}, {100 * wrong:.1f} % wrong", result)


def report(title: str, result: Comparison) -> None:
    """Prints one condition."""
    print(f"\n{title}", flush=True)
    print_comparison(result)
    if AUTO not in result.summaries:
        print("auto did not run.", flush=True)
        return
    behind = {}
    for name in BASELINES:
        auto, other = (accuracies(result, method) for method in (AUTO, name))
        if name in result.summaries and None not in (*auto, *other):
            difference = paired_interval(auto, other)
            if difference.high < 0:
                behind[name] = difference
    for name, difference in behind.items():
        print(
            f"auto is BELOW {name}: {100 * difference.mean:.1f} ± "
            f"{100 * difference.half_width:.1f} points"
        )
    if not behind:
        print("auto is below no baseline by more than the interval.", flush=True)


def accuracies(result: Comparison, method: str) -> list[float | None]:
    """Returns a method's test accuracies in the order of the seeds."""
    return [o.test_accuracy for o in result.outcomes if o.method == method]


if __name__ == "__main__":
    main()
