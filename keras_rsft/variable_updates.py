"""Updates of Keras variables for which TensorFlow has means of its own.

Keras reads the variable, computes and assigns: a copy of all of it in every step.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops


def add_to(variable: keras.Variable, value: Any) -> None:
    """Adds a tensor of the same shape to a variable."""
    if keras.backend.backend() == "tensorflow":
        variable.value.assign_add(value)
    else:
        variable.assign(variable.value + value)


def write_rows(variable: keras.Variable, rows: Any, values: Any) -> None:
    """Overwrites rows of a variable `(n, ...)`, none of them twice."""
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        variable.value.scatter_update(tf.IndexedSlices(values, rows))
    else:
        variable.assign(ops.scatter_update(variable.value, rows[:, None], values))


def assign_after(variable: keras.Variable, value: Any, tensor: Any) -> None:
    """Assigns a value once a tensor of the batch is there.

    At the end of a data set of unknown size, Keras under TensorFlow runs whatever does
    not wait for a batch.
    """
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        with tf.control_dependencies([tensor]):
            variable.assign(value)
    else:
        variable.assign(value)
