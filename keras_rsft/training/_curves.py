"""Learning curves of both splits, and whether they show overfitting."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence

import keras
import numpy as np

from keras_rsft._ledger import RejectionLedger
from keras_rsft.features._store import FeatureSet
from keras_rsft.training._features import SplitFeatures

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

    def losses_and_hits(
        self, model: keras.Model, credits: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns cross-entropies, float32 `(m,)`, and which labels are predicted.

        With `credits` `(m, classes)`, both by right labels.
        """
        scores = np.concatenate(
            [np.asarray(model(chunk, training=False)) for chunk in self._chunks]
        )
        predicted = scores.argmax(axis=-1)
        if credits is not None:
            losses = -np.log(np.clip(scores, keras.config.epsilon(), 1.0)) * credits
            return losses.sum(axis=1), credits[np.arange(len(credits)), predicted]
        losses = keras.losses.sparse_categorical_crossentropy(self.labels, scores)
        return np.asarray(losses), predicted == self.labels


class EpochCurves(keras.callbacks.Callback):
    """Logs `train_accuracy` and `train_loss` of the weights at the end of the epoch.

    By `credits` `(validation samples, classes)` it logs `val_loss_estimated` too; the
    errors of validation are those of the accuracy and the loss by right labels.
    """

    def __init__(
        self,
        features: SplitFeatures,
        recorder: RejectionLedger,
        seed: int,
        credits: np.ndarray | None = None,
    ):
        super().__init__()
        self._recorder = recorder
        self._train = _Part(features.train, seed)
        self._validation, self._credits = None, None
        if len(features.validation):
            self._validation = _Part(features.validation, seed)
            if credits is not None:
                self._credits = credits[self._validation.rows]

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if logs is None or self._recorder.last_epoch is None:
            return
        losses, hits = self._train.losses_and_hits(self.model)
        accepted = self._recorder.last_epoch[1][self._train.rows] > 0
        chosen_of = {"train": np.ones(len(hits), bool), "train_accepted": accepted}
        for name, chosen in chosen_of.items():
            counted = chosen & np.isfinite(losses)
            hit_rate = hits[chosen].mean() if chosen.any() else np.nan
            mean_loss = losses[counted].mean() if counted.any() else np.nan
            logs[f"{name}_accuracy"] = float(hit_rate)
            logs[f"{name}_loss"] = float(mean_loss)
        if (part := self._validation) is not None:
            losses, hits = part.losses_and_hits(self.model, self._credits)
            if self._credits is not None:
                logs["val_loss_estimated"] = float(losses.mean())
            for name, values in (("loss", losses), ("accuracy", hits)):
                error = float(np.std(values)) / math.sqrt(part.whole_count)
                logs[f"val_{name}_error"] = error


# Overfitting --------------------------------------------------------------------------

# Epochs whose median a curve is smoothed by, and how many of the last must have fallen.
WINDOW = 5
LASTING = 3


@dataclasses.dataclass(frozen=True)
class Overfitting:
    """Validation fell while training went on improving.

    Validation is judged by right labels, known or estimated, or by the given ones.
    """

    measure: str
    best_epoch: int
    epochs: int
    validation: tuple[float, float]
    training: tuple[float, float]
    standard_error: float
    by_right_labels: bool = False

    @property
    def sentence(self) -> str:
        worse, better = "fell", "rose"
        if self.measure == "loss":
            worse, better = better, worse
        (best, last), (before, after) = self.validation, self.training

        def shown(value: float) -> str:
            is_share = self.measure == "accuracy"
            return f"{100 * value:.1f} %" if is_share else f"{value:.3g}"

        by = " by right labels" if self.by_right_labels else ""
        return (
            f"Overfitting from epoch {self.best_epoch + 1} on: validation "
            f"{self.measure}{by} {worse} from {shown(best)} to {shown(last)} (standard "
            f"error {shown(self.standard_error)}), while training {self.measure} "
            f"{better} from {shown(before)} to {shown(after)}. Try `--early-stopping`, "
            f"`--epochs {self.best_epoch}` or `--weight-decay`."
        )


def find_overfitting(
    curves: Mapping[str, Sequence[float]], validation_size: int
) -> Overfitting | None:
    for measure, sign in (("accuracy", 1.0), ("loss", -1.0)):
        training = curves.get(f"train_accepted_{measure}", ())
        # By right labels, where that is possible: wrong ones fit a good head badly.
        right = curves.get(f"val_{measure}_estimated")
        validation = curves.get(f"val_{measure}", ()) if right is None else right
        errors = curves.get(f"val_{measure}_error", ())
        if measure == "accuracy":
            least = [accuracy_error(value, validation_size) for value in validation]
            errors = list(map(max, least, errors or least))
        epochs = min(len(training), len(validation), len(errors))
        rows = [row[:epochs] for row in (training, validation, errors)]
        if epochs < WINDOW + LASTING or not np.isfinite(rows).all():
            continue
        learnt, smooth, smooth_errors = map(_smoothed, rows)
        best = max(range(len(smooth)), key=lambda at: sign * smooth[at])
        around = range(best, best + WINDOW)  # The epochs of that median.
        best_epoch = max(around, key=lambda at: sign * validation[at])
        last = range(len(smooth) - LASTING, len(smooth))
        if best < last[0] and all(
            sign * (smooth[best] - smooth[at]) > smooth_errors[best]
            and sign * (learnt[at] - learnt[best]) > 0
            for at in last
        ):
            return Overfitting(
                measure=measure,
                best_epoch=best_epoch + 1,
                epochs=epochs,
                validation=(smooth[best], smooth[-1]),
                training=(learnt[best], learnt[-1]),
                standard_error=smooth_errors[best],
                by_right_labels=right is not None,
            )
    return None


def accuracy_error(accuracy: float, count: int) -> float:
    """Returns the standard error of an accuracy in [0, 1] of some samples."""
    share = (min(max(accuracy, 0.0), 1.0) * count + 2) / (count + 4)
    return math.sqrt(share * (1 - share) / (count + 4))


def _smoothed(values: Sequence[float]) -> list[float]:
    """Returns the medians of 5 epochs in a row, which two odd ones do not move."""
    return [
        statistics.median(values[at : at + WINDOW])
        for at in range(len(values) - WINDOW + 1)
    ]
