"""The training step on several replicas."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import keras
import tensorflow as tf

from keras_rsft.errors import InvalidArgument
from keras_rsft.model._step import Data, Pass, unpack

if TYPE_CHECKING:
    from keras_rsft.model._rsft_model import RSFTModel


# Tensors of one update: gradients, state to be averaged, state equal on all replicas.
_Update = list[list[tf.Tensor]]
_REPLICATED = (
    tf.distribute.MirroredStrategy,
    tf.distribute.MultiWorkerMirroredStrategy,
)


def is_replicated(strategy: Any) -> bool:
    """Says whether a strategy runs copies of the model side by side, one included."""
    return isinstance(strategy, _REPLICATED)


def ready_for_replicas(model: RSFTModel, data: Any) -> Any:
    """Refuses what cannot be trained where it was made; returns the data for it."""
    strategy = model.distribute_strategy
    if not is_replicated(strategy):
        if strategy.num_replicas_in_sync > 1:
            raise InvalidArgument(
                "RSFTModel trains on several devices under MirroredStrategy and "
                f"MultiWorkerMirroredStrategy. Received: {type(strategy).__name__}."
            )
        return data
    reason = _what_keras_cannot_do(model)
    if reason is not None:
        raise InvalidArgument(
            f"{reason} Received: {strategy.num_replicas_in_sync} replicas of "
            f"{type(strategy).__name__}."
        )
    variables = [*model.variables, *model.optimizer.variables] if model.built else []
    for variable in variables:
        if not isinstance(variable.value, tf.distribute.DistributedValues):
            raise InvalidArgument(
                "Model, policy and optimizer must be made, and compiled, in the scope "
                "of the strategy that trains them: `with strategy.scope(): ...`. "
                f"Received: {variable.path}, which was not."
            )
    spec = getattr(data, "element_spec", None)
    if not (isinstance(data, tf.data.Dataset) and isinstance(spec, tuple)):
        return data
    if len(spec) != 4 or hasattr(spec[2], "shape"):
        return data
    # TensorFlow cannot hand a None to replicas.
    return data.map(lambda x, y, none, index: (x, y, tf.ones(tf.shape(index)), index))


def _what_keras_cannot_do(model: RSFTModel) -> str | None:
    optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    losses = keras.tree.flatten(model.loss)
    reductions = {
        loss.reduction for loss in losses if isinstance(loss, keras.losses.Loss)
    } - {"sum_over_batch_size", "mean", "auto"}
    refusals = (
        (
            model.steps_per_execution > 1,
            "Keras runs one step in a call under a strategy of several replicas. "
            "Compile with `steps_per_execution=1`.",
        ),
        (
            model.jit_compile,
            "XLA cannot compile a step that goes from replica to replica. "
            "Compile with `jit_compile=False`.",
        ),
        (
            optimizer.gradient_accumulation_steps,
            "Keras cannot accumulate gradients under a strategy of several replicas. "
            "Leave out `gradient_accumulation_steps`, or train on one device.",
        ),
        (
            optimizer.ema_overwrite_frequency,
            "Keras cannot overwrite weights with their averages under a strategy of "
            "several replicas. Leave out `ema_overwrite_frequency`.",
        ),
        (
            model.policy.level == "element",
            "Elements within samples are judged on one device. "
            "Use `level='sample'`, or no strategy.",
        ),
        (
            model._takes_all_or_nothing and reductions,
            "The loss of several replicas is the mean over their samples. Give it "
            f"`reduction='sum_over_batch_size'`, not {sorted(map(str, reductions))}.",
        ),
    )
    return next((reason for holds, reason in refusals if holds), None)


def gather(recorded: Pass) -> Pass:
    """Exchanges what a decision needs: a few numbers a row, as two sums."""
    context = tf.distribute.get_replica_context()
    replica, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
    row_count = tf.size(recorded.losses)
    rows = tf.cast(row_count, tf.float64)
    penalty = tf.cast(sum(recorded.penalties, tf.zeros(())), tf.float64)
    penalty = tf.where(row_count > 0, penalty * rows, 0.0)
    own = tf.stack([rows, penalty])[None]
    counted = tf.scatter_nd(tf.reshape(replica, (1, 1)), own, (replicas, 2))
    counted = context.all_reduce(tf.distribute.ReduceOp.SUM, counted)
    row_counts = tf.cast(counted[:, 0], tf.int32)
    first_row, total = tf.reduce_sum(row_counts[:replica]), tf.reduce_sum(row_counts)

    kinds = {
        "losses": tf.float32,
        "weighted": tf.float32,
        "labels": tf.int32,
        "sample_index": tf.int32,
    }
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


def speaks_for_its_worker(model: RSFTModel) -> bool:
    """Says whether this is a worker's first replica, so that each row is told once."""
    local_replicas = len(model.distribute_strategy.extended.worker_devices)
    context = tf.distribute.get_replica_context()
    replica = tf.get_static_value(context.replica_id_in_sync_group)
    return replica % local_replicas == 0


def update_if_accepted(
    model: RSFTModel, recorded: Pass, whole: Pass, accept_mask: tf.Tensor, data: Data
) -> None:
    """Changes the weights, or notes that this batch was rejected by all replicas."""
    accepts_any = tf.reduce_any(accept_mask)
    finite = tf.math.is_finite(whole.losses)
    # Which variables are reached is known once a branch with gradients is traced.
    targets: list[list[Any]] = []

    def computed(passed: Pass, counted: tf.Tensor) -> _Update:
        counted = tf.cast(counted, tf.float32)
        share = tf.reduce_sum(whole.own(counted)) / tf.reduce_sum(counted)
        found = _contribution(model, passed, whole, accept_mask, share)
        targets[:] = [[variable for variable, _ in part] for part in found]
        return [[value for _, value in part] for part in found]

    def update() -> _Update:
        return computed(recorded, tf.ones_like(finite))

    def repeat() -> _Update:
        # A replica may have no finite row, and then no share in anything.
        mask = whole.own(accept_mask)
        return computed(model._finite_pass(recorded.losses, mask, data), finite)

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
        update,
        lambda: tf.cond(accepts_any, repeat, nothing),
    )
    if targets:
        tf.distribute.get_replica_context().merge_call(
            functools.partial(_apply_if, model, targets), args=(accepts_any, values)
        )
    judged = tf.where(accepts_any, float("inf"), whole.losses)
    model.reject(whole._replace(losses=judged))


def _contribution(
    model: RSFTModel, passed: Pass, whole: Pass, accept_mask: tf.Tensor, share: Any
) -> tuple[list[tuple[Any, tf.Tensor]], ...]:
    """Runs this replica's backward pass; returns variables with their updates."""

    def own_part(value: Any) -> tf.Tensor:
        # What a replica without rows computes may be 0 / 0.
        value = tf.convert_to_tensor(value)
        return tf.where(share > 0, value, tf.zeros_like(value))

    gradients = model._gradients(passed, whole, accept_mask, share)
    pairs = zip(model.trainable_variables, gradients, strict=True)
    changed = model._pending_values(passed)
    floating = [tf.as_dtype(variable.dtype).is_floating for variable, _ in changed]
    averaged = [c for c, is_float in zip(changed, floating, strict=True) if is_float]
    taken = [c for c, is_float in zip(changed, floating, strict=True) if not is_float]
    return (
        [(v, own_part(gradient)) for v, gradient in pairs if gradient is not None],
        [(v, own_part(tf.cast(value, tf.float32)) * share) for v, value in averaged],
        [(v, tf.convert_to_tensor(value)) for v, value in taken],
    )


def _apply_if(
    model: RSFTModel,
    targets: list[list[Any]],
    strategy: tf.distribute.Strategy,
    accepts_any: Any,
    values: _Update,
) -> None:
    """Applies an update on all replicas, or on none of them."""

    def apply() -> None:
        with _gradients_are_summed(model.optimizer):
            strategy.extended.call_for_each_replica(
                functools.partial(_apply, model, targets), args=(values,)
            )

    tf.cond(strategy.experimental_local_results(accepts_any)[0], apply, lambda: None)


def _apply(model: RSFTModel, targets: list[list[Any]], values: _Update) -> None:
    """Sums what all replicas have computed, and changes this replica's copies."""
    gradients, averaged, taken = values
    summed = tf.distribute.get_replica_context().all_reduce(
        tf.distribute.ReduceOp.SUM, [*gradients, *averaged]
    )
    count = len(gradients)
    states = [*zip(targets[1], summed[count:], strict=True)]
    states += zip(targets[2], taken, strict=True)
    for variable, value in states:
        variable.assign(tf.cast(value, variable.dtype))
    model.optimizer.apply(summed[:count], targets[0])


@contextlib.contextmanager
def _gradients_are_summed(optimizer: Any) -> Iterator[None]:
    """Keeps a Keras optimizer from summing over the replicas what is summed already."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    own = vars(optimizer)
    own["_all_reduce_sum_gradients"] = lambda gradients_and_variables: (
        gradients_and_variables
    )
    try:
        yield
    finally:
        del own["_all_reduce_sum_gradients"]


def test_step(model: RSFTModel, data: Any) -> dict[str, Any]:
    """Evaluates this replica's rows of a batch, which may be none."""
    x, y, sample_weight, _ = unpack(data)
    y_pred = model(x, training=False)
    losses = model._scorer(y, y_pred, sample_weight)
    row_count = tf.size(losses)
    mean = tf.math.divide_no_nan(tf.reduce_sum(losses), tf.cast(row_count, tf.float32))
    penalty = sum(model._penalties(), tf.zeros(()))
    shown = mean + tf.where(row_count > 0, penalty, 0.0)
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(shown, sample_weight=row_count)
    return per_worker(model, model.compute_metrics(x, y, y_pred, sample_weight))


def per_worker(model: RSFTModel, logs: dict[str, Any]) -> dict[str, Any]:
    """Returns logs in the shape that Keras can reduce over workers: `(1,)`."""
    several = tf.distribute.MultiWorkerMirroredStrategy
    if not isinstance(model.distribute_strategy, several):
        return logs
    return {name: tf.reshape(value, (1,)) for name, value in logs.items()}


def build_on_symbols(model: RSFTModel, element_spec: Any) -> None:
    """Builds metrics, losses and optimizer from the form of a batch alone."""

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
