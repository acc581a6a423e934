"""Trains a head on cached features."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft._ledger import Ledger, RejectionLedger
from keras_rsft._progress import progress_bar
from keras_rsft.backbones._build import build_head
from keras_rsft.config import NOT_DECAYED, SPLITS, PolicyConfig, TrainConfig
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.features._batches import TrainingBatches, batches_of
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality._audit import Estimate, LabelQuality, audit_labels
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._listed import AcceptReviewed, AutoPolicy
from keras_rsft.policies._policy import Policy
from keras_rsft.policies._threshold import build_policy
from keras_rsft.training._curves import (
    CHUNK_ROWS,
    EpochCurves,
    Overfitting,
    find_overfitting,
)
from keras_rsft.training._devices import ONE_DEVICE, Devices
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._resume import TrainingCheckpoint, options_of

MAX_STEPS_PER_EXECUTION = 64
VALIDATION_BATCH = 256

Callbacks = (
    Sequence[keras.callbacks.Callback]
    | Callable[[RejectionLedger], Sequence[keras.callbacks.Callback]]
)


HELD_OUT = SPLITS[1:]


def audit_splits(
    features: SplitFeatures, seed: int, *, progress: bool = True
) -> LabelQuality:
    """Audits the labels of all splits; those held out by the training split alone."""
    held_out = [getattr(features, name) for name in HELD_OUT]
    found = audit_labels(
        features.train,
        class_names=features.class_names,
        held_out=[*held_out, *features.left_out.values()],
        seed=seed,
        progress=progress,
    )
    further = found.held_out[len(held_out) :]
    return dataclasses.replace(
        found,
        held_out=found.held_out[: len(held_out)],
        left_out=dict(zip(features.left_out, further, strict=True)),
    )


@dataclasses.dataclass(frozen=True)
class TrainedHead:
    model: RSFTModel
    history: dict[str, list[float]]
    results: dict[str, float]
    accepted: np.ndarray
    recorder: RejectionLedger
    callbacks: Sequence[keras.callbacks.Callback] = ()
    label_quality: LabelQuality | None = None
    overfitting: Overfitting | None = None

    @property
    def ledger(self) -> Ledger:
        return self.recorder.ledger


def why_nothing(loss: float) -> str:
    """Says what may have kept samples of this mean loss from being accepted."""
    if not np.isfinite(loss):
        return "The losses are NaN or infinite: lower `--learning-rate`."
    return (
        f"The losses are {loss:.3g} on average: change `--threshold` where the policy "
        "has one, raise `--warmup-epochs`, or choose another `--policy`."
    )


def train_head(
    features: SplitFeatures,
    settings: TrainConfig,
    *,
    callbacks: Callbacks = (),
    progress: bool = True,
    checkpoint: TrainingCheckpoint | None = None,
    devices: Devices = ONE_DEVICE,
    curves: bool = False,
    called: str | None = None,
    label_quality: LabelQuality | None = None,
) -> TrainedHead:
    train = features.train
    if settings.early_stopping is not None and not len(features.validation):
        raise InvalidArgument(
            "Early stopping goes by the validation split, and there is none. Leave out "
            "`--early-stopping`, or give `--validation-fraction`."
        )
    judged = settings.policy.name == "auto" or settings.early_stopping is not None
    if label_quality is None and judged:
        label_quality = audit_splits(features, settings.seed, progress=progress)
    with devices.scope():
        model = untrained_head(features, settings, label_quality)
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
    found_in_validation = None if label_quality is None else label_quality.held_out[0]
    credits = right_credits(
        features.validation, found_in_validation, len(features.class_names)
    )
    if curves:
        own.append(EpochCurves(features, recorder, settings.seed, credits))
    monitor = "val_accuracy"
    if credits is not None:
        monitor = ESTIMATED_ACCURACY
        own.append(
            EstimatedAccuracy(
                lambda model: predicted_classes(model, features.validation), credits
            )
        )
    remembering = [*further]
    if (most := settings.early_stopping) is not None:
        remembering.insert(0, best_of_all_epochs(monitor, "max", epochs=most))
    validation = None
    if count := len(features.validation):
        rows = even_batch(count)
        plain = batches_of(features.validation, batch_size=rows, share=devices.share)
        validation = devices.distributed(plain, count, rows)
    history = fit_resumable(
        model,
        devices.distributed(batches.dataset, len(train), settings.batch_size),
        validation,
        own,
        remembering,
        recorder,
        epochs=settings.epochs,
        checkpoint=checkpoint,
        origin={
            "features": [p.path.parent.name for p in (train, features.validation)],
            "settings": dataclasses.asdict(settings),
        },
        title=called or f"Training the head with {settings.policy.name}",
        progress=progress,
    )
    best = len(history["loss"]) - 1
    if settings.early_stopping is not None:
        best = int(np.argmax(history[monitor]))
    if history["acceptance_rate"][best] == 0:
        raise TrainingStalled(
            f"The last of {settings.epochs} epochs accepted no sample. "
            f"{why_nothing(history['loss'][-1])}"
        )
    results: dict[str, float] = {}
    for at, name in enumerate(HELD_OUT):
        if len(part := getattr(features, name)):
            predicted = predicted_classes(model, part)
            found_in = None if label_quality is None else label_quality.held_out[at]
            results |= accuracies(f"{name}_accuracy", predicted, part, found_in)
    results["acceptance_rate"] = history["acceptance_rate"][best]
    if settings.early_stopping is not None:
        results |= {"best_epoch": best + 1, "epochs_trained": len(history["loss"])}
    probabilities = head_probabilities(model, train)
    # What the finished model accepts, in the last epoch's batches.
    losses = keras.losses.sparse_categorical_crossentropy(train.labels, probabilities)
    losses = losses.numpy()
    samples = batches.order(settings.epochs - 1)[0].numpy()
    accepted = np.zeros(len(train), bool)
    for start in range(0, len(samples), settings.batch_size):
        batch = samples[start : start + settings.batch_size]
        with keras.StatelessScope():  # Judging changes no running statistics.
            accepted[batch] = model.policy(losses[batch], train.labels[batch], batch)
    recorder.ledger.note_probabilities(probabilities)
    if train.reviewed is not None:
        recorder.ledger.note_reviewed(train.reviewed)
    if label_quality is not None and label_quality.can_judge:
        recorder.ledger.note_quality(label_quality)
        results["estimated_wrong_labels"] = label_quality.noise_rate
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
        recorder,
        further,
        label_quality,
        found,
    )


def fit_resumable(
    model: RSFTModel,
    train: Any,
    validation: Any,
    own: Sequence[keras.callbacks.Callback],
    callbacks: Sequence[keras.callbacks.Callback],
    recorder: RejectionLedger,
    *,
    epochs: int,
    checkpoint: TrainingCheckpoint | None,
    origin: dict[str, Any],
    title: str,
    progress: bool,
    begin: int = 0,
    steps: int | None = None,
) -> dict[str, list[float]]:
    """Trains the epochs that are left after `begin`; returns the history of all."""
    first, last = begin, begin + epochs
    if checkpoint is not None:
        options = [options_of(callback) for callback in callbacks]
        checkpoint.open({**origin, "callbacks": options}, recorder, callbacks)
        first = max(begin, checkpoint.epochs_done)
        last = first if checkpoint.stopped else last
    with progress_bar(
        title,
        total=epochs * (steps or 1),
        unit="steps" if steps else "epochs",
        done=(first - begin) * (steps or 1),
        visible=progress,
    ) as advance:
        moment = "on_train_batch_end" if steps else "on_epoch_end"
        bar = keras.callbacks.LambdaCallback(**{moment: lambda at, logs: advance(1)})
        history = model.fit(
            train,
            validation_data=validation,
            initial_epoch=first,
            epochs=last,
            # The checkpoint sees what all others have done.
            callbacks=[*own, bar, *callbacks, *([checkpoint] if checkpoint else [])],
            verbose=0,
            shuffle=False,
        ).history
    return history if checkpoint is None else checkpoint.history


def untrained_head(
    features: SplitFeatures,
    settings: TrainConfig,
    label_quality: LabelQuality | None = None,
) -> RSFTModel:
    train, num_classes = features.train, len(features.class_names)
    steps = -(-len(train) // settings.batch_size)
    head = build_head(train.dim, num_classes, moments=train.moments())
    if settings.policy.name == "auto" and label_quality is not None:
        policy: Policy = AutoPolicy(
            label_quality.accept_mask(threshold=settings.policy.threshold),
            weights=label_quality.weights,
            loss_limit=label_quality.loss_limit,
            warmup_steps=round(settings.policy.warmup_epochs * steps),
        )
    else:
        policy = build_policy(
            settings.policy, num_classes=num_classes, steps_per_epoch=steps
        )
    if train.reviewed is not None and policy.level == "sample":
        policy = AcceptReviewed(policy, train.reviewed)
    model = RSFTModel(head, policy)
    model.compile(
        make_optimizer(settings),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        # With several replicas Keras can run one step at a time.
        steps_per_execution=(
            1 if tf.distribute.has_strategy() else choose_steps_per_execution(steps)
        ),
    )
    return model


def make_optimizer(
    settings: TrainConfig, *, largest_gradient: float | None = None
) -> keras.optimizers.Optimizer:
    """Returns a new optimizer; `largest_gradient` clips all gradients' norm."""
    config = {"learning_rate": settings.learning_rate}
    if largest_gradient is not None:
        config["global_clipnorm"] = largest_gradient
    if settings.optimizer.lower() == "sgd":
        config["momentum"] = float(settings.momentum)
    if settings.weight_decay is not None:
        config["weight_decay"] = settings.weight_decay
    try:
        optimizer = keras.optimizers.get(
            {"class_name": settings.optimizer.lower(), "config": config}
        )
    except (ValueError, TypeError) as error:
        raise InvalidArgument(
            f"Keras {keras.__version__} cannot make this optimizer. Received: "
            f"{settings.optimizer!r}. Use another, such as sgd, adam or adamw."
        ) from error
    optimizer.exclude_from_weight_decay(var_names=list(NOT_DECAYED))
    return optimizer


def even_batch(count: int) -> int:
    """Returns a batch size, at most 256, by which batches are nearly equally large."""
    return -(-count // -(-count // VALIDATION_BATCH))


def choose_steps_per_execution(steps: int) -> int:
    calls = -(-steps // MAX_STEPS_PER_EXECUTION)
    return -(-steps // calls)


def head_probabilities(model: keras.Model, part: FeatureSet) -> np.ndarray:
    """Returns a head's probabilities for the plain images, `(n, classes)` float32."""
    chunks = part.chunks(CHUNK_ROWS)
    return np.concatenate([np.asarray(model(one, training=False)) for one in chunks])


def predicted_classes(model: keras.Model, part: FeatureSet) -> np.ndarray:
    return head_probabilities(model, part).argmax(axis=-1)


ESTIMATED_ACCURACY = "val_accuracy_estimated"


class EstimatedAccuracy(keras.callbacks.Callback):
    """Logs the validation accuracy by right labels, known or estimated."""

    def __init__(
        self, predicted: Callable[[keras.Model], np.ndarray], credits: np.ndarray
    ):
        super().__init__()
        self._predicted, self._credits = predicted, credits

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is not None:
            credited = credited_to(self._credits, self._predicted(self.model))
            logs[ESTIMATED_ACCURACY] = float(credited.mean())


def credited_to(credits: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Returns what each prediction counts; their mean is the estimated accuracy."""
    return credits[np.arange(len(credits)), predicted]


def given_credits(labels: np.ndarray, num_classes: int) -> np.ndarray:
    """Returns the same by labels as they are."""
    return np.equal.outer(labels, np.arange(num_classes)).astype(np.float32)


def right_credits(
    part: FeatureSet, quality: LabelQuality | None, num_classes: int
) -> np.ndarray | None:
    """Returns what each class counts for each sample by right labels, `(n, k)`."""
    if not len(part):
        return None
    if part.clean_labels is not None:
        return given_credits(part.clean_labels, num_classes)
    if quality is None or not quality.can_judge:
        return None
    return quality.credits


def accuracies(
    name: str, predicted: np.ndarray, part: FeatureSet, quality: LabelQuality | None
) -> dict[str, float]:
    """Returns an accuracy by the given labels, and by the right ones, as one can."""
    results = {name: float(np.mean(predicted == part.labels))}
    if part.clean_labels is not None:
        results[f"{name}_clean"] = float(np.mean(predicted == part.clean_labels))
    elif quality is not None and (found := quality.accuracy(predicted)) is not None:
        estimate = zip(("estimated", "low", "high"), found, strict=True)
        results |= {f"{name}_{key}": value for key, value in estimate}
    return results


def judge_of(
    features: SplitFeatures, split: str, quality: LabelQuality | None
) -> LabelQuality | None:
    """Returns what judges predictions of a held-out split: right labels, if known."""
    if quality is None:
        return None
    judge = quality.held_out[HELD_OUT.index(split)]
    clean = getattr(features, split).clean_labels
    return judge if clean is None else judge.with_right_labels(clean)


def rejected_shares(train: FeatureSet, accepted: np.ndarray) -> dict[str, float]:
    wrong = train.labels != train.clean_labels
    shares = {"wrong_labels": float(wrong.mean())}
    if wrong.any():
        shares["wrong_labels_rejected"] = float(np.mean(~accepted[wrong]))
    if not wrong.all():
        shares["right_labels_rejected"] = float(np.mean(~accepted[~wrong]))
    return shares


def best_of_all_epochs(
    monitor: str, mode: str, *, epochs: int, first: int = 0
) -> keras.callbacks.Callback:
    """Restores the best weights, at the end or after `epochs` epochs that are worse.

    Epochs before the `first` do not count.
    """
    return keras.callbacks.EarlyStopping(
        monitor=monitor,
        mode=mode,
        patience=epochs,
        restore_best_weights=True,
        start_from_epoch=first,
    )


# --- A plain head beside it ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class AgainstPlain:
    """How often a head with rejection and a plain one were right on the same images."""

    split: str
    images: int
    both_right: int
    only_rejection_right: int
    only_plain_right: int
    wrong_labels: int | None
    history: dict[str, list[float]]
    results: dict[str, float]
    # By the right labels, known or estimated: both accuracies and their difference.
    by_right_labels: dict[str, Estimate] | None = None


def train_against_plain(
    features: SplitFeatures,
    trained: TrainedHead,
    settings: TrainConfig,
    *,
    progress: bool = True,
    devices: Devices = ONE_DEVICE,
) -> AgainstPlain | None:
    parts = {"test": features.test, "validation": features.validation}
    judged = next(((name, part) for name, part in parts.items() if len(part)), None)
    if trained.model.policy.accepts_every_finite_sample or judged is None:
        return None
    plain = train_head(
        features,
        dataclasses.replace(settings, policy=PolicyConfig("accept-all")),
        progress=progress,
        devices=devices,
        curves=True,
        called="Training the plain head for comparison",
        label_quality=trained.label_quality,
    )
    name, part = judged
    predicted, plain_predicted = (
        predicted_classes(model, part) for model in (trained.model, plain.model)
    )
    right, plain_right = predicted == part.labels, plain_predicted == part.labels
    clean, judge = part.clean_labels, judge_of(features, name, trained.label_quality)
    return AgainstPlain(
        split=name,
        images=len(part),
        both_right=int(np.sum(right & plain_right)),
        only_rejection_right=int(np.sum(right & ~plain_right)),
        only_plain_right=int(np.sum(plain_right & ~right)),
        wrong_labels=None if clean is None else int(np.sum(clean != part.labels)),
        history=plain.history,
        results=plain.results,
        by_right_labels=by_right_labels(judge, predicted, plain_predicted),
    )


def by_right_labels(
    judge: LabelQuality | None, predicted: np.ndarray, plain: np.ndarray
) -> dict[str, Estimate] | None:
    """Returns both accuracies and their difference, None where none can be judged."""
    if judge is None or (difference := judge.gain(predicted, plain)) is None:
        return None
    both = {"rejection": judge.accuracy(predicted), "plain": judge.accuracy(plain)}
    return {key: one for key, one in both.items() if one is not None} | {
        "difference": difference
    }
