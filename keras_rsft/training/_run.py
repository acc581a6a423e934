"""Runs a fine-tuning: images, features, head, evaluation, run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np

from keras_rsft import _storage
from keras_rsft._ledger import COLUMNS, Ledger
from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._storage import NumberedFolder
from keras_rsft.backbones._build import build_classifier
from keras_rsft.config import SPLITS, FeatureConfig, TrainConfig
from keras_rsft.data._labels import COLUMNS as CORRECTION_COLUMNS
from keras_rsft.data._labels import apply_corrections
from keras_rsft.data._samples import SampleData
from keras_rsft.errors import InvalidArgument, WorkerLost
from keras_rsft.features._neighbours import near_duplicates
from keras_rsft.features._store import FeatureSet, read_meta
from keras_rsft.features._thumbnails import (
    write_excerpts,
    write_previews,
    write_thumbnails,
)
from keras_rsft.label_quality._audit import LabelQuality, label_results, left_out_of
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training import _before
from keras_rsft.training._curves import Overfitting
from keras_rsft.training._devices import Devices, open_devices
from keras_rsft.training._features import (
    SplitFeatures,
    choose_dtype,
    open_features,
    resolve,
)
from keras_rsft.training._head import (
    HELD_OUT,
    AgainstPlain,
    Callbacks,
    TrainedHead,
    audit_splits,
    train_against_plain,
    train_head,
)
from keras_rsft.training._resume import TrainingCheckpoint, identity_of_run
from keras_rsft.training._unfreeze import (
    cut_backbone,
    require_layers_to_train,
    unfreeze,
)

SAMPLE_COLUMNS = (
    "id", "split", "given_label", "clean_label", "decision", "label_before", "copy_of"
)  # fmt: skip


def fill_run_folder(folder: Path, run: Run, work: _Work) -> None:
    run.model.save(folder / _storage.MODEL_FILE)
    run.head.save(folder / _storage.HEAD_FILE)
    recorder = run.trained.recorder
    epochs = enumerate(zip(*run.history.values(), strict=True), 1)
    tables: Tables = {
        _storage.METRICS_FILE: (
            ["epoch", *run.history],
            ([at, *row] for at, row in epochs),
        ),
    } | recorder.tables(run.class_names)
    if run.predictions is not None:
        tables[_storage.PREDICTIONS_FILE] = (
            _before.COLUMNS,
            _prediction_rows(run.predictions, work.data),
        )
    quality = run.trained.label_quality
    ledgers = {"train": recorder.ledger} | held_out_ledgers(run.features, quality)
    fill_folder(
        folder,
        work.data,
        run.features,
        ledgers,
        config=run.config | {"finding": run.finding},
        results=results_of(run),
        tables=tables,
        cache_dir=work.features.cache_dir,
        progress=work.progress,
    )


Tables = dict[str, tuple[Sequence[str], Iterable[Sequence]]]


def fill_folder(
    folder: Path,
    data: SampleData,
    features: SplitFeatures,
    ledgers: dict[str, Ledger],
    *,
    config: dict[str, Any],
    results: dict[str, Any],
    tables: Tables,
    cache_dir: str | os.PathLike | None,
    progress: bool,
) -> None:
    """Writes what a run and an audit have in common, and further tables."""
    described = config | {"versions": _storage.installed_versions()}
    _storage.write_json(folder / _storage.CONFIG_FILE, described)
    _storage.write_json(folder / _storage.RESULTS_FILE, results)
    _storage.write_json(folder / _storage.CLASSES_FILE, list(data.class_names))
    tables |= {
        _storage.SAMPLES_FILE: (
            SAMPLE_COLUMNS,
            _sample_rows(data, features),
        ),
        _storage.LEDGER_FILE: (
            COLUMNS,
            (
                row
                for split, ledger in ledgers.items()
                for row in ledger.rows(data.class_names, split)
            ),
        ),
        _storage.NEAR_DUPLICATES_FILE: (
            ["id", "split", "other_id", "other_split", "similarity"],
            _near_duplicate_rows(features, ledgers, progress=progress),
        ),
    }
    if data.corrections is not None:
        tables[_storage.CORRECTIONS_FILE] = (CORRECTION_COLUMNS, data.corrections.rows)
    if features.unreadable:
        tables["unreadable.csv"] = (["id", "reason"], features.unreadable)
    for name, (header, rows) in tables.items():
        _storage.write_csv(folder / name, header, rows)
    _storage.write_json(folder / _storage.CACHED_FEATURES_FILE, cached_in(features))
    by_id = {
        str(sample_id): value
        for ledger in ledgers.values()
        for sample_id, value in zip(ledger.ids, ledger.suspicion.tolist(), strict=True)
    }
    splits: Any = [getattr(data, name) for name in SPLITS if name in ledgers]
    if data.kind == "texts":
        write_excerpts(splits, by_id, folder)
    else:
        write_thumbnails(splits, by_id, folder, cache_dir=cache_dir, progress=progress)
        write_previews(splits, by_id, folder, progress=progress)


def _prediction_rows(
    predictions: _before.Predictions, data: SampleData
) -> Iterable[list[str]]:
    names = data.class_names
    for split, (ids, predicted) in predictions.items():
        part = getattr(data, split)
        given = dict(zip(part.ids.tolist(), part.labels, strict=True))
        for sample_id, label in zip(ids.tolist(), predicted, strict=True):
            yield [sample_id, split, names[given[sample_id]], names[label]]


def cached_in(features: SplitFeatures) -> dict[str, dict[str, Any]]:
    """Returns where each split's features are, and what was decided about them."""
    parts = {name: getattr(features, name) for name in SPLITS}
    parts |= {left_out_of(name): part for name, part in features.left_out.items()}
    places = {}
    for name, part in parts.items():
        if not len(part):
            continue
        rows, dropped = part.file_rows(np.arange(len(part))), {}
        if name == "train" and (whole := part.before_review) is not None:
            gone = np.setdiff1d(np.arange(len(whole)), rows)
            dropped = {str(whole.ids[row]): int(row) for row in gone}
        clean = part.reviewed is not None and bool(part.reviewed.all())
        meta = read_meta(part.path.parent) or {}
        places[name] = {
            "folder": str(part.path.parent),
            "checksums": meta.get("checksums"),
            "rows": None if part.rows is None else rows.tolist(),
            "dropped": dropped,
            "clean": clean,
        }
    return places


def held_out_ledgers(
    features: SplitFeatures, quality: LabelQuality | None
) -> dict[str, Ledger]:
    """Returns what the audit says of the splits that were not trained on, by name."""
    if quality is None:
        return {}
    ledgers = {}
    for name, found in zip(HELD_OUT, quality.held_out, strict=True):
        if len(part := getattr(features, name)):
            ledgers[name] = audited_ledger(part, found, quality.can_judge)
    for name, part in features.left_out.items():
        found = quality.left_out[name]
        ledgers[left_out_of(name)] = audited_ledger(part, found, quality.can_judge)
    return ledgers


def audited_ledger(part: FeatureSet, found: LabelQuality, can_judge: bool) -> Ledger:
    ledger = Ledger(part.ids, part.labels, part.clean_labels)
    if can_judge:
        ledger.note_quality(found)
    return ledger


def results_of(run: Run) -> dict[str, Any]:
    results: dict[str, Any] = {**run.results, "overfitting": None}
    if (found := run.overfitting) is not None:
        results["overfitting"] = vars(found) | {"sentence": found.sentence}
    if run.against_plain is not None:
        results["against_plain"] = dataclasses.asdict(run.against_plain)
    results |= data_results(run.features)
    if (compared := run.against_before) is not None:
        results["against_before"] = dataclasses.asdict(compared) | {
            "sentence": compared.sentence
        }
    if (quality := run.trained.label_quality) is not None:
        results["label_quality"] = label_results(quality, run.class_names)
    return results


def data_results(features: SplitFeatures) -> dict[str, Any]:
    results: dict[str, Any] = {
        "unread_files": features.unread_files,
        "images_of_one_colour": len(features.one_colour),
        "data_notes": [*features.notes, *features.one_colour_notes],
    }
    if (copies := features.copies) is not None:
        results["copies"] = vars(copies) | {"sentence": copies.sentence}
    return results


def _near_duplicate_rows(
    features: SplitFeatures, ledgers: dict[str, Ledger], *, progress: bool
) -> Iterable[list[str]]:
    named = {name: getattr(features, name) for name in SPLITS}
    named |= {left_out_of(name): part for name, part in features.left_out.items()}
    parts = [named[name] for name in ledgers]
    splits = np.repeat(list(ledgers), list(map(len, parts)))
    ids = np.concatenate([part.ids for part in parts])
    suspicion = np.concatenate([one.suspicion for one in ledgers.values()])
    for one in near_duplicates(parts, suspicion, progress=progress):
        pair = [str(of[at]) for at in (one.first, one.second) for of in (ids, splits)]
        yield [*pair, f"{one.similarity:.4f}"]


def _sample_rows(data: SampleData, features: SplitFeatures) -> Iterable[list[str]]:
    rows = () if data.corrections is None else data.corrections.rows
    decided = {row.id: [row.decision, row.given_label] for row in rows}
    copies = features.copy_of
    left_out = {
        str(sample_id): left_out_of(name)
        for name, part in features.left_out.items()
        for sample_id in part.ids
    }
    for split in (data.train, data.validation, data.test):
        known = split.clean_labels is not None
        clean = split.labels if split.clean_labels is None else split.clean_labels
        for sample_id, given, right in zip(split.ids, split.labels, clean, strict=True):
            names = [data.class_names[given], data.class_names[right] if known else ""]
            decision = decided.get(str(sample_id), ["", ""])
            name = left_out.get(str(sample_id), split.name)
            copy_of = copies.get(str(sample_id), "")
            yield [str(sample_id), name, *names, *decision, copy_of]


# Run ----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Run:
    """What came out of one run.

    Attributes:
        model: Images `(batch, height, width, 3)` in [0, 255], or texts `(batch,)`, to
            probabilities.
        head: The trained `RSFTModel` over features, with its policy's state.
        class_names: Names of the classes, in the order of the probabilities.
        history: Each logged value, one number an epoch.
        results: Final numbers: accuracies in [0, 1] by the given labels, each with one
            by right labels beside it (`..._clean`, or `..._estimated` with the ends
            `..._low` and `..._high` of its interval), acceptance rate, seconds, and,
            where the right labels are known, the fractions of wrong and right
            labels that the finished model's policy rejects. With unfrozen layers also
            `unfrozen_validation_accuracy`, `unfrozen_test_accuracy`, and
            `unfrozen_kept`: 1.0 where `model` has the unfrozen layers. With
            `"last-block"` these names begin with `stage2`. If kept, the accuracies
            without a prefix are those of `model`, and `head_validation_accuracy` and
            `head_test_accuracy` those of the head on the frozen backbone.
        config: Everything that is needed to repeat the run.
        features: The cached features; `.unreadable` names the images left out.
        trained: The head's training: ledger, acceptance by class, label_quality.
        folder: Where the run was written, or None.
        against_plain: Rejection against a plain head, image by image; None where
            none was trained.
        against_before: This run against the one before its corrections, on the
            corrected labels; None where there was none.
        predictions: Ids and predicted labels of the validation and the test split;
            None where no folder was written.
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
    against_before: _before.AgainstBefore | None = None
    predictions: _before.Predictions | None = None

    @property
    def finding(self) -> str | None:
        """What the policy `auto` found and chose, in one line; None for others."""
        label_quality = self.trained.label_quality
        policy = self.config.get("policy") or {}
        if label_quality is None or policy.get("name") != "auto":
            return None
        return label_quality.describe(policy.get("threshold"))

    @property
    def overfitting(self) -> Overfitting | None:
        """How the head's training overfits; None where it does not."""
        return self.trained.overfitting

    def __repr__(self) -> str:
        from keras_rsft.report._summary import run_summary, summary_text

        return summary_text(run_summary(self))

    def _repr_html_(self) -> str:
        from keras_rsft.report._notebook import run_html

        return run_html(self)


def finetune(
    data: Any,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    corrections: Any = (),
    before: str | os.PathLike | None = None,
    features: FeatureConfig | str | None = None,
    settings: TrainConfig | None = None,
    strategy: str | Devices = "none",
    output: str | os.PathLike | NumberedFolder | None = None,
    callbacks: Callbacks = (),
    with_plain: bool = True,
    progress: bool = True,
    command: str | None = None,
    on_begin: Callable[[Path, bool], None] | None = None,
    on_note: Callable[[str], None] = lambda text: None,
) -> Run:
    """Fine-tunes a new head on a frozen backbone and writes a run folder.

    With `unfreeze` in the settings, a part of the backbone, or all of it, then learns
    with the head: under the same policy, or on the accepted samples alone (Ahn et al.,
    2024, TURN). The activations before that part are cached like features where the
    disk has room. The result is kept where it gets no fewer validation images right
    than the head alone, by right labels, known or estimated.

    Args:
        data: Loaded images or texts, or what `load_data` takes: `(x, y)`, a
            `tf.data.Dataset`, a DataFrame, a folder and so on.
        validation_data: The validation split, as in `load_data`. Default: a part of the
            training samples, or the split that `data` has.
        test_data: The same of the test split.
        corrections: What `apply_corrections` takes. Default: none.
        before: The folder of the run before these corrections, to compare with on the
            corrected labels. Default: the latest one beside `output` that differs by
            its corrections alone.
        features: A `FeatureConfig`, or a backbone's name for `FeatureConfig(name)`.
            Default: `FeatureConfig()`.
        settings: How to train. Default: `TrainConfig()`.
        strategy: The devices that train the head and run the backbone, see
            `open_devices`: `"none"`, one device; `"mirrored"`; `"multiworker"`, where
            the chief alone writes the run and the others return it without a folder.
            Unfrozen layers are trained on one device. Default `"none"`.
        output: The run folder, which must not exist, or `NumberedFolder("photos")`
            for the next `runs/photos-N`. Until the run is finished it is called
            `...unfinished`; killed there, the same call resumes it and ends with
            the same weights. Default: none is written.
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
        WeightsUnavailable: If the backbone's weights cannot be downloaded or read.
        TrainingStalled: If the last epoch accepted nothing, or the finished head
            accepts nothing for unfrozen layers to learn from.
        OSError: If the disk is full; the same call resumes once there is room.
        WorkerLost: If another worker is gone; the same call on all of them resumes.
    """
    require_tensorflow_backend("`finetune`")
    settings = settings or TrainConfig()
    devices = open_devices(strategy) if isinstance(strategy, str) else strategy
    if devices.strategy is not None and settings.unfreezes_under_policy:
        raise InvalidArgument(
            "A part of the backbone is trained on one device. Received: the strategy "
            f"{devices.name}. Leave out `--strategy`, or `--unfreeze`."
        )
    if output is not None and not isinstance(output, NumberedFolder):
        _storage.check_new_folder(output)  # Before the work, not after it.
    data, features = resolve(data, features, validation_data, test_data, progress)
    if settings.unfreeze is not None:
        require_layers_to_train(features)
    with_plain = with_plain and output is not None
    data = apply_corrections(data, corrections)
    if before is not None and data.corrections is None:
        raise InvalidArgument(
            "`before` names the run before a review. Give its `corrections` too."
        )
    named = None if before is None else _before.read_before(Path(before), data)
    work = _Work(
        data,
        features,
        settings,
        devices,
        callbacks,
        with_plain,
        progress,
        command,
        on_note,
        named,
    )
    identity = identity_of_run(
        data,
        callbacks,
        features=dataclasses.asdict(
            dataclasses.replace(
                features, cache_dir=None, dtype=choose_dtype(features), engine="auto"
            )
        ),
        settings=dataclasses.asdict(settings),
        strategy=devices.name,
        with_plain=with_plain,
    )
    devices.require_same(identity)
    if output is None:
        return work.run()
    if devices.is_chief:
        with _storage.open_place(output, identity) as place:
            if on_begin is not None:
                on_begin(place.folder, place.resumed)
            run = work.run_at(place)
    else:
        run = work.run(TrainingCheckpoint(Path(), devices=devices))
    devices.from_chief(b"")  # The others wait here until the run is written.
    return run


@dataclasses.dataclass(frozen=True)
class _Work:
    """A run that is asked for, whatever folder its result gets."""

    data: SampleData
    features: FeatureConfig
    settings: TrainConfig
    devices: Devices
    callbacks: Callbacks
    with_plain: bool
    progress: bool
    command: str | None
    on_note: Callable[[str], None]
    before: _before.RunBefore | None = None

    def run_at(self, place: _storage.RunPlace) -> Run:
        path = place.unfinished / _storage.HEAD_STATE
        checkpoint = TrainingCheckpoint(path, devices=self.devices)
        of_backbone = TrainingCheckpoint(place.unfinished / _storage.BACKBONE_STATE)
        try:
            run = self.run(checkpoint, of_backbone, place)
            run = self._compared(dataclasses.replace(run, folder=place.folder))
            place.write(lambda folder: fill_run_folder(folder, run, self))
        except (KeyboardInterrupt, OSError, WorkerLost) as error:
            for state in (checkpoint, of_backbone):
                with contextlib.suppress(OSError):  # The disk may be full.
                    state.flush()
            if isinstance(error, KeyboardInterrupt) and checkpoint.epochs_done:
                done = of_backbone.epochs_done
                if not self.settings.unfreezes_under_policy:  # They count from 0 again.
                    done += checkpoint.epochs_done
                error.add_note(
                    f"{max(done, checkpoint.epochs_done)} of "
                    f"{self.settings.all_epochs} epochs are kept in {place.unfinished}."
                )
            described = _storage.disk_full_said(error, place.unfinished)
            if described is error:
                raise
            raise described from error
        return run

    def run(
        self,
        checkpoint: TrainingCheckpoint | None = None,
        of_backbone: TrainingCheckpoint | None = None,
        place: _storage.RunPlace | None = None,
    ) -> Run:
        started = time.perf_counter()
        settings, devices = self.settings, self.devices
        source = open_features(
            self.data,
            self.features,
            seed=settings.seed,
            progress=self.progress,
            devices=devices,
            on_backbone=self._check,
            on_note=self.on_note,
        )
        features = source.features
        quality = audit_splits(features, settings.seed, progress=self.progress)
        with devices.heeding_loss():
            trained = train_head(
                features,
                settings,
                label_quality=quality,
                callbacks=self.callbacks,
                progress=self.progress,
                checkpoint=checkpoint,
                devices=devices,
                curves=True,
            )
        head, results = trained.model, trained.results
        if settings.unfreeze is None or not devices.is_chief:
            model = build_classifier(
                source.float32_backbone(), self.data.num_classes, head=head.model
            )
        else:
            if checkpoint is not None:
                checkpoint.flush()  # What comes now takes longer than all before.
            model, trained = unfreeze(
                source, trained, settings, place=place, checkpoint=of_backbone
            )
        against_plain = None
        if self.with_plain:
            with devices.heeding_loss():
                against_plain = train_against_plain(
                    features, trained, settings, progress=self.progress, devices=devices
                )
        results["seconds"] = time.perf_counter() - started
        return Run(
            model=model,
            head=head,
            class_names=self.data.class_names,
            history=trained.history,
            results=results,
            config={
                "command": self.command,
                **source.origin,
                **dataclasses.asdict(settings),
                "strategy": devices.name,
            },
            features=features,
            trained=trained,
            against_plain=against_plain,
        )

    def _compared(self, run: Run) -> Run:
        """Adds what the model predicts, and what a review has gained."""
        if any(run.results.get(f"{name}_kept") for name in ("unfrozen", "stage2")):
            predictions = _before.predictions_of_model(run.model, self.data)
        else:
            predictions = _before.predictions_of_head(run.head.model, run.features)
        run, quality = (
            dataclasses.replace(run, predictions=predictions),
            run.trained.label_quality,
        )
        if self.data.corrections is None or run.folder is None or quality is None:
            return run
        before = self.before
        if before is None:
            before = _before.find_before(run.folder.parent, self.data, run.config)
        if before is None:
            self.on_note(
                f"No run of the same data and settings without these corrections is in "
                f"{run.folder.parent}, so there is nothing to compare with; "
                "`--set before=RUN` names one."
            )
            return run
        against = before.against(predictions, run.features, quality)
        return dataclasses.replace(run, against_before=against)

    def _check(self, backbone: keras.Model) -> None:
        # Raises, before features are extracted, where the layers are not in it.
        if self.settings.unfreeze is not None:
            cut_backbone(backbone, self.settings.unfreeze)


# Audit --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, repr=False)
class Audit:
    """What was found out about the labels of a data set, without training.

    Attributes:
        label_quality: That of the training split; its `held_out` are those of the
            validation and test splits.
        class_names: Names of the classes, by label.
        results: The numbers by split and by class, as in `results.json`.
        config: Everything that is needed to repeat the audit.
        features: The cached features; `.unreadable` names the samples left out.
        folder: Where the audit was written, or None.
    """

    label_quality: LabelQuality
    class_names: tuple[str, ...]
    results: dict[str, Any]
    config: dict[str, Any]
    features: SplitFeatures
    folder: Path | None = None

    @property
    def finding(self) -> str:
        """How many labels look wrong, in one sentence."""
        return self.label_quality.finding

    def __repr__(self) -> str:
        from keras_rsft.report._summary import audit_summary, summary_text

        return summary_text(audit_summary(self))

    def _repr_html_(self) -> str:
        from keras_rsft.report._notebook import audit_html

        return audit_html(self)


def audit(
    data: Any,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    corrections: Any = (),
    features: FeatureConfig | str | None = None,
    seed: int = 0,
    output: str | os.PathLike | NumberedFolder | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Audit:
    """Estimates which labels of a data set are wrong, in all splits, without training.

    Each label is judged by the other samples: one of the training split by all others
    there, one of the validation or test split by the training split; see
    `audit_labels`.

    Args:
        data: Loaded images or texts, or what `load_data` takes: `(x, y)`, a
            `tf.data.Dataset`, a DataFrame, a folder and so on.
        validation_data: The validation split, as in `load_data`. Default: a part of the
            training samples, or the split that `data` has.
        test_data: The same of the test split.
        corrections: What `apply_corrections` takes. Default: none.
        features: A `FeatureConfig`, or a backbone's name for `FeatureConfig(name)`.
            Default: `FeatureConfig()`.
        seed: As in `audit_labels`. Default 0.
        output: Folder of the audit, which must not exist, or
            `NumberedFolder("audit-photos")` for the next number. It appears whole at
            the end; `write_report` writes its page for a review. Default: none is
            written.
        progress: Show progress bars. Default True.
        command: The command line that asked for this, for the record.

    Returns:
        How likely each label is right, and the numbers by split and by class.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data cannot be used, or not be corrected so.
        WeightsUnavailable: If the backbone's weights cannot be downloaded or read.
        OSError: If the disk is full.
    """
    require_tensorflow_backend("`audit`")
    started = time.perf_counter()
    data, config = resolve(data, features, validation_data, test_data, progress)
    data = apply_corrections(data, corrections)
    with contextlib.ExitStack() as stack:
        place = None  # Taken before the work, not after it.
        if output is not None:
            opened = _storage.open_place(output, {"kind": "audit"})
            place = stack.enter_context(opened)
        source = open_features(data, config, seed=seed, progress=progress)
        quality = audit_splits(source.features, seed, progress=progress)
        found = Audit(
            label_quality=quality,
            class_names=data.class_names,
            results={"label_quality": label_results(quality, data.class_names)}
            | data_results(source.features),
            config={"command": command, **source.origin, "seed": seed},
            features=source.features,
            folder=None if place is None else place.folder,
        )
        found.results["seconds"] = time.perf_counter() - started
        if place is not None:
            train = source.features.train
            ledgers = {"train": audited_ledger(train, quality, quality.can_judge)}
            ledgers |= held_out_ledgers(source.features, quality)
            place.write(
                lambda folder: fill_folder(
                    folder,
                    data,
                    source.features,
                    ledgers,
                    config=found.config | {"finding": found.finding},
                    results=found.results,
                    tables={_storage.LABELS_FILE: _label_rows(ledgers, data)},
                    cache_dir=config.cache_dir,
                    progress=progress,
                )
            )
    return found


def _label_rows(ledgers: dict[str, Ledger], data: SampleData) -> tuple:
    columns = ("id", "split", "given_label", "predicted_label", "right_probability")
    wanted = [COLUMNS.index(name) for name in columns]
    header = [name.replace("predicted", "proposed") for name in columns]
    return header, (
        [row[at] for at in wanted]
        for split, ledger in ledgers.items()
        for row in ledger.rows(data.class_names, split)
    )
