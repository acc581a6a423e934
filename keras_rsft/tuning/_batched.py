"""Trains many heads together on cached features."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from keras_rsft.config import TrainConfig
from keras_rsft.features._batches import TrainingBatches
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.policies import _rules as rules
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import ESTIMATED_ACCURACY, credited_to, given_credits
from keras_rsft.tuning import _space

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
    highest: tf.Tensor  # Threshold of `auto` that still accepts each.
    weights: tf.Tensor  # How much each counts for `auto`.
    reviewed: tf.Tensor
    present: tf.Tensor
    step: tf.Tensor


class Trials(NamedTuple):
    """The numbers of `k` heads, each `(k,)`, and the positions by way of acceptance."""

    numbers: dict[str, tf.Tensor]
    groups: dict[int, tf.Tensor]


def head_logits(features: tf.Tensor, kernel: tf.Tensor, bias: tf.Tensor) -> tf.Tensor:
    """Returns the scores of all heads, `(batch, classes, k)`, by one matrix product."""
    dim, classes, trials = kernel.shape
    scores = tf.matmul(features, tf.reshape(kernel, (dim, classes * trials)))
    return tf.reshape(scores, (-1, classes, trials)) + bias


def log_likelihoods(logits: tf.Tensor) -> tf.Tensor:
    """Returns the logarithms of the probabilities, `(batch, classes, k)`."""
    shifted = logits - tf.reduce_max(logits, axis=1, keepdims=True)
    normalizer = tf.reduce_sum(tf.exp(shifted), axis=1, keepdims=True)
    return shifted - tf.math.log(normalizer)


def step_heads(
    batch: Batch, state: HeadState, trials: Trials
) -> tuple[HeadState, tf.Tensor]:
    """Takes one step with every head; also returns `_SUMS` sums for each."""
    usable = tf.reduce_all(tf.math.is_finite(batch.features), axis=-1)
    # A NaN in one row would reach the gradients of all through the product.
    features = tf.where(usable[:, None], batch.features, 0.0)
    likelihoods = log_likelihoods(head_logits(features, state.kernel, state.bias))
    _, classes, trial_count = likelihoods.shape
    wanted = tf.one_hot(batch.labels, classes)[:, :, None]
    losses = -tf.gather(likelihoods, batch.labels, axis=1, batch_dims=1)
    usable = tf.logical_and(usable, batch.present)[:, None]
    losses = tf.where(usable, losses, float("inf"))
    accepted = tf.transpose(accepted_by_trials(tf.transpose(losses), batch, trials))
    share = tf.cast(accepted, tf.float32)
    share = tf.math.divide_no_nan(share, tf.reduce_sum(share, axis=0))
    is_auto = tf.equal(trials.numbers["acceptance"], _space.LISTED)
    share *= tf.where(is_auto, batch.weights[:, None], 1.0)
    errors = (tf.exp(likelihoods) - wanted) * share[:, None]
    errors = tf.where(accepted[:, None], errors, 0.0)
    flat_errors = tf.reshape(errors, (-1, classes * trial_count))
    gradient = tf.matmul(features, flat_errors, transpose_a=True)
    gradients = tf.reshape(gradient, state.kernel.shape), tf.reduce_sum(errors, axis=0)
    moves = tf.reduce_any(accepted, axis=0)
    state = _updated(state, gradients, trials.numbers, moves)
    finite = tf.math.is_finite(losses)
    rows = [  # As `model.metrics.selection_sums` counts.
        tf.broadcast_to(tf.cast(batch.present[:, None], tf.float32), tf.shape(losses)),
        tf.cast(accepted, tf.float32),
        tf.where(accepted, losses, 0.0),
        tf.cast(finite, tf.float32),
        tf.where(finite, losses, 0.0),
    ]
    return state, tf.stack([tf.reduce_sum(row, axis=0) for row in rows])


def accepted_by_trials(losses: tf.Tensor, batch: Batch, trials: Trials) -> tf.Tensor:
    """Returns which samples each trial accepts, bool `(k, batch)` like the losses."""
    accepted = tf.ones_like(losses, dtype=tf.bool)
    for acceptance, positions in trials.groups.items():
        if acceptance == _space.ACCEPT_ALL:
            continue
        own = tf.gather(losses, positions)
        threshold, right_probability, keep_fraction, warmup_steps = (
            tf.gather(trials.numbers[name], positions)[:, None]
            for name in (
                "threshold", "right_probability", "keep_fraction", "warmup_steps"
            )
        )  # fmt: skip
        in_warmup = tf.ones_like(own, dtype=tf.bool)
        if acceptance == _space.KEEP_SMALLEST:
            warmup_steps, ramp_steps = 0, warmup_steps
            share = rules.ramped_keep_fraction(batch.step, keep_fraction, ramp_steps)
            chosen = rules.keep_smallest(own, share)
        elif acceptance == _space.BELOW:
            chosen = rules.accept_below(own, threshold)
        elif acceptance == _space.LISTED:
            in_warmup = batch.highest >= right_probability
            chosen = rules.accept_listed(in_warmup, own, batch.labels, threshold)
        else:
            finite = tf.logical_or(tf.math.is_finite(own), ~batch.present)
            in_warmup = tf.reduce_all(finite, axis=1, keepdims=True)
            chosen = rules.accept_batch_below(own, threshold, batch.present)
        chosen = rules.after_warmup(chosen, in_warmup, batch.step, warmup_steps)
        if acceptance != _space.BATCH_BELOW:  # As `AcceptReviewed` has it.
            chosen = tf.logical_or(chosen, batch.reviewed)
        accepted = tf.tensor_scatter_nd_update(accepted, positions[:, None], chosen)
    return tf.logical_and(accepted, tf.math.is_finite(losses))


def _updated(
    state: HeadState,
    gradients: tuple[tf.Tensor, tf.Tensor],
    numbers: dict[str, tf.Tensor],
    moves: tf.Tensor,
) -> HeadState:
    """Returns the state after an update of the heads that move, bool `(k,)`."""
    rate = numbers["learning_rate"]
    decay = 1.0 - numbers["weight_decay"] * rate
    iterations = tf.where(moves, state.iterations + 1.0, state.iterations)
    # A head that has not moved yet, and does not now, would divide 0 by 0.
    steps = tf.maximum(iterations, 1.0)
    adam_rate = rate * tf.sqrt(1.0 - BETA_2**steps) / (1.0 - BETA_1**steps)
    parts = []
    for weights, gradient, slots, decayed in (
        (state.kernel, gradients[0], state.kernel_slots, decay),
        (state.bias, gradients[1], state.bias_slots, 1.0),  # A bias does not decay.
    ):
        is_adam = len(slots) == 2
        if is_adam:
            targets = ((gradient, BETA_1), (tf.square(gradient), BETA_2))
            moved = [
                slot + (target - slot) * (1.0 - beta)
                for slot, (target, beta) in zip(slots, targets, strict=True)
            ]
        else:  # SGD
            moved = [slots[0] * numbers["momentum"] - gradient * rate]
        # From here on the old slots are not needed, so that the compiler copies none.
        new = tuple(
            tf.where(moves, one, old) for one, old in zip(moved, slots, strict=True)
        )
        change = new[0]
        if is_adam:
            change = -new[0] * adam_rate / (tf.sqrt(new[1]) + EPSILON)
        parts.append((tf.where(moves, weights * decayed + change, weights), new))
    (kernel, kernel_slots), (bias, bias_slots) = parts
    return HeadState(kernel, bias, kernel_slots, bias_slots, iterations)


# Heads --------------------------------------------------------------------------------

# Rows that are handed to one call of the compiled loop: an epoch, if it is not huge.
_BLOCK_BYTES = 2**27
_VALIDATION_ROWS = 4096
_SUMS = 5  # Of `step_heads`, for each trial.
OnEpoch = Callable[[int, float], None]
METRICS = (
    "loss", "acceptance_rate", "accepted_loss", "val_accuracy", ESTIMATED_ACCURACY,
    "val_loss",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class TrainedHeads:
    """`k` heads, each with the weights of its best epoch."""

    history: dict[str, np.ndarray]  # (k, epochs); NaN after a head was dropped.
    kernels: np.ndarray  # (k, dim, classes)
    biases: np.ndarray  # (k, classes)
    predicted: np.ndarray  # (k, validation samples), the classes.
    best_epochs: np.ndarray  # (k,), counted from 0.
    diverged: np.ndarray  # (k,): whether the loss became NaN or infinite.


class BatchedHeads:
    """Trains heads together on one data set, again and again."""

    def __init__(self, features: SplitFeatures, given: TrainConfig):
        train, batch_size = features.train, given.batch_size
        self._features, self._batch_size, self._seed = features, batch_size, given.seed
        mean, variance = train.moments()
        # As the layer Normalization has it.
        scale = np.maximum(np.sqrt(variance), 1e-7)
        self._moments = tf.constant(mean), tf.constant(scale)
        self._steps_per_epoch = -(-len(train) // batch_size)
        most = max(1, _BLOCK_BYTES // (4 * train.dim * batch_size))
        calls = -(-self._steps_per_epoch // most)
        self._block_rows = -(-self._steps_per_epoch // calls) * batch_size

    def train(
        self,
        settings: Sequence[TrainConfig],
        label_quality: LabelQuality | None = None,
        *,
        credits: np.ndarray | None = None,
        objective: str = "val_accuracy",
        direction: str = "max",
        halvings: int = 0,
        on_epoch: OnEpoch = lambda heads, value: None,
    ) -> TrainedHeads:
        """Trains one head for each of the settings, all of one rule and length.

        `credits` `(validation samples, classes)` are those of `val_accuracy_estimated`,
        by default the given labels.
        """
        train, epochs, count = self._features.train, settings[0].epochs, len(settings)
        classes, validation = len(self._features.class_names), self._features.validation
        if credits is None:
            credits = given_credits(validation.labels, classes)
        highest = weights = np.ones(len(train), np.float32)
        if label_quality is not None:
            highest, weights = label_quality.highest_thresholds(), label_quality.weights
        none = np.zeros(len(train), bool)
        reviewed = none if train.reviewed is None else train.reviewed
        columns = highest, weights, reviewed
        numbers = _space.stack_trials(
            settings,
            num_classes=classes,
            steps_per_epoch=self._steps_per_epoch,
            loss_limit=math.inf if label_quality is None else label_quality.loss_limit,
        )
        trained = TrainedHeads(
            {name: np.full((count, epochs), np.nan, np.float32) for name in METRICS},
            np.zeros((count, train.dim, classes), np.float32),
            np.zeros((count, classes), np.float32),
            np.zeros((count, len(validation)), np.int32),
            np.zeros(count, int),
            np.zeros(count, bool),
        )
        best_values = np.full(count, -np.inf)
        first_epochs = np.array([_space.first_epoch(one) for one in settings])
        alive = np.arange(count)
        cuts = {round(epochs * n / (halvings + 1)) for n in range(1, halvings + 1)}
        state = self._first_state(count, _space.update_rule(settings[0]))
        batches = TrainingBatches(
            train, batch_size=self._block_rows, seed=self._seed, sample_index=True
        )
        sign = 1.0 if direction == "max" else -1.0
        for epoch in range(epochs):
            state, logs = self._epoch(batches, columns, epoch, state, numbers)
            scores, predicted = self._validate(state)
            estimated = credited_to(credits, predicted).mean(axis=-1)
            logs |= {**scores, ESTIMATED_ACCURACY: estimated}
            for name, measured in logs.items():
                trained.history[name][alive, epoch] = measured
            trained.diverged[alive] |= ~np.isfinite(logs["val_loss"])
            values = np.where(
                epoch < first_epochs[alive], -np.inf, sign * logs[objective]
            )
            rows = np.flatnonzero(values > best_values[alive])  # The first of equals.
            better = alive[rows]
            best_values[better] = values[rows]
            trained.predicted[better] = predicted[rows]
            trained.best_epochs[better] = epoch
            if len(rows):
                gather = functools.partial(tf.gather, indices=rows, axis=-1)
                kernels = gather(state.kernel).numpy()
                trained.kernels[better] = np.moveaxis(kernels, -1, 0)
                trained.biases[better] = gather(state.bias).numpy().T
            on_epoch(len(alive), sign * float(best_values.max()))
            if epoch + 1 in cuts and len(alive) > 1:
                worst_last = np.argsort(-best_values[alive], kind="stable")
                left = np.sort(worst_last[: -(-len(alive) // 2)])
                alive = alive[left]
                numbers = {name: array[left] for name, array in numbers.items()}
                gather = functools.partial(tf.gather, indices=left, axis=-1)
                state = tf.nest.map_structure(gather, state)
        return trained

    def _first_state(self, count: int, rule: str) -> HeadState:
        """Returns the weights that `untrained_head` begins with, of all heads."""
        classes = len(self._features.class_names)
        kernel = tf.zeros((self._features.train.dim, classes, count))
        bias = tf.zeros((classes, count))
        slots = 1 if rule == "sgd" else 2
        return HeadState(
            kernel,
            bias,
            kernel_slots=(tf.zeros_like(kernel),) * slots,
            bias_slots=(tf.zeros_like(bias),) * slots,
            iterations=tf.zeros(count),
        )

    def _epoch(
        self,
        batches: TrainingBatches,
        columns: Sequence[np.ndarray],
        epoch: int,
        state: HeadState,
        numbers: dict[str, np.ndarray],
    ) -> tuple[HeadState, dict[str, np.ndarray]]:
        batches.callback.on_epoch_begin(epoch)
        acceptance = numbers["acceptance"]
        constants = functools.partial(tf.nest.map_structure, tf.constant)
        groups = _space.acceptance_groups(acceptance)
        trials = Trials(constants(numbers), constants(groups))
        sums = tf.zeros((_SUMS, len(acceptance)))
        step = epoch * self._steps_per_epoch
        for features, labels, _, index in batches.dataset:
            rows = len(labels)
            own = (tf.constant(one[index.numpy()]) for one in columns)
            state, sums = run_block(
                _filled_up((features, labels, *own), self._block_rows),
                tf.constant(rows),
                self._moments,
                state,
                sums,
                trials,
                tf.constant(step),
                batch_size=self._batch_size,
            )
            step += -(-rows // self._batch_size)
        samples, accepted, accepted_loss, finite, finite_loss = sums.numpy()
        with np.errstate(invalid="ignore"):  # Of none it is NaN, as in `fit`.
            return state, {
                "loss": finite_loss / finite,
                "acceptance_rate": accepted / samples,
                "accepted_loss": accepted_loss / accepted,
            }

    def _validate(self, state: HeadState) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """Returns accuracies and losses, and the predicted classes `(k, n)`."""
        validation = self._features.validation
        count = len(validation)
        rows = min(_VALIDATION_ROWS, count)
        totals, start, predicted = np.zeros((2, 1), np.float32), 0, []
        for chunk in validation.chunks(rows):
            labels = validation.labels[start : start + len(chunk)]
            start += len(chunk)
            block = _filled_up((tf.constant(chunk), tf.constant(labels)), rows)
            size = tf.constant(len(chunk))
            weights = state.kernel, state.bias
            sums, classes = score_block(*block, size, self._moments, *weights)
            totals = totals + sums.numpy()
            predicted.append(classes.numpy()[: len(chunk)])
        scores = {"val_accuracy": totals[0] / count, "val_loss": totals[1] / count}
        return scores, np.concatenate(predicted).T


@tf.function(jit_compile=True, autograph=False)
def run_block(
    block: list[tf.Tensor],
    rows: tf.Tensor,
    moments: tuple[tf.Tensor, tf.Tensor],
    state: HeadState,
    sums: tf.Tensor,
    trials: Trials,
    first_step: tf.Tensor,
    *,
    batch_size: int,
) -> tuple[HeadState, tf.Tensor]:
    """Takes all steps of a block of shuffled rows, as one compiled program."""
    steps = (rows + batch_size - 1) // batch_size
    features, *columns = block  # The others have one axis.

    def body(step: tf.Tensor, state: HeadState, sums: tf.Tensor) -> tuple:
        start = step * batch_size
        values = tf.slice(features, [start, 0], [batch_size, features.shape[1]])
        labels, highest, weights, reviewed = (
            tf.slice(one, [start], [batch_size]) for one in columns
        )
        present = start + tf.range(batch_size) < rows
        values = (values - moments[0]) / moments[1]
        batch = Batch(
            values, labels, highest, weights, reviewed, present, first_step + step
        )
        state, added = step_heads(batch, state, trials)
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
) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the right labels and summed loss `(2, k)`, and classes `(rows, k)`."""
    logits = head_logits((features - moments[0]) / moments[1], kernel, bias)
    losses = -tf.gather(log_likelihoods(logits), labels, axis=1, batch_dims=1)
    predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
    right = tf.equal(predicted, labels[:, None])
    present = (tf.range(features.shape[0]) < rows)[:, None]
    counted = (tf.cast(right, tf.float32), losses)
    sums = [tf.reduce_sum(tf.where(present, one, 0.0), axis=0) for one in counted]
    return tf.stack(sums), predicted


def _filled_up(parts: tuple[tf.Tensor, ...], rows: int) -> list[tf.Tensor]:
    """Adds rows of zeros, so that one compiled program serves every block."""
    missing = rows - len(parts[0])
    return [
        tf.pad(part, [[0, missing]] + [[0, 0]] * (part.shape.rank - 1))
        if missing
        else part
        for part in parts
    ]
