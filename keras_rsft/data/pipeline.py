"""How this package's `tf.data` pipelines run."""

from __future__ import annotations

import tensorflow as tf


def without_autotuning(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the same data set with fixed buffers and a call for each core."""
    # `tf.data`'s tuner has nothing to find in pipelines as short as ours, and its
    # thread is asleep for up to five seconds when an iterator is dropped, which then
    # waits for it (seen with TensorFlow 2.21 at the end of passes of five seconds and
    # more).
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def without_tuning_or_rewriting(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Returns the same data set, to be run as it is."""
    # For those that a served graph runs anew on each request: looking for a better form
    # of the pipeline takes longer there than the pipeline.
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    return dataset.with_options(options)
