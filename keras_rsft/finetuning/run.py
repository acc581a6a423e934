"""Puts a run together: images, features, head, evaluation, one model out."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from keras_rsft.backbones import build_classifier
from keras_rsft.data import ImageData, apply_corrections, load_images
from keras_rsft.finetuning.feature_source import open_features
from keras_rsft.finetuning.head_training import (
    Callbacks,
    SplitFeatures,
    TrainedHead,
    train_head,
)
from keras_rsft.finetuning.plain_head import AgainstPlain, train_against_plain
from keras_rsft.finetuning.run_folder import check_new_folder, write_run
from keras_rsft.finetuning.settings import TrainingSettings
from keras_rsft.finetuning.stage_two import (
    accuracy_on_images,
    check_base_can_learn,
    fine_tune_last_block,
)
from keras_rsft.model import RSFTModel


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of one run.

    Attributes:
        model: Images `(batch, height, width, 3)` in [0, 255] to probabilities.
        head: The trained `RSFTModel` over features, with its policy's state.
        class_names: Names of the classes, in the order of the probabilities.
        history: Each logged value, one number an epoch.
        results: Final numbers: accuracies in [0, 1], acceptance rate, seconds,
            and, where the right labels are known, the shares of wrong and right
            labels that the finished model's policy rejects. After a stage two also
            `stage2_validation_accuracy`, `stage2_test_accuracy`, and `stage2_kept`:
            1.0 where `model` is its model. The plain accuracies are then its own,
            and the head's `head_validation_accuracy` and `head_test_accuracy`.
        config: Everything that is needed to repeat the run.
        features: The kept features; `.unreadable` names the images left out.
        trained: The head's training: ledger, acceptance by class, examination.
        folder: Where the run was written, or None.
        against_plain: Rejection against a plain head, image by image; None where
            none was trained.
    """

    model: keras.Model
    head: RSFTModel
    class_names: tuple[str, ...]
    history: dict[str, list[float]]
    results: dict[str, float]
    config: dict[str, Any]
    features: SplitFeatures
    trained: TrainedHead
    folder: Path | None = None
    against_plain: AgainstPlain | None = None

    @property
    def finding(self) -> str | None:
        """What the policy `auto` found and chose, in one line; None for others."""
        examination = self.trained.examination
        return None if examination is None else examination.describe()

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.notebook import run_html

        return run_html(self)


def finetune(
    data: ImageData | str | os.PathLike,
    *,
    corrections: str | os.PathLike | Sequence[str | os.PathLike] = (),
    backbone: str = "resnet50",
    weights: str = "imagenet",
    image_size: int | None = None,
    precision: str = "auto",
    views: int = 1,
    settings: TrainingSettings | None = None,
    output: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
    callbacks: Callbacks = (),
    with_plain: bool = True,
    progress: bool = True,
    command: str | None = None,
) -> Run:
    """Fine-tunes a new head on a frozen base and writes a run folder.

    With `stage2_epochs` in the settings, the base's last block is then fine-tuned
    with the head on the accepted images (Ahn et al., 2024, TURN). That is kept where
    it gets no fewer validation images right than the head alone.

    Args:
        data: Loaded images, or what `load_images` takes.
        corrections: Files for `apply_corrections`. Default: none.
        backbone: Name of a base or path of a `.keras` file. Default ResNet50.
        weights: `"imagenet"`, `"none"`, or a file. Default `"imagenet"`.
        image_size: Side of the square images in pixels. Default: the base's.
        precision: `"auto"`, `"float32"` or `"bfloat16"`, for the base's pass.
        views: Views kept of each training image, at least 1. Default 1.
        settings: How to train. Default: `TrainingSettings()`.
        output: The run folder; it must not exist. Default: none is written.
        cache_dir: Where features are kept. Default: the user's cache folder.
        callbacks: Further Keras callbacks for the training of the head, or a function
            that makes them of the run's `RejectionLedger`.
        with_plain: Train a plain head as well, to be compared in the report. Default
            True; only where a folder is written and the policy can reject.
        progress: Show progress bars. Default True.
        command: The command line that asked for this run, for the record.

    Returns:
        The trained model with its history and results.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data cannot be trained on, or not be corrected so.
        WeightsUnavailable: If the base's weights cannot be had.
        TrainingStalled: If the last epoch accepted nothing, or the finished head
            accepts nothing for a stage two to learn from.
    """
    settings = settings or TrainingSettings()
    started = time.perf_counter()
    folder = check_new_folder(output) if output is not None else None
    if settings.stage2_epochs:
        check_base_can_learn(str(backbone))
    if corrections:
        data = data if isinstance(data, ImageData) else load_images(data)
        data = apply_corrections(data, corrections)
    source = open_features(
        data,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        precision=precision,
        views=views,
        seed=settings.seed,
        cache_dir=cache_dir,
        progress=progress,
    )
    data, features = source.data, source.features
    trained = train_head(features, settings, callbacks=callbacks, progress=progress)
    head, results = trained.model, trained.results
    base = source.float32_base()
    model = build_classifier(base, data.num_classes, head=head.model)
    if settings.stage2_epochs:
        model = _stage_two(model, base, data, features, trained, settings, progress)
    against_plain = None
    if with_plain and folder is not None:
        against_plain = train_against_plain(
            features, trained, settings, progress=progress
        )
    results["seconds"] = time.perf_counter() - started
    run = Run(
        model=model,
        head=head,
        class_names=data.class_names,
        history=trained.history,
        results=results,
        config={
            "command": command,
            **source.origin,
            **dataclasses.asdict(settings),
        },
        features=features,
        trained=trained,
        folder=folder,
        against_plain=against_plain,
    )
    if folder is not None:
        write_run(run, data, cache_dir=cache_dir, progress=progress)
    return run


def _stage_two(
    head_only: keras.Model,
    base: keras.Model,
    data: ImageData,
    features: SplitFeatures,
    trained: TrainedHead,
    settings: TrainingSettings,
    progress: bool,
) -> keras.Model:
    """Returns the better of two models by validation, and notes both in the results."""
    results = trained.results
    tuned = fine_tune_last_block(
        base,
        trained.model.model,
        data.train,
        features.train,
        trained.accepted,
        epochs=settings.stage2_epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=progress,
    )
    kept = False
    if len(features.test):
        results["stage2_test_accuracy"] = accuracy_on_images(tuned, data.test)
    if len(features.validation):
        accuracy = accuracy_on_images(tuned, data.validation)
        results["stage2_validation_accuracy"] = accuracy
        # Anew, as the features may have been computed in another precision.
        kept = accuracy >= accuracy_on_images(head_only, data.validation)
    results["stage2_kept"] = float(kept)
    if not kept:
        return head_only
    for name in ("validation_accuracy", "test_accuracy"):
        if name in results:
            results[f"head_{name}"] = results[name]
            results[name] = results[f"stage2_{name}"]
    return tuned
