"""A new head, and a head joined to a base: images or texts in, class scores out."""

from __future__ import annotations

import keras
import numpy as np

from keras_rsft.errors import InvalidArgument


def build_head(
    dim: int,
    num_classes: int,
    *,
    moments: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> keras.Model:
    """Builds a Dense head with softmax.

    Args:
        dim: Number of features, at least 1.
        num_classes: Number of classes, at least 2.
        moments: Mean and variance of the features, `(dim,)` each, by which they
            are standardised first; None leaves them as they are.
        seed: Seed of the initial weights. Default 0.

    Returns:
        Model from features `(batch, dim)` to probabilities
        `(batch, num_classes)`, float32, with a trainable kernel and bias.

    Raises:
        InvalidArgument: If there are fewer than 2 classes.

    Example:
        >>> import keras_rsft as rsft
        >>> rsft.build_head(1280, 10).output_shape
        (None, 10)
    """
    if num_classes < 2:
        raise InvalidArgument(
            f"`num_classes` must be at least 2. Received: num_classes={num_classes}."
        )
    features = keras.Input((dim,), name="features")
    values = features
    if moments is not None:
        mean, variance = (np.asarray(moment, np.float32) for moment in moments)
        standardise = keras.layers.Normalization(
            mean=mean.tolist(), variance=variance.tolist(), name="standardise"
        )
        values = standardise(values)
    scores = keras.layers.Dense(
        num_classes,
        activation="softmax",
        kernel_initializer=keras.initializers.GlorotUniform(seed=seed),
        dtype="float32",
        name="scores",
    )(values)
    return keras.Model(features, scores, name="head")


def build_classifier(
    backbone: keras.Model, num_classes: int, *, head: keras.Model | None = None
) -> keras.Model:
    """Joins a frozen base and a head into one model.

    Args:
        backbone: Model from images `(batch, height, width, 3)`, float32 in
            [0, 255], or from texts, to features `(batch, dim)`, as `load_backbone`
            gives it.
        num_classes: Number of classes, at least 2.
        head: A trained head. Default: a new one, without standardisation.

    Returns:
        Model from images or texts to probabilities `(batch, num_classes)`; only the
        head is trainable.

    Raises:
        InvalidArgument: If the head does not fit the base or the classes.
    """
    dim = backbone.output_shape[-1]
    if head is None:
        head = build_head(dim, num_classes)
    if head.input_shape[-1] != dim or head.output_shape[-1] != num_classes:
        raise InvalidArgument(
            f"The head must map {dim} features to {num_classes} classes. Received: "
            f"a head from {head.input_shape[-1]} to {head.output_shape[-1]}."
        )
    backbone.trainable = False
    taken = backbone.inputs[0]
    samples = keras.Input(taken.shape[1:], dtype=taken.dtype, name=taken.name)
    return keras.Model(samples, head(backbone(samples)), name="classifier")
