"""How long the training of a part of the base will take, from a few of its steps.

The training itself is `base_training.py`.
"""

from __future__ import annotations

import dataclasses
import time

import keras
import numpy as np

from keras_rsft.backbones import build_head
from keras_rsft.backbones.assembly import built_in_float32
from keras_rsft.backbones.trainable_part import TrainablePart
from keras_rsft.data import ImageData
from keras_rsft.features import FrozenBase
from keras_rsft.features.timing import seconds_per_image
from keras_rsft.finetuning.base_training import LARGEST_GRADIENT
from keras_rsft.finetuning.settings import TrainingSettings, make_optimizer
from keras_rsft.finetuning.split_features import SplitFeatures
from keras_rsft.model import RSFTModel
from keras_rsft.policies import AcceptAll

_LEAST_SECONDS, _MOST_STEPS = 1.0, 20
# Of a training step: there is a backward pass of twice its work besides.
_FORWARD_SHARE = 1 / 3


@dataclasses.dataclass(frozen=True)
class BaseTime:
    """What the training of a part of the base takes.

    Attributes:
        pass_seconds: Of the pass that keeps the activations before that part, which
            all trainings of it share; 0 where they are not kept.
        training_seconds: Of one training without that pass.
    """

    pass_seconds: float
    training_seconds: float

    def seconds(self, trainings: int) -> float:
        """Returns the time of several trainings of the same part.

        Args:
            trainings: How many, at least 0.
        """
        return bool(trainings) * self.pass_seconds + trainings * self.training_seconds


def measured_time(
    part: TrainablePart,
    data: ImageData,
    features: SplitFeatures,
    settings: TrainingSettings,
    *,
    keep_activations: bool,
) -> BaseTime:
    """Measures some training steps, and reading images and running the front on them.

    Args:
        part: The cut base. Its layers are trained a little: give a copy to be lost.
        data: The images.
        features: Their features.
        settings: How it will be trained.
        keep_activations: Whether the front is run once, or in each epoch.

    Returns:
        The expected time. Rejection, which saves a part of the backward pass or runs
        a second forward pass, is not in it.
    """
    validation = len(features.validation)
    images = len(features.train) * features.train.views + validation
    steps = -(-len(features.train) // settings.batch_size)
    step = _step_seconds(part, settings, len(features.class_names))
    judging = validation / settings.batch_size * step * _FORWARD_SHARE
    epoch = steps * step + judging
    front = seconds_per_image(FrozenBase(part.front), data.train)
    if keep_activations:
        return BaseTime(images * front, settings.base_epochs * epoch)
    anew = (len(features.train) + validation) * front
    return BaseTime(0.0, settings.base_epochs * (epoch + anew))


def _step_seconds(
    part: TrainablePart, settings: TrainingSettings, num_classes: int
) -> float:
    """Returns the time of a step on random activations; the first is not counted."""
    with built_in_float32():
        head = build_head(part.rest.output_shape[-1], num_classes)
        inputs = keras.Input(part.rest.input_shape[1:], name="activations")
        model = RSFTModel(keras.Model(inputs, head(part.rest(inputs))), AcceptAll())
    model.compile(
        make_optimizer(settings, largest_gradient=LARGEST_GRADIENT),
        "sparse_categorical_crossentropy",
        jit_compile=False,
    )
    rng = np.random.default_rng(0)
    shape = (settings.batch_size, *part.rest.input_shape[1:])
    x = rng.uniform(0.0, 1.0, shape).astype(np.float32)
    y = rng.integers(0, num_classes, settings.batch_size).astype(np.int32)
    model.train_on_batch(x, y)
    started, steps, passed = time.perf_counter(), 0, 0.0
    while passed < _LEAST_SECONDS and steps < _MOST_STEPS:
        model.train_on_batch(x, y)
        steps, passed = steps + 1, time.perf_counter() - started
    return passed / steps
