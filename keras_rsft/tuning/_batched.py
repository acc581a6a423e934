"""Trains many heads together on cached features."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.features._batches import TrainingBatches
from keras_rsft.features._store import FeatureSet
from keras_rsft.policies import _rules as rules
from keras_rsft.tuning._space import (
    ACCEPT_ALL,
    BATCH_BELOW,
    BELOW,
    KEEP_SMALLEST,
    LISTED,
    HeadTrials,
)

# Step ---------------------------------------------------------------------------------

# The defaults of `keras.optimizers.Adam` and `AdamW`.
BETA_1, BETA_2, EPSILON = 0.9, 0.999, 1e-7


class HeadState(NamedTuple):
    """Weights and optimizer slots of `k` heads, float32."""

    kernel: tf.Tensor
    bias: tf.Tensor
    kernel_slots: tuple[tf.Tensor, ...]
    bias_slots: tuple[tf.Tensor, ...]
    iterations: tf.Tensor


class Batch(NamedTuple):
    """One batch, which all heads see."""

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
    """Takes one step with every head; `groups` are those of `HeadTrials`."""
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
    """Returns which samples each trial accepts, bool `(k, batch)` like the losses."""
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


# Heads --------------------------------------------------------------------------------

# Rows that are handed to one call of the compiled loop: an epoch, if it is not huge.
_BLOCK_BYTES = 2**27
_VALIDATION_ROWS = 4096
_SLOTS = {"sgd": 1, "adam": 2}
_SUMS = 5  # What `step_heads` sums for each trial.
OnEpoch = Callable[[int, float], None]
METRICS = ("loss", "acceptance_rate", "accepted_loss", "val_accuracy", "val_loss")


@dataclasses.dataclass(eq=False)
class TrainedHeads:
    """What is recorded of `k` heads, while they train and after."""

    history: dict[str, np.ndarray]  # (k, epochs); NaN after a head was dropped.
    kernels: np.ndarray  # (k, dim, classes), of the last epoch.
    biases: np.ndarray  # (k, classes)
    best_kernels: np.ndarray  # Those of the best epoch.
    best_biases: np.ndarray
    best_epochs: np.ndarray  # (k,), counted from 0.
    best_values: np.ndarray  # (k,), where more is better.
    diverged: np.ndarray  # (k,): whether the loss became NaN or infinite.

    def record_epoch(
        self,
        epoch: int,
        heads: np.ndarray,
        logs: dict[str, np.ndarray],
        values: np.ndarray,
        state: HeadState,
    ) -> None:
        """Records an epoch of some heads; of equal values the earlier is the best."""
        for name, numbers in logs.items():
            self.history[name][heads, epoch] = numbers
        scored = logs.get("val_loss", logs["loss"])
        self.diverged[heads] |= ~np.isfinite(scored)
        rows = np.flatnonzero(values > self.best_values[heads])
        better = heads[rows]
        self.best_values[better] = values[rows]
        self.best_epochs[better] = epoch
        if len(rows):
            self.best_kernels[better], self.best_biases[better] = _weights(state, rows)


class BatchedHeads:
    """Trains heads together on one data set, again and again."""

    def __init__(
        self,
        train: FeatureSet,
        validation: FeatureSet,
        *,
        num_classes: int,
        batch_size: int,
        seed: int,
    ):
        self._train, self._validation = train, validation
        self._num_classes = num_classes
        self._batch_size = batch_size
        self._seed = seed
        self._listed = np.ones(len(train), bool)
        self._reviewed = np.zeros(len(train), bool)
        if train.reviewed is not None:
            self._reviewed = train.reviewed
        mean, variance = train.moments()
        # As the layer Normalization has it.
        scale = np.maximum(np.sqrt(variance), 1e-7)
        self._moments = tf.constant(mean), tf.constant(scale)
        self.steps_per_epoch = -(-len(train) // batch_size)
        most = max(1, _BLOCK_BYTES // (4 * train.dim * batch_size))
        calls = -(-self.steps_per_epoch // most)
        self._block_rows = -(-self.steps_per_epoch // calls) * batch_size

    def list_samples(self, listed: np.ndarray) -> None:
        """Says which samples trials with `LISTED` accept; before, they accept all."""
        self._listed = listed

    def train(
        self,
        trials: HeadTrials,
        *,
        epochs: int,
        objective: str = "val_accuracy",
        direction: str = "max",
        halvings: int = 0,
        on_epoch: OnEpoch | None = None,
    ) -> TrainedHeads:
        """Trains one head for each trial."""
        names = METRICS if len(self._validation) else METRICS[:3]
        count, dim, classes = len(trials), self._train.dim, self._num_classes
        trained = TrainedHeads(
            {name: np.full((count, epochs), np.nan, np.float32) for name in names},
            *(
                np.zeros(shape, np.float32)
                for shape in [(count, dim, classes), (count, classes)] * 2
            ),
            np.zeros(count, int),
            np.full(count, -np.inf),
            np.zeros(count, bool),
        )
        alive = np.arange(count)
        cuts = {round(epochs * n / (halvings + 1)) for n in range(1, halvings + 1)}
        state = self._first_state(trials)
        batches = TrainingBatches(
            self._train,
            batch_size=self._block_rows,
            seed=self._seed,
            sample_index=True,
        )
        sign = 1.0 if direction == "max" else -1.0
        for epoch in range(epochs):
            state, logs = self._epoch(batches, epoch, state, trials)
            logs |= self._validate(state)
            trained.record_epoch(epoch, alive, logs, sign * logs[objective], state)
            if on_epoch is not None:
                on_epoch(len(alive), sign * float(trained.best_values.max()))
            cut = epoch + 1 in cuts and len(alive) > 1
            if cut or epoch + 1 == epochs:
                rows = np.arange(len(alive))
                trained.kernels[alive], trained.biases[alive] = _weights(state, rows)
            if cut:
                worst_last = np.argsort(-trained.best_values[alive], kind="stable")
                kept = np.sort(worst_last[: -(-len(alive) // 2)])
                alive, trials = alive[kept], trials.take(kept)
                parts = tf.nest.map_structure(
                    functools.partial(tf.gather, indices=kept, axis=-1), tuple(state)
                )
                state = HeadState(*parts)
        return trained

    def _first_state(self, trials: HeadTrials) -> HeadState:
        """Returns the weights that `build_head` begins with, the same for all."""
        count, shape = len(trials), (self._train.dim, self._num_classes)
        first = keras.initializers.GlorotUniform(seed=self._seed)(shape)
        kernel = tf.tile(tf.convert_to_tensor(first)[:, :, None], (1, 1, count))
        bias = tf.zeros((self._num_classes, count))
        slots = (
            (tf.zeros_like(one),) * _SLOTS[trials.update_rule] for one in (kernel, bias)
        )
        return HeadState(kernel, bias, *slots, tf.zeros((count,)))

    def _epoch(
        self,
        batches: TrainingBatches,
        epoch: int,
        state: HeadState,
        trials: HeadTrials,
    ) -> tuple[HeadState, dict[str, np.ndarray]]:
        batches.callback.on_epoch_begin(epoch)
        arrays = {name: tf.constant(v) for name, v in trials.arrays.items()}
        groups = {way: tf.constant(v) for way, v in trials.groups.items()}
        sums = tf.zeros((_SUMS, len(trials)))
        step = epoch * self.steps_per_epoch
        for features, labels, _, index in batches.dataset:
            rows = len(labels)
            masks = (mask[index.numpy()] for mask in (self._listed, self._reviewed))
            block = (features, labels, *map(tf.constant, masks))
            state, sums = run_block(
                _filled_up(block, self._block_rows),
                tf.constant(rows),
                self._moments,
                state,
                sums,
                arrays,
                groups,
                tf.constant(step),
                batch_size=self._batch_size,
                update_rule=trials.update_rule,
            )
            step += -(-rows // self._batch_size)
        samples, accepted, accepted_loss, finite, finite_loss = sums.numpy()
        return state, {
            "loss": finite_loss / np.maximum(finite, 1),
            "acceptance_rate": accepted / samples,
            "accepted_loss": accepted_loss / np.maximum(accepted, 1),
        }

    def _validate(self, state: HeadState) -> dict[str, np.ndarray]:
        count = len(self._validation)
        if count == 0:
            return {}
        rows = min(_VALIDATION_ROWS, count)
        totals, start = 0.0, 0
        for chunk in self._validation.chunks(rows):
            labels = self._validation.labels[start : start + len(chunk)]
            start += len(chunk)
            totals += score_block(
                *_filled_up((tf.constant(chunk), tf.constant(labels)), rows),
                tf.constant(len(chunk)),
                self._moments,
                state.kernel,
                state.bias,
            ).numpy()
        return {"val_accuracy": totals[0] / count, "val_loss": totals[1] / count}


@tf.function(jit_compile=True, autograph=False)
def run_block(
    block: list[tf.Tensor],
    rows: tf.Tensor,
    moments: tuple[tf.Tensor, tf.Tensor],
    state: HeadState,
    sums: tf.Tensor,
    trials: dict[str, tf.Tensor],
    groups: dict[int, tf.Tensor],
    first_step: tf.Tensor,
    *,
    batch_size: int,
    update_rule: str,
) -> tuple[HeadState, tf.Tensor]:
    """Takes all steps of a block of shuffled rows, as one compiled program."""
    steps = (rows + batch_size - 1) // batch_size
    features, *masks = block  # Labels, listed and reviewed are of one axis.

    def body(step: tf.Tensor, state: HeadState, sums: tf.Tensor) -> tuple:
        start = step * batch_size
        values = tf.slice(features, [start, 0], [batch_size, features.shape[1]])
        batch = Batch(
            (values - moments[0]) / moments[1],
            *(tf.slice(one, [start], [batch_size]) for one in masks),
            start + tf.range(batch_size) < rows,
        )
        step_now = first_step + step
        state, added = step_heads(
            batch, state, trials, step_now, update_rule=update_rule, groups=groups
        )
        return step + 1, state, sums + added

    _, state, sums = tf.while_loop(
        lambda step, *_: step < steps, body, (tf.constant(0), state, sums)
    )
    return state, sums


@tf.function(jit_compile=True, autograph=False)
def score_block(
    features: tf.Tensor,
    labels: tf.Tensor,
    rows: tf.Tensor,
    moments: tuple[tf.Tensor, tf.Tensor],
    kernel: tf.Tensor,
    bias: tf.Tensor,
) -> tf.Tensor:
    """Returns how many labels each head gets right, and its summed loss, `(2, k)`."""
    logits = head_logits((features - moments[0]) / moments[1], kernel, bias)
    losses = losses_of(log_likelihoods(logits), labels)
    predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
    right = tf.equal(predicted, labels[:, None])
    present = (tf.range(features.shape[0]) < rows)[:, None]
    counted = (tf.cast(right, tf.float32), losses)
    return tf.stack([tf.reduce_sum(tf.where(present, c, 0.0), axis=0) for c in counted])


def _weights(state: HeadState, rows: np.ndarray) -> list[np.ndarray]:
    """Returns kernels and biases of some heads, which are then the first axis."""
    chosen = (tf.gather(v, rows, axis=-1) for v in (state.kernel, state.bias))
    return [np.moveaxis(values.numpy(), -1, 0) for values in chosen]


def _filled_up(parts: tuple[tf.Tensor, ...], rows: int) -> list[tf.Tensor]:
    """Adds rows of zeros, so that one compiled program serves every block."""
    missing = rows - len(parts[0])
    return [
        tf.pad(part, [[0, missing]] + [[0, 0]] * (part.shape.rank - 1))
        if missing
        else part
        for part in parts
    ]
