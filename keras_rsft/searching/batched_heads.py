"""Trains many heads together on kept features.

All heads see the same batches in the same order, and each ends up as `train_head`
would have left it with the same hyperparameters and seed. Owns the loop over epochs,
what it notes of each head, and the dropping of hopeless heads; a step is
`batched_step.py`'s business.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.features import FeatureSet, TrainingBatches
from keras_rsft.searching.batched_step import (
    Batch,
    HeadState,
    head_logits,
    log_likelihoods,
    losses_of,
    step_heads,
)
from keras_rsft.searching.head_notes import HeadNotes, TrainedHeads
from keras_rsft.searching.head_trials import HeadTrials

# Rows that are handed to one call of the compiled loop: an epoch, if it is not huge.
_BLOCK_BYTES = 2**27
_VALIDATION_ROWS = 4096
_SLOTS = {"sgd": 1, "adam": 2}
OnEpoch = Callable[[int, float], None]
_SUMS = 5  # What `step_heads` sums for each trial.


class BatchedHeads:
    """Trains heads together on one data set, again and again.

    Args:
        train: Training features with the given labels.
        validation: Validation features; may be empty.
        num_classes: Number of classes, at least 2.
        batch_size: Samples per step, at least 1.
        seed: Seed of the initial weights and of the order.
    """

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
        self._mean, self._scale = mean, np.maximum(np.sqrt(variance), 1e-7)
        self.steps_per_epoch = -(-len(train) // batch_size)
        most = max(1, _BLOCK_BYTES // (4 * train.dim * batch_size))
        calls = -(-self.steps_per_epoch // most)
        self._block_rows = -(-self.steps_per_epoch // calls) * batch_size

    def list_samples(self, listed: np.ndarray) -> None:
        """Says which samples trials with `LISTED` accept; before, they accept all.

        Args:
            listed: Boolean array `(n,)`, one entry a training sample.
        """
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
        """Trains one head for each trial.

        Args:
            trials: Hyperparameters of `k` heads.
            epochs: Passes over the training features, at least 1.
            objective: One of the logged values; its best epoch is kept beside the last.
            direction: `"max"` or `"min"`, of the objective. Default `"max"`.
            halvings: How often, at even intervals, the worse half of the heads is
                dropped (Jamieson and Talwalkar, 2016, "Non-stochastic best arm
                identification"). Default 0: never.
            on_epoch: Called after each epoch with the number of heads trained, and the
                best value of the objective so far.
        """
        count = len(trials)
        notes = HeadNotes(count, epochs, self._train.dim, self._num_classes)
        alive = np.arange(count)
        cuts = _halving_epochs(epochs, halvings)
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
            notes.add(epoch, alive, logs, sign * logs[objective], state)
            if on_epoch is not None:
                on_epoch(len(alive), sign * float(notes.best_values.max()))
            if epoch + 1 in cuts and len(alive) > 1:
                kept = _better_half(notes.best_values[alive])
                notes.finish(
                    np.delete(alive, kept),
                    np.delete(np.arange(len(alive)), kept),
                    state,
                )
                alive, trials, state = (
                    alive[kept],
                    trials.take(kept),
                    _take(state, kept),
                )
        notes.finish(alive, np.arange(len(alive)), state)
        return notes.trained(has_validation=len(self._validation) > 0)

    def _first_state(self, trials: HeadTrials) -> HeadState:
        """Returns the weights that `build_head` begins with, the same for all."""
        count, shape = len(trials), (self._train.dim, self._num_classes)
        first = keras.initializers.GlorotUniform(seed=self._seed)(shape)
        kernel = tf.tile(tf.convert_to_tensor(first)[:, :, None], (1, 1, count))
        bias = tf.zeros((self._num_classes, count))
        slots = _SLOTS[trials.update_rule]
        return HeadState(
            kernel,
            bias,
            (tf.zeros_like(kernel),) * slots,
            (tf.zeros_like(bias),) * slots,
            tf.zeros((count,)),
        )

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
            listed, reviewed = (
                tf.constant(mask[index.numpy()])
                for mask in (self._listed, self._reviewed)
            )
            block = _filled_up((features, labels, listed, reviewed), self._block_rows)
            state, sums = run_block(
                *block,
                tf.constant(rows),
                (tf.constant(self._mean), tf.constant(self._scale)),
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
        totals = 0.0
        for features, labels in self._validation_chunks(rows):
            features, filled = _filled_up((features, labels), rows)
            totals += score_block(
                features,
                filled,
                tf.constant(len(labels)),
                (tf.constant(self._mean), tf.constant(self._scale)),
                state.kernel,
                state.bias,
            ).numpy()
        return {"val_accuracy": totals[0] / count, "val_loss": totals[1] / count}

    def _validation_chunks(self, rows: int) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
        start = 0
        for chunk in self._validation.chunks(rows):
            labels = self._validation.labels[start : start + len(chunk)]
            yield tf.constant(chunk), tf.constant(labels)
            start += len(chunk)


@tf.function(jit_compile=True, autograph=False)
def run_block(
    features: tf.Tensor,
    labels: tf.Tensor,
    listed: tf.Tensor,
    reviewed: tf.Tensor,
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
    """Takes all steps of a block of shuffled rows, as one compiled program.

    Args:
        features: Float32, shape `(n, dim)`, as they were kept; `n` is a multiple of
            `batch_size`.
        labels: int32, shape `(n,)`.
        listed: bool, shape `(n,)`.
        reviewed: bool, shape `(n,)`.
        rows: int32 scalar: how many of the rows there are; the others only fill up.
        moments: What to subtract from the features, and what to divide them by.
        state: Weights and slots of all heads.
        sums: Float32 `(5, k)`, to which those of each step are added.
        trials: The arrays of a `HeadTrials`, as tensors.
        groups: Which trials accept in which way, see `HeadTrials.groups`.
        first_step: int32 scalar, batches judged before this block.
        batch_size: Samples per step.
        update_rule: `"sgd"` or `"adam"`.
    """
    steps = (rows + batch_size - 1) // batch_size

    def body(step: tf.Tensor, state: HeadState, sums: tf.Tensor) -> tuple:
        start = step * batch_size
        values = tf.slice(features, [start, 0], [batch_size, features.shape[1]])
        batch = Batch(
            (values - moments[0]) / moments[1],
            tf.slice(labels, [start], [batch_size]),
            tf.slice(listed, [start], [batch_size]),
            tf.slice(reviewed, [start], [batch_size]),
            start + tf.range(batch_size) < rows,
        )
        state, added = step_heads(
            batch,
            state,
            trials,
            first_step + step,
            update_rule=update_rule,
            groups=groups,
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
    """Returns how many labels each head gets right, and its summed loss, `(2, k)`.

    Args:
        features: Float32, shape `(n, dim)`, as they were kept.
        labels: int32, shape `(n,)`.
        rows: int32 scalar: how many of the rows there are; the others only fill up.
        moments: What to subtract from the features, and what to divide them by.
        kernel: Float32, shape `(dim, classes, k)`.
        bias: Float32, shape `(classes, k)`.
    """
    logits = head_logits((features - moments[0]) / moments[1], kernel, bias)
    losses = losses_of(log_likelihoods(logits), labels)
    predicted = tf.argmax(logits, axis=1, output_type=tf.int32)
    right = tf.equal(predicted, labels[:, None])
    present = (tf.range(features.shape[0]) < rows)[:, None]
    counted = (tf.cast(right, tf.float32), losses)
    return tf.stack([tf.reduce_sum(tf.where(present, c, 0.0), axis=0) for c in counted])


def _halving_epochs(epochs: int, halvings: int) -> set[int]:
    """Returns after how many epochs the worse half is dropped, at even intervals."""
    return {round(epochs * n / (halvings + 1)) for n in range(1, halvings + 1)} - {0}


def _better_half(values: np.ndarray) -> np.ndarray:
    """Returns the rows of the larger half, in order; of equal values the earlier."""
    order = np.argsort(-np.nan_to_num(values, nan=-np.inf), kind="stable")
    return np.sort(order[: -(-len(values) // 2)])


def _take(state: HeadState, rows: np.ndarray) -> HeadState:
    """Returns the state of some heads, which are the last axis of every part."""
    return HeadState(
        *tf.nest.map_structure(lambda values: tf.gather(values, rows, axis=-1), state)
    )


def _filled_up(parts: tuple[tf.Tensor, ...], rows: int) -> list[tf.Tensor]:
    """Adds rows of zeros, so that one compiled program serves every block."""
    missing = rows - len(parts[0])
    return [
        tf.pad(part, [[0, missing]] + [[0, 0]] * (part.shape.rank - 1))
        if missing
        else part
        for part in parts
    ]
