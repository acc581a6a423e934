"""What happened to each training sample: losses, accepted, rejected."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import ops

from keras_rsft import _storage
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import LabelQuality

COLUMNS = (
    "id",
    "split",
    "given_label",
    "clean_label",
    "predicted_label",
    "predicted_probability",
    "loss_mean",
    "loss_last",
    "loss_trend",
    "seen",
    "accepted",
    "rejected",
    "suspicion",
    "right_probability",
    "looks_wrong",
)
HISTOGRAM_COLUMNS = ("epoch", "threshold", "low", "high", "accepted", "rejected")
# Ten bins a decade: clean and noisy labels stand apart by their loss's logarithm.
# What lies outside is counted in the first and the last bin.
HISTOGRAM_EDGES = np.geomspace(1e-3, 1e2, 51)
_NOT_SEEN = -1.0
_COUNTS = ("seen", "accepted", "_loss_sum", "_finite", "_loss_first", "loss_last")


class Ledger:
    """The record of `n` training samples, 44 bytes each beside ids and labels.

    Args:
        ids: String array `(n,)`.
        labels: Integer array `(n,)`, the given labels.
        clean_labels: Integer array `(n,)`, the right labels, or None.

    Attributes:
        seen: int32 array `(n,)`, how often the sample was judged.
        accepted: int32 array `(n,)`, how often it was accepted.
        predicted: int32 array `(n,)`, predicted labels; -1 where not known.
        predicted_probability: Float32 array `(n,)`; NaN where not known.
        loss_last: Float32 array `(n,)`, the last loss, NaN or infinite as it came.
        right_probability: Float32 array `(n,)`, how likely the given label is right;
            NaN where the labels were not audited.
        looks_wrong: int32 array `(n,)`, 1 where the given label looks wrong, else 0.

    Raises:
        InvalidArgument: If the arrays differ in length.
    """

    def __init__(self, ids: Any, labels: Any, clean_labels: Any = None):
        self.ids, self.labels = np.asarray(ids), np.asarray(labels, np.int32)
        clean = self.labels if clean_labels is None else clean_labels
        _require_equally_long(ids=self.ids, labels=labels, clean_labels=clean)
        is_known = clean_labels is not None
        self.clean_labels = np.asarray(clean, np.int32) if is_known else None
        count = len(self.ids)
        self.seen, self.accepted, self._finite = np.zeros((3, count), np.int32)
        self._loss_first, self.loss_last = np.full((2, count), np.nan, np.float32)
        self._loss_sum = np.zeros(count, np.float32)
        self.predicted = np.full(count, -1, np.int32)
        self.predicted_probability, self.right_probability = np.full(
            (2, count), np.nan, np.float32
        )
        self.looks_wrong = np.zeros(count, np.int32)
        self._suspicion: np.ndarray | None = None
        self._reviewed = np.zeros(count, bool)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def rejected(self) -> np.ndarray:
        """int32 array `(n,)`, how often the sample was rejected."""
        return self.seen - self.accepted

    @property
    def loss_mean(self) -> np.ndarray:
        """Float32 array `(n,)`, mean of the finite losses; NaN if there is none."""
        counts = np.where(self._finite, self._finite, np.nan)
        return self._loss_sum / counts.astype(np.float32)

    @property
    def loss_trend(self) -> np.ndarray:
        """Float32 array `(n,)`: last loss less first loss; falling is negative."""
        return self.loss_last - self._loss_first

    @property
    def suspicion(self) -> np.ndarray:
        """Float32 array `(n,)` in [0, 1]; the higher, the likelier a wrong label.

        One minus the probability of the given label, where probabilities were
        noted; else the rank of the mean loss among the samples seen. 0 for those that
        were never seen, and for a label that was reviewed.
        """
        suspicion = self._suspicion
        if suspicion is None:
            unseen = self.seen == 0
            losses = np.nan_to_num(self.loss_mean, nan=np.inf)
            losses = np.where(unseen, -np.inf, losses)
            order = np.argsort(np.argsort(losses, kind="stable"), kind="stable")
            ranks = np.maximum(order - unseen.sum(), 0)
            suspicion = (ranks / max(ranks.max(initial=0), 1)).astype(np.float32)
        return np.where(self._reviewed, np.float32(0), suspicion)

    def note_epoch(self, losses: np.ndarray, accepted: np.ndarray) -> None:
        """Adds one epoch.

        Args:
            losses: Float array `(n,)`.
            accepted: Float array `(n,)`: 1 accepted, 0 rejected, negative not seen.
        """
        seen = accepted >= 0
        finite = seen & np.isfinite(losses)
        first = seen & (self.seen == 0)
        self._loss_first[first] = losses[first]
        self.loss_last[seen] = losses[seen]
        self._loss_sum[finite] += losses[finite]
        self._finite[finite] += 1
        self.seen[seen] += 1
        self.accepted[seen] += accepted[seen] > 0

    def note_probabilities(self, probabilities: np.ndarray) -> None:
        """Notes predictions, out-of-sample ones where they can be had.

        Args:
            probabilities: Float array `(n, classes)` in [0, 1].
        """
        rows = np.arange(len(self))
        self.predicted = probabilities.argmax(axis=1).astype(np.int32)
        self.predicted_probability = probabilities.max(axis=1).astype(np.float32)
        given = probabilities[rows, self.labels]
        self._suspicion = (1.0 - given).astype(np.float32)

    def note_quality(self, quality: LabelQuality) -> None:
        """Notes what an audit found out about the labels.

        Args:
            quality: That of these samples.
        """
        self.note_probabilities(quality.out_of_sample)
        self.right_probability = quality.right_probability
        self.looks_wrong = quality.looks_wrong.astype(np.int32)
        if quality.reviewed is not None:
            self.note_reviewed(quality.reviewed)

    def note_reviewed(self, reviewed: np.ndarray) -> None:
        """Notes which labels a reviewer has decided on: not to be asked again.

        Args:
            reviewed: Boolean array `(n,)`: True where a reviewer confirmed or
                corrected the label.
        """
        self._reviewed |= reviewed

    def rows(
        self, class_names: tuple[str, ...], split: str = "train"
    ) -> Iterator[list[Any]]:
        """Yields one row a sample, in the order of `COLUMNS`; unknown is empty.

        Args:
            class_names: Names of the classes.
            split: Name of the samples' split. Default `"train"`.
        """
        named = [*class_names, ""]  # -1, not known, is the empty name.
        unknown = np.full(len(self), -1)
        clean = unknown if self.clean_labels is None else self.clean_labels
        numbers = [getattr(self, name) for name in COLUMNS[5:]]
        columns = (self.ids, self.labels, clean, self.predicted, *numbers)
        for sample_id, *values in zip(*columns, strict=True):
            names = (named[label] for label in values[:3])
            yield [str(sample_id), split, *names, *map(_written, values[3:])]


class RejectionLedger(keras.callbacks.Callback):
    """Keeps a `Ledger` of an `RSFTModel` while it is fitted.

    Works in `fit(x, y)` of arrays and of a `PyDataset`, whose rows are numbered from 0,
    and with a `tf.data.Dataset` from `with_ids`. Without arguments it takes the labels
    from what `fit` gets, and the numbers as ids: all but arrays are read once for that,
    before the first epoch. Where the right labels are known, each epoch's logs get
    `rejection_precision` (fraction of the rejected samples whose label is wrong) and
    `rejection_recall` (fraction of the wrong labels rejected), 0 where there is nothing
    to divide by.

    Of a policy at level `"element"` it keeps samples all the same: the mean of the
    finite losses of a sample's elements, and as accepted those of whose elements at
    least half were.

    Args:
        ids: String array `(n,)`, named by the sample indices. Default: `"0"`, `"1"`...
        labels: Integer array `(n,)`, the given labels. Default: those that `fit` gets.
        clean_labels: Integer array `(n,)`, the right labels, or None.

    Attributes:
        ledger: The `Ledger`. Where no labels are given, there is none before `fit`.
        acceptance_by_class: A float32 array `(classes,)` an epoch: accepted share of
            the samples seen of each class, NaN where none was seen.
        last_epoch: Of the last epoch two float arrays `(n,)`: the losses, and what
            became of the samples: 1 accepted, 0 rejected, negative not seen. None
            before the first.
        loss_histograms: A `LossHistogram` an epoch.
        page: Where `write_report` wrote the page of this ledger, or None.

    Raises:
        InvalidArgument: If the arrays differ in length; in `fit`, if its data do not
            say which samples there are, or the targets are not classes.

    Example:
        >>> import keras_rsft as rsft
        >>> model = rsft.RSFTModel(rsft.build_head(2, 2), rsft.KeepFraction(0.5))
        >>> model.compile("sgd", "sparse_categorical_crossentropy")
        >>> x, y = np.eye(2, dtype="float32"), np.array([0, 1])
        >>> ledger = rsft.RejectionLedger()
        >>> history = model.fit(x, y, epochs=3, callbacks=[ledger], verbose=0)
        >>> int(ledger.ledger.seen.sum()), int(ledger.ledger.rejected.sum())
        (6, 3)
    """

    needs_sample_index = True

    def __deepcopy__(self, memo: dict) -> RejectionLedger:
        raise InvalidArgument(
            "A ledger is of one training, and cannot be copied: Keras Tuner copies "
            "callbacks for each trial. Give one to `fit` within the hypermodel's `fit`."
        )

    def __init__(self, ids: Any = None, labels: Any = None, clean_labels: Any = None):
        super().__init__()
        self._ids, self._clean_labels = ids, clean_labels
        self._ledger: Ledger | None = None
        self._samples: Any = None
        self.page: Path | None = None
        self.acceptance_by_class: list[np.ndarray] = []
        self.last_epoch: tuple[np.ndarray, np.ndarray] | None = None
        self.loss_histograms: list[LossHistogram] = []
        if labels is not None:
            self._begin(labels)

    @property
    def ledger(self) -> Ledger:
        """The `Ledger`, once the labels are known.

        Raises:
            InvalidArgument: If they are not yet.
        """
        if self._ledger is None:
            raise InvalidArgument(
                "The ledger takes its labels from `fit`. Received: none yet. Call "
                "`fit(..., callbacks=[ledger])` first."
            )
        return self._ledger

    def learn_samples(self, samples: Any, quality: LabelQuality | None) -> None:
        """Takes what `RSFTModel.fit` knows of its samples, before it begins.

        Args:
            samples: The samples with their `labels` and `count`; None where the data
                do not say which samples there are.
            quality: What an audit found, or None.

        Raises:
            InvalidArgument: If the samples are not known, or others than before.
        """
        if self._ledger is None:
            if samples is None:
                raise InvalidArgument(
                    "A ledger must know which samples there are. Received: data that "
                    "do not say it. Give `fit` arrays or a `PyDataset`; number a "
                    "`tf.data.Dataset` by `rsft.with_ids(dataset)`, before it is "
                    "shuffled."
                )
            self._begin(samples.labels)
        known = None if samples is None else samples.count
        if known not in (None, len(self.ledger)):
            raise InvalidArgument(
                f"The ledger is of {len(self.ledger):,} samples. Received: {known:,} "
                "in `fit`. Make a new RejectionLedger for other data."
            )
        self._samples = samples
        if quality is not None and quality.can_judge:
            self.ledger.note_quality(quality)

    def _begin(self, labels: Any) -> None:
        ids = np.arange(len(labels)).astype(str) if self._ids is None else self._ids
        self._ledger = Ledger(ids, labels, self._clean_labels)
        unseen = np.full((len(self._ledger), 2), _NOT_SEEN, np.float32)
        self._epoch = keras.Variable(
            unseen, dtype="float32", trainable=False, name="rejection_ledger"
        )

    def inputs(self, rows: np.ndarray) -> dict[int, Any]:
        """Returns what `fit` was given of some samples, by index; reads its data once.

        Args:
            rows: Integers `(k,)`, indices of samples.
        """
        return {} if self._samples is None else self._samples.inputs(rows)

    def tables(self, class_names: Sequence[str]) -> dict[str, tuple[Any, Any]]:
        """Returns header and rows of each file that a run folder has of this ledger.

        Args:
            class_names: Names of the classes.
        """
        epochs = enumerate(self.acceptance_by_class, 1)
        missing = [math.nan] * len(class_names)
        return {
            _storage.LEDGER_FILE: (COLUMNS, self.ledger.rows(tuple(class_names))),
            _storage.ACCEPTANCE_FILE: (
                ["epoch", *class_names],
                ([at, *row, *missing[len(row) :]] for at, row in epochs),
            ),
            _storage.HISTOGRAMS_FILE: (
                HISTOGRAM_COLUMNS,
                (
                    row
                    for at, histogram in enumerate(self.loss_histograms, 1)
                    for row in histogram.rows(at)
                ),
            ),
        }

    def review(
        self,
        images: Any = None,
        *,
        class_names: Sequence[str] | None = None,
        count: int = 50,
    ) -> Any:
        """Shows the most suspicious samples in a notebook, to decide on their labels.

        With buttons where ipywidgets is installed (the extra `notebook`), else as a
        table with the way to the report. A label is proposed where the policy `"auto"`
        audited the labels, or `Ledger.note_probabilities` was called.

        ```python
        review = ledger.review()
        review  # The last line of a cell: shows it.
        rsft.finetune((x, y), corrections=review)
        ```

        Args:
            images: The training samples' pictures, `(n, height, width[, channels])`.
                Default: the inputs of `fit`, where they are pictures.
            class_names: Names of the classes, by label. Default: the numbers.
            count: How many samples to show, at least 1. Default 50.

        Returns:
            The decisions, a sequence of rows of corrections, as `finetune`,
            `audit_labels` and `apply_corrections` take them; `.to_frame()` makes a
            DataFrame of them, `.decide(id, decision)` notes one.

        Raises:
            InvalidArgument: If `fit` was not called, or an argument does not fit it.
        """
        from keras_rsft.report._own import Review

        return Review(self, images, class_names, count)

    def state(self) -> dict[str, np.ndarray]:
        """Returns copies of what the epochs so far have left, by name."""
        # A threshold of None, which no array of numbers can hold, becomes NaN.
        histograms = [
            (h.threshold, *h.accepted, *h.rejected) for h in self.loss_histograms
        ]
        state = {name: getattr(self.ledger, name).copy() for name in _COUNTS} | {
            "acceptance_by_class": np.array(self.acceptance_by_class, np.float32),
            "loss_histograms": np.array(histograms, np.float64),
        }
        if self.last_epoch is not None:
            state["last_epoch"] = np.stack(self.last_epoch)
        return state

    def restore(self, state: dict[str, np.ndarray]) -> None:
        """Resumes from what `state` gave at the end of an epoch.

        Args:
            state: Arrays by name, of a ledger of the same samples.
        """
        for name in _COUNTS:
            setattr(self.ledger, name, state[name].copy())
        self.acceptance_by_class = list(state["acceptance_by_class"])
        if "last_epoch" in state:
            self.last_epoch = tuple(state["last_epoch"])
        self.loss_histograms = [
            LossHistogram(
                None if np.isnan(threshold) else float(threshold),
                *np.split(np.array(counts, np.int64), 2),
            )
            for threshold, *counts in state["loss_histograms"]
        ]

    def set_model(self, model: keras.Model) -> None:
        super().set_model(model)
        if self._ledger is not None:  # Else it is told again, by `fit`.
            model.record_with(_Recorder(self._epoch))

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        losses, accepted = self._epoch.numpy().T.copy()
        self._epoch.assign(ops.full(self._epoch.shape, _NOT_SEEN))
        self.ledger.note_epoch(losses, accepted)
        self.last_epoch = (losses, accepted)
        threshold = self.model.policy.threshold_in_use()
        self.loss_histograms.append(loss_histogram(losses, accepted, threshold))
        epochs = len(self.loss_histograms)
        self.model.policy.note_losses(self.ledger.loss_mean, epochs)
        seen = accepted >= 0
        labels = self.ledger.labels
        with np.errstate(invalid="ignore"):
            share = np.bincount(labels, accepted > 0) / np.bincount(labels, seen)
        self.acceptance_by_class.append(share.astype(np.float32))
        if logs is not None and self.ledger.clean_labels is not None:
            logs |= rejection_quality(
                (accepted == 0)[seen], (labels != self.ledger.clean_labels)[seen]
            )


class _Recorder:
    def __init__(self, epoch: keras.Variable):
        self.variables = [epoch]

    def __call__(self, sample_index: Any, losses: Any, accept_mask: Any) -> None:
        rows = ops.stack([losses, ops.cast(accept_mask, "float32")], 1)
        (epoch,) = self.variables
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf  # `assign` would copy all of it in every step.

            epoch.value.scatter_update(tf.IndexedSlices(rows, sample_index))
        else:
            index = sample_index[:, None]
            epoch.assign(ops.scatter_update(epoch.value, index, rows))


def rejection_quality(rejected: np.ndarray, wrong: np.ndarray) -> dict[str, float]:
    """Returns precision and recall of rejection, 0 where nothing is to divide by."""
    hits = int((rejected & wrong).sum())
    return {
        "rejection_precision": hits / max(int(rejected.sum()), 1),
        "rejection_recall": hits / max(int(wrong.sum()), 1),
    }


class LossHistogram(NamedTuple):
    """The live threshold and int64 `(50,)` counts in the bins of one epoch's losses."""

    threshold: float | None
    accepted: np.ndarray
    rejected: np.ndarray

    def rows(self, epoch: int) -> Iterator[list[Any]]:
        """Yields a row for each bin that is not empty, as in `HISTOGRAM_COLUMNS`."""
        shown = "" if self.threshold is None else f"{self.threshold:.6g}"
        for index in np.flatnonzero(self.accepted + self.rejected):
            low, high = (f"{edge:.6g}" for edge in HISTOGRAM_EDGES[index : index + 2])
            counts = (int(self.accepted[index]), int(self.rejected[index]))
            yield [epoch, shown, low, high, *counts]


def loss_histogram(
    losses: np.ndarray, accepted: np.ndarray, threshold: float | None = None
) -> LossHistogram:
    """Counts the finite losses of an epoch, as `Ledger.note_epoch` takes it."""
    clipped = np.clip(losses, HISTOGRAM_EDGES[0], HISTOGRAM_EDGES[-1])
    finite = np.isfinite(losses)
    counts = (
        np.histogram(clipped[finite & chosen], HISTOGRAM_EDGES)[0]
        for chosen in (accepted > 0, accepted == 0)
    )
    return LossHistogram(threshold, *counts)


def _require_equally_long(**arrays: Any) -> None:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) > 1:
        names = ", ".join(f"`{name}`" for name in lengths)
        raise InvalidArgument(f"{names} must be equally long. Received: {lengths}.")


def _written(number: Any) -> str:
    if isinstance(number, np.integer):
        return str(number)
    return "" if np.isnan(number) else f"{number:.6g}"
