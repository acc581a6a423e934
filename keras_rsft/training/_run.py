"""Runs a fine-tuning: images, features, head, evaluation, run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras

from keras_rsft._ledger import COLUMNS, HISTOGRAM_COLUMNS
from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._storage import (
    ACCEPTANCE_FILE,
    CLASSES_FILE,
    CONFIG_FILE,
    CORRECTIONS_FILE,
    HEAD_FILE,
    HISTOGRAMS_FILE,
    LEDGER_FILE,
    METRICS_FILE,
    MODEL_FILE,
    NEAR_DUPLICATES_FILE,
    RESULTS_FILE,
    SAMPLES_FILE,
    NumberedFolder,
    RunPlace,
    check_new_folder,
    disk_full_said,
    installed_versions,
    open_place,
    write_csv,
    write_json,
)
from keras_rsft.backbones._build import build_classifier
from keras_rsft.config import TrainConfig
from keras_rsft.data._labels import COLUMNS as CORRECTION_COLUMNS
from keras_rsft.data._labels import apply_corrections
from keras_rsft.data._samples import SampleData
from keras_rsft.data._sources import load_images
from keras_rsft.errors import WorkerLost
from keras_rsft.features._neighbours import near_duplicates
from keras_rsft.features._thumbnails import write_excerpts, write_thumbnails
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training._curves import Overfitting
from keras_rsft.training._devices import Devices, open_devices
from keras_rsft.training._features import SplitFeatures, open_features
from keras_rsft.training._head import (
    AgainstPlain,
    Callbacks,
    TrainedHead,
    train_against_plain,
    train_head,
)
from keras_rsft.training._resume import (
    TrainingCheckpoint,
    callbacks_identity,
    run_identity,
)
from keras_rsft.training._unfreeze import (
    BackboneSource,
    cut_backbone,
    require_layers_to_train,
    unfreeze,
)

# Run folder ---------------------------------------------------------------------------


def read_class_names(folder: Path) -> tuple[str, ...]:
    """Returns the class names of a run folder."""
    return tuple(json.loads((folder / CLASSES_FILE).read_text(encoding="utf-8")))


def fill_run_folder(
    folder: Path,
    run: Run,
    data: SampleData,
    *,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
) -> None:
    """Writes all files of a run into an empty folder."""
    run.model.save(folder / MODEL_FILE)
    run.head.save(folder / HEAD_FILE)
    described = {"finding": run.finding, "versions": installed_versions()}
    write_json(folder / CONFIG_FILE, run.config | described)
    write_json(folder / RESULTS_FILE, results_of(run))
    write_json(folder / CLASSES_FILE, list(run.class_names))
    names = list(run.history)
    rows = zip(*(run.history[name] for name in names), strict=True)
    write_csv(
        folder / METRICS_FILE,
        ["epoch", *names],
        ([epoch, *row] for epoch, row in enumerate(rows, start=1)),
    )
    write_csv(
        folder / SAMPLES_FILE,
        ["id", "split", "given_label", "clean_label", "decision", "label_before"],
        _sample_rows(data),
    )
    if data.corrections is not None:
        corrected = data.corrections.rows
        write_csv(folder / CORRECTIONS_FILE, CORRECTION_COLUMNS, corrected)
    trained = run.trained
    write_csv(folder / LEDGER_FILE, COLUMNS, trained.ledger.rows(run.class_names))
    write_csv(
        folder / ACCEPTANCE_FILE,
        ["epoch", *run.class_names],
        ([epoch, *row] for epoch, row in enumerate(trained.acceptance_by_class, 1)),
    )
    write_csv(
        folder / HISTOGRAMS_FILE,
        HISTOGRAM_COLUMNS,
        (
            row
            for epoch, histogram in enumerate(trained.loss_histograms, 1)
            for row in histogram.rows(epoch)
        ),
    )
    if run.features.unreadable:
        write_csv(folder / "unreadable.csv", ["id", "reason"], run.features.unreadable)
    # What a person looks at: pairs of near duplicates, and the samples.
    train, suspicion = run.features.train, run.trained.ledger.suspicion
    write_csv(
        folder / NEAR_DUPLICATES_FILE,
        ["id", "other_id", "similarity"],
        (
            [str(train.ids[pair.first]), str(train.ids[pair.second]),
             f"{pair.similarity:.4f}"]
            for pair in near_duplicates(train, suspicion, progress=progress)
        ),
    )  # fmt: skip
    by_id = dict(zip(map(str, train.ids), suspicion.tolist(), strict=True))
    if data.kind == "texts":
        write_excerpts(data.train, by_id, folder)
        return
    write_thumbnails(data.train, by_id, folder, cache_dir=cache_dir, progress=progress)


def results_of(run: Run) -> dict[str, Any]:
    """Returns what `results.json` holds."""
    found = run.overfitting
    results = run.results | {"overfitting": None}
    if found is not None:
        described = dataclasses.asdict(found) | {"sentence": found.sentence}
        results["overfitting"] = described
    if run.against_plain is None:
        return results
    return results | {"against_plain": dataclasses.asdict(run.against_plain)}


def _sample_rows(data: SampleData) -> Iterable[list[str]]:
    """Yields the samples that remain, with what was decided and what it replaced."""
    rows = () if data.corrections is None else data.corrections.rows
    decided = {row.id: [row.decision, row.given_label] for row in rows}
    for split in (data.train, data.validation, data.test):
        clean = split.labels if split.clean_labels is None else split.clean_labels
        known = split.clean_labels is not None
        for sample_id, given, right in zip(split.ids, split.labels, clean, strict=True):
            right_name = data.class_names[right] if known else ""
            names = [data.class_names[given], right_name]
            decision = decided.get(str(sample_id), ["", ""])
            yield [str(sample_id), split.name, *names, *decision]


# Run ----------------------------------------------------------------------------------


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
        features: The cached features; `.unreadable` names the images left out.
        trained: The head's training: ledger, acceptance by class, label_quality.
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
        label_quality = self.trained.label_quality
        return None if label_quality is None else label_quality.describe()

    @property
    def overfitting(self) -> Overfitting | None:
        """How the head's training overfits; None where it does not."""
        return self.trained.overfitting

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.report._notebook import run_html

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
    settings: TrainConfig | None = None,
    strategy: str | Devices = "none",
    output: str | os.PathLike | NumberedFolder | None = None,
    cache_dir: str | os.PathLike | None = None,
    callbacks: Callbacks = (),
    with_plain: bool = True,
    progress: bool = True,
    command: str | None = None,
    on_begin: Callable[[Path, bool], None] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Fine-tunes a new head on a frozen base and writes a run folder.

    With `unfreeze` in the settings, a part of the base, or all of it, then learns with
    the head: under the same policy, or on the accepted samples alone (Ahn et al., 2024,
    TURN). The activations before that part are cached like features where the disk has
    room. The result is kept where it gets no fewer validation images right than the
    head alone.

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
        settings: How to train. Default: `TrainConfig()`.
        strategy: On what the head is trained and the base is run, see `open_devices`:
            `"none"`, one device; `"mirrored"`; `"multiworker"`, where the chief alone
            writes the run and the others return it without a folder. Unfrozen layers
            are trained on one device. Default `"none"`.
        output: The run folder, which must not exist, or `NumberedFolder("photos")`
            for the next `runs/photos-N`. Until the run is finished it is called
            `...unfinished`; killed there, the same call resumes it and ends with
            the same weights. Default: none is written.
        cache_dir: Where features are kept. Default: the user's cache folder.
        callbacks: Further Keras callbacks for the training of the head, or a function
            that makes them of the run's `RejectionLedger`.
        with_plain: Train a plain head as well, to be compared in the report. Default
            True; only where a folder is written and the policy can reject.
        progress: Show progress bars. Default True.
        command: The command line that asked for this run, for the record.
        on_begin: Called before the work with the run folder to be, and with whether
            an unfinished run is resumed there. Not called without `output`.
        on_note: Called with what is decided on the way, in one line.

    Returns:
        The trained model with its history and results.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data cannot be trained on, or not be corrected so.
        WeightsUnavailable: If the base's weights cannot be had.
        TrainingStalled: If the last epoch accepted nothing, or the finished head
            accepts nothing for unfrozen layers to learn from.
        OSError: If the disk is full; the same call resumes once there is room.
        WorkerLost: If another worker is gone; the same call on all of them resumes.
    """
    require_tensorflow_backend("`finetune`")
    settings = settings or TrainConfig()
    devices = open_devices(strategy) if isinstance(strategy, str) else strategy
    devices.require_trainable(base_learns=settings.unfreezes_under_policy)
    if settings.unfreeze is not None:
        require_layers_to_train(str(backbone))
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
        callbacks=callbacks_identity(callbacks),
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
            on_begin(place.folder, place.resumed)
        run = _run_at(place, data, work)
    devices.from_chief(b"")
    return run


@dataclasses.dataclass(frozen=True)
class _Work:
    """What to do with the images, whatever place the result gets."""

    options: dict[str, Any]
    settings: TrainConfig
    devices: Devices
    cache_dir: str | os.PathLike | None
    callbacks: Callbacks
    with_plain: bool
    progress: bool
    command: str | None
    on_note: Callable[[str], None]

    def check(self, base: keras.Model) -> None:
        """Raises where the part of the base that shall learn is not in it."""
        if self.settings.unfreeze is not None:
            cut_backbone(base, self.settings.unfreeze)


def _run_at(place: RunPlace, data: SampleData, work: _Work) -> Run:
    """Makes a run and its folder; keeps the training's state where that fails."""
    checkpoint = TrainingCheckpoint(place.checkpoint, devices=work.devices)
    of_base = TrainingCheckpoint(place.unfreeze_checkpoint)
    try:
        run = _run(data, work, checkpoint, of_base, place)
        run = dataclasses.replace(run, folder=place.folder)
        place.write(
            lambda folder: fill_run_folder(
                folder, run, data, cache_dir=work.cache_dir, progress=work.progress
            )
        )
    except (KeyboardInterrupt, OSError, WorkerLost) as error:
        for state in (checkpoint, of_base):
            with contextlib.suppress(OSError):  # The disk may be full.
                state.flush()
        if isinstance(error, KeyboardInterrupt) and checkpoint.epochs_done:
            done = of_base.epochs_done
            if not work.settings.unfreezes_under_policy:  # Those count from 0 again.
                done += checkpoint.epochs_done
            error.add_note(
                f"{max(done, checkpoint.epochs_done)} of {work.settings.all_epochs} "
                f"epochs are kept in {place.unfinished}."
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
    of_base: TrainingCheckpoint | None = None,
    place: RunPlace | None = None,
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
    if settings.unfreeze is None or not devices.is_chief:
        model = build_classifier(
            source.float32_base(), data.num_classes, head=head.model
        )
    else:
        if checkpoint is not None:
            checkpoint.flush()  # What comes now takes longer than all before.
        backbone = BackboneSource(
            data,
            source.float32_base,
            work.options["feature_precision"],
            work.cache_dir,
            progress,
            work.on_note,
        )
        model, trained = unfreeze(
            backbone, features, trained, settings, place=place, checkpoint=of_base
        )
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
