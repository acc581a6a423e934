"""The embedded example: real digits, noisy labels put in, with and without rejection.

Needs no network: the images ship with scikit-learn, the weights with a package of the
extra `demo`.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import keras_rsft as rsft
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.training._head import train_head

NOISE = "symmetric:0.3"


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found; `results` has the three heads, each as in `Run.results`."""

    run: rsft.Run
    exported: Path
    sample_image: Path
    train_size: int
    wrong_labels: int
    test_size: int
    results: dict[str, dict[str, float]]


def run_demo(
    settings: TrainConfig, output: str | None, cache_dir: str | None, **options: Any
) -> DemoResult:
    """Fine-tunes on digits, 30 % of the training labels wrong, in three ways."""
    data = rsft.load_images("digits")
    clean = {
        name: split.with_labels(split.labels, split.labels)
        for name in ("train", "validation", "test")
        for split in [getattr(data, name)]
    }
    data = dataclasses.replace(data, **clean)
    data = rsft.add_label_noise(data, NOISE, seed=settings.seed)
    run = rsft.finetune(
        data,
        features=FeatureConfig(
            "efficientnet_lite0", image_size=96, dtype="float32", cache_dir=cache_dir
        ),
        settings=settings,
        output=Path(output) if output else rsft.NumberedFolder("demo"),
        **options,
    )
    train = run.features.train
    clean_features = dataclasses.replace(
        run.features, train=train.with_labels(train.clean_labels)
    )
    plain = dataclasses.replace(settings, policy=PolicyConfig("accept-all"))
    on_clean = train_head(clean_features, plain, progress=options["progress"])
    sample_image = run.folder / "sample.png"
    sample_image.write_bytes(data.test.encoded(0))
    return DemoResult(
        run=run,
        exported=rsft.export_saved_model(
            run.model, Path("saved_models") / "digits", class_names=run.class_names
        ),
        sample_image=sample_image,
        train_size=len(data.train),
        wrong_labels=int((data.train.labels != data.train.clean_labels).sum()),
        test_size=len(data.test),
        results={
            "plain": run.against_plain.results,
            "rsft": run.results,
            "right labels only": on_clean.results,
        },
    )
