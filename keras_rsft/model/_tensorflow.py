"""The training step under TensorFlow, on one device and on several replicas."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from keras_rsft.errors import InvalidArgument
from keras_rsft.model._step import (
    Change,
    Pass,
    TrainingStep,
    held_back,
    unpack,
    unselected,
)

# Tensors of one update: gradients, state to be averaged, state equal on all replicas.
_Update = list[list[tf.Tensor]]
_SEVERAL_WORKERS = tf.distribute.MultiWorkerMirroredStrategy


class TensorFlowStep(TrainingStep):
    def _is_replicated(self) -> bool:
        mirrored = (tf.distribute.MirroredStrategy, _SEVERAL_WORKERS)
        return isinstance(self.distribute_strategy, mirrored)

    def train_step(self, data: Any) -> dict[str, Any]:
        if self._is_replicated():
            return _per_worker(self, self.train_on(data))
        if not self._is_whole():  # Nothing can be made inside a `tf.cond`.
            with tf.init_scope():  # Slots are made of values.
                self.model(keras.tree.map_structure(_symbol, unpack(data)[0]))
                self._make_slots()
        return self.train_on(data)

    def test_step(self, data: Any) -> dict[str, Any]:
        x, y, sample_weight, _ = unpack(data)
        if not self._is_replicated():
            return unselected(super().test_step((x, y, sample_weight)))
        y_pred = self(x, training=False)  # Of this replica's rows, maybe none.
        losses = self._scorer(y, y_pred, sample_weight)
        row_count = tf.size(losses)
        rows = tf.cast(row_count, tf.float32)
        mean = tf.math.divide_no_nan(tf.reduce_sum(losses), rows)
        penalty = sum(self._penalties(), tf.zeros(()))
        shown = mean + tf.where(row_count > 0, penalty, 0.0)
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(shown, sample_weight=row_count)
        logs = self.compute_metrics(x, y, y_pred, sample_weight)
        return unselected(_per_worker(self, logs))

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
        self, condition: Any, accepted: Change, otherwise: Change, rare: bool = False
    ) -> Any:
        if rare and not tf.executing_eagerly():
            # Kept apart: TensorFlow would otherwise unfold it into the graph, and
            # walk through its dead operations in every step.
            otherwise = tf.function(
                otherwise, autograph=False, experimental_attributes={"_noinline": True}
            )
        return tf.cond(condition, accepted, otherwise)

    def are_finite(self, values: Sequence[Any]) -> Any:
        # Of an embedding some rows have a gradient.
        sparse = tf.IndexedSlices
        return super().are_finite(
            [value.values if isinstance(value, sparse) else value for value in values]
        )

    def taken(self, part: Any, rows: Any, usable: Any) -> Any:
        if isinstance(part, tf.SparseTensor):  # Cannot be gathered from: it has zeros.
            return tf.sparse.retain(part, tf.gather(usable, part.indices[:, 0]))
        return super().taken(part, rows, usable)

    def ready_for_training(self, data: Any) -> Any:
        strategy = self.distribute_strategy
        if not self._is_replicated():
            if strategy.num_replicas_in_sync > 1:
                raise InvalidArgument(
                    "RSFTModel trains on several devices under MirroredStrategy and "
                    f"MultiWorkerMirroredStrategy. Received: {type(strategy).__name__}."
                )
            return data
        _check_replicable(self)
        spec = getattr(data, "element_spec", None)
        if not (isinstance(data, tf.data.Dataset) and isinstance(spec, tuple)):
            return data
        if len(spec) != 4 or hasattr(spec[2], "shape"):
            return data
        # TensorFlow cannot hand a None to replicas.
        return data.map(
            lambda x, y, none, index: (x, y, tf.ones(tf.shape(index)), index)
        )

    def _of_all_replicas(self, recorded: Pass) -> Pass:
        """Exchanges what a decision needs: a few numbers a row, as two sums."""
        if not self._is_replicated():
            return recorded
        context = tf.distribute.get_replica_context()
        replica = context.replica_id_in_sync_group
        row_count = tf.size(recorded.losses)
        rows = tf.cast(row_count, tf.float64)
        penalty = tf.cast(sum(recorded.penalties, tf.zeros(())), tf.float64)
        penalty = tf.where(row_count > 0, penalty * rows, 0.0)
        own = tf.stack([rows, penalty])[None]
        shape = (context.num_replicas_in_sync, 2)
        counted = tf.scatter_nd(tf.reshape(replica, (1, 1)), own, shape)
        counted = context.all_reduce(tf.distribute.ReduceOp.SUM, counted)
        row_counts = tf.cast(counted[:, 0], tf.int32)
        first_row = tf.reduce_sum(row_counts[:replica])
        total = tf.reduce_sum(row_counts)

        kinds = dict.fromkeys(("losses", "weighted"), tf.float32)
        kinds |= dict.fromkeys(("labels", "sample_index"), tf.int32)
        columns = {name: getattr(recorded, name) for name in kinds}
        columns = {name: c for name, c in columns.items() if c is not None}
        given = [tf.cast(column, tf.float64) for column in columns.values()]
        after = total - first_row - row_count
        padded = tf.pad(tf.stack(given), [[0, 0], [first_row, after]])
        whole = context.all_reduce(tf.distribute.ReduceOp.SUM, padded)
        values = zip(columns, tf.unstack(whole, num=len(given)), strict=True)
        mean_penalty = tf.reduce_sum(counted[:, 1]) / tf.cast(total, tf.float64)
        return Pass(
            **{name: tf.cast(value, kinds[name]) for name, value in values},
            penalties=[tf.cast(mean_penalty, tf.float32)],
            first_row=first_row,
            row_count=row_count,
        )

    def _record(self, whole: Pass, accept_mask: Any) -> None:
        if self._is_replicated():  # A worker's first replica alone notes all rows.
            local_replicas = len(self.distribute_strategy.extended.worker_devices)
            context = tf.distribute.get_replica_context()
            replica = tf.get_static_value(context.replica_id_in_sync_group)
            if replica % local_replicas > 0:
                return
        super()._record(whole, accept_mask)

    def _update_if_accepted(
        self, recorded: Pass, whole: Pass, accept_mask: Any, data: Any
    ) -> Any:
        if not self._is_replicated():
            return super()._update_if_accepted(recorded, whole, accept_mask, data)
        accepts_any = tf.reduce_any(accept_mask)
        finite = tf.math.is_finite(whole.losses)
        # Which variables are reached is known once a branch with gradients is traced.
        targets: list[list[Any]] = []

        def computed(passed: Pass, counted: tf.Tensor) -> _Update:
            counted = tf.cast(counted, tf.float32)
            share = tf.reduce_sum(whole.own(counted)) / tf.reduce_sum(counted)
            found = _contribution(self, passed, whole, accept_mask, share)
            targets[:] = [[variable for variable, _ in part] for part in found]
            return [[value for _, value in part] for part in found]

        def repeat() -> _Update:
            # A replica may have no finite row, and then no share in anything.
            mask = whole.own(accept_mask)
            return computed(self._finite_pass(recorded.losses, mask, data), finite)

        def nothing() -> _Update:
            gradients, averaged, taken = targets or ([], [], [])
            return [
                [tf.zeros(v.shape, v.dtype) for v in gradients],
                [tf.zeros(v.shape) for v in averaged],
                [tf.zeros(v.shape, v.dtype) for v in taken],
            ]

        # No branch exchanges anything: TensorFlow cannot do so from within one.
        values = tf.cond(
            tf.logical_and(accepts_any, tf.reduce_all(finite)),
            lambda: computed(recorded, tf.ones_like(finite)),
            lambda: tf.cond(accepts_any, repeat, nothing),
        )
        changed = tf.zeros_like(accepts_any)
        if targets:
            changed = tf.distribute.get_replica_context().merge_call(
                functools.partial(_apply_if, self, targets), args=(accepts_any, values)
            )
        judged = tf.where(accepts_any, float("inf"), whole.losses)
        self.reject(whole._replace(losses=judged))
        return changed

    def _make_slots(self) -> None:
        with tf.init_scope(), self.distribute_strategy.scope():
            super()._make_slots()

    def _maybe_symbolic_build(
        self, iterator: Any = None, data_batch: Any = None
    ) -> None:
        if iterator is None or not self._is_replicated():
            super()._maybe_symbolic_build(iterator, data_batch)
            return
        spec = iterator.data_adapter.get_tf_dataset().element_spec
        parts = spec if isinstance(spec, tuple) else (spec,)
        batch = tuple(keras.tree.map_structure(_row_symbol, one) for one in parts[:3])
        with self.distribute_strategy.scope():
            self._symbolic_build(data_batch=batch)

    def _get_metrics_result_or_logs(self, logs: dict[str, Any]) -> dict[str, Any]:
        if not self._is_replicated():
            return super()._get_metrics_result_or_logs(logs)
        whole = self.get_metrics_result()  # Those of a step are the replicas' mean.
        return {name: whole[name] for name in logs}


def _symbol(value: Any) -> keras.KerasTensor:
    dtype = keras.backend.standardize_dtype(value.dtype)
    sparse = isinstance(value, tf.SparseTensor)
    return keras.KerasTensor(value.shape, dtype, sparse=sparse)


def _row_symbol(spec: Any) -> keras.KerasTensor | None:
    """Returns a symbol of the form of a batch of any size."""
    spec = getattr(spec, "_value_specs", [spec])[0]
    if not isinstance(spec, tf.TensorSpec):
        return None
    return _symbol(tf.TensorSpec((None, *spec.shape[1:]), spec.dtype))


def _per_worker(model: TrainingStep, logs: dict[str, Any]) -> dict[str, Any]:
    """Returns logs in the shape that Keras can reduce over workers: `(1,)`."""
    if not isinstance(model.distribute_strategy, _SEVERAL_WORKERS):
        return logs
    return {name: tf.reshape(value, (1,)) for name, value in logs.items()}


# Several replicas ---------------------------------------------------------------------


def _check_replicable(model: TrainingStep) -> None:
    """Refuses what Keras cannot do on several replicas, or was not made for them."""
    strategy = model.distribute_strategy
    whole: Any = model.optimizer
    optimizer = getattr(whole, "inner_optimizer", whole)
    losses = keras.tree.flatten(model.loss)
    reductions = {
        loss.reduction for loss in losses if isinstance(loss, keras.losses.Loss)
    } - {"sum_over_batch_size", "mean", "auto"}
    refusals = {
        "Keras runs one step in a call under a strategy of several replicas. "
        "Compile with `steps_per_execution=1`.": model.steps_per_execution > 1,
        "XLA cannot compile a step that goes from replica to replica. "
        "Compile with `jit_compile=False`.": model.jit_compile,
        "Keras cannot accumulate gradients under a strategy of several replicas. Leave "
        "out `gradient_accumulation_steps`, or train on one device.": (
            optimizer.gradient_accumulation_steps
        ),
        "Keras cannot overwrite weights with their averages under a strategy of "
        "several replicas. Leave out `ema_overwrite_frequency`.": (
            optimizer.ema_overwrite_frequency
        ),
        "Several outputs are judged on one device. "
        "Train without a strategy, or give one loss to one output.": (
            max(len(losses), len(keras.tree.flatten(model.output_names or ()))) > 1
        ),
        "Elements within samples are judged on one device. "
        "Use `level='sample'`, or no strategy.": model.policy.level == "element",
        "The loss of several replicas is the mean over their samples. Give it "
        f"`reduction='sum_over_batch_size'`, not {sorted(map(str, reductions))}.": (
            model._takes_all_or_nothing and reductions
        ),
    }
    for reason, holds in refusals.items():
        if holds:
            raise InvalidArgument(
                f"{reason} Received: {strategy.num_replicas_in_sync} replicas of "
                f"{type(strategy).__name__}."
            )
    for variable in [*model.variables, *whole.variables] if model.built else []:
        if not isinstance(variable.value, tf.distribute.DistributedValues):
            raise InvalidArgument(
                "Model, policy and optimizer must be made, and compiled, in the scope "
                "of the strategy that trains them: `with strategy.scope(): ...`. "
                f"Received: {variable.path}, which was not."
            )


def _contribution(
    model: TrainingStep, passed: Pass, whole: Pass, accept_mask: tf.Tensor, share: Any
) -> tuple[list[tuple[Any, tf.Tensor]], ...]:
    """Runs this replica's backward pass; returns variables with their updates."""

    def own_part(value: Any) -> tf.Tensor:
        # What a replica without rows computes may be 0 / 0.
        value = tf.convert_to_tensor(value)
        return tf.where(share > 0, value, tf.zeros_like(value))

    gradients = model._gradients(passed, whole, accept_mask, share)
    pairs = zip(model.trainable_variables, gradients, strict=True)
    averaged, taken = [], []
    for variable, value in held_back(passed, model.model.variables):
        if tf.as_dtype(variable.dtype).is_floating:
            part = own_part(tf.cast(value, tf.float32)) * share
            averaged.append((variable, part))
        else:
            taken.append((variable, tf.convert_to_tensor(value)))
    reached = [(v, own_part(gradient)) for v, gradient in pairs if gradient is not None]
    return reached, averaged, taken


def _apply_if(
    model: TrainingStep,
    targets: list[list[Any]],
    strategy: tf.distribute.Strategy,
    accepts_any: Any,
    values: _Update,
) -> Any:
    """Applies an update on all replicas, or on none; returns whether it did."""
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    method = "_all_reduce_sum_gradients"  # Which are summed already.
    on_each = strategy.extended.call_for_each_replica
    count = len(targets[0])

    def summed(parts: _Update) -> list[tf.Tensor]:
        """Sums what all replicas have computed."""
        reduce = tf.distribute.get_replica_context().all_reduce
        parts = [*parts[0], *parts[1]]
        return reduce(tf.distribute.ReduceOp.SUM, parts) if parts else parts

    def change_own(sums: list[tf.Tensor], taken: list[tf.Tensor]) -> None:
        """Changes this replica's copies."""
        states = [*zip(targets[1], sums[count:], strict=True)]
        states += zip(targets[2], taken, strict=True)
        for variable, value in states:
            variable.assign(tf.cast(value, variable.dtype))
        if count:
            model.optimizer.apply(sums[:count], targets[0])

    def apply() -> Any:
        sums = on_each(summed, args=(values,))
        finite = on_each(model.are_finite, args=(sums,))
        finite = strategy.experimental_local_results(finite)[0]

        def change() -> None:
            vars(optimizer)[method] = lambda pairs: pairs
            try:
                on_each(change_own, args=(sums, values[2]))
            finally:
                del vars(optimizer)[method]

        tf.cond(finite, change, model.note_not_finite)
        return finite

    accepts_any = strategy.experimental_local_results(accepts_any)[0]
    return tf.cond(accepts_any, apply, lambda: tf.zeros_like(accepts_any))
