"""Keras Tuner's oracles and tuners by name, with their known faults mended."""

from __future__ import annotations

import importlib.util
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.errors import FailedTrialError
from keras_tuner.oracles import (
    BayesianOptimizationOracle,
    GridSearchOracle,
    HyperbandOracle,
    RandomSearchOracle,
)

from keras_rsft.config import BATCHED, HYPERBAND, SearchConfig
from keras_rsft.model import RSFTModel
from keras_rsft.searching.batched_tuner import BatchedTuner
from keras_rsft.searching.durable import DurableOracle, OnEpoch, TrialsTuner
from keras_rsft.searching.hypermodel import RSFTHyperModel

TRIALS_FOLDER = "trials"


class RandomOracle(DurableOracle, RandomSearchOracle):
    """Keras Tuner's random oracle."""


class BayesianOracle(DurableOracle, BayesianOptimizationOracle):
    """Keras Tuner's Bayesian oracle."""


class BandsOracle(DurableOracle, HyperbandOracle):
    """Keras Tuner's Hyperband oracle."""


class GridOracle(DurableOracle, GridSearchOracle):
    """Keras Tuner's grid, which resumes after a stop and hands out many at once.

    The stock oracle forgets at a stop which combinations have been handed out
    (github.com/keras-team/keras-tuner/issues/1055), and waits for each trial's end
    before it proposes the next. The space is known from the start here, so that the
    next combination follows from the last.
    """

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if not self.start_order:
            return super().populate_space(trial_id)
        last = self.trials[self.start_order[-1]].hyperparameters.values
        values = self._get_next_combination(last)
        if values is None:
            return {"status": TrialStatus.STOPPED}
        return {"status": TrialStatus.RUNNING, "values": values}


class OneByOneTuner(TrialsTuner):
    """Trains one trial at a time, for any oracle.

    Keras Tuner's own needs the package `tensorboard` and prints tracebacks.
    """

    def _train(self, trials: Sequence[Trial], on_epoch: OnEpoch | None) -> None:
        (trial,) = trials
        objective = self.oracle.objective
        try:
            history = self.run_trial(trial, on_epoch).history
            values = history[objective.name]
            best = (
                np.argmax(values) if objective.direction == "max" else np.argmin(values)
            )
        except FailedTrialError as error:
            self._fail(trial, str(error))
        except Exception:
            self._fail(trial, traceback.format_exc())
        else:
            self._complete(trial, history, int(best))

    def run_trial(
        self, trial: Trial, on_epoch: OnEpoch | None = None
    ) -> keras.callbacks.History:
        """Trains a trial, and keeps the weights of its best epoch."""
        keras.backend.clear_session()
        hp, name = trial.hyperparameters, self.oracle.objective.name
        model = self.hypermodel.build(hp)
        options = {}
        if "tuner/epochs" in hp.values:  # Hyperband's.
            options = {
                "epochs": hp.values["tuner/epochs"],
                "initial_epoch": hp.values["tuner/initial_epoch"],
            }
        if "tuner/trial_id" in hp.values:
            model.load_weights(self._weights_of(hp.values["tuner/trial_id"]))
        best_epoch = keras.callbacks.ModelCheckpoint(
            self._weights_of(trial.trial_id),
            monitor=name,
            mode=self.oracle.objective.direction,
            save_best_only=True,
            save_weights_only=True,
        )
        callbacks = [best_epoch]
        if on_epoch is not None:
            callbacks.append(
                keras.callbacks.LambdaCallback(
                    on_epoch_end=lambda epoch, logs: on_epoch(1, logs[name])
                )
            )
        with warnings.catch_warnings():
            # Told by a trial's acceptance rate, instead of by a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            return self.hypermodel.fit(hp, model, callbacks=callbacks, **options)

    def load_model(self, trial: Trial) -> RSFTModel:
        """Returns a trial's model with the weights of its best epoch."""
        model = self.hypermodel.build(trial.hyperparameters)
        model.load_weights(self._weights_of(trial.trial_id))
        return model

    def _weights_of(self, trial_id: str) -> str:
        return str(Path(self.get_trial_dir(trial_id)) / "checkpoint.weights.h5")


def make_tuner(
    hypermodel: RSFTHyperModel, options: SearchConfig, folder: Path
) -> TrialsTuner:
    """Returns a tuner, with the trials that `folder/trials` has already."""
    place = {"directory": str(folder), "project_name": TRIALS_FOLDER}
    shared = {
        "objective": keras_tuner.Objective(options.objective, options.direction),
        "seed": hypermodel.settings.seed + 1,  # Keras Tuner takes 0 for any seed.
        # A failed trial is no reason to give up the others.
        "max_consecutive_failed_trials": None,
    }
    if options.tuner == HYPERBAND:
        bands = BandsOracle(max_epochs=hypermodel.settings.epochs, **shared)
        bands.max_trials = options.max_trials
        return OneByOneTuner(bands, hypermodel, **place)
    name = options.oracle if options.tuner == BATCHED else options.tuner
    if name == "bayesian" and importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "The Bayesian oracle needs scikit-learn. "
            'Install it with: pip install "keras_rsft[search]"'
        )
    kinds = {"random": RandomOracle, "bayesian": BayesianOracle, "grid": GridOracle}
    oracle = kinds[name](max_trials=options.max_trials, **shared)
    if options.tuner != BATCHED:
        return OneByOneTuner(oracle, hypermodel, **place)
    return BatchedTuner(
        oracle,
        hypermodel,
        parallel_trials=options.parallel_trials,
        halvings=options.halvings,
        **place,
    )
