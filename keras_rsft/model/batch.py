"""What a batch of training data may look like."""

from __future__ import annotations

from typing import Any

import keras
from keras.src.trainers.data_adapters.tf_dataset_adapter import (
    make_class_weight_map_fn,
)

from keras_rsft.errors import InvalidArgument


def unpack(data: Any) -> tuple[Any, Any, Any, Any]:
    """Returns inputs, targets, weights and sample indices, None where there are none.

    Raises:
        InvalidArgument: If the indices are not one whole number a sample.
    """
    if not (isinstance(data, (tuple, list)) and len(data) == 4):
        return (*keras.utils.unpack_x_y_sample_weight(data), None)
    sample_index = data[3]
    dtype = keras.backend.standardize_dtype(sample_index.dtype)
    if not (keras.backend.is_int_dtype(dtype) and len(sample_index.shape) == 1):
        raise InvalidArgument(
            "The fourth part of a batch must be the sample indices, whole numbers of "
            f"shape (batch,). Received: {dtype} of shape {sample_index.shape}."
        )
    return tuple(data)


def class_labels(y: Any) -> Any:
    """Returns the classes that targets name, int32 `(batch,)`, or None.

    Classes are integers of shape `(batch,)` or `(batch, 1)`, or one-hot rows. A row
    with several ones cannot be told from these while a step is traced.
    """
    if isinstance(y, (dict, list, tuple)) or y is None or len(y.shape) > 2:
        return None
    if len(y.shape) == 2 and (y.shape[-1] or 0) > 1:
        return keras.ops.cast(keras.ops.argmax(y, axis=-1), "int32")
    if not keras.backend.is_int_dtype(y.dtype):
        return None
    return keras.ops.cast(keras.ops.reshape(y, (-1,)), "int32")


def has_index(data: Any) -> bool:
    """Says whether data are a `tf.data.Dataset` of batches with sample indices."""
    spec = getattr(data, "element_spec", None)
    return hasattr(data, "map") and isinstance(spec, tuple) and len(spec) == 4


def weighted_by_class(data: Any, class_weight: dict[int, float]) -> Any:
    """Returns a `tf.data.Dataset` with the weights of classes as sample weights.

    Keras does so itself where batches have no sample indices.

    Args:
        data: Data set of `(x, y, None, sample_index)`.
        class_weight: Weights of all classes, by their numbers.

    Raises:
        ValueError: If the data set has sample weights of its own.
    """
    weighted = make_class_weight_map_fn(class_weight)
    return data.map(lambda x, y, weight, index: (*weighted(x, y, weight), index))


def require_index(sample_index: Any) -> None:
    """Raises InvalidArgument where a batch does not say which samples it holds."""
    if sample_index is None:
        raise InvalidArgument(
            "A ledger must be told which samples a batch holds. Received: no "
            "sample_index. Let the data set yield (x, y, sample_weight or None, "
            "sample_index)."
        )


def symbolic_input(value: Any) -> keras.KerasTensor:
    """Returns a symbolic tensor of the shape and type of a value."""
    return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))


def symbolic_inputs(shape: Any) -> Any:
    """Returns symbolic float32 inputs for a shape, or a dict or list of shapes."""
    if isinstance(shape, dict):
        return {name: symbolic_inputs(part) for name, part in shape.items()}
    if shape and isinstance(shape[0], (list, tuple)):
        return [symbolic_inputs(part) for part in shape]
    return keras.KerasTensor(shape)
