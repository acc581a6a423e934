"""The model of one trial, as Keras Tuner wants it built and fitted."""

from __future__ import annotations

import functools
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner.errors import FailedTrialError

from keras_rsft.config import SearchSpace, TrainConfig
from keras_rsft.errors import DataError
from keras_rsft.examination import Examination, examine_labels
from keras_rsft.features import TrainingBatches, batches_of
from keras_rsft.finetuning import SplitFeatures
from keras_rsft.finetuning.head_training import untrained_head
from keras_rsft.ledger import RejectionLedger
from keras_rsft.model import RSFTModel
from keras_rsft.searching.space import Space, check_space, settings_of_values

DIVERGED = (
    "The weights became NaN or infinite: the learning rate is too high for this data."
)


class RSFTHyperModel(keras_tuner.HyperModel):
    """A new head on kept features, with its policy, for any of Keras Tuner's tuners.

    ```python
    hypermodel = RSFTHyperModel(features)
    tuner = keras_tuner.RandomSearch(hypermodel, "val_accuracy", max_trials=20)
    tuner.search()
    ```

    Args:
        features: Kept features; their test split is never looked at.
        settings: Epochs, batch size and seed, and every number that `space` leaves
            open. Default: `TrainConfig()`.
        space: What is searched. Default: `SearchSpace()`.
        progress: Show a progress bar while labels are examined. Default True.

    Raises:
        InvalidArgument: If the space is empty or contradicts itself.
        DataError: If there is no validation split to judge trials by.
    """

    def __init__(
        self,
        features: SplitFeatures,
        *,
        settings: TrainConfig | None = None,
        space: Space | None = None,
        progress: bool = True,
    ):
        super().__init__()
        if not len(features.validation):
            raise DataError(
                "A search judges its trials by a validation split, and there is none."
            )
        self.features = features
        self.settings = settings or TrainConfig()
        self.space = space or SearchSpace()
        check_space(self.space, self.settings)
        self._progress = progress

    @functools.cached_property
    def examination(self) -> Examination:
        """What `auto` knows about the labels; found out once, for all trials."""
        return examine_labels(
            self.features.train,
            len(self.features.class_names),
            seed=self.settings.seed,
            progress=self._progress,
        )

    def settings_of(self, hp: keras_tuner.HyperParameters) -> TrainConfig:
        """Returns how to train a trial, and declares what is searched.

        Args:
            hp: The trial's hyperparameters.
        """
        return settings_of_values(self.space(hp), self.settings)

    def build(self, hp: keras_tuner.HyperParameters) -> RSFTModel:
        """Returns a trial's compiled, untrained `RSFTModel` over features."""
        settings = self.settings_of(hp)
        auto = settings.policy.name == "auto"
        return untrained_head(
            self.features, settings, self.examination if auto else None
        )

    def fit(
        self,
        hp: keras_tuner.HyperParameters,
        model: RSFTModel,
        *args: Any,
        epochs: int | None = None,
        callbacks: Any = (),
        **kwargs: Any,
    ) -> keras.callbacks.History:
        """Trains a trial on the kept features; takes what `keras.Model.fit` takes.

        Raises:
            keras_tuner.errors.FailedTrialError: If the weights became NaN.
        """
        settings, train = self.settings_of(hp), self.features.train
        batches = TrainingBatches(
            train,
            batch_size=settings.batch_size,
            seed=settings.seed,
            sample_index=True,
        )
        own: list[keras.callbacks.Callback] = [batches.callback]
        if model.policy.needs_ledger:
            own.append(RejectionLedger(train.ids, train.labels))
        history = model.fit(
            batches.dataset,
            *args,
            validation_data=batches_of(self.features.validation),
            epochs=settings.epochs if epochs is None else epochs,
            callbacks=[*own, *callbacks],
            shuffle=False,
            **({"verbose": 0} | kwargs),
        )
        if not np.isfinite(history.history["val_loss"]).all():
            raise FailedTrialError(DIVERGED)
        return history
