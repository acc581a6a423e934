"""How long a base takes for an image, measured on a few."""

from __future__ import annotations

import time

import tensorflow as tf

from keras_rsft.data import SampleSplit
from keras_rsft.errors import DataError
from keras_rsft.features.frozen_base import FrozenBase

_LEAST_SECONDS = 1.0
_MOST_BATCHES = 20


def seconds_per_image(
    base: FrozenBase, split: SampleSplit, *, batch_size: int = 32
) -> float:
    """Measures the pass: reading and decoding images, and the base on them."""
    images = split.inputs(base.sample_shape).repeat().batch(batch_size).prefetch(2)
    if next(iter(split.inputs(base.sample_shape).take(1)), None) is None:
        raise DataError(
            f"None of the {len(split)} {split.kind} of {split.name!r} can be read."
        )
    batches = iter(images)
    started, counted = 0.0, 0
    for number in range(_MOST_BATCHES + 1):
        _, batch = next(batches)
        base.forward(tf.reshape(batch, (-1, *base.sample_shape))).numpy()
        now = time.perf_counter()
        if number == 0:
            started = now
            continue
        counted += len(batch)
        if now - started >= _LEAST_SECONDS:
            break
    return (now - started) / counted
