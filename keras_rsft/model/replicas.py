"""The training step on several replicas, equal to the step of one device.

Each replica runs the forward pass over its rows. The losses of all rows are then
brought together in their order, so that every replica takes the same decision, from
what one device would have seen. Gradients are summed over the replicas, divided by
the number accepted by all of them, and applied by every replica alike; a step that
accepts nothing computes and exchanges none.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import tensorflow as tf

from keras_rsft.model.batch import class_labels, require_index, unpack
from keras_rsft.model.recorded_pass import Pass, shown_loss
from keras_rsft.model.replica_trainer import per_worker
from keras_rsft.model.selection import selection_sums

if TYPE_CHECKING:
    from keras_rsft.model.rsft_model import RSFTModel


class _Whole(NamedTuple):
    """The batch of all replicas, the same on each of them, and where our rows are.

    `losses` and `weighted` are float32 `(n,)`; `labels` and `sample_index` int32
    `(n,)` or None; `penalty` is what layers add to the loss, the mean over all rows.
    """

    losses: tf.Tensor
    weighted: tf.Tensor
    labels: tf.Tensor | None
    sample_index: tf.Tensor | None
    penalty: tf.Tensor
    first_row: tf.Tensor
    row_count: tf.Tensor

    def own(self, values: tf.Tensor) -> tf.Tensor:
        """Returns this replica's part of values of all rows."""
        return values[self.first_row : self.first_row + self.row_count]

    def share(self) -> tf.Tensor:
        """Returns which part of all rows this replica has, float32."""
        whole = tf.cast(tf.size(self.losses), tf.float32)
        return tf.cast(self.row_count, tf.float32) / whole


class _Update(NamedTuple):
    """What a replica adds to a step: gradients, and the state of its forward pass."""

    gradients: list[tf.Tensor]
    averaged: list[tf.Tensor]
    taken: list[tf.Tensor]


class _Targets(NamedTuple):
    """Which variables the three parts of an `_Update` are for."""

    gradients: list[Any]
    averaged: list[Any]
    taken: list[Any]


def replica_train_step(model: RSFTModel, data: Any) -> dict[str, Any]:
    """Trains on this replica's rows of a batch.

    Args:
        model: The model, built in the scope of its strategy.
        data: This replica's part of the batch, as `unpack` takes it; may have no rows.

    Returns:
        The logs of the step.
    """
    x, y, sample_weight, sample_index = unpack(data)
    with tf.GradientTape() as tape:
        y_pred, pending = model._forward(x)
        per_sample_loss = weighted_loss = model._scorer(y, y_pred)
        if sample_weight is not None:
            weighted_loss = model._scorer(y, y_pred, sample_weight)
        penalties = model._penalties()
    whole = _brought_together(
        per_sample_loss, weighted_loss, class_labels(y), sample_index, penalties
    )
    accept_mask = model.policy(whole.losses, whole.labels, whole.sample_index)
    _record(model, whole, accept_mask)
    if model.trainable_variables:

        def update() -> tuple[Any, _Update]:
            parts = tape, penalties, weighted_loss, pending
            return _contribution(model, whole, accept_mask, whole.share(), *parts)

        def repeat() -> tuple[Any, _Update]:
            # A replica may have no finite row, and then no share in anything.
            finite = tf.cast(tf.math.is_finite(whole.losses), tf.float32)
            share = tf.reduce_sum(whole.own(finite)) / tf.reduce_sum(finite)
            again = model._finite_pass(
                per_sample_loss, whole.own(accept_mask), (x, y, sample_weight)
            )
            parts = again.tape, again.minimised, again.per_sample, again.pending
            return _contribution(model, whole, accept_mask, share, *parts)

        _update_if_accepted(model, whole, accept_mask, update, repeat)
    sums = selection_sums(per_sample_loss, whole.own(accept_mask))
    shown = shown_loss(
        Pass([], None, None, weighted=whole.weighted, penalties=[whole.penalty])
    )
    _note_loss(model, shown, whole.row_count)
    model.selection.update_state(sums)
    return per_worker(model, model.compute_metrics(x, y, y_pred, sample_weight))


def replica_test_step(model: RSFTModel, data: Any) -> dict[str, Any]:
    """Evaluates this replica's rows of a batch, which may be none.

    Args:
        model: The model, built in the scope of its strategy.
        data: This replica's part of the batch, as `unpack` takes it.

    Returns:
        The logs of the step.
    """
    x, y, sample_weight, _ = unpack(data)
    y_pred = model(x, training=False)
    losses = model._scorer(y, y_pred, sample_weight)
    row_count = tf.size(losses)
    mean = tf.math.divide_no_nan(tf.reduce_sum(losses), tf.cast(row_count, tf.float32))
    penalty = sum(model._penalties(), tf.zeros(()))
    _note_loss(model, mean + tf.where(row_count > 0, penalty, 0.0), row_count)
    return per_worker(model, model.compute_metrics(x, y, y_pred, sample_weight))


def _brought_together(
    per_sample_loss: tf.Tensor,
    weighted_loss: tf.Tensor,
    labels: tf.Tensor | None,
    sample_index: tf.Tensor | None,
    penalties: list[tf.Tensor],
) -> _Whole:
    """Exchanges what a decision needs: a few numbers a row, as two sums.

    Sums, since each replica adds zeros for the rows of the others: that keeps their
    order, and works for any number of rows. In float64, which holds every number of
    a row exactly.
    """
    context = tf.distribute.get_replica_context()
    replica, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync
    row_count = tf.size(per_sample_loss)
    rows = tf.cast(row_count, tf.float64)
    penalty = tf.cast(sum(penalties, tf.zeros(())), tf.float64)
    penalty = tf.where(row_count > 0, penalty * rows, 0.0)
    own = tf.stack([rows, penalty])[None]
    counted = tf.scatter_nd(tf.reshape(replica, (1, 1)), own, (replicas, 2))
    counted = context.all_reduce(tf.distribute.ReduceOp.SUM, counted)
    row_counts = tf.cast(counted[:, 0], tf.int32)
    first_row, total = tf.reduce_sum(row_counts[:replica]), tf.reduce_sum(row_counts)

    columns = [per_sample_loss, weighted_loss, labels, sample_index]
    given = [tf.cast(c, tf.float64) for c in columns if c is not None]
    after = total - first_row - row_count
    padded = tf.pad(tf.stack(given), [[0, 0], [first_row, after]])
    whole = context.all_reduce(tf.distribute.ReduceOp.SUM, padded)
    values = iter(tf.unstack(whole, num=len(given)))
    kinds = tf.float32, tf.float32, tf.int32, tf.int32
    return _Whole(
        *(
            None if column is None else tf.cast(next(values), kind)
            for column, kind in zip(columns, kinds, strict=True)
        ),
        penalty=tf.cast(
            tf.reduce_sum(counted[:, 1]) / tf.cast(total, tf.float64), tf.float32
        ),
        first_row=first_row,
        row_count=row_count,
    )


def _record(model: RSFTModel, whole: _Whole, accept_mask: tf.Tensor) -> None:
    """Has the first replica of each worker report the whole batch, so each row once."""
    if model._recorder is None:
        return
    require_index(whole.sample_index)
    local_replicas = len(model.distribute_strategy.extended.worker_devices)
    replica = tf.get_static_value(
        tf.distribute.get_replica_context().replica_id_in_sync_group
    )
    if replica % local_replicas == 0:
        model._recorder(whole.sample_index, whole.losses, accept_mask)


def _contribution(
    model: RSFTModel,
    whole: _Whole,
    accept_mask: tf.Tensor,
    share: tf.Tensor,
    tape: tf.GradientTape,
    penalties: list[tf.Tensor],
    weighted_loss: tf.Tensor,
    pending: keras.StatelessScope,
) -> tuple[_Targets, _Update]:
    """Runs the backward pass of this replica's rows.

    Args:
        model: The model.
        whole: The batch of all replicas.
        accept_mask: The decision on all its rows.
        share: This replica's share of what layers add to the loss, and of the
            statistics that they keep, in [0, 1]. The shares add up to 1.
        tape: Recorded the forward pass.
        penalties: What layers add to the loss.
        weighted_loss: Float32 `(rows,)`, this replica's losses.
        pending: Holds what the forward pass would change in the model.

    Returns:
        What to change, and by what: gradients to be summed over the replicas, state
        to be summed, and state that is the same on all of them.
    """
    accepted = tf.cast(accept_mask, tf.float32)
    seeds = [whole.own(accepted) / tf.reduce_sum(accepted)]
    seeds += [tf.fill(tf.shape(penalty), share) for penalty in penalties]
    variables = model.trainable_variables
    gradients = tape.gradient(
        [weighted_loss, *penalties],
        [variable.value for variable in variables],
        output_gradients=[model.optimizer.scale_loss(seed) for seed in seeds],
    )
    changed = [(v, pending.get_current_value(v)) for v in model.model.variables]
    changed = [(v, value) for v, value in changed if value is not None]
    averaged = [pair for pair in changed if tf.as_dtype(pair[0].dtype).is_floating]
    taken = [pair for pair in changed if not tf.as_dtype(pair[0].dtype).is_floating]
    reached = [
        (v, g) for v, g in zip(variables, gradients, strict=True) if g is not None
    ]

    def own_part(value: Any) -> tf.Tensor:
        # What a replica without rows computes may be 0 / 0.
        value = tf.convert_to_tensor(value)
        return tf.where(share > 0, value, tf.zeros_like(value))

    targets = _Targets(*([v for v, _ in pairs] for pairs in (reached, averaged, taken)))
    update = _Update(
        [own_part(gradient) for _, gradient in reached],
        [own_part(tf.cast(value, tf.float32)) * share for _, value in averaged],
        [tf.convert_to_tensor(value) for _, value in taken],
    )
    return targets, update


def _update_if_accepted(
    model: RSFTModel, whole: _Whole, accept_mask: tf.Tensor, update: Any, repeat: Any
) -> None:
    """Changes the weights, or notes that this batch was rejected by all replicas."""
    accepts_any = tf.reduce_any(accept_mask)
    all_finite = tf.reduce_all(tf.math.is_finite(whole.losses))
    targets: list[_Targets] = []

    def computed(contribution: Any) -> _Update:
        found, values = contribution()
        targets[:] = [found]
        return values

    def nothing() -> _Update:
        # Which variables are reached is known once the other branch is traced.
        parts = targets[0] if targets else _Targets([], [], [])
        gradients = [tf.zeros(v.shape, v.dtype) for v in parts.gradients]
        averaged = [tf.zeros(v.shape) for v in parts.averaged]
        return _Update(
            gradients, averaged, [tf.zeros(v.shape, v.dtype) for v in parts.taken]
        )

    # No branch exchanges anything: TensorFlow cannot do so from within one.
    values = tf.cond(
        tf.logical_and(accepts_any, all_finite),
        lambda: computed(update),
        lambda: tf.cond(accepts_any, lambda: computed(repeat), nothing),
    )
    if targets:
        tf.distribute.get_replica_context().merge_call(
            functools.partial(_apply_if, model, targets[0]), args=(accepts_any, values)
        )
    judged = tf.where(accepts_any, float("inf"), whole.losses)
    model.selection.note_rejected(judged, model.policy.level)


def _apply_if(
    model: RSFTModel,
    targets: _Targets,
    strategy: tf.distribute.Strategy,
    accepts_any: Any,
    values: _Update,
) -> None:
    """Applies an update on all replicas, or on none of them.

    Runs outside of the replicas, as the condition has to: `optimizer.apply` gathers
    them itself, which cannot begin within a branch of a replica.
    """

    def apply() -> None:
        with gradients_are_summed(model.optimizer):
            strategy.extended.call_for_each_replica(
                functools.partial(_apply, model, targets), args=(values,)
            )

    tf.cond(strategy.experimental_local_results(accepts_any)[0], apply, lambda: None)


def _apply(model: RSFTModel, targets: _Targets, values: _Update) -> None:
    """Sums what all replicas have computed, and changes this replica's copies."""
    context = tf.distribute.get_replica_context()
    summed = context.all_reduce(
        tf.distribute.ReduceOp.SUM, [*values.gradients, *values.averaged]
    )
    gradients = summed[: len(targets.gradients)]
    averaged = summed[len(targets.gradients) :]
    states = [*zip(targets.averaged, averaged, strict=True)]
    states += zip(targets.taken, values.taken, strict=True)
    for variable, value in states:
        variable.assign(tf.cast(value, variable.dtype))
    model.optimizer.apply(gradients, targets.gradients)


@contextlib.contextmanager
def gradients_are_summed(optimizer: Any) -> Iterator[None]:
    """Keeps a Keras optimizer from summing over the replicas what is summed already.

    It would do so after clipping. One device clips the gradient of the whole batch,
    and loss scaling looks for overflow in it: both need the sum first.

    Args:
        optimizer: A Keras optimizer.
    """
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    own = vars(optimizer)
    own["_all_reduce_sum_gradients"] = lambda gradients_and_variables: (
        gradients_and_variables
    )
    try:
        yield
    finally:
        del own["_all_reduce_sum_gradients"]


def _note_loss(model: RSFTModel, shown: tf.Tensor, row_count: tf.Tensor) -> None:
    for metric in model.metrics:
        if metric.name == "loss":
            metric.update_state(shown, sample_weight=row_count)
