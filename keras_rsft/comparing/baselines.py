"""Trains the baselines that no policy expresses, on the same kept features.

Each takes the optimizer, the epochs, the batches and their order from the same
`TrainingSettings` as the policies do.
"""

from __future__ import annotations

import dataclasses

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones import build_head
from keras_rsft.comparing.method_names import require_cleanlab
from keras_rsft.features import TrainingBatches
from keras_rsft.finetuning import SplitFeatures, TrainingSettings
from keras_rsft.finetuning.head_training import (
    choose_steps_per_execution,
    head_probabilities,
)
from keras_rsft.finetuning.settings import make_optimizer
from keras_rsft.policies import keep_smallest, ramped_keep_fraction

GCE_Q = 0.7
CO_TEACHING_RAMP_EPOCHS = 10
FOLDS = 5
# A rate estimate above this would leave co-teaching with next to nothing.
MAX_NOISE_RATE = 0.9
# Apart from the first head's seed, and from the neighbouring seeds of a comparison.
_SECOND_HEAD = 1_000_003


def train_gce(features: SplitFeatures, settings: TrainingSettings) -> keras.Model:
    """Trains a head with the generalised cross-entropy loss, `(1 - p**0.7) / 0.7`.

    Source: Zhang and Sabuncu, "Generalized cross entropy loss for training deep
    neural networks with noisy labels", NeurIPS 2018, with their q and without
    their truncation.

    Args:
        features: The splits; only `train` is used.
        settings: How to train; its policy plays no part.

    Returns:
        The trained head, features to probabilities.
    """
    loss = keras.losses.CategoricalGeneralizedCrossEntropy(q=GCE_Q)
    return _train_stock(features, settings, loss)


def train_co_teaching(
    features: SplitFeatures, settings: TrainingSettings, *, noise_rate: float
) -> tuple[keras.Model, np.ndarray]:
    """Trains two heads, each on the samples that have a small loss for the other.

    Source: Han et al., "Co-teaching: robust training of deep neural networks with
    extremely noisy labels", NeurIPS 2018. The share kept of each batch falls over
    10 epochs from 1 to `1 - noise_rate`.

    Args:
        features: The splits; only `train` is used.
        settings: How to train; its policy plays no part.
        noise_rate: Estimated share of wrong labels, in [0, 1).

    Returns:
        The first of the two trained heads, and which training samples the other
        one chooses for it in the end: a boolean array of shape `(n,)`.
    """
    train = features.train
    seeds = (settings.seed, (settings.seed + _SECOND_HEAD) % 2**31)
    heads = [
        build_head(
            train.dim,
            len(features.class_names),
            moments=train.moments(),
            seed=seed,
        )
        for seed in seeds
    ]
    optimizers = [make_optimizer(settings) for _ in heads]
    for head, optimizer in zip(heads, optimizers, strict=True):
        optimizer.build(head.trainable_variables)
    batches = TrainingBatches(train, batch_size=settings.batch_size, seed=settings.seed)

    @tf.function
    def run_epoch(keep: tf.Tensor) -> None:
        for inputs, labels in batches.dataset:
            co_teaching_step(heads, optimizers, inputs, labels, keep)

    for epoch in range(settings.epochs):
        batches.callback.on_epoch_begin(epoch)
        keep = ramped_keep_fraction(epoch, 1 - noise_rate, CO_TEACHING_RAMP_EPOCHS)
        run_epoch(tf.cast(keep, tf.float32))
    probabilities = head_probabilities(heads[1], train)
    losses = keras.losses.sparse_categorical_crossentropy(train.labels, probabilities)
    chosen = np.zeros(len(train), bool)
    order = batches.order(settings.epochs - 1)[0].numpy()
    for start in range(0, len(order), settings.batch_size):
        batch = order[start : start + settings.batch_size]
        chosen[batch] = np.asarray(keep_smallest(tf.gather(losses, batch), keep))
    return heads[0], chosen


def co_teaching_step(
    heads: list[keras.Model],
    optimizers: list[keras.optimizers.Optimizer],
    inputs: tf.Tensor,
    labels: tf.Tensor,
    keep_fraction: tf.Tensor | float,
) -> None:
    """Updates each of two heads on the samples that the other one chooses.

    Both choose before either is updated; the gradient is that of the mean loss of
    the chosen samples.

    Args:
        heads: Two models, features `(batch, dim)` to probabilities.
        optimizers: One for each, built.
        inputs: Features `(batch, dim)`.
        labels: Given labels `(batch,)`, integers.
        keep_fraction: Share of the batch that each chooses, in (0, 1].
    """
    with tf.GradientTape(persistent=True) as tape:
        losses = [
            keras.losses.sparse_categorical_crossentropy(
                labels, head(inputs, training=True)
            )
            for head in heads
        ]
        chosen = [
            tf.cast(keep_smallest(tf.stop_gradient(loss), keep_fraction), loss.dtype)
            for loss in losses
        ]
        objectives = [
            tf.reduce_sum(loss * mask) / tf.maximum(tf.reduce_sum(mask), 1)
            for loss, mask in zip(losses, reversed(chosen), strict=True)
        ]
    for head, optimizer, objective in zip(heads, optimizers, objectives, strict=True):
        variables = head.trainable_variables
        optimizer.apply(tape.gradient(objective, variables), variables)


def out_of_fold_probabilities(
    features: SplitFeatures, settings: TrainingSettings
) -> np.ndarray:
    """Returns what plain heads say of training samples that they have not seen.

    Args:
        features: The splits; only `train` is used.
        settings: How each of the 5 heads is trained; its seed also cuts the
            folds.

    Returns:
        Probabilities, float32 of shape `(n, classes)`, each row from a head that
        was trained on the other four folds.
    """
    train = features.train
    folds = np.random.default_rng(settings.seed).permutation(len(train)) % FOLDS
    loss = "sparse_categorical_crossentropy"
    probabilities = np.zeros((len(train), len(features.class_names)), np.float32)
    for fold in range(FOLDS):
        held_out = folds == fold
        if not held_out.any():
            continue
        seen = train.take(np.flatnonzero(~held_out))
        head = _train_stock(dataclasses.replace(features, train=seen), settings, loss)
        probabilities[held_out] = head_probabilities(head, train)[held_out]
    return probabilities


def estimated_noise_rate(labels: np.ndarray, probabilities: np.ndarray) -> float:
    """Estimates the share of wrong labels from out-of-fold probabilities.

    Source: Northcutt, Jiang and Chuang, "Confident learning: estimating uncertainty
    in dataset labels", JAIR 2021: the confident joint, without its calibration. A
    sample counts for the likeliest of the classes whose probability reaches the
    mean probability that samples given that class have for it. It also counts the
    heads' own mistakes, so it is rather too high.

    Args:
        labels: Given labels, integers of shape `(n,)`.
        probabilities: Shape `(n, classes)`.

    Returns:
        A share in [0, 0.9]; 0 where no sample counts.
    """
    num_classes = probabilities.shape[1]
    thresholds = np.full(num_classes, np.inf)
    for label in np.unique(labels):
        thresholds[label] = probabilities[labels == label, label].mean()
    confident = np.where(probabilities >= thresholds, probabilities, -1.0)
    counted = confident.max(axis=1) >= 0
    if not counted.any():
        return 0.0
    wrong = confident.argmax(axis=1)[counted] != labels[counted]
    return min(float(wrong.mean()), MAX_NOISE_RATE)


def cleanlab_accepts(labels: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Returns which samples `cleanlab.filter.find_label_issues` leaves alone.

    Args:
        labels: Given labels, integers of shape `(n,)`.
        probabilities: Out-of-fold probabilities, shape `(n, classes)`.

    Returns:
        Boolean array of shape `(n,)`.

    Raises:
        ImportError: If the package is not installed.
    """
    require_cleanlab()
    from cleanlab.filter import find_label_issues

    return ~find_label_issues(labels, probabilities, n_jobs=1)


def _train_stock(
    features: SplitFeatures, settings: TrainingSettings, loss: str | keras.losses.Loss
) -> keras.Model:
    train = features.train
    head = build_head(
        train.dim,
        len(features.class_names),
        moments=train.moments(),
        seed=settings.seed,
    )
    steps = -(-len(train) // settings.batch_size)
    head.compile(
        make_optimizer(settings),
        loss,
        steps_per_execution=choose_steps_per_execution(steps),
    )
    batches = TrainingBatches(train, batch_size=settings.batch_size, seed=settings.seed)
    head.fit(
        batches.dataset,
        epochs=settings.epochs,
        callbacks=[batches.callback],
        verbose=0,
        shuffle=False,
    )
    return head
