"""One training step of many heads at once: what is accepted, and what it changes.

Pure functions of tensors, with the trials along an axis of their own. The decisions
are those of `keras_rsft.policies.rules`, the updates those of Keras's optimizers.
"""

from __future__ import annotations

from typing import NamedTuple

import tensorflow as tf

from keras_rsft.policies import rules
from keras_rsft.searching.head_trials import (
    ACCEPT_ALL,
    BATCH_BELOW,
    BELOW,
    KEEP_SMALLEST,
    LISTED,
)

# The defaults of `keras.optimizers.Adam` and `AdamW`.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


class HeadState(NamedTuple):
    """Weights and optimizer slots of `k` heads, float32.

    The kernel is `(dim, classes, k)`, so that all heads are one matrix, and what is
    done to each head is done to neighbours in memory; the bias `(classes, k)`. Each has
    one (`sgd`) or two (`adam`) slots of its shape; `iterations` `(k,)` are updates.
    """

    kernel: tf.Tensor
    bias: tf.Tensor
    kernel_slots: tuple[tf.Tensor, ...]
    bias_slots: tuple[tf.Tensor, ...]
    iterations: tf.Tensor


class Batch(NamedTuple):
    """One batch, which all heads see.

    Standardised float32 features `(batch, dim)`; int32 labels; and boolean `(batch,)`
    which samples the list of `auto` accepts, which a person has reviewed, and which are
    there at all: other rows only fill up the batch.
    """

    features: tf.Tensor
    labels: tf.Tensor
    listed: tf.Tensor
    reviewed: tf.Tensor
    present: tf.Tensor


def head_logits(features: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Returns the scores of all heads, `(batch, classes, k)`, by one matrix product."""
    dim, classes, trials = kernel.shape
    scores = tf.matmul(features, tf.reshape(kernel, (dim, classes * trials)))
    return tf.reshape(scores, (-1, classes, trials)) + bias


def losses_of(likelihoods: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
    """Returns the cross-entropy of each sample under each head, `(batch, k)`."""
    wanted = tf.one_hot(labels, likelihoods.shape[1], on_value=True, off_value=False)
    chosen = tf.where(wanted[:, :, None], likelihoods, 0.0)
    return -tf.reduce_sum(chosen, axis=1)


def log_likelihoods(logits: tf.Tensor) -> tf.Tensor:
    """Returns the logarithms of the probabilities, `(batch, classes, k)`."""
    shifted = logits - tf.reduce_max(logits, axis=1, keepdims=True)
    normalizer = tf.reduce_sum(tf.exp(shifted), axis=1, keepdims=True)
    return shifted - tf.math.log(normalizer)


def step_heads(
    batch: Batch,
    state: HeadState,
    trials: dict[str, tf.Tensor],
    step: tf.Tensor,
    *,
    update_rule: str,
    groups: dict[int, tf.Tensor],
) -> tuple[HeadState, tf.Tensor]:
    """Takes one step with every head; `groups` are those of `HeadTrials`.

    A head that accepts nothing keeps its weights, slots and iterations. Returns the
    state, and what `_sums` counts.
    """
    usable = tf.reduce_all(tf.math.is_finite(batch.features), axis=-1)
    # A NaN in one row would reach the gradients of all through the product.
    features = tf.where(usable[:, None], batch.features, 0.0)
    likelihoods = log_likelihoods(head_logits(features, state.kernel, state.bias))
    _, classes, trial_count = likelihoods.shape
    wanted = tf.one_hot(batch.labels, classes)[:, :, None]
    losses = losses_of(likelihoods, batch.labels)
    usable = tf.logical_and(usable, batch.present)[:, None]
    losses = tf.where(usable, losses, float("inf"))
    accepted = tf.transpose(
        accepted_by_trials(tf.transpose(losses), batch, trials, step, groups=groups)
    )
    share = tf.cast(accepted, tf.float32)
    share = tf.math.divide_no_nan(share, tf.reduce_sum(share, axis=0))
    errors = (tf.exp(likelihoods) - wanted) * share[:, None]
    errors = tf.where(accepted[:, None], errors, 0.0)
    flat_errors = tf.reshape(errors, (-1, classes * trial_count))
    gradient = tf.matmul(features, flat_errors, transpose_a=True)
    gradients = tf.reshape(gradient, state.kernel.shape), tf.reduce_sum(errors, axis=0)
    moves = tf.reduce_any(accepted, axis=0)
    state = _updated(state, gradients, trials, moves, update_rule)
    return state, _sums(losses, accepted, batch.present[:, None])


def accepted_by_trials(
    losses: tf.Tensor,
    batch: Batch,
    trials: dict[str, tf.Tensor],
    step: tf.Tensor,
    *,
    groups: dict[int, tf.Tensor],
) -> tf.Tensor:
    """Returns which samples each trial accepts, bool `(k, batch)` like the losses.

    Each rule is asked about the trials that go by it alone: to rank losses costs more
    than all the rest of a step.
    """
    accepted = tf.ones_like(losses, dtype=tf.bool)
    for acceptance, places in groups.items():
        if acceptance == ACCEPT_ALL:
            continue
        column = {name: tf.gather(v, places)[:, None] for name, v in trials.items()}
        own = tf.gather(losses, places)
        chosen = _accepted_by(acceptance, own, batch, column, step)
        if acceptance != BATCH_BELOW:  # As `AcceptReviewed` has it.
            chosen = tf.logical_or(chosen, batch.reviewed)
        accepted = tf.tensor_scatter_nd_update(accepted, places[:, None], chosen)
    return tf.logical_and(accepted, tf.math.is_finite(losses))


def _accepted_by(
    acceptance: int,
    losses: tf.Tensor,
    batch: Batch,
    column: dict[str, tf.Tensor],
    step: tf.Tensor,
) -> tf.Tensor:
    """Decides for the trials of one rule, as its policy does for one."""
    warmup_steps, threshold = column["warmup_steps"], column["threshold"]
    if acceptance == KEEP_SMALLEST:
        share = rules.ramped_keep_fraction(step, column["keep_fraction"], warmup_steps)
        return rules.keep_smallest(losses, share)
    in_warmup = tf.ones_like(losses, dtype=tf.bool)
    if acceptance == BELOW:
        mask = rules.accept_below(losses, threshold)
    elif acceptance == LISTED:
        in_warmup = tf.logical_and(in_warmup, batch.listed)
        mask = rules.accept_listed(batch.listed, losses, batch.labels, threshold)
    else:
        finite = tf.logical_or(tf.math.is_finite(losses), ~batch.present)
        in_warmup = tf.reduce_all(finite, axis=1, keepdims=True)
        mask = rules.accept_batch_below(losses, threshold, batch.present)
    return rules.after_warmup(mask, in_warmup, step, warmup_steps)


def _updated(
    state: HeadState,
    gradients: tuple[tf.Tensor, tf.Tensor],
    trials: dict[str, tf.Tensor],
    moves: tf.Tensor,
    update_rule: str,
) -> HeadState:
    """Returns the state after an update of the heads that move, bool `(k,)`."""
    slots_of, change_of = _OPTIMIZERS[update_rule]
    decay = 1.0 - trials["weight_decay"] * trials["learning_rate"]
    iterations = tf.where(moves, state.iterations + 1.0, state.iterations)
    parts = []
    for weights, gradient, slots, kept in (
        (state.kernel, gradients[0], state.kernel_slots, decay),
        (state.bias, gradients[1], state.bias_slots, 1.0),  # A bias does not decay.
    ):
        # From here on the old slots are not needed, so that the compiler copies none.
        new_slots = tuple(
            tf.where(moves, new, old)
            for new, old in zip(slots_of(slots, gradient, trials), slots, strict=True)
        )
        change = change_of(new_slots, trials, iterations)
        moved = weights * kept + change
        parts.append((tf.where(moves, moved, weights), new_slots))
    (kernel, kernel_slots), (bias, bias_slots) = parts
    return HeadState(kernel, bias, kernel_slots, bias_slots, iterations)


def _sgd_slots(
    slots: tuple[tf.Tensor, ...], gradient: tf.Tensor, trials: dict[str, tf.Tensor]
) -> tuple[tf.Tensor, ...]:
    rate, momentum = trials["learning_rate"], trials["momentum"]
    return (slots[0] * momentum - gradient * rate,)


def _sgd(
    slots: tuple[tf.Tensor, ...], trials: dict[str, tf.Tensor], iterations: tf.Tensor
) -> tf.Tensor:
    return slots[0]


def _adam_slots(
    slots: tuple[tf.Tensor, ...], gradient: tf.Tensor, trials: dict[str, tf.Tensor]
) -> tuple[tf.Tensor, ...]:
    first = slots[0] + (gradient - slots[0]) * (1.0 - BETA_1)
    second = slots[1] + (tf.square(gradient) - slots[1]) * (1.0 - BETA_2)
    return first, second


def _adam(
    slots: tuple[tf.Tensor, ...], trials: dict[str, tf.Tensor], iterations: tf.Tensor
) -> tf.Tensor:
    # Of a head that has not moved yet, to which nothing is added, it would be 0 / 0.
    steps = tf.maximum(iterations, 1.0)
    rate = trials["learning_rate"] * tf.sqrt(1.0 - BETA_2**steps)
    rate /= 1.0 - BETA_1**steps
    return -slots[0] * rate / (tf.sqrt(slots[1]) + EPSILON)


# By update rule: new slots, as Keras's optimizers have them, and the weights' change.
_OPTIMIZERS = {"sgd": (_sgd_slots, _sgd), "adam": (_adam_slots, _adam)}


def _sums(losses: tf.Tensor, accepted: tf.Tensor, present: tf.Tensor) -> tf.Tensor:
    """Counts for each trial, `(5, k)`, what `model.metrics.selection_sums` does."""
    finite = tf.math.is_finite(losses)
    rows = [
        tf.broadcast_to(tf.cast(present, tf.float32), tf.shape(losses)),
        tf.cast(accepted, tf.float32),
        tf.where(accepted, losses, 0.0),
        tf.cast(finite, tf.float32),
        tf.where(finite, losses, 0.0),
    ]
    return tf.stack([tf.reduce_sum(row, axis=0) for row in rows])
