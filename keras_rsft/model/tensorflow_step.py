"""The training step under TensorFlow: a tape, `tf.cond`, and several replicas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from keras_rsft.model.batch import symbolic_input, unpack
from keras_rsft.model.recorded_pass import Pass
from keras_rsft.model.replica_rules import is_replicated, ready_for_replicas
from keras_rsft.model.replica_trainer import ReplicaTrainer
from keras_rsft.model.replicas import replica_test_step, replica_train_step
from keras_rsft.model.selection import SELECTION_METRICS
from keras_rsft.model.training_step import TrainingStep


class TensorFlowStep(ReplicaTrainer, TrainingStep):
    """`TrainingStep` for Keras's TensorFlow backend."""

    def ready_for_training(self, data: Any) -> Any:
        return ready_for_replicas(self, data)

    def train_step(self, data: Any) -> dict[str, Any]:
        if is_replicated(self.distribute_strategy):
            return replica_train_step(self, data)
        batch = unpack(data)
        if not self.model.built:  # Nothing can be made inside a `tf.cond`.
            self.model(keras.tree.map_structure(symbolic_input, batch[0]))
            self._make_slots()
        return self.train_on(batch)

    def test_step(self, data: Any) -> dict[str, Any]:
        if is_replicated(self.distribute_strategy):
            logs = replica_test_step(self, data)
        else:
            logs = super().test_step(unpack(data)[:3])
        return {k: v for k, v in logs.items() if k not in SELECTION_METRICS}

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

    def _make_slots(self) -> None:
        with tf.init_scope(), self.distribute_strategy.scope():
            super()._make_slots()
