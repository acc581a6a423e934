"""Training and validation at the end of each epoch, by the same weights.

Keras's own numbers of an epoch are means over weights that change meanwhile, and those
of the validation are of the last weights: the gap between them is not what it seems.
On cached features one matrix product for some thousand rows once an epoch mends that.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_rsft.features import FeatureSet
from keras_rsft.finetuning.features import SplitFeatures
from keras_rsft.ledger import RejectionLedger

# At most this many samples per split, the same ones in each epoch.
MOST_SAMPLES = 5000
CHUNK_ROWS = 4096


class _Part:
    """The samples of a split that are looked at, with their features in memory."""

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
        scores = np.concatenate(
            [np.asarray(model(chunk, training=False)) for chunk in self._chunks]
        )
        losses = keras.losses.sparse_categorical_crossentropy(self.labels, scores)
        return np.asarray(losses), scores.argmax(axis=-1) == self.labels


class EpochCurves(keras.callbacks.Callback):
    """Logs `train_accuracy` and `train_loss` of the weights at the end of the epoch.

    Also `train_accepted_accuracy` and `train_accepted_loss`, of the samples that were
    accepted in this epoch, NaN without any; and `val_loss_error`, the standard error of
    `val_loss`. All by the given labels. Goes behind the `RejectionLedger`.
    """

    def __init__(self, features: SplitFeatures, recorder: RejectionLedger, seed: int):
        super().__init__()
        self._recorder = recorder
        self._train = _Part(features.train, seed)
        self._validation = None
        if len(features.validation):
            self._validation = _Part(features.validation, seed)

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is None or self._recorder.last_epoch is None:
            return
        losses, hits = self._train.losses_and_hits(self.model)
        accepted = self._recorder.last_epoch[1][self._train.rows] > 0
        logs |= _means("train", losses, hits, np.ones(len(hits), bool))
        logs |= _means("train_accepted", losses, hits, accepted)
        if self._validation is not None:
            losses, _ = self._validation.losses_and_hits(self.model)
            error = np.std(losses) / np.sqrt(self._validation.whole_count)
            logs["val_loss_error"] = float(error)


def _means(
    name: str, losses: np.ndarray, hits: np.ndarray, chosen: np.ndarray
) -> dict[str, float]:
    counted = chosen & np.isfinite(losses)
    return {
        f"{name}_accuracy": float(hits[chosen].mean()) if chosen.any() else np.nan,
        f"{name}_loss": float(losses[counted].mean()) if counted.any() else np.nan,
    }
