"""Trains a part of the base together with a head that was trained before.

The head's training goes on: with its policy as it is by then, its ledger, its callbacks
and the next epoch's number. What is new is that the part of the base behind the cut
learns too, at its own learning rate. The front of it stays as it is, so that its
activations can be kept like features. Which model is kept is decided in
`better_model.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones import build_classifier
from keras_rsft.backbones.assembly import built_in_float32
from keras_rsft.backbones.own_copy import copy_model
from keras_rsft.backbones.trainable_part import TrainablePart
from keras_rsft.data import ImageData
from keras_rsft.features import FrozenBase, TrainingBatches, batches_of
from keras_rsft.features.extraction import extract_features
from keras_rsft.features.image_batches import ImageBatches, labelled_images
from keras_rsft.features.timing import seconds_per_image
from keras_rsft.finetuning.activations import (
    ActivationChoice,
    ActivationCosts,
    choose_activations,
    free_bytes,
)
from keras_rsft.finetuning.callback_memory import options_of
from keras_rsft.finetuning.checkpoint import TrainingCheckpoint
from keras_rsft.finetuning.head_training import SplitFeatures, TrainedHead
from keras_rsft.finetuning.settings import (
    NOT_DECAYED,
    TrainingSettings,
    make_optimizer,
)
from keras_rsft.model import RSFTModel, TwoPassRSFTModel
from keras_rsft.model.second_pass import what_forbids_two_passes
from keras_rsft.model.two_rates import with_two_rates
from keras_rsft.policies import Policy
from keras_rsft.progress import progress_bar

# A head that standardises features of little spread makes the first gradients large
# enough to ruin the base; clipped to this norm they cannot.
LARGEST_GRADIENT = 1.0


@dataclasses.dataclass(frozen=True, eq=False)
class TunedBase:
    """What the training of a part of the base gives.

    Attributes:
        classifier: Images to probabilities, of stock Keras parts, all of it frozen but
            the head.
        trained: The head's training with what came after it: history, ledger and
            acceptance by class go on; `accepted` is of the last epoch. Its model is
            still the head of before.
        epochs: Epochs in which the base learnt.
    """

    classifier: keras.Model
    trained: TrainedHead
    epochs: int


@dataclasses.dataclass(frozen=True)
class _Batches:
    """What a fit is given."""

    train: TrainingBatches | ImageBatches
    validation: tf.data.Dataset | None
    kept: tuple[str, ...]


def measured_choice(
    part: TrainablePart,
    data: ImageData,
    features: SplitFeatures,
    settings: TrainingSettings,
    *,
    feature_precision: str,
    cache_dir: str | os.PathLike | None,
) -> ActivationChoice:
    """Measures the front on a few images, and chooses how to have its activations.

    Args:
        part: The cut base.
        data: The images.
        features: The features of the whole base.
        settings: How to train.
        feature_precision: Of activations on disk.
        cache_dir: Where they would be kept.
    """
    image_bytes = np.dtype(feature_precision).itemsize * part.front.output_shape[-1]
    costs = ActivationCosts(
        images=len(features.train) * features.train.views + len(features.validation),
        image_bytes=int(image_bytes),
        free_bytes=free_bytes(cache_dir),
        front_seconds=0.0,
        epochs=settings.base_epochs,
        front_is_preprocessing=part.front_is_preprocessing,
    )
    if not part.front_is_preprocessing:
        seconds = seconds_per_image(FrozenBase(part.front), data.train)
        costs = dataclasses.replace(costs, front_seconds=seconds)
    return choose_activations(costs, cut=part.cut)


def train_base(
    part: TrainablePart,
    trained: TrainedHead,
    data: ImageData,
    features: SplitFeatures,
    settings: TrainingSettings,
    *,
    keep_activations: bool,
    feature_precision: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    checkpoint: TrainingCheckpoint | None = None,
) -> TunedBase:
    """Trains the part's layers and a copy of the head, under the head's policy.

    Args:
        part: A cut base; its layers are changed, and frozen again in the end.
        trained: The head's training. Its head is not changed, its ledger goes on.
        data: The images.
        features: Features of the whole base.
        settings: How to train: `base_epochs`, `base_learning_rate` and what the head
            was trained with. The gradient is clipped to a norm of 1.
        keep_activations: Run the front once and keep what comes out.
        feature_precision: How that is kept, as in `extract_features`.
        cache_dir: Where it is kept. Default: the user's cache folder.
        progress: Show progress bars. Default True.
        checkpoint: Where the training's state is kept, and gone on from.

    Raises:
        DataError: If an image cannot be read any more.
        OSError: If the disk has no room for the activations.
    """
    if keep_activations:
        batches = _kept_batches(
            part, data, features, settings, feature_precision, cache_dir, progress
        )
    else:
        batches = _image_batches(part, data, features, settings)
    with built_in_float32():
        head = copy_model(trained.model.model)
        policy = _copy_policy(trained.model.policy)
        model = _trainable_model(part, head, policy, settings, keep_activations)
    first = len(trained.history["loss"])
    origin = {
        "activations": batches.kept,
        "cut": part.cut,
        "first": first,
        "settings": dataclasses.asdict(settings),
        "callbacks": [options_of(callback) for callback in trained.callbacks],
    }
    history = _fit(model, batches, trained, origin, settings, checkpoint, progress)
    part.freeze()
    classifier = build_classifier(part.base, head.output_shape[-1], head=head)
    return TunedBase(classifier, _gone_on(trained, history), settings.base_epochs)


class FrozenFront(keras.layers.Layer):
    """The part of a base that stays as it is, whatever the model around it does.

    Args:
        front: From images to activations.
    """

    def __init__(self, front: keras.Model, **options: Any):
        super().__init__(trainable=False, dtype="float32", **options)
        self.front = front

    def call(self, images: Any) -> Any:
        return keras.ops.stop_gradient(self.front(images, training=False))

    def compute_output_spec(self, images: Any) -> keras.KerasTensor:
        return keras.KerasTensor((images.shape[0], *self.front.output_shape[1:]))


def _kept_batches(
    part: TrainablePart,
    data: ImageData,
    features: SplitFeatures,
    settings: TrainingSettings,
    feature_precision: str,
    cache_dir: str | os.PathLike | None,
    progress: bool,
) -> _Batches:
    views = features.train.views
    front = FrozenBase(
        part.front, num_images=views * len(data.train) + len(data.validation)
    )
    keep = functools.partial(
        extract_features,
        front,
        seed=settings.seed,
        feature_precision=feature_precision,
        cache_dir=cache_dir,
        called="Activations",
        progress=progress,
    )
    train = keep(data.train, views=views)
    kept, validation = [train.path.parent.name], None
    if len(features.validation):
        activations = keep(data.validation)
        validation = batches_of(activations, batch_size=settings.batch_size)
        kept.append(activations.path.parent.name)
    batches = TrainingBatches(
        train, batch_size=settings.batch_size, seed=settings.seed, sample_index=True
    )
    return _Batches(batches, validation, tuple(kept))


def _image_batches(
    part: TrainablePart,
    data: ImageData,
    features: SplitFeatures,
    settings: TrainingSettings,
) -> _Batches:
    size, batch_size = part.base.input_shape[1:3], settings.batch_size
    validation = None
    if len(features.validation):
        validation = labelled_images(
            data.validation, features.validation, size, batch_size=batch_size
        )
    train = ImageBatches(
        data.train, features.train, size, batch_size=batch_size, seed=settings.seed
    )
    return _Batches(train, validation, kept=())


def _trainable_model(
    part: TrainablePart,
    head: keras.Model,
    policy: Policy,
    settings: TrainingSettings,
    from_activations: bool,
) -> RSFTModel:
    """Returns a compiled model from activations, or from images, to probabilities."""
    inputs = keras.Input(part.rest.input_shape[1:], name="activations")
    activations = inputs
    if not from_activations:
        inputs = keras.Input(part.base.input_shape[1:], name="images")
        activations = FrozenFront(part.front)(inputs)
    body = keras.Model(inputs, head(part.rest(activations)), name="tuned")
    judges_samples = policy.level == "sample" and not policy.accepts_every_finite_sample
    two_passes = judges_samples and what_forbids_two_passes(body) is None
    model = (TwoPassRSFTModel if two_passes else RSFTModel)(body, policy)
    optimizer = with_two_rates(
        make_optimizer(settings, largest_gradient=LARGEST_GRADIENT),
        # Of the layers in their order the head's are the last.
        slow_variables=len(part.rest.trainable_variables),
        slow_rate=settings.base_rate / settings.learning_rate,
    )
    optimizer.exclude_from_weight_decay(var_names=list(NOT_DECAYED))
    model.compile(
        optimizer,
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=False,  # It takes minutes to compile a base, and convolves slowly.
    )
    return model


def _copy_policy(policy: Policy) -> Policy:
    """Returns one of its own that has seen what the other has."""
    copy = type(policy).from_config(policy.get_config())
    for own, other in zip(copy.variables, policy.variables, strict=True):
        own.assign(other)
    return copy


def _fit(
    model: RSFTModel,
    batches: _Batches,
    trained: TrainedHead,
    origin: dict[str, Any],
    settings: TrainingSettings,
    checkpoint: TrainingCheckpoint | None,
    progress: bool,
) -> dict[str, list[float]]:
    """Trains what is left to train; returns the history of all of its epochs."""
    begin = origin["first"]
    first, last = begin, begin + settings.base_epochs
    own: list[keras.callbacks.Callback] = [batches.train.callback, trained.recorder]
    if checkpoint is not None:
        checkpoint.open(origin, trained.recorder, trained.callbacks)
        first = max(begin, checkpoint.epochs_done)
        last = first if checkpoint.stopped else last
    steps = int(batches.train.dataset.cardinality())
    with progress_bar(
        "Training head and base",
        total=settings.base_epochs * steps,
        done=(first - begin) * steps,
        unit="steps",
        visible=progress,
    ) as advance:
        own.append(
            keras.callbacks.LambdaCallback(
                on_train_batch_end=lambda batch, logs: advance(1)
            )
        )
        try:
            history = model.fit(
                batches.train.dataset,
                validation_data=batches.validation,
                initial_epoch=first,
                epochs=last,
                # The checkpoint sees what all others have done.
                callbacks=_in_order(own, trained.callbacks, checkpoint),
                verbose=0,
                shuffle=False,
            ).history
        except tf.errors.OpError as error:
            failure = getattr(batches.train, "failure", None)
            if failure is None:
                raise
            raise failure from error
    return history if checkpoint is None else checkpoint.history


def _in_order(
    own: Sequence[keras.callbacks.Callback],
    others: Sequence[keras.callbacks.Callback],
    checkpoint: TrainingCheckpoint | None,
) -> list[keras.callbacks.Callback]:
    return [*own, *others, *([] if checkpoint is None else [checkpoint])]


def _gone_on(trained: TrainedHead, history: dict[str, list[float]]) -> TrainedHead:
    """Returns a head's training with the epochs that came after it."""
    recorder = trained.recorder
    before, after = (len(one["loss"]) for one in (trained.history, history))
    unknown = float("nan")  # What only one of both has logged.
    whole = {
        name: trained.history.get(name, [unknown] * before)
        + history.get(name, [unknown] * after)
        for name in dict.fromkeys([*trained.history, *history])
    }
    return dataclasses.replace(
        trained,
        history=whole,
        accepted=recorder.last_epoch[1] > 0,
        acceptance_by_class=np.stack(recorder.acceptance_by_class),
        loss_histograms=tuple(recorder.loss_histograms),
    )
