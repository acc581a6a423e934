"""Shows a training's rejections in TensorBoard."""

from __future__ import annotations

import importlib.util
import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft._ledger import RejectionLedger
from keras_rsft._storage import numbered
from keras_rsft.data._images import decode_image
from keras_rsft.data._samples import ImageSplit
from keras_rsft.errors import InvalidArgument

IMAGE_SIZE = 128
MAX_CELL = 200
_MARKUP = frozenset("\\`*_[]()<>|~&#!")


class RejectionTensorBoard(keras.callbacks.Callback):
    """Writes for TensorBoard what each epoch of an `RSFTModel` accepted.

    Scalars: every logged value (`loss`, `accepted_loss`, `acceptance_rate`, `val_...`)
    and the policy's `threshold`, where it has one. Histograms: `losses/accepted` and
    `losses/rejected`, a value a sample, and `thresholds`, those of all epochs so far.
    Images: `rejected_images`, the rejected samples with the highest losses; and as
    text, in the same order, `rejected_samples`: their ids, given labels and losses.
    With `hparams`, the run is on the page HParams. The step is the number of the epoch,
    from 1.

    ```python
    ledger = rsft.RejectionLedger(train.ids, train.labels)
    board = rsft.RejectionTensorBoard("logs/first", ledger, images=data.train)
    model.fit(batches.dataset, callbacks=[batches.callback, ledger, board])
    ```

    Args:
        log_dir: Folder of this run's event files, made if need be.
        ledger: The ledger of the same `fit`, before this one among the callbacks.
        images: The training images, with the ids that the ledger has. Default None:
            no images.
        class_names: Names of the labels, for the text. Default: their numbers.
        max_images: Most images an epoch, at least 0. Default 25.
        hparams: Names and values (bool, int, float or str) for the page HParams.
            Default: none.

    Raises:
        InvalidArgument: If `max_images` is out of its range.
        ImportError: If the package `tensorboard` is not installed.
    """

    def __init__(
        self,
        log_dir: str | os.PathLike,
        ledger: RejectionLedger,
        *,
        images: ImageSplit | None = None,
        class_names: tuple[str, ...] | None = None,
        max_images: int = 25,
        hparams: Mapping[str, bool | int | float | str] | None = None,
    ):
        super().__init__()
        require_tensorboard()
        if max_images < 0:
            raise InvalidArgument(
                f"`max_images` must be at least 0. Received: {max_images}."
            )
        self._log_dir = os.fspath(log_dir)
        self._recorder = ledger
        self._images = images
        self._class_names = class_names
        self._max_images = max_images
        self._hparams = dict(hparams or {})
        self._thresholds: list[float] = []
        self._writer: Any = None

    def on_train_begin(self, logs: dict | None = None) -> None:
        # Opened at the first epoch's end: a resumed training has by then been given
        # back the folder that the killed one wrote to.
        self._writer = None

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        step, is_new = epoch + 1, self._writer is None
        if is_new:
            self._writer = tf.summary.create_file_writer(self._log_dir)
        with self._writer.as_default():
            if is_new and self._hparams:
                from tensorboard.plugins.hparams import api

                # Else runs with equal settings on other data would count as one.
                api.hparams(self._hparams, trial_id=os.path.basename(self._log_dir))
            for name, value in (logs or {}).items():
                tf.summary.scalar(name, value, step)
            threshold = self.model.policy.threshold_in_use()
            if threshold is not None:
                self._thresholds.append(threshold)
                tf.summary.scalar("threshold", threshold, step)
                tf.summary.histogram("thresholds", self._thresholds, step)
            if self._recorder.last_epoch is not None:
                self._write_samples(*self._recorder.last_epoch, step)
        self._writer.flush()

    def on_train_end(self, logs: dict | None = None) -> None:
        if self._writer is not None:
            self._writer.close()

    def _write_samples(
        self, losses: np.ndarray, accepted: np.ndarray, step: int
    ) -> None:
        finite = np.isfinite(losses)
        for name, chosen in (("accepted", accepted > 0), ("rejected", accepted == 0)):
            values = losses[finite & chosen]
            if len(values):
                tf.summary.histogram(f"losses/{name}", values, step)
        suspects = most_suspicious(losses, accepted == 0, self._max_images)
        if not len(suspects):
            return
        ledger = self._recorder.ledger
        lines = ["| id | given label | loss |", "|---|---|---|"]
        for sample in suspects:
            label = ledger.labels[sample]
            name = self._class_names[label] if self._class_names else label
            cells = (_cell(ledger.ids[sample]), _cell(name), f"{losses[sample]:.4g}")
            lines.append(f"| {' | '.join(cells)} |")
        tf.summary.text("rejected_samples", "\n".join(lines), step)
        if shown := self._decoded(suspects):
            tf.summary.image(
                "rejected_images", np.stack(shown), step, max_outputs=len(shown)
            )

    def _decoded(self, suspects: np.ndarray) -> list[np.ndarray]:
        """Returns the images that can still be read, uint8 `(128, 128, 3)` each."""
        if self._images is None:
            return []
        index = {sample_id: at for at, sample_id in enumerate(self._images.ids)}
        shown = []
        for sample_id in self._recorder.ledger.ids[suspects].tolist():
            try:
                encoded = tf.constant(self._images.encoded(index[sample_id]))
                image = decode_image(encoded, (IMAGE_SIZE, IMAGE_SIZE))
            except (KeyError, OSError, tf.errors.OpError):
                continue  # Gone since its features were cached.
            shown.append(np.clip(image.numpy(), 0, 255).astype(np.uint8))
        return shown


def most_suspicious(losses: np.ndarray, rejected: np.ndarray, most: int) -> np.ndarray:
    """Returns at most `most` rejected samples, highest or not finite losses first."""
    samples = np.flatnonzero(rejected)
    ranked = np.where(np.isfinite(losses[samples]), losses[samples], np.inf)
    return samples[np.argsort(-ranked, kind="stable")[:most]]


def hparams_of(settings: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    flat: dict[str, bool | int | float | str] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            inner = hparams_of(value)
            flat |= {f"{name}.{key}": one for key, one in inner.items()}
        elif isinstance(value, (bool, int, float, str)) and value == value:
            flat[name] = value  # NaN, which alone differs from itself, says nothing.
    return flat


def free_log_folder(root: str | os.PathLike, name: str) -> Path:
    """Returns `ROOT/NAME`, or the first of `ROOT/NAME-1`, ... that does not exist."""
    candidates = itertools.chain([Path(root) / name], numbered(root, name))
    return next(folder for folder in candidates if not folder.exists())


def require_tensorboard() -> None:
    if importlib.util.find_spec("tensorboard") is None:
        raise ImportError(
            'TensorBoard is not installed: `pip install "keras_rsft[tensorboard]"`.'
        )


def _cell(text: object) -> str:
    """Returns text that cannot leave its cell of a Markdown table."""
    shown = " ".join(str(text).split())[:MAX_CELL]
    return "".join(f"&#{ord(c)};" if c in _MARKUP else c for c in shown)
