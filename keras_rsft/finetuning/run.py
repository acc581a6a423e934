"""Puts a run together: images, features, head, evaluation, one model out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_rsft.backbones import build_classifier
from keras_rsft.backend_in_use import require_tensorflow_backend
from keras_rsft.data import SampleData, apply_corrections, load_images
from keras_rsft.errors import WorkerLost
from keras_rsft.finetuning.better_model import better_model
from keras_rsft.finetuning.callback_memory import identity_of
from keras_rsft.finetuning.checkpoint import TrainingCheckpoint
from keras_rsft.finetuning.devices import Devices, open_devices
from keras_rsft.finetuning.feature_source import FeatureSource, open_features
from keras_rsft.finetuning.head_training import Callbacks, TrainedHead, train_head
from keras_rsft.finetuning.overfitting import Overfitting
from keras_rsft.finetuning.plain_head import AgainstPlain, train_against_plain
from keras_rsft.finetuning.run_folder import check_new_folder, fill_run_folder
from keras_rsft.finetuning.settings import TrainingSettings
from keras_rsft.finetuning.split_features import SplitFeatures
from keras_rsft.finetuning.stage_two import check_base_can_learn, fine_tune_last_block
from keras_rsft.finetuning.tuned_run import (
    BaseTrainingPlace,
    Unfreezing,
    check_part_can_learn,
    part_to_train,
    unfreeze,
)
from keras_rsft.finetuning.unfinished import (
    NumberedFolder,
    RunPlace,
    open_place,
    run_identity,
)
from keras_rsft.model import RSFTModel
from keras_rsft.result_folder import disk_full_said
from keras_rsft.trainable_choice import TrainableFrom


@dataclasses.dataclass(frozen=True)
class Run:
    """What came out of one run.

    Attributes:
        model: Images `(batch, height, width, 3)` in [0, 255], or texts `(batch,)`, to
            probabilities.
        head: The trained `RSFTModel` over features, with its policy's state.
        class_names: Names of the classes, in the order of the probabilities.
        history: Each logged value, one number an epoch.
        results: Final numbers: accuracies in [0, 1], acceptance rate, seconds,
            and, where the right labels are known, the shares of wrong and right
            labels that the finished model's policy rejects. After a stage two also
            `stage2_validation_accuracy`, `stage2_test_accuracy`, and `stage2_kept`:
            1.0 where `model` is its model. The plain accuracies are then its own,
            and the head's `head_validation_accuracy` and `head_test_accuracy`. Where a
            part of the base was trained, the same under names with `unfrozen`.
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

    @property
    def overfitting(self) -> Overfitting | None:
        """How the head's training overfits; None where it does not."""
        return self.trained.overfitting

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.notebook import run_html

        return run_html(self)


def finetune(
    data: SampleData | str | os.PathLike,
    *,
    corrections: str | os.PathLike | Sequence[str | os.PathLike] = (),
    backbone: str = "resnet50",
    weights: str = "imagenet",
    image_size: int | None = None,
    precision: str = "auto",
    views: int = 1,
    feature_precision: str = "float32",
    settings: TrainingSettings | None = None,
    strategy: str | Devices = "none",
    output: str | os.PathLike | NumberedFolder | None = None,
    cache_dir: str | os.PathLike | None = None,
    callbacks: Callbacks = (),
    with_plain: bool = True,
    progress: bool = True,
    command: str | None = None,
    on_begin: Callable[[Path, bool], None] | None = None,
    trainable_from: TrainableFrom | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Fine-tunes a new head on a frozen base and writes a run folder.

    With `stage2_epochs` in the settings, the base's last block is then fine-tuned
    with the head on the accepted images (Ahn et al., 2024, TURN). That is kept where
    it gets no fewer validation images right than the head alone.

    With `trainable_from`, a part of the base, or all of it, then learns with the head
    under the same policy, for `base_epochs`. The activations in front of that part are
    kept like features where that pays. The result is kept by the same rule.

    Args:
        data: Loaded images or texts, or what `load_images` takes.
        corrections: Files for `apply_corrections`. Default: none.
        backbone: Name of a base or path of a `.keras` file; for texts `"minilm"`.
            Default ResNet50.
        weights: `"imagenet"`, `"none"`, or a file. Default `"imagenet"`.
        image_size: Side of the square images in pixels. Default: the base's.
        precision: `"auto"`, `"float32"` or `"bfloat16"`, for the base's pass.
        views: Views kept of each training image, at least 1. Default 1.
        feature_precision: How features are kept: `"float32"` or, in half the space,
            `"float16"`. Default float32.
        settings: How to train. Default: `TrainingSettings()`.
        strategy: On what the head is trained and the base is run, see `open_devices`:
            `"none"`, one device; `"mirrored"`; `"multiworker"`, where the chief alone
            writes the run and the others return it without a folder. A stage two has
            one device. Default `"none"`.
        output: The run folder, which must not exist, or `NumberedFolder("photos")`
            for the next `runs/photos-N`. Until the run is finished it is called
            `...unfinished`; killed there, the same call goes on with it and ends with
            the same weights. Default: none is written.
        cache_dir: Where features are kept. Default: the user's cache folder.
        callbacks: Further Keras callbacks for the training of the head, or a function
            that makes them of the run's `RejectionLedger`.
        with_plain: Train a plain head as well, to be compared in the report. Default
            True; only where a folder is written and the policy can reject.
        progress: Show progress bars. Default True.
        command: The command line that asked for this run, for the record.
        on_begin: Called before the work with the run folder to be, and with whether
            an unfinished run goes on there. Not called without `output`.
        trainable_from: In the place of the settings': how many of the base's last
            blocks learn, `"all"`, or names of layers.
        on_note: Called with what is decided on the way, in one line.

    Returns:
        The trained model with its history and results.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data cannot be trained on, or not be corrected so.
        WeightsUnavailable: If the base's weights cannot be had.
        TrainingStalled: If the last epoch accepted nothing, or the finished head
            accepts nothing for a stage two to learn from.
        OSError: If the disk is full; the same call goes on once there is room.
        WorkerLost: If another worker is gone; the same call on all of them goes on.
    """
    require_tensorflow_backend("`finetune`")
    settings = settings or TrainingSettings()
    if trainable_from is not None:
        settings = dataclasses.replace(settings, trainable_from=trainable_from)
    devices = open_devices(strategy) if isinstance(strategy, str) else strategy
    devices.require_trainable(base_learns=settings.trainable_from is not None)
    if settings.stage2_epochs:
        check_base_can_learn(str(backbone))
    if settings.trainable_from is not None:
        check_part_can_learn(str(backbone))
    options = {
        "backbone": backbone,
        "weights": weights,
        "image_size": image_size,
        "precision": precision,
        "views": views,
        "feature_precision": feature_precision,
    }
    with_plain = with_plain and output is not None
    work = _Work(
        options,
        settings,
        devices,
        cache_dir,
        callbacks,
        with_plain,
        progress,
        command,
        on_note,
    )
    if output is not None and not isinstance(output, NumberedFolder):
        check_new_folder(output)  # Before the work, not after it.
    if not isinstance(data, SampleData):
        data = load_images(data)
    if corrections:
        data = apply_corrections(data, corrections)
    identity = run_identity(
        data,
        **options,
        settings=dataclasses.asdict(settings),
        strategy=devices.name,
        callbacks=identity_of(callbacks),
        with_plain=with_plain,
    )
    devices.require_same(identity)
    if output is None:
        return _run(data, work)
    if not devices.is_chief:
        run = _run(data, work, TrainingCheckpoint(Path(), devices=devices))
        devices.from_chief(b"")  # Which is there once the run is written.
        return run
    with open_place(output, identity) as place:
        if on_begin is not None:
            on_begin(place.folder, place.went_on)
        run = _run_at(place, data, work)
    devices.from_chief(b"")
    return run


@dataclasses.dataclass(frozen=True)
class _Work:
    """What to do with the images, whatever place the result gets."""

    options: dict[str, Any]
    settings: TrainingSettings
    devices: Devices
    cache_dir: str | os.PathLike | None
    callbacks: Callbacks
    with_plain: bool
    progress: bool
    command: str | None
    on_note: Callable[[str], None]

    def check(self, base: keras.Model) -> None:
        """Raises where the part of the base that shall learn is not in it."""
        if self.settings.trainable_from is not None:
            part_to_train(base, self.settings)


def _run_at(place: RunPlace, data: SampleData, work: _Work) -> Run:
    """Makes a run and its folder; keeps the training's state where that fails."""
    checkpoint = TrainingCheckpoint(place.checkpoint, devices=work.devices)
    of_base = BaseTrainingPlace.at(place)
    try:
        run = _run(data, work, checkpoint, of_base)
        run = dataclasses.replace(run, folder=place.folder)
        place.write(
            lambda folder: fill_run_folder(
                folder, run, data, cache_dir=work.cache_dir, progress=work.progress
            )
        )
    except (KeyboardInterrupt, OSError, WorkerLost) as error:
        for state in (checkpoint, of_base.checkpoint):
            with contextlib.suppress(OSError):  # The disk may be full.
                state.flush()
        if isinstance(error, KeyboardInterrupt) and checkpoint.epochs_done:
            done = max(checkpoint.epochs_done, of_base.checkpoint.epochs_done)
            error.add_note(
                f"{done} of {work.settings.all_epochs} epochs are kept "
                f"in {place.unfinished}."
            )
        said = disk_full_said(error, place.unfinished)
        if said is error:
            raise
        raise said from error
    return run


def _run(
    data: SampleData,
    work: _Work,
    checkpoint: TrainingCheckpoint | None = None,
    of_base: BaseTrainingPlace | None = None,
) -> Run:
    started = time.perf_counter()
    settings, progress, devices = work.settings, work.progress, work.devices
    source = open_features(
        data,
        **work.options,
        seed=settings.seed,
        cache_dir=work.cache_dir,
        progress=progress,
        on_base=work.check,
        device_names=devices.local_names,
        cluster=devices.cluster,
    )
    data, features = source.data, source.features
    with devices.heeding_loss():
        trained = train_head(
            features,
            settings,
            callbacks=work.callbacks,
            progress=progress,
            checkpoint=checkpoint,
            devices=devices,
            curves=True,
        )
    head, results = trained.model, trained.results
    if checkpoint is not None and settings.trainable_from is not None:
        checkpoint.flush()  # What comes now takes longer than all before.
    model, trained = _with_base(source, trained, work, of_base)
    against_plain = None
    if work.with_plain:
        with devices.heeding_loss():
            against_plain = train_against_plain(
                features, trained, settings, progress=progress, devices=devices
            )
    results["seconds"] = time.perf_counter() - started
    return Run(
        model=model,
        head=head,
        class_names=data.class_names,
        history=trained.history,
        results=results,
        config={
            "command": work.command,
            **source.origin,
            **dataclasses.asdict(settings),
            "strategy": devices.name,
        },
        features=features,
        trained=trained,
        against_plain=against_plain,
    )


def _with_base(
    source: FeatureSource,
    trained: TrainedHead,
    work: _Work,
    of_base: BaseTrainingPlace | None,
) -> tuple[keras.Model, TrainedHead]:
    """Returns the whole model, and the training with what the base has learnt in it."""
    settings, base, data = work.settings, source.float32_base(), source.data
    model = build_classifier(base, data.num_classes, head=trained.model.model)
    if settings.stage2_epochs and work.devices.is_chief:
        model = _stage_two(model, base, data, source.features, trained, work)
    if settings.trainable_from is None:
        return model, trained
    how = Unfreezing(
        settings,
        work.options["feature_precision"],
        work.cache_dir,
        work.progress,
        work.on_note,
    )
    return unfreeze(model, base, data, source.features, trained, how, of_base)


def _stage_two(
    head_only: keras.Model,
    base: keras.Model,
    data: SampleData,
    features: SplitFeatures,
    trained: TrainedHead,
    work: _Work,
) -> keras.Model:
    """Returns the better of two models by validation, and notes both in the results."""
    settings = work.settings
    tuned = fine_tune_last_block(
        base,
        trained.model.model,
        data.train,
        features.train,
        trained.accepted,
        epochs=settings.stage2_epochs,
        batch_size=settings.batch_size,
        seed=settings.seed,
        progress=work.progress,
    )
    return better_model(
        head_only, tuned, data, features, trained.results, name="stage2"
    )
