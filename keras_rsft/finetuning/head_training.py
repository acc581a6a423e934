"""Trains a head on kept features and says how good it is.

Owns the shortest way from features to a trained `RSFTModel`; a comparison or a
search walks it many times on the same features.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones import build_head
from keras_rsft.errors import TrainingStalled
from keras_rsft.examination import Examination, examine_labels
from keras_rsft.features import FeatureSet, TrainingBatches, batches_of
from keras_rsft.finetuning.callback_memory import options_of
from keras_rsft.finetuning.checkpoint import TrainingCheckpoint
from keras_rsft.finetuning.devices import ONE_DEVICE, Devices
from keras_rsft.finetuning.early_stopping import (
    early_stopping,
    kept_epoch,
    require_validation,
)
from keras_rsft.finetuning.epoch_curves import EpochCurves
from keras_rsft.finetuning.overfitting import Overfitting, find_overfitting
from keras_rsft.finetuning.settings import TrainingSettings, make_optimizer
from keras_rsft.finetuning.split_features import SplitFeatures
from keras_rsft.ledger import Ledger, RejectionLedger
from keras_rsft.loss_histogram import LossHistogram
from keras_rsft.model import RSFTModel
from keras_rsft.policies import AcceptReviewed, AutoPolicy, Policy, build_policy
from keras_rsft.progress import progress_bar

MAX_STEPS_PER_EXECUTION = 64
VALIDATION_BATCH = 256

Callbacks = (
    Sequence[keras.callbacks.Callback]
    | Callable[[RejectionLedger], Sequence[keras.callbacks.Callback]]
)


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    """What the training of a head gives.

    Attributes:
        model: The trained `RSFTModel` over features.
        history: Each logged value, one number an epoch.
        results: Accuracies, acceptance rate and rejected shares, as in `Run`.
        accepted: Boolean array of shape `(n,)`: which training samples the
            finished model's policy accepts.
        ledger: What happened to each training sample.
        acceptance_by_class: Float32 array `(epochs, classes)`: accepted share of each
            class, NaN for a class without training samples.
        examination: What `auto` found out about the labels; None for other policies.
        loss_histograms: The losses of each epoch.
        recorder: The callback that keeps the ledger, for a training that goes on.
        callbacks: The user's callbacks, for the same.
        overfitting: What the curves say; None where there are none, or nothing is to be
            said, or early stopping kept the weights of the best epoch.
    """

    model: RSFTModel
    history: dict[str, list[float]]
    results: dict[str, float]
    accepted: np.ndarray
    ledger: Ledger
    acceptance_by_class: np.ndarray
    examination: Examination | None = None
    loss_histograms: tuple[LossHistogram, ...] = ()
    recorder: RejectionLedger | None = None
    callbacks: Sequence[keras.callbacks.Callback] = ()
    overfitting: Overfitting | None = None


def train_head(
    features: SplitFeatures,
    settings: TrainingSettings,
    *,
    callbacks: Callbacks = (),
    progress: bool = True,
    checkpoint: TrainingCheckpoint | None = None,
    devices: Devices = ONE_DEVICE,
    curves: bool = False,
    called: str | None = None,
) -> TrainedHead:
    """Trains a new head on kept features and evaluates it.

    Args:
        features: Features of the three splits.
        settings: How to train.
        callbacks: Further Keras callbacks, or a function that makes them of the
            `RejectionLedger` of this training.
        progress: Show a progress bar.
        checkpoint: Where the training's state is kept, and gone on from. With the
            same features and settings the result is the same to the last bit.
            Default: nowhere.
        devices: What to train on. Default: one device.
        curves: Have the history tell of accepted and of all samples at the end of each
            epoch, as `EpochCurves` does. Default False.
        called: What the progress bar says. Default: with which policy.

    Raises:
        InvalidArgument: If early stopping has no validation split to go by.
        TrainingStalled: If the last epoch accepted nothing.
    """
    train = features.train
    require_validation(settings, features)
    examination = None
    if settings.policy.name == "auto":
        examination = examine_labels(
            train,
            len(features.class_names),
            seed=settings.seed,
            progress=progress,
            held_out=features.validation if curves else None,
        )
    with devices.scope():
        model = untrained_head(features, settings, examination)
    batches = TrainingBatches(
        train,
        batch_size=settings.batch_size,
        seed=settings.seed,
        sample_index=True,
        share=devices.share,
    )
    recorder = RejectionLedger(train.ids, train.labels, train.clean_labels)
    further = callbacks(recorder) if callable(callbacks) else callbacks
    own: list[keras.callbacks.Callback] = [batches.callback, recorder]
    if curves:
        own.append(
            EpochCurves(
                features,
                recorder,
                batch_size=settings.batch_size,
                seed=settings.seed,
                examination=examination,
            )
        )
    remembering = [*early_stopping(settings), *further]
    history = _fit(
        model, batches, features, settings, recorder, own, remembering, progress,
        checkpoint, devices, called or f"Training the head with {settings.policy.name}",
    )  # fmt: skip
    kept = kept_epoch(settings, history)
    if history["acceptance_rate"][kept] == 0:
        raise TrainingStalled(
            f"The last of {settings.epochs} epochs accepted no sample: the losses, "
            f"{history['loss'][-1]:.3g} on average, are not below the threshold. "
            "Raise `--threshold` or `--warmup-epochs`, or leave both out."
        )
    results = _accuracies(model, features)
    results["acceptance_rate"] = history["acceptance_rate"][kept]
    if settings.early_stopping is not None:
        results |= {"best_epoch": kept + 1, "epochs_trained": len(history["loss"])}
    probabilities = head_probabilities(model, train)
    accepted = _final_decisions(model, train.labels, probabilities, batches, settings)
    if examination is not None:
        probabilities = examination.out_of_sample
        if examination.noise_rate > 0:  # Else there was too little to judge by.
            results["estimated_wrong_labels"] = examination.noise_rate
    recorder.ledger.note_probabilities(probabilities)
    if train.reviewed is not None:
        recorder.ledger.note_reviewed(train.reviewed)
    if train.clean_labels is not None:
        results |= rejected_shares(train, accepted)
    found = None
    if settings.early_stopping is None:  # Else the best weights were kept.
        found = find_overfitting(history, len(features.validation))
    return TrainedHead(
        model,
        history,
        results,
        accepted,
        recorder.ledger,
        np.stack(recorder.acceptance_by_class),
        examination,
        tuple(recorder.loss_histograms),
        recorder,
        further,
        found,
    )


def _fit(
    model: RSFTModel,
    batches: TrainingBatches,
    features: SplitFeatures,
    settings: TrainingSettings,
    recorder: RejectionLedger,
    own: Sequence[keras.callbacks.Callback],
    callbacks: Sequence[keras.callbacks.Callback],
    progress: bool,
    checkpoint: TrainingCheckpoint | None,
    devices: Devices,
    called: str,
) -> dict[str, list[float]]:
    """Trains what is left to train; returns the history of all epochs.

    `own` need not be remembered by the checkpoint, `callbacks` are.
    """
    first, last = 0, settings.epochs
    if checkpoint is not None:
        origin = _origin(features, settings, callbacks)
        checkpoint.open(origin, recorder, callbacks)
        first = checkpoint.epochs_done
        last = first if checkpoint.stopped else last
    validation = None
    if count := len(features.validation):
        rows = even_batch(count)
        validation = batches_of(
            features.validation, batch_size=rows, share=devices.share
        )
        validation = devices.distributed(validation, count, rows)
    with _epoch_bar(called, settings.epochs, done=first, visible=progress) as bar:
        history = model.fit(
            devices.distributed(
                batches.dataset, len(features.train), settings.batch_size
            ),
            validation_data=validation,
            initial_epoch=first,
            epochs=last,
            # The checkpoint sees what all others have done.
            callbacks=[*own, bar, *callbacks, *([checkpoint] if checkpoint else [])],
            verbose=0,
            shuffle=False,
        ).history
    return history if checkpoint is None else checkpoint.history


def _origin(
    features: SplitFeatures,
    settings: TrainingSettings,
    callbacks: Sequence[keras.callbacks.Callback],
) -> dict[str, Any]:
    """Returns what a checkpoint must be of to be gone on with."""
    parts = (features.train, features.validation)
    return {
        "features": [part.path.parent.name for part in parts],
        "settings": dataclasses.asdict(settings),
        "callbacks": [options_of(callback) for callback in callbacks],
    }


def untrained_head(
    features: SplitFeatures,
    settings: TrainingSettings,
    examination: Examination | None = None,
) -> RSFTModel:
    """Builds and compiles a new head over kept features, under its policy.

    Samples that a person has reviewed are accepted whatever the policy says, unless
    it judges whole batches.

    Args:
        features: Features of the three splits.
        settings: How it will be trained.
        examination: What was found out about the labels; `"auto"` needs it.
    """
    train, num_classes = features.train, len(features.class_names)
    steps = -(-len(train) // settings.batch_size)
    policy = _policy(settings, num_classes, steps, examination)
    if train.reviewed is not None and policy.level == "sample":
        policy = AcceptReviewed(policy, train.reviewed)
    head = build_head(
        train.dim, num_classes, moments=train.moments(), seed=settings.seed
    )
    model = RSFTModel(head, policy)
    model.compile(
        make_optimizer(settings),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # Of several replicas Keras can run one step at a time.
        steps_per_execution=(
            1 if tf.distribute.has_strategy() else choose_steps_per_execution(steps)
        ),
    )
    return model


def _policy(
    settings: TrainingSettings,
    num_classes: int,
    steps: int,
    examination: Examination | None,
) -> Policy:
    if settings.policy.name == "auto":
        return AutoPolicy(
            examination,
            loss_limit=examination.loss_limit,
            warmup_steps=round(settings.policy.warmup_epochs * steps),
        )
    return build_policy(settings.policy, num_classes=num_classes, steps_per_epoch=steps)


def even_batch(count: int) -> int:
    """Returns a batch size, at most 256, by which batches are nearly equally large.

    Keras takes the loss of an evaluation for the mean over its batches: samples of a
    small last batch would count for more.

    Args:
        count: Number of samples, at least 1.
    """
    return -(-count // -(-count // VALIDATION_BATCH))


def choose_steps_per_execution(steps: int) -> int:
    """Returns how many steps to run in one call.

    As many as keep the overhead of a call small, in calls of nearly equal size,
    so that progress is still shown several times in a long epoch.

    Args:
        steps: Steps per epoch, at least 1.

    Returns:
        A number in [1, 64].
    """
    calls = -(-steps // MAX_STEPS_PER_EXECUTION)
    return -(-steps // calls)


def _accuracies(model: RSFTModel, features: SplitFeatures) -> dict[str, float]:
    parts = {"validation": features.validation, "test": features.test}
    return {
        f"{name}_accuracy": float(
            np.mean(head_probabilities(model, part).argmax(axis=-1) == part.labels)
        )
        for name, part in parts.items()
        if len(part)
    }


def head_probabilities(
    model: keras.Model, part: FeatureSet, *, chunk_rows: int = 4096
) -> np.ndarray:
    """Returns a head's probabilities for the plain images, `(n, classes)` float32.

    Args:
        model: Features `(batch, dim)` to probabilities.
        part: The features.
        chunk_rows: Rows at a time, at least 1. Default 4096.
    """
    chunks = [
        np.asarray(model(chunk, training=False)) for chunk in part.chunks(chunk_rows)
    ]
    return np.concatenate(chunks)


def _final_decisions(
    model: RSFTModel,
    labels: np.ndarray,
    probabilities: np.ndarray,
    batches: TrainingBatches,
    settings: TrainingSettings,
) -> np.ndarray:
    """Returns which samples the finished model accepts, in the last epoch's batches."""
    losses = keras.losses.sparse_categorical_crossentropy(labels, probabilities).numpy()
    samples = batches.order(settings.epochs - 1)[0].numpy()
    accepted = np.zeros(len(labels), bool)
    for start in range(0, len(samples), settings.batch_size):
        batch = samples[start : start + settings.batch_size]
        with keras.StatelessScope():  # Judging changes no running statistics.
            accepted[batch] = model.policy(losses[batch], labels[batch], batch)
    return accepted


def rejected_shares(train: FeatureSet, accepted: np.ndarray) -> dict[str, float]:
    """Returns how many wrong labels there are, and which shares were rejected.

    Args:
        train: Training features whose right labels are known.
        accepted: Boolean array of shape `(n,)`.
    """
    wrong = train.labels != train.clean_labels
    shares = {"wrong_labels": float(wrong.mean())}
    if wrong.any():
        shares["wrong_labels_rejected"] = float(np.mean(~accepted[wrong]))
    if not wrong.all():
        shares["right_labels_rejected"] = float(np.mean(~accepted[~wrong]))
    return shares


@contextlib.contextmanager
def _epoch_bar(
    called: str, epochs: int, *, done: int, visible: bool
) -> Iterator[keras.callbacks.Callback]:
    with progress_bar(
        called, total=epochs, unit="epochs", done=done, visible=visible
    ) as advance:
        yield keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: advance(1)
        )
