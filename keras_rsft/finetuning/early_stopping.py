"""Ends the training of a head early, and keeps the weights of its best epoch.

Keras's own callback does it; what it remembers is part of a checkpoint, so that a run
that was killed ends in the same epoch with the same weights.
"""

from __future__ import annotations

import keras
import numpy as np

from keras_rsft.errors import InvalidArgument
from keras_rsft.finetuning.settings import TrainingSettings
from keras_rsft.finetuning.split_features import SplitFeatures


def early_stopping(settings: TrainingSettings) -> list[keras.callbacks.Callback]:
    """Returns the callback that ends a training early, or none.

    By accuracy rather than loss: under wrong labels the loss of a validation split is
    ruled by those it gets wrong, while the model that is best on right labels still
    has the best accuracy on noisy ones (Chen et al., "Robustness of accuracy metric and
    its inspirations in learning with noisy labels", AAAI 2021).
    """
    if settings.early_stopping is None:
        return []
    return [
        keras.callbacks.EarlyStopping(
            monitor="val_accuracy",
            mode="max",
            patience=settings.early_stopping,
            restore_best_weights=True,
        )
    ]


def best_of_all_epochs(
    monitor: str, mode: str, *, epochs: int
) -> keras.callbacks.Callback:
    """Returns the callback that ends no training and keeps its best epoch's weights.

    Args:
        monitor: Name of what is best, as in the logs: `"val_accuracy"`.
        mode: `"max"` or `"min"`.
        epochs: Of the training: the patience, so that no dip ends it.
    """
    return keras.callbacks.EarlyStopping(
        monitor=monitor, mode=mode, patience=epochs, restore_best_weights=True
    )


def kept_epoch(settings: TrainingSettings, history: dict[str, list[float]]) -> int:
    """Returns which epoch's weights are kept, from 0: the last, or the first best."""
    if settings.early_stopping is None:
        return len(history["acceptance_rate"]) - 1
    return int(np.argmax(history["val_accuracy"]))


def require_validation(settings: TrainingSettings, features: SplitFeatures) -> None:
    """Raises InvalidArgument where early stopping has nothing to go by."""
    if settings.early_stopping is not None and not len(features.validation):
        raise InvalidArgument(
            "Early stopping goes by the validation split, and there is none. Leave out "
            "`--early-stopping`, or give `--validation-fraction`."
        )
