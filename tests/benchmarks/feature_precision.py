"""Features kept in float16 against float32: accuracy and disk.

Frozen EfficientNet-Lite0 at 96 px on the digits of scikit-learn, clean and with wrong
labels; heads trained plainly and with `auto`, 30 epochs. Each seed is trained on both
kinds of features, and the digits are split in several ways, so that every image is
tested often. One test image more or less is 0.4 points of one accuracy; the mean over
splits and seeds tells what remains.

    python tests/benchmarks/feature_precision.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from keras_rsft._stats import paired_interval
from keras_rsft.comparison._compare import compare
from keras_rsft.config import FeatureConfig, TrainConfig
from keras_rsft.data._sources import load_images

METHODS = ("plain", "auto")
CONDITIONS = (None, "symmetric:0.3")
PRECISIONS = ("float32", "float16")


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--splits", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{'noise':14} {'method':12} {'float32':>8} {'float16':>8}  difference")
    with tempfile.TemporaryDirectory() as root:
        folders = {precision: Path(root) / precision for precision in PRECISIONS}
        for noise in CONDITIONS:
            accuracies = {
                precision: measure(noise, precision, folder, arguments)
                for precision, folder in folders.items()
            }
            for method in METHODS:
                wide, narrow = (accuracies[p][method] for p in PRECISIONS)
                change = paired_interval(narrow, wide)
                print(
                    f"{noise or 'none':14} {method:12} {mean(wide):7.2f}% "
                    f"{mean(narrow):7.2f}%  {100 * change.mean:+.3f} ± "
                    f"{100 * change.half_width:.3f} points, {len(wide)} runs",
                    flush=True,
                )
        sizes = [features_size(folder) for folder in folders.values()]
        print(f"bytes on disk {sizes[0]:,} and {sizes[1]:,}: {sizes[1] / sizes[0]:.2f}")


def measure(
    noise: str | None, precision: str, folder: Path, arguments: argparse.Namespace
) -> dict[str, list[float]]:
    """Returns each method's test accuracies, in the order of splits and seeds."""
    found: dict[str, list[float]] = {method: [] for method in METHODS}
    for split_seed in range(arguments.splits):
        result = compare(
            load_images("digits", split_seed=split_seed),
            features=FeatureConfig(
                "efficientnet_lite0",
                image_size=96,
                cache_dtype=precision,
                cache_dir=folder,
            ),
            methods=list(METHODS),
            seeds=arguments.seeds,
            noise=noise,
            settings=TrainConfig(epochs=30),
        )
        for outcome in result.outcomes:
            found[outcome.method].append(outcome.test_accuracy)
    return found


def mean(accuracies: list[float]) -> float:
    """Returns the mean in percent."""
    return 100 * sum(accuracies) / len(accuracies)


def features_size(folder: Path) -> int:
    """Returns the bytes of the kept features, without ids and labels."""
    return sum(path.stat().st_size for path in folder.rglob("features*"))


if __name__ == "__main__":
    main()
