"""The training step under TensorFlow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_rsft.model import _replicas as replicas
from keras_rsft.model._step import Data, Pass, TrainingStep, unpack, without_selection


class TensorFlowStep(TrainingStep):
    """`TrainingStep` for Keras's TensorFlow backend."""

    @property
    def _replicated(self) -> bool:
        return replicas.is_replicated(self.distribute_strategy)

    def ready_for_training(self, data: Any) -> Any:
        return replicas.ready_for_replicas(self, data)

    def train_step(self, data: Any) -> dict[str, Any]:
        if self._replicated:
            return replicas.per_worker(self, self.train_on(data))
        if not self.model.built:  # Nothing can be made inside a `tf.cond`.
            self.model(keras.tree.map_structure(_symbol, unpack(data)[0]))
            self._make_slots()
        return self.train_on(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        if not self._replicated:
            return super().test_step(data)
        return without_selection(replicas.test_step(self, data))

    def recorded(self, score: Callable[[], Pass]) -> Pass:
        with tf.GradientTape() as tape:
            scored = score()
        return scored._replace(tape=tape)

    def gradients(self, recorded: Pass, seeds: list[Any]) -> list[Any]:
        return recorded.tape.gradient(
            recorded.targets(),
            [variable.value for variable in self.trainable_variables],
            output_gradients=seeds,
        )

    def branch(
        self,
        condition: Any,
        when_true: Callable[[], None],
        when_false: Callable[[], None],
        *,
        rare: bool = False,
    ) -> None:
        if rare and not tf.executing_eagerly():
            # Kept apart: TensorFlow would otherwise unfold it into the graph, and
            # walk through its dead operations in every step.
            when_false = tf.function(
                when_false,
                autograph=False,
                experimental_attributes={"_noinline": True},
            )
        tf.cond(condition, when_true, when_false)

    def _of_all_replicas(self, recorded: Pass) -> Pass:
        return replicas.gather(recorded) if self._replicated else recorded

    def _record(self, whole: Pass, accept_mask: Any) -> None:
        if not self._replicated or replicas.speaks_for_its_worker(self):
            super()._record(whole, accept_mask)

    def _update_if_accepted(
        self, recorded: Pass, whole: Pass, accept_mask: Any, data: Data
    ) -> None:
        if self._replicated:
            replicas.update_if_accepted(self, recorded, whole, accept_mask, data)
        else:
            super()._update_if_accepted(recorded, whole, accept_mask, data)

    def _make_slots(self) -> None:
        with tf.init_scope(), self.distribute_strategy.scope():
            super()._make_slots()

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        if iterator is None or not self._replicated:
            super()._maybe_symbolic_build(iterator, data_batch)
            return
        dataset = iterator.data_adapter.get_tf_dataset()
        replicas.build_on_symbols(self, dataset.element_spec)

    def _get_metrics_result_or_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        if not self._replicated:
            return super()._get_metrics_result_or_logs(logs)
        whole = self.get_metrics_result()  # Those of a step are the replicas' mean.
        return {name: whole[name] for name in logs}


def _symbol(value: Any) -> keras.KerasTensor:
    return keras.KerasTensor(value.shape, keras.backend.standardize_dtype(value.dtype))
