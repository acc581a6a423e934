"""Trains unfrozen layers of a backbone together with its head."""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft import config
from keras_rsft._ledger import RejectionLedger
from keras_rsft._storage import CACHE_CHOICE, RunPlace, read_json, replaced, write_json
from keras_rsft.backbones._blocks import TrainablePart, copy_model, trainable_part
from keras_rsft.backbones._build import build_classifier, built_in_float32
from keras_rsft.data._samples import ImageSplit
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.features import _batches
from keras_rsft.features._extract import (
    FrozenBackbone,
    default_cache_dir,
    extract_features,
)
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import AcceptAll
from keras_rsft.training import _head
from keras_rsft.training._features import FeatureSource, SplitFeatures
from keras_rsft.training._resume import TrainingCheckpoint

# A head that standardises features of little spread makes the first gradients large
# enough to ruin the backbone; clipped to this norm they cannot.
LARGEST_GRADIENT = 1.0
LARGEST_SHARE_OF_DISK = 0.5


def require_layers_to_train(
    features: config.FeatureConfig, option: str = "--unfreeze"
) -> None:
    """Refuses by its name a backbone in which no layer can learn."""
    backbone = str(features.backbone)
    config.require_unfreezable(backbone)
    if config.is_fixed_network(backbone):
        raise InvalidArgument(
            f"No part of {backbone} can learn: it has no Keras layers. Leave out "
            f"`{option}`, or use a Keras backbone."
        )


def cut_backbone(backbone: keras.Model, how: config.UnfreezeConfig) -> TrainablePart:
    return trainable_part(backbone, how.cut, train_batch_norm=how.train_batch_norm)


def unfreeze(
    source: FeatureSource,
    trained: _head.TrainedHead,
    settings: config.TrainConfig,
    *,
    place: RunPlace | None,
    checkpoint: TrainingCheckpoint | None,
) -> tuple[keras.Model, _head.TrainedHead]:
    backbone, how = source.float32_backbone(), settings.unfreezing
    features = source.features
    head_only = build_classifier(
        backbone, len(features.class_names), head=trained.model.model
    )
    name = "stage2" if how.accepted_only else "unfrozen"
    tuned, whole = tune(
        backbone, source, trained, settings, place=place, checkpoint=checkpoint
    )
    if whole.history["acceptance_rate"][-1] == 0:
        raise TrainingStalled(
            f"The last of the {how.epochs} epochs in which the backbone learns "
            "accepted no sample. "
            f"{_head.why_nothing(whole.history['loss'][-1])} Or leave "
            "out `--unfreeze`."
        )
    results = trained.results
    kept = better_model(head_only, tuned, source, trained, name=name)
    if how.accepted_only:
        return kept, trained
    if results["unfrozen_kept"]:
        results["acceptance_rate"] = whole.history["acceptance_rate"][-1]
        if features.train.clean_labels is not None:
            results |= _head.rejected_shares(features.train, whole.accepted)
    return kept, whole


def tune(
    backbone: keras.Model,
    source: FeatureSource,
    trained: _head.TrainedHead,
    settings: config.TrainConfig,
    *,
    place: RunPlace | None = None,
    checkpoint: TrainingCheckpoint | None = None,
) -> tuple[keras.Model, _head.TrainedHead]:
    """Cuts a copy of the backbone and trains it and the head as the settings say."""
    features = source.features
    if settings.unfreezing.accepted_only:
        if not trained.accepted.any():
            raise TrainingStalled(
                "The trained head accepts no sample, so there is nothing to fine-tune "
                "the last block on. Choose another `--policy` or `--threshold`, or "
                "leave out `--unfreeze`."
            )
        settings = dataclasses.replace(
            settings,
            policy=config.PolicyConfig("accept-all"),
            optimizer="sgd",
            momentum=0.9,
            weight_decay=None,
            learning_rate=settings.unfreeze_rate,
        )
        features = dataclasses.replace(
            features,
            train=features.train.take(np.flatnonzero(trained.accepted)),
            validation=features.validation.take(np.arange(0)),
        )
        trained = begun_from(RSFTModel(trained.model.model, AcceptAll()), features)
    part = cut_backbone(backbone, settings.unfreezing)
    choice_file = None if place is None else place.unfinished / CACHE_CHOICE
    quality = trained.label_quality
    credits = _head.right_credits(
        features.validation,
        None if quality is None else quality.held_out[0],
        len(features.class_names),
    )
    return train_unfrozen(
        part,
        trained,
        source,
        features,
        settings,
        cached=cache_activations(part, features, source, choice_file),
        checkpoint=checkpoint,
        credits=credits,
    )


def begun_from(
    head: RSFTModel,
    features: SplitFeatures,
    *,
    epochs: int = 0,
    callbacks: Sequence[keras.callbacks.Callback] = (),
) -> _head.TrainedHead:
    """Returns a head of `epochs` epochs, of which no ledger is left, to train on."""
    train = features.train
    return _head.TrainedHead(
        model=head,
        history={"loss": [float("nan")] * epochs},
        results={},
        accepted=np.zeros(len(train), bool),
        recorder=RejectionLedger(train.ids, train.labels, train.clean_labels),
        callbacks=callbacks,
    )


def better_model(
    head_only: keras.Model,
    tuned: keras.Model,
    source: FeatureSource,
    trained: _head.TrainedHead,
    *,
    name: str,
) -> keras.Model:
    """Returns the model that gets more of the validation split right, by right labels.

    Writes the accuracies of `tuned` into the head's results.
    """
    kept, features, results = name == "unfrozen", source.features, trained.results
    for split in _head.HELD_OUT:
        part, images = getattr(features, split), getattr(source.images, split)
        if not len(part):
            continue
        judge = _head.judge_of(features, split, trained.label_quality)
        predicted = predicted_on_images(tuned, images)[1]
        results |= _head.accuracies(f"{name}_{split}_accuracy", predicted, part, judge)
        if split == "validation":
            # Anew, as the features may have been computed in another dtype.
            of_head = predicted_on_images(head_only, images)[1]
            gain = None if judge is None else judge.gain(predicted, of_head)
            right = part.with_right_labels().labels
            more = np.mean(predicted == right) - np.mean(of_head == right)
            kept = bool((more if gain is None else gain.value) >= 0)
    results[f"{name}_kept"] = float(kept)
    if not kept:
        return head_only
    for split in ("validation_accuracy", "test_accuracy"):
        if f"{name}_{split}" in results:
            for key in [key for key in results if key.startswith(split)]:
                results[f"head_{key}"] = results.pop(key)
            for key in [key for key in results if key.startswith(f"{name}_{split}")]:
                results[key.removeprefix(f"{name}_")] = results[key]
    return tuned


def predicted_on_images(
    model: keras.Model, split: ImageSplit, *, batch_size: int = 32
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the indices of the readable images, and the classes predicted."""
    size = model.input_shape[1:3]
    images = tf.TensorSpec((None, *size, 3), tf.float32)

    @tf.function(input_signature=[images], autograph=False)
    def classify(images: tf.Tensor) -> tf.Tensor:
        return tf.argmax(model(images, training=False), axis=-1)

    batches = split.images(size).batch(batch_size)
    parts = [(index.numpy(), classify(images).numpy()) for index, images in batches]
    index, predicted = map(np.concatenate, zip(*parts, strict=True))
    return index, predicted


# --- Activations before the unfrozen layers -----------------------------------------


def cache_activations(
    part: TrainablePart,
    features: SplitFeatures,
    source: FeatureSource,
    choice_file: Path | None = None,
) -> bool:
    """Says whether activations are cached: if they fit into half of the free disk."""
    chosen = None if choice_file is None else read_json(choice_file)
    if isinstance(chosen, bool):
        return chosen
    folder = Path(source.config.cache_dir or default_cache_dir())
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    images = features.train.augmentations * len(features.train)
    images += len(features.validation)
    itemsize = np.dtype(source.config.cache_dtype).itemsize
    needed = images * itemsize * int(part.front.output_shape[-1])
    cached = needed <= LARGEST_SHARE_OF_DISK * free and not part.front_is_preprocessing
    if part.front_is_preprocessing:
        note = f"Nothing frozen is before {part.cut}: no activations are cached."
    else:
        how = "cached" if cached else "computed in each epoch"
        note = (
            f"The activations before {part.cut} are {how}: {needed / 1e9:.2g} GB, "
            f"{free / 1e9:.3g} GB are free."
        )
    source.on_note(note)
    if choice_file is not None:
        replaced(choice_file, lambda path: write_json(path, cached))
    return cached


class FrozenFront(keras.layers.Layer):
    """The frozen layers of a backbone, whatever the model around them does."""

    def __init__(self, front: keras.Model, **options: Any):
        super().__init__(trainable=False, dtype="float32", **options)
        self.front = front

    def call(self, images: Any) -> Any:
        return keras.ops.stop_gradient(self.front(images, training=False))

    def compute_output_spec(self, images: Any) -> keras.KerasTensor:
        return keras.KerasTensor((images.shape[0], *self.front.output_shape[1:]))


# --- Training -----------------------------------------------------------------------


class _TwoRates(keras.optimizers.Optimizer):
    """Mixed into an optimizer's class: the first variables are the slow ones."""

    weight_decay: Any
    slow_variables: int
    slow_rate: float

    def build(self, variables: list[Any]) -> None:
        self._slow = {self._var_key(one) for one in variables[: self.slow_variables]}
        super().build(variables)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        if self._var_key(variable) in self._slow:
            learning_rate = learning_rate * self.slow_rate
        super().update_step(gradient, variable, learning_rate)

    def _apply_weight_decay(self, variables: list[Any]) -> None:
        decay = self.weight_decay
        if decay is None:
            return
        slow = [v for v in variables if self._var_key(v) in self._slow]
        fast = [v for v in variables if self._var_key(v) not in self._slow]
        super()._apply_weight_decay(fast)
        try:  # It is multiplied by the learning rate of all.
            self.weight_decay = decay * self.slow_rate
            super()._apply_weight_decay(slow)
        finally:
            self.weight_decay = decay


def with_two_rates(
    optimizer: keras.optimizers.Optimizer, *, slow_variables: int, slow_rate: float
) -> keras.optimizers.Optimizer:
    """Returns the same optimizer with a smaller rate for the first variables."""
    kind: Any = type("TwoRates", (_TwoRates, type(optimizer)), {})
    two_rates = kind.from_config(optimizer.get_config())
    two_rates.slow_variables, two_rates.slow_rate = slow_variables, slow_rate
    two_rates.exclude_from_weight_decay(var_names=list(config.NOT_DECAYED))
    return two_rates


def train_unfrozen(
    part: TrainablePart,
    trained: _head.TrainedHead,
    source: FeatureSource,
    features: SplitFeatures,
    settings: config.TrainConfig,
    *,
    cached: bool,
    checkpoint: TrainingCheckpoint | None = None,
    credits: np.ndarray | None = None,
) -> tuple[keras.Model, _head.TrainedHead]:
    """Trains the part's layers and a copy of the head, under the head's policy.

    By `credits` `(validation samples, classes)` it logs `val_accuracy_estimated`.
    """
    data, recorder, validation = source.images, trained.recorder, None
    batch_size = settings.unfreezing.batch_size or settings.batch_size
    names: list[str] = []
    train: _batches.TrainingBatches | _batches.ImageBatches
    if cached:
        augmentations = features.train.augmentations
        images = augmentations * len(data.train) + len(data.validation)
        extract = functools.partial(
            extract_features,
            FrozenBackbone(part.front, num_images=images),
            seed=settings.seed,
            cache_dtype=source.config.cache_dtype,
            cache_dir=source.config.cache_dir,
            called="Activations",
            progress=source.progress,
        )
        activations = extract(data.train, augmentations=augmentations)
        names.append(activations.path.parent.name)
        if not np.array_equal(activations.ids, features.train.ids):
            activations = activations.take(
                _batches.positions_of(features.train, activations)
            )
        if len(features.validation):
            of_validation = extract(data.validation)
            validation = _batches.batches_of(of_validation, batch_size=batch_size)
            names.append(of_validation.path.parent.name)
        train = _batches.TrainingBatches(
            activations, batch_size=batch_size, seed=settings.seed, sample_index=True
        )
    else:
        size = part.backbone.input_shape[1:3]
        if len(features.validation):
            validation = _batches.labelled_images(
                data.validation, features.validation, size, batch_size=batch_size
            )
        train = _batches.ImageBatches(
            data.train, features.train, size, batch_size=batch_size, seed=settings.seed
        )
    with built_in_float32():
        head = copy_model(trained.model.model)
        old = trained.model.policy
        policy = type(old).from_config(old.get_config())
        for own, other in zip(policy.variables, old.variables, strict=True):
            own.assign(other)
        if cached:
            rest_of = inputs = keras.Input(part.rest.input_shape[1:])
        else:
            inputs = keras.Input(part.backbone.input_shape[1:])
            rest_of = FrozenFront(part.front)(inputs)
        body = keras.Model(inputs, head(part.rest(rest_of)), name="tuned")
        model = RSFTModel(body, policy)
        optimizer = with_two_rates(
            _head.make_optimizer(settings, largest_gradient=LARGEST_GRADIENT),
            # In the order of the layers the head's come last.
            slow_variables=len(part.rest.trainable_variables),
            slow_rate=settings.unfreeze_rate / settings.learning_rate,
        )
        model.compile(
            optimizer,
            "sparse_categorical_crossentropy",
            metrics=["accuracy"],
            # XLA takes minutes to compile a backbone, and convolves slowly.
            jit_compile=False,
        )
    begin = len(trained.history["loss"])
    logging: list[keras.callbacks.Callback] = [train.callback, recorder]
    if credits is not None and validation is not None:
        logging.append(
            _head.EstimatedAccuracy(
                lambda model: model.predict(validation, verbose=0).argmax(axis=-1),
                credits,
            )
        )
    try:
        history = _head.fit_resumable(
            model,
            train.dataset,
            validation,
            logging,
            trained.callbacks,
            recorder,
            begin=begin,
            epochs=settings.all_epochs - settings.epochs,
            steps=int(train.dataset.cardinality()),
            checkpoint=checkpoint,
            origin={
                "activations": names,
                "cut": part.cut,
                "first": begin,
                "settings": dataclasses.asdict(settings),
            },
            title="Training head and backbone",
            progress=source.progress,
        )
    except tf.errors.OpError as error:
        failure = getattr(train, "failure", None)
        if failure is None:
            raise
        raise failure from error
    part.freeze()
    with built_in_float32():
        classifier = build_classifier(part.backbone, head.output_shape[-1], head=head)
    unknown = [float("nan")]
    both = {
        name: trained.history.get(name, unknown * begin)
        + history.get(name, unknown * len(history["loss"]))
        for name in dict.fromkeys([*trained.history, *history])
    }
    last = recorder.last_epoch
    accepted = trained.accepted if last is None else last[1] > 0
    return classifier, dataclasses.replace(trained, history=both, accepted=accepted)
