"""What Keras does around the steps of several replicas, where it has to be helped."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from keras_rsft.model.replica_rules import is_replicated


class ReplicaTrainer:
    """Lets `fit` and `evaluate` of a `keras.Model` run on several replicas.

    A base class to go before `keras.Model`; on one device it changes nothing.
    """

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        if iterator is None or not is_replicated(self.distribute_strategy):
            super()._maybe_symbolic_build(iterator, data_batch)
            return
        _build_on_symbols(self, iterator.data_adapter.get_tf_dataset().element_spec)

    def _get_metrics_result_or_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        if not is_replicated(self.distribute_strategy):
            return super()._get_metrics_result_or_logs(logs)
        whole = self.get_metrics_result()  # Those of a step are the replicas' mean.
        return {name: whole[name] for name in logs}


def per_worker(model: keras.Model, logs: dict[str, Any]) -> dict[str, Any]:
    """Returns logs in the shape that Keras can reduce over workers: `(1,)`."""
    if not isinstance(
        model.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy
    ):
        return logs
    return {name: tf.reshape(value, (1,)) for name, value in logs.items()}


def _build_on_symbols(model: keras.Model, element_spec: Any) -> None:
    """Builds metrics, losses and optimizer from the form of a batch alone.

    Keras takes the mean of a batch over the replicas for that, which fails where they
    have different numbers of rows, and on several workers.

    Args:
        model: The model, built in the scope of its strategy.
        element_spec: What a data set says of its batches.
    """

    def symbol(spec: Any) -> keras.KerasTensor | None:
        spec = getattr(spec, "_value_specs", [spec])[0]
        if not isinstance(spec, tf.TensorSpec):
            return None
        shape = (None, *spec.shape[1:])
        return keras.KerasTensor(shape, keras.backend.standardize_dtype(spec.dtype))

    parts = element_spec if isinstance(element_spec, tuple) else (element_spec,)
    batch = tuple(keras.tree.map_structure(symbol, part) for part in parts[:3])
    with model.distribute_strategy.scope():
        model._symbolic_build(data_batch=batch)
