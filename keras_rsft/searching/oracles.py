"""Keras Tuner's oracles and tuners by name, with their known faults mended."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras_tuner
from keras_tuner.engine.trial import TrialStatus
from keras_tuner.errors import FailedTrialError, FatalError
from keras_tuner.oracles import (
    BayesianOptimizationOracle,
    GridSearchOracle,
    HyperbandOracle,
    RandomSearchOracle,
)

from keras_rsft.errors import SearchFailed
from keras_rsft.searching.batched_tuner import BatchedTuner
from keras_rsft.searching.durable import DurableOracle, DurableTuner
from keras_rsft.searching.hypermodel import RSFTHyperModel
from keras_rsft.searching.names import BATCHED, HYPERBAND, SearchOptions

TRIALS_FOLDER = "trials"


class RandomOracle(DurableOracle, RandomSearchOracle):
    """Keras Tuner's random oracle."""


class BayesianOracle(DurableOracle, BayesianOptimizationOracle):
    """Keras Tuner's Bayesian oracle."""


class BandsOracle(DurableOracle, HyperbandOracle):
    """Keras Tuner's Hyperband oracle."""


class GridOracle(DurableOracle, GridSearchOracle):
    """Keras Tuner's grid, which goes on after a stop and hands out many at once.

    The stock oracle forgets at a stop which combinations have been handed out, and
    waits for each trial's end before it proposes the next.
    """

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        response = super().populate_space(trial_id)
        if response["status"] == "RUNNING":
            # The space is known from the start: no trial's end can add to it.
            self._populate_next.append(trial_id)
        return response

    def set_state(self, state: Mapping[str, Any]) -> None:
        super().set_state(state)
        by_values = functools.cmp_to_key(
            lambda one, other: self._compare(
                self.trials[one].hyperparameters.values,
                self.trials[other].hyperparameters.values,
            )
        )
        ordered = sorted(self.trials, key=by_values)
        for trial_id in ordered:
            self._ordered_ids.insert(trial_id)
        self._populate_next = list(ordered)


class _OneByOne(DurableTuner):
    """What Keras Tuner's own ways of running a trial lack."""

    def _configure_tensorboard_dir(
        self, callbacks: list, trial: Any, execution: int = 0
    ) -> None:
        # Needs the package `tensorboard` only where that callback is used.
        if any(type(callback).__name__ == "TensorBoard" for callback in callbacks):
            super()._configure_tensorboard_dir(callbacks, trial, execution)

    def _try_run_and_update_trial(self, trial: Any, *args: Any, **kwargs: Any) -> None:
        """Is Keras Tuner's, but prints no traceback and passes on a chief's end."""
        try:
            self._run_and_update_trial(trial, *args, **kwargs)
            trial.status = TrialStatus.COMPLETED
        except (SearchFailed, FatalError):
            raise
        except FailedTrialError as error:
            trial.status, trial.message = TrialStatus.FAILED, str(error)
        except Exception:
            trial.status, trial.message = TrialStatus.INVALID, traceback.format_exc()


class OneByOneTuner(_OneByOne, keras_tuner.Tuner):
    """Keras Tuner's tuner for any oracle but Hyperband's."""


class OneByOneHyperband(_OneByOne, keras_tuner.Hyperband):
    """Keras Tuner's Hyperband, with an oracle that is given."""

    def __init__(
        self, oracle: HyperbandOracle, hypermodel: RSFTHyperModel, **kwargs: Any
    ):
        keras_tuner.Tuner.__init__(self, oracle, hypermodel, **kwargs)


def make_tuner(
    hypermodel: RSFTHyperModel, options: SearchOptions, folder: Path
) -> keras_tuner.Tuner:
    """Returns a tuner, with the trials that its folder has already.

    Args:
        hypermodel: What a trial is.
        options: Which tuner, and how it goes on.
        folder: An existing folder; trials are kept in `trials` inside.

    Raises:
        ImportError: If the Bayesian oracle is asked for without scikit-learn.
        InvalidArgument: If the batched tuner cannot take the space.
    """
    place = {"directory": str(folder), "project_name": TRIALS_FOLDER}
    objective = keras_tuner.Objective(options.objective, options.direction)
    shared = {
        "objective": objective,
        "seed": hypermodel.settings.seed + 1,  # Keras Tuner takes 0 for any seed.
        # A failed trial is no reason to give up the others.
        "max_consecutive_failed_trials": None,
    }
    if options.tuner == HYPERBAND:
        oracle = BandsOracle(max_epochs=hypermodel.settings.epochs, **shared)
        oracle.max_trials = options.max_trials
        return OneByOneHyperband(oracle, hypermodel, **place)
    name = options.oracle if options.tuner == BATCHED else options.tuner
    oracle = _make_oracle(name, max_trials=options.max_trials, **shared)
    if options.tuner == BATCHED:
        return BatchedTuner(
            oracle,
            hypermodel,
            parallel_trials=options.parallel_trials,
            halvings=options.halvings,
            **place,
        )
    return OneByOneTuner(oracle, hypermodel, **place)


def make_quiet_tuner(
    hypermodel: RSFTHyperModel, options: SearchOptions, folder: Path
) -> keras_tuner.Tuner:
    """Is `make_tuner`, without what Keras Tuner prints about going on."""
    with contextlib.redirect_stdout(io.StringIO()):
        return make_tuner(hypermodel, options, folder)


def _make_oracle(name: str, **options: Any) -> keras_tuner.Oracle:
    if name == "bayesian" and importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "The Bayesian oracle needs scikit-learn. "
            'Install it with: pip install "keras_rsft[search]"'
        )
    oracles = {
        "random": RandomOracle,
        "bayesian": BayesianOracle,
        "grid": GridOracle,
    }
    return oracles[name](**options)
