"""How well wrong labels are ranked: the ledger's suspicion against cleanlab's score.

AUROC of both on the same features of a frozen EfficientNet-Lite0 at 128 px. cleanlab
computes its label quality (self-confidence) from what it usually gets: out-of-fold
probabilities of five plainly trained heads. `predictions` is the suspicion of an audit
of these probabilities alone.

    python tests/benchmarks/suspicion.py FOLDER

FOLDER holds labels.csv with the columns path, split, random_label1, aggre_label and
clean_label, as in CIFAR-10N.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from cleanlab.rank import get_label_quality_scores
from sklearn.metrics import roc_auc_score

import keras_rsft as rsft
from keras_rsft.comparison._methods import out_of_fold_probabilities
from keras_rsft.training._features import open_features


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--columns", nargs="+", default=["random_label1", "aggre_label"]
    )
    parser.add_argument("--cache-dir")
    arguments = parser.parse_args()
    config = rsft.FeatureConfig(
        "efficientnet_lite0",
        image_size=128,
        dtype="float32",
        cache_dir=arguments.cache_dir,
    )
    settings = rsft.TrainConfig(policy=rsft.PolicyConfig("accept-all"))
    print(
        f"{'labels':16} {'wrong':>7} {'suspicion':>10} {'predictions':>11} "
        f"{'cleanlab':>10}"
    )
    for column in arguments.columns:
        data = rsft.load_images(
            str(arguments.folder / "labels.csv"),
            label_column=column,
            clean_label_column="clean_label",
        )
        features = open_features(data, config).features
        train = features.train
        found = rsft.audit_labels(train, num_classes=data.num_classes)
        with tempfile.TemporaryDirectory() as folder:
            plain = out_of_fold_probabilities(features, settings, folder=Path(folder))
        wrong = train.labels != train.clean_labels
        by_model = rsft.audit_labels(labels=train.labels, probabilities=plain)
        quality = get_label_quality_scores(train.labels, plain)
        print(
            f"{column:16} {100 * wrong.mean():6.1f}% "
            f"{roc_auc_score(wrong, found.suspicion):10.4f} "
            f"{roc_auc_score(wrong, by_model.suspicion):11.4f} "
            f"{roc_auc_score(wrong, -quality):10.4f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
