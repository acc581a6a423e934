"""The second half of a run with `--unfreeze`: cut the base, choose, train, compare."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import keras

from keras_rsft.backbones.base_name import is_fixed_network, require_base_can_learn
from keras_rsft.backbones.trainable_part import TrainablePart, trainable_part
from keras_rsft.data import ImageData
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.finetuning.activations import settled_choice
from keras_rsft.finetuning.base_training import measured_choice, train_base
from keras_rsft.finetuning.better_model import better_model
from keras_rsft.finetuning.checkpoint import TrainingCheckpoint
from keras_rsft.finetuning.head_training import (
    SplitFeatures,
    TrainedHead,
    rejected_shares,
)
from keras_rsft.finetuning.settings import TrainingSettings
from keras_rsft.finetuning.unfinished import RunPlace


@dataclasses.dataclass(frozen=True)
class Unfreezing:
    """How a run trains a part of the base.

    Attributes:
        settings: The settings of the run, with a `trainable_from`.
        feature_precision: How activations are kept.
        cache_dir: Where they are kept.
        progress: Whether progress bars are shown.
        on_note: Told in one line whether they are kept, and why.
    """

    settings: TrainingSettings
    feature_precision: str
    cache_dir: str | os.PathLike | None
    progress: bool
    on_note: Callable[[str], None]


@dataclasses.dataclass(frozen=True, eq=False)
class BaseTrainingPlace:
    """Where the training of the base keeps what it must know after a kill.

    Attributes:
        checkpoint: Its state.
        activations: File of the choice between keeping activations and not.
    """

    checkpoint: TrainingCheckpoint
    activations: Path

    @classmethod
    def at(cls, place: RunPlace) -> BaseTrainingPlace:
        """Returns the place within that of a run."""
        return cls(TrainingCheckpoint(place.base_checkpoint), place.activations)


def check_part_can_learn(backbone: str, *, option: str = "--unfreeze") -> None:
    """Refuses a base in which there is no layer to train, by its name.

    Args:
        backbone: The base's name.
        option: What asks for it.

    Raises:
        InvalidArgument: If it is a SavedModel, an ONNX file, or a text encoder.
    """
    require_base_can_learn(backbone)
    if is_fixed_network(backbone):
        raise InvalidArgument(
            f"No part of {backbone} can learn: it has no Keras layers. Leave out "
            f"`{option}`, or use a Keras base."
        )


def part_to_train(base: keras.Model, settings: TrainingSettings) -> TrainablePart:
    """Cuts the base as the settings say.

    Raises:
        InvalidArgument: If the base has no such part.
    """
    return trainable_part(
        base,
        settings.trainable_from,
        train_batch_norm=settings.train_batch_norm,
    )


def unfreeze(
    head_only: keras.Model,
    base: keras.Model,
    data: ImageData,
    features: SplitFeatures,
    trained: TrainedHead,
    how: Unfreezing,
    place: BaseTrainingPlace | None = None,
) -> tuple[keras.Model, TrainedHead]:
    """Trains a part of the base with the head, and keeps the better model.

    Args:
        head_only: Images to probabilities, on the frozen base.
        base: The base in float32.
        data: The images.
        features: Features of the base.
        trained: The head's training; its results get the new numbers.
        how: How to train.
        place: Where the state is kept. Default: nowhere.

    Returns:
        The model that is kept, and the training with all of its epochs.

    Raises:
        TrainingStalled: If the last epoch accepted no sample.
    """
    settings, progress = how.settings, how.progress
    part = part_to_train(base, settings)
    choice = settled_choice(
        None if place is None else place.activations,
        lambda: measured_choice(
            part,
            data,
            features,
            settings,
            feature_precision=how.feature_precision,
            cache_dir=how.cache_dir,
        ),
    )
    how.on_note(choice.reason)
    tuned = train_base(
        part,
        trained,
        data,
        features,
        settings,
        keep_activations=choice.keep,
        feature_precision=how.feature_precision,
        cache_dir=how.cache_dir,
        progress=progress,
        checkpoint=None if place is None else place.checkpoint,
    )
    whole, results = tuned.trained, trained.results
    if whole.history["acceptance_rate"][-1] == 0:
        raise TrainingStalled(
            f"The last of the {settings.base_epochs} epochs in which the base learns "
            f"accepted no sample: the losses, {whole.history['loss'][-1]:.3g} on "
            "average, are not below the threshold. Raise `--threshold`, or leave out "
            "`--unfreeze`."
        )
    kept = better_model(
        head_only,
        tuned.classifier,
        data,
        features,
        results,
        name="unfrozen",
        unjudged=True,
    )
    if results["unfrozen_kept"]:
        results["acceptance_rate"] = whole.history["acceptance_rate"][-1]
        if features.train.clean_labels is not None:
            results |= rejected_shares(features.train, whole.accepted)
    return kept, whole
