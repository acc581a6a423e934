"""Training and validation at the end of each epoch, of accepted and of all samples.

Keras's own numbers of an epoch are means over weights that change meanwhile, and those
of the validation are of the last weights: the gap between them is not what it seems.
Here one set of weights is asked about both. On kept features that is one matrix product
for some thousand rows, so it is done once an epoch and not in the training step.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_rsft.examination import Examination
from keras_rsft.features import FeatureSet
from keras_rsft.finetuning.features import SplitFeatures
from keras_rsft.finetuning.judged_validation import validation_judge
from keras_rsft.ledger import RejectionLedger

# Of more samples, so many are asked about, the same ones in each epoch.
MOST_SAMPLES = 5000
CHUNK_ROWS = 4096


class _Part:
    """The samples of a split that are asked about, with their features in memory."""

    def __init__(self, features: FeatureSet, seed: int):
        self.rows = np.arange(len(features))
        if len(features) > MOST_SAMPLES:
            drawn = np.random.default_rng(seed).permutation(len(features))
            self.rows = np.sort(drawn[:MOST_SAMPLES])
        self.labels = np.asarray(features.labels)[self.rows]
        self.whole_count = len(features)
        values = [
            features.views_of(self.rows[at : at + CHUNK_ROWS])[:, 0]
            for at in range(0, len(self.rows), CHUNK_ROWS)
        ]
        self._chunks = [np.asarray(chunk, np.float32) for chunk in values]

    def losses_and_hits(self, model: keras.Model) -> tuple[np.ndarray, np.ndarray]:
        """Returns cross-entropies, float32 `(m,)`, and which labels are predicted."""
        scores = [np.asarray(model(chunk, training=False)) for chunk in self._chunks]
        scores = np.concatenate(scores)
        losses = keras.losses.sparse_categorical_crossentropy(self.labels, scores)
        return np.asarray(losses), scores.argmax(axis=-1) == self.labels


class EpochCurves(keras.callbacks.Callback):
    """Adds to the logs of an epoch what the model is worth at its end.

    `train_accuracy`, `train_loss`, `train_accepted_accuracy`, `train_accepted_loss`: of
    the training samples, and of those that were accepted in this epoch.
    `val_acceptance_rate`, `val_accepted_accuracy`, `val_accepted_loss`: of the
    validation samples that the policy would accept, where it can be asked.
    `val_loss_error`: the standard error of `val_loss`. All by the given labels; NaN
    where no sample is accepted. Of more than 5,000 samples of a split, so many.

    Goes behind the `RejectionLedger`.

    Args:
        features: The splits.
        recorder: The ledger's callback.
        batch_size: Samples in a training batch.
        seed: Chooses the samples. Default 0.
        examination: Of `auto`, made with the validation split held out.
    """

    def __init__(
        self,
        features: SplitFeatures,
        recorder: RejectionLedger,
        *,
        batch_size: int,
        seed: int = 0,
        examination: Examination | None = None,
    ):
        super().__init__()
        self._recorder = recorder
        self._train = _Part(features.train, seed)
        self._validation = None
        if len(features.validation):
            self._validation = _Part(features.validation, seed)
        self._batch_size, self._seed = batch_size, seed
        self._examination = examination
        self._judge = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        if self._validation is not None:
            self._judge = validation_judge(
                self.model.policy,
                self._validation.labels,
                batch_size=self._batch_size,
                examination=self._examination,
                chosen=self._validation.rows,
                seed=self._seed,
            )

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is None:
            return
        losses, hits = self._train.losses_and_hits(self.model)
        accepted = self._recorder.last_epoch[1][self._train.rows] > 0
        logs |= _means("train", losses, hits, np.ones(len(hits), bool))
        logs |= _means("train_accepted", losses, hits, accepted)
        if self._validation is None:
            return
        losses, hits = self._validation.losses_and_hits(self.model)
        spread = float(np.std(losses)) / np.sqrt(self._validation.whole_count)
        logs["val_loss_error"] = float(spread)
        if self._judge is not None:
            accepted = self._judge(losses)
            logs |= _means("val_accepted", losses, hits, accepted)
            logs["val_acceptance_rate"] = float(accepted.mean())


def _means(
    name: str, losses: np.ndarray, hits: np.ndarray, chosen: np.ndarray
) -> dict[str, float]:
    counted = chosen & np.isfinite(losses)
    return {
        f"{name}_accuracy": float(hits[chosen].mean()) if chosen.any() else np.nan,
        f"{name}_loss": float(losses[counted].mean()) if counted.any() else np.nan,
    }
