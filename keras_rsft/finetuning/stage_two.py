"""Fine-tunes the last block of the base on the samples that the head accepts.

The last of the three steps of TURN (Ahn et al., 2024, "Fine-tuning pre-trained
models for robustness under noisy labels", IJCAI): a head on frozen features sorts
the samples, which is `head_training.py`; then the network itself learns, from the
accepted ones only. Whether the result is kept is decided in `run.py`.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones import build_classifier
from keras_rsft.backbones.assembly import built_in_float32
from keras_rsft.backbones.base_name import is_fixed_network, require_base_can_learn
from keras_rsft.backbones.trainable_part import (
    copy_model,
    last_block,
    learns,
    set_trainable,
)
from keras_rsft.data.samples import ImageSplit
from keras_rsft.errors import InvalidArgument, TrainingStalled
from keras_rsft.features import FeatureSet
from keras_rsft.features.batches import positions_of
from keras_rsft.finetuning.base_training import LARGEST_GRADIENT
from keras_rsft.model import RSFTModel
from keras_rsft.policies import AcceptAll
from keras_rsft.progress import progress_bar

# Decoded images that are in memory at once, to be shuffled.
_SHUFFLED_BYTES = 2**28
_BYTES_PER_PIXEL = 3 * 4


def fine_tune_last_block(
    base: keras.Model,
    head: keras.Model,
    split: ImageSplit,
    kept: FeatureSet,
    accepted: np.ndarray,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float = 1e-4,
    seed: int = 0,
    progress: bool = True,
) -> keras.Model:
    """Fine-tunes copies of the last block and the head on the accepted samples.

    SGD with momentum 0.9 on the cross-entropy with the given labels, the gradient
    clipped to a norm of 1. BatchNorm is in inference mode throughout: its statistics,
    scale and offset stay as they are. The images of the other samples are not even
    read.

    Args:
        base: From images `(batch, height, width, 3)` in [0, 255] to features
            `(batch, dim)` in float32, as `load_backbone` gives it. Not changed.
        head: From features to probabilities `(batch, classes)`. Not changed.
        split: The training images.
        kept: Features of its readable images; labels are taken from here.
        accepted: Boolean, shape `(len(kept),)`: which of `kept` to learn from.
        epochs: Passes over the accepted images, at least 1.
        batch_size: Images per step, at least 1.
        learning_rate: Positive. Default 0.0001.
        seed: Seed of the order. Default 0.
        progress: Show a progress bar. Default True.

    Returns:
        A new float32 model of stock Keras parts from images to probabilities, its
        base frozen as in `build_classifier`.

    Raises:
        InvalidArgument: If an argument is out of its range.
        DataError: If `kept` is not of `split`.
        TrainingStalled: If no sample is accepted.
    """
    for name, value in (("epochs", epochs), ("batch_size", batch_size)):
        if value < 1:
            raise InvalidArgument(f"`{name}` must be at least 1. Received: {value}.")
    positions, labels = _accepted_samples(split, kept, accepted)
    with built_in_float32():
        own_base = copy_model(base)
        classifier = build_classifier(
            own_base, head.output_shape[-1], head=copy_model(head)
        )
        block = [layer for layer in last_block(own_base) if learns(layer)]
        set_trainable(own_base, block)
        model = RSFTModel(classifier, AcceptAll())
    model.compile(
        keras.optimizers.SGD(
            learning_rate, momentum=0.9, global_clipnorm=LARGEST_GRADIENT
        ),
        "sparse_categorical_crossentropy",
    )
    steps = -(-len(positions) // batch_size)
    with progress_bar(
        "Fine-tuning the last block",
        total=epochs * steps,
        unit="steps",
        visible=progress,
    ) as advance:
        bar = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: advance(1)
        )
        rng = np.random.default_rng(seed)
        for epoch in range(epochs):
            images = _shuffled(split, positions, labels, base.input_shape[1:3], rng)
            model.fit(
                images.batch(batch_size).prefetch(2),
                initial_epoch=epoch,
                epochs=epoch + 1,
                steps_per_epoch=steps,
                callbacks=[bar],
                verbose=0,
                shuffle=False,
            )
    set_trainable(own_base, [])
    return classifier


def check_base_can_learn(backbone: str) -> None:
    """Refuses a base in which there is no layer to fine-tune, by its name.

    Raises:
        InvalidArgument: If it is a SavedModel, an ONNX file, or a text encoder.
    """
    require_base_can_learn(backbone)
    if is_fixed_network(backbone):
        raise InvalidArgument(
            f"The last block of {backbone} cannot be fine-tuned: it has no Keras "
            "layers. Leave out `--stage2`, or use a Keras base."
        )


def accuracy_on_images(
    model: keras.Model, split: ImageSplit, *, batch_size: int = 32
) -> float:
    """Returns the share of a split's readable images that a model gets right.

    Args:
        model: From images `(batch, height, width, 3)` to probabilities.
        split: The images, with at least one that can be read.
        batch_size: Images at a time, at least 1. Default 32.

    Returns:
        A number in [0, 1].
    """
    size = model.input_shape[1:3]
    images = tf.TensorSpec((None, *size, 3), tf.float32)

    @tf.function(input_signature=[images], autograph=False)
    def classify(images: tf.Tensor) -> tf.Tensor:
        return tf.argmax(model(images, training=False), axis=-1)

    right = [
        classify(images).numpy() == split.labels[index.numpy()]
        for index, images in split.images(size).batch(batch_size)
    ]
    return float(np.mean(np.concatenate(right)))


def _accepted_samples(
    split: ImageSplit, kept: FeatureSet, accepted: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Returns positions in `split`, increasing, and labels of what is accepted."""
    accepted = np.asarray(accepted)
    if accepted.shape != (len(kept),) or accepted.dtype != bool:
        raise InvalidArgument(
            f"`accepted` must be {len(kept)} booleans, one for each row of `kept`. "
            f"Received: shape {accepted.shape}, dtype {accepted.dtype}."
        )
    if not accepted.any():
        raise TrainingStalled(
            "The trained head accepts no sample, so there is nothing to fine-tune the "
            "last block on. Raise `--threshold`, or leave out `--stage2`."
        )
    part = kept.take(np.flatnonzero(accepted))
    positions = positions_of(part, split)
    order = np.argsort(positions)
    return positions[order], part.labels[order]


def _shuffled(
    split: ImageSplit,
    positions: np.ndarray,
    labels: np.ndarray,
    image_size: tuple[int, int],
    rng: np.random.Generator,
) -> tf.data.Dataset:
    """Returns `(image, label)` in a random order of all samples.

    A folder lists one class after the other, and a buffer that does not hold them
    all would leave it so. So the samples are dealt at random to parts that fit
    into memory, and each part, read in the order that a split wants, is shuffled.
    """
    capacity = max(1, _SHUFFLED_BYTES // (_BYTES_PER_PIXEL * np.prod(image_size)))
    order = rng.permutation(len(positions))
    parts = np.array_split(order, -(-len(order) // capacity))
    dataset = None
    for part in parts:
        chosen = np.sort(part)
        part_labels = tf.constant(labels[chosen])
        stream = (
            split.take(positions[chosen])
            .images(image_size)
            .shuffle(len(chosen), seed=int(rng.integers(2**31)))
            .map(_labelled_with(part_labels))
        )
        dataset = stream if dataset is None else dataset.concatenate(stream)
    return dataset


def _labelled_with(labels: tf.Tensor):
    return lambda index, image: (image, tf.gather(labels, index))
