"""Keras Tuner's oracles and tuners, durable, and the tuner of many heads at once."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner
import numpy as np
from keras_tuner import oracles
from keras_tuner.engine.trial import Trial, TrialStatus
from keras_tuner.errors import FailedTrialError

from keras_rsft._ledger import RejectionLedger
from keras_rsft._storage import json_of, open_regular, replaced, understood
from keras_rsft.config import BATCHED, HYPERBAND, SearchConfig, SearchSpace, TrainConfig
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._batches import TrainingBatches, batches_of
from keras_rsft.label_quality._audit import LabelQuality
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training._features import SplitFeatures
from keras_rsft.training._head import (
    EstimatedAccuracy,
    audit_splits,
    given_credits,
    predicted_classes,
    right_credits,
    untrained_head,
)
from keras_rsft.tuning import _space
from keras_rsft.tuning._batched import METRICS, BatchedHeads, OnEpoch
from keras_rsft.tuning._choice import COMPLETED, TrialOutcome
from keras_rsft.tuning._space import Space

# Durable state ------------------------------------------------------------------------

STATE_FILE = "oracle.json"
# Keras Tuner's protocol drops why a trial failed, so a worker leaves it here.
_MESSAGE_FILE = "message.txt"
PREDICTED_FILE = "validation_predictions.npy"
_WAIT_SECONDS = 1.0
# Hyperband's own numbers, which are among the values of its trials.
TUNERS_OWN = "tuner/"
SECONDS = "training_seconds"


class DurableOracle(keras_tuner.Oracle):
    """An oracle whose files are written whole, and that loses no trial."""

    trials: dict[str, Trial]

    def _path(self, *names: str) -> Path:
        return Path(self._get_oracle_fname()).parent.joinpath(*names)

    def end_trial(self, trial: Trial) -> None:
        message = self._path(f"trial_{trial.trial_id}", _MESSAGE_FILE)
        if trial.message is None and message.exists():
            trial.message = message.read_text(encoding="utf-8")
            message.unlink()
        super().end_trial(trial)

    def save(self) -> None:
        text = json.dumps(self.get_state())
        replaced(self._path(STATE_FILE), lambda path: path.write_text(text))

    def set_state(self, state: Mapping[str, Any]) -> None:
        # A trial that was written just before a kill, of which the oracle's own file
        # does not know yet, would be neither ended nor tried again.
        self.trials = {name: self.trials[name] for name in state["start_order"]}
        # Nobody is training them any more: the queue's last one is the first out.
        ended = {*state["end_order"]}
        waiting = [name for name in reversed(self.trials) if name not in ended]
        super().set_state({**state, "ongoing_trials": {}, "retry_queue": waiting})

    def save_trial(self, trial: Trial) -> None:
        path = self._path(f"trial_{trial.trial_id}", "trial.json")
        path.parent.mkdir(exist_ok=True)
        replaced(path, lambda beside: trial.save(str(beside)))

    _save_trial = save_trial  # Keras Tuner's name for it.


class DurableTuner(keras_tuner.Tuner):
    """Keeps all of its state in its oracle, which in a worker is the chief's."""

    def __init__(self, oracle: keras_tuner.Oracle, hypermodel: Any = None, **kwargs):
        # A failed trial is no reason to give up the others.
        oracle.max_consecutive_failed_trials = None
        super().__init__(oracle, hypermodel, **kwargs)
        state = Path(self.project_dir) / STATE_FILE
        if not self.is_worker and state.exists():
            self._check_same_space(state)
            self.reload()

    def _check_same_space(self, state: Path) -> None:
        """Refuses the trials of another space, which new ones cannot be mixed with."""
        known = json.loads(state.read_text())["hyperparameters"]["space"]
        now = json.loads(json.dumps(self.oracle.get_space().get_config()["space"]))
        names = {one["config"]["name"] for one in now}
        if [one for one in known if one["config"]["name"] in names] != now:
            raise InvalidArgument(
                f"{self.project_dir} holds a search with another search space, whose "
                "trials cannot be mixed with new ones. Choose another `directory` or "
                "`project_name`, or repeat the first search to resume."
            )

    @property
    def is_worker(self) -> bool:
        return not isinstance(self.oracle, keras_tuner.Oracle)

    def save(self) -> None:
        if not self.is_worker:
            self.oracle.save()

    def reload(self) -> None:
        if self.is_worker:
            return
        folder = Path(self.project_dir)
        for path in sorted(folder.glob("trial_*/trial.json")):
            with understood(path):
                Trial.from_state(json_of(path, dict))
        with understood(folder / STATE_FILE):
            self.oracle.reload()

    def settings_of(self, trial: Trial, epochs: int) -> TrainConfig:
        """Returns how a trial was trained up to its best epoch, the last of these."""
        raise NotImplementedError

    @property
    def outcomes(self) -> tuple[TrialOutcome, ...]:
        """All trials, in the order in which they began."""
        outcomes = []
        for name in self.oracle.start_order:
            with understood(Path(self.get_trial_dir(name)) / "trial.json"):
                outcomes.append(self._outcome(self.oracle.trials[name]))
        return tuple(outcomes)

    def _outcome(self, trial: Trial) -> TrialOutcome:
        values, completed = trial.hyperparameters.values, trial.status == COMPLETED
        first = values.get(f"{TUNERS_OWN}initial_epoch", 0)
        epochs = first + trial.best_step + 1 if completed else 0
        names = trial.metrics.metrics if completed else ()
        lines = (trial.message or "").strip().splitlines()
        settings = self.settings_of(trial, epochs)
        shown = {k: v for k, v in values.items() if not k.startswith(TUNERS_OWN)}
        if completed and "warmup_epochs" in shown:  # It ends before the training does.
            shown["warmup_epochs"] = type(shown["warmup_epochs"])(
                settings.policy.warmup_epochs
            )
        return TrialOutcome(
            trial.trial_id,
            trial.status,
            shown,
            {name: trial.metrics.get_last_value(name) for name in names},
            epochs,
            lines[-1] if lines else None,
            settings,
        )

    def _complete(
        self,
        trial: Trial,
        history: Mapping[str, Sequence[float]],
        best: int,
        seconds: float,
        **more: float,
    ) -> None:
        """Reports a trial by the metrics of its best epoch."""
        metrics = {name: float(values[best]) for name, values in history.items()}
        metrics |= {SECONDS: seconds, **more}
        self.oracle.update_trial(trial.trial_id, metrics, step=best)
        trial.status = TrialStatus.COMPLETED
        self.on_trial_end(trial)

    def _note_predicted(self, trial: Trial, predicted: np.ndarray) -> None:
        """Leaves the classes predicted for the validation samples in its folder."""
        path = Path(self.get_trial_dir(trial.trial_id)) / PREDICTED_FILE
        small = predicted.astype(np.min_scalar_type(int(predicted.max(initial=0))))
        replaced(path, functools.partial(np.save, arr=small))

    def predicted(self, outcome: TrialOutcome) -> np.ndarray:
        """Returns them: integers, one for each validation sample."""
        path = Path(self.get_trial_dir(outcome.trial_id)) / PREDICTED_FILE
        with understood(path), open_regular(path) as file:
            return np.load(file, allow_pickle=False)

    def _fail(self, trial: Trial, message: str) -> None:
        trial.status, trial.message = TrialStatus.FAILED, message
        if self.is_worker:
            path = Path(self.get_trial_dir(trial.trial_id)) / _MESSAGE_FILE
            replaced(path, lambda beside: beside.write_text(message, encoding="utf-8"))
        self.on_trial_end(trial)


class TrialsTuner(DurableTuner):
    """Takes trials from an oracle, trains them and reports them, until none is left."""

    parallel_trials = 1
    _on_epoch: OnEpoch

    def settings_of(self, trial: Trial, epochs: int) -> TrainConfig:
        if not epochs:  # It failed, perhaps because of its settings.
            return self.hypermodel.settings
        settings = self.hypermodel.settings_of(trial.hyperparameters)
        return dataclasses.replace(settings, epochs=epochs, unfreeze=None)

    def model_of(self, outcome: TrialOutcome) -> RSFTModel:
        return self.load_model(self.oracle.trials[outcome.trial_id])

    def test_predicted(self, outcome: TrialOutcome) -> np.ndarray:
        """Returns the classes predicted for the samples of the test split."""
        return predicted_classes(self.model_of(outcome), self.hypermodel.features.test)

    def search(
        self, *, verbose: int = 0, on_epoch: OnEpoch = lambda heads, value: None
    ) -> None:
        """Trains trials until the oracle has no more."""
        self.oracle.verbose, self._on_epoch = verbose, on_epoch
        self.on_search_begin()
        while trials := self._take_trials():
            for trial in trials:
                self.on_trial_begin(trial)
            self._train(trials)
        self.on_search_end()

    def _train(self, trials: Sequence[Trial]) -> None:
        """Trains trials, and ends each by `_complete` or `_fail`."""
        raise NotImplementedError

    def _take_trials(self) -> list[Trial]:
        """Asks the oracle for trials, each under a tuner's name of its own."""
        taken: list[Trial] = []
        while len(taken) < self.parallel_trials:
            self.pre_create_trial()
            trial = self.oracle.create_trial(f"{self.tuner_id}-{len(taken)}")
            if trial.status == TrialStatus.STOPPED:
                break
            if trial.status != TrialStatus.IDLE:
                taken.append(trial)
            elif taken:
                break
            else:  # Another tuner's trials must end first.
                time.sleep(_WAIT_SECONDS)
        return taken


# Hypermodel ---------------------------------------------------------------------------


DIVERGED = (
    "The weights became NaN or infinite: the learning rate is too high for this data."
)


class RSFTHyperModel(keras_tuner.HyperModel):
    """A new head on cached features, with its policy, for any of Keras Tuner's tuners.

    ```python
    hypermodel = RSFTHyperModel(features)
    tuner = keras_tuner.RandomSearch(hypermodel, "val_accuracy", max_trials=20)
    tuner.search()
    ```

    Args:
        features: Cached features; their test split is never looked at.
        settings: Epochs, batch size and seed, and every number that `space` leaves
            open. Default: `TrainConfig()`.
        space: Ranges, or a function that declares them. Default: `SearchSpace()`.
        progress: Show a progress bar while labels are audited. Default True.

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
        self.space: Space = space or SearchSpace()
        _space.check_space(self.space, self.settings)
        self._progress = progress

    @functools.cached_property
    def label_quality(self) -> LabelQuality:
        """The quality of the labels of all splits; found once, for all trials."""
        return audit_splits(self.features, self.settings.seed, progress=self._progress)

    @functools.cached_property
    def credits(self) -> np.ndarray:
        """What each class counts for each validation sample: `LabelQuality.credits`."""
        validation, classes = self.features.validation, len(self.features.class_names)
        found = right_credits(validation, self.label_quality.held_out[0], classes)
        return given_credits(validation.labels, classes) if found is None else found

    def settings_of(self, hp: keras_tuner.HyperParameters) -> TrainConfig:
        """Returns how to train a trial, and declares the hyperparameters.

        Args:
            hp: The trial's hyperparameters.
        """
        values = _space.values_of(self.space, hp)
        return _space.settings_of_values(values, self.settings)

    def declare_hyperparameters(self, hp: keras_tuner.HyperParameters) -> None:
        """Declares those of all branches of the space; Keras Tuner calls it first."""
        hp.merge(_space.explored(self.space), overwrite=False)

    def build(self, hp: keras_tuner.HyperParameters) -> RSFTModel:
        """Returns a trial's compiled, untrained `RSFTModel` over features."""
        settings = self.settings_of(hp)
        auto = settings.policy.name == "auto"
        return untrained_head(
            self.features, settings, self.label_quality if auto else None
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
        """Trains a trial on the cached features; takes what `keras.Model.fit` takes.

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
        validation = self.features.validation
        estimated = EstimatedAccuracy(
            lambda model: predicted_classes(model, validation), self.credits
        )
        own: list[keras.callbacks.Callback] = [batches.callback, estimated]
        if model.policy.needs_ledger:
            own.append(RejectionLedger(train.ids, train.labels))
        options = {
            "validation_data": batches_of(validation),
            "epochs": settings.epochs if epochs is None else epochs,
            "callbacks": [*own, *callbacks],
            "shuffle": False,
            "verbose": 0,
        }
        history = model.fit(batches.dataset, *args, **options | kwargs)
        if not np.isfinite(history.history["val_loss"]).all():
            raise FailedTrialError(DIVERGED)
        return history


# Batched tuner ------------------------------------------------------------------------

HEAD_FILE = "head.npz"


class BatchedTuner(TrialsTuner):
    """Takes up to `parallel_trials` trials from an oracle and trains them together.

    Results go back to the oracle trial by trial, so that everything else is as with
    any of Keras Tuner's tuners: trial folders, `get_best_models`,
    `get_best_hyperparameters`, `results_summary`, and resuming after a stop. A
    trial's value is that of its best epoch, whose weights are kept.

    Args:
        oracle: Any of Keras Tuner's oracles but Hyperband's. It is set not to stop
            after some failures in a row, which say little of trials trained together.
        hypermodel: Builds the trials.
        parallel_trials: Most heads that are trained together, at least 1. Default 64.
        halvings: How often the worse half of the heads is dropped while they train,
            at least 0. Default 0.
        **kwargs: `directory`, `project_name`, `overwrite`, `logger` and `tuner_id` of
            `keras_tuner.Tuner`.

    Raises:
        InvalidArgument: If the oracle or something in the space cannot be batched;
            the message names a tuner that can take it. If the folder holds the search
            of another space, or another argument is given, such as `optimizer`.
    """

    def __init__(
        self,
        oracle: keras_tuner.Oracle,
        hypermodel: RSFTHyperModel,
        *,
        parallel_trials: int = 64,
        halvings: int = 0,
        **kwargs: Any,
    ):
        if not isinstance(hypermodel, RSFTHyperModel):
            raise InvalidArgument(
                "The batched tuner trains heads on cached features, so `hypermodel` "
                f"must be an `RSFTHyperModel`. Received: {type(hypermodel).__name__}."
            )
        if isinstance(oracle, oracles.HyperbandOracle):
            raise InvalidArgument(
                "The batched tuner trains all its trials for the same epochs, so it "
                "cannot take Hyperband's: use the tuner hyperband, or `halvings`."
            )
        SearchConfig(parallel_trials=parallel_trials, halvings=halvings)  # Checks them.
        names = "directory", "project_name", "overwrite", "logger", "tuner_id"
        if ignored := sorted(set(kwargs) - set(names)):
            raise InvalidArgument(
                "The batched tuner trains the heads of `hypermodel` once each. "
                f"Received: {', '.join(ignored)}, which it would ignore. Give the "
                "hypermodel `settings` or a `space`, or use another tuner."
            )
        if oracle.objective.name not in METRICS:
            raise InvalidArgument(
                f"The objective must be one of {', '.join(METRICS)}. "
                f"Received: {oracle.objective.name!r}."
            )
        self.parallel_trials, self._halvings = parallel_trials, halvings
        super().__init__(oracle, hypermodel, **kwargs)
        if self.is_worker:  # Its space is the chief's.
            return
        declared, given = oracle.get_space(), hypermodel.settings
        _space.update_rule(hypermodel.settings_of(declared))
        for one in declared.space:
            if one.name in ("policy", "optimizer"):
                for value in one.values:
                    settings = _space.settings_of_values({one.name: value}, given)
                    _space.update_rule(settings)

    def load_model(self, trial: Trial) -> RSFTModel:
        """Returns a trial's model with the weights of its best epoch."""
        model = self.hypermodel.build(trial.hyperparameters)
        path = Path(self.get_trial_dir(trial.trial_id)) / HEAD_FILE
        with (
            understood(path),
            open_regular(path) as file,
            np.load(file, allow_pickle=False) as saved,
        ):
            weights = [saved["kernel"], saved["bias"]]
            model.model.get_layer("scores").set_weights(weights)
        batch_size = self.hypermodel.settings.batch_size
        steps = -(-len(self.hypermodel.features.train) // batch_size)
        model.policy.note_steps_seen((trial.best_step + 1) * steps)
        return model

    def _train(self, trials: Sequence[Trial]) -> None:
        """Trains trials together, those of each update rule and length at once."""
        groups: dict[tuple, list[tuple[Trial, TrainConfig]]] = {}
        for trial in trials:
            try:
                settings = self.hypermodel.settings_of(trial.hyperparameters)
                rule = (_space.update_rule(settings), settings.epochs)
                groups.setdefault(rule, []).append((trial, settings))
            except Exception as error:  # A user's space: this trial alone is at fault.
                self._fail(trial, f"{type(error).__name__}: {error}")
        objective = self.oracle.objective
        for group in groups.values():
            auto = any(one.policy.name == "auto" for _, one in group)
            began = time.perf_counter()
            trained = self._heads.train(
                [one for _, one in group],
                self.hypermodel.label_quality if auto else None,
                credits=self.hypermodel.credits,
                objective=objective.name,
                direction=objective.direction,
                halvings=self._halvings,
                on_epoch=self._on_epoch,
            )
            seconds = (time.perf_counter() - began) / len(group)
            for row, (trial, _) in enumerate(group):
                if trained.diverged[row]:
                    self._fail(trial, DIVERGED)
                    continue
                parts = {"kernel": trained.kernels[row], "bias": trained.biases[row]}
                path = Path(self.get_trial_dir(trial.trial_id)) / HEAD_FILE
                replaced(path, functools.partial(np.savez, **parts))
                self._note_predicted(trial, trained.predicted[row])
                history = {name: v[row] for name, v in trained.history.items()}
                self._complete(trial, history, int(trained.best_epochs[row]), seconds)

    @functools.cached_property
    def _heads(self) -> BatchedHeads:
        return BatchedHeads(self.hypermodel.features, self.hypermodel.settings)


# By name ------------------------------------------------------------------------------


class GridOracle(DurableOracle, oracles.GridSearchOracle):
    """Keras Tuner's grid, which resumes after a stop and hands out many at once."""

    def populate_space(self, trial_id: str) -> dict[str, Any]:
        if not self.start_order:
            return super().populate_space(trial_id)
        last = self.trials[self.start_order[-1]].hyperparameters.values
        last = self.get_space().values | last  # Some may have been found since.
        values = self._get_next_combination(last)
        if values is None:
            return {"status": TrialStatus.STOPPED}
        return {"status": TrialStatus.RUNNING, "values": values}


_ORACLES: dict[str, Any] = {"grid": GridOracle} | {
    name: type(kind.__name__, (DurableOracle, kind), {})
    for name, kind in (
        ("random", oracles.RandomSearchOracle),
        ("bayesian", oracles.BayesianOptimizationOracle),
        (HYPERBAND, oracles.HyperbandOracle),
    )
}


class _BestEpoch(keras.callbacks.ModelCheckpoint):
    """Keeps the best of the epochs behind the warm-up."""

    first = 0

    def on_epoch_end(self, epoch: int, logs: dict | None = None) -> None:
        if epoch >= self.first:
            super().on_epoch_end(epoch, logs)


class OneByOneTuner(TrialsTuner):
    """Trains one trial at a time, for any oracle."""

    def _train(self, trials: Sequence[Trial]) -> None:
        (trial,) = trials
        objective, began = self.oracle.objective, time.perf_counter()
        best_of = np.argmax if objective.direction == "max" else np.argmin
        try:
            history = self.run_trial(trial).history
        except FailedTrialError as error:
            self._fail(trial, str(error))
        except Exception:
            self._fail(trial, traceback.format_exc())
        else:
            first = self._first_epoch(trial)
            values = history[objective.name]
            best = first + int(best_of(values[first:]))
            model = self.load_model(trial)
            validation = self.hypermodel.features.validation
            self._note_predicted(trial, predicted_classes(model, validation))
            self._complete(trial, history, best, time.perf_counter() - began)

    def run_trial(self, trial: Trial) -> keras.callbacks.History:
        """Trains a trial, and keeps the weights of its best epoch."""
        keras.backend.clear_session()
        hp, objective = trial.hyperparameters, self.oracle.objective
        model, options = self.hypermodel.build(hp), {}
        if "tuner/epochs" in hp.values:  # Hyperband's.
            names = ("epochs", "initial_epoch")
            options = {name: hp.values[f"{TUNERS_OWN}{name}"] for name in names}
        if "tuner/trial_id" in hp.values:
            model.load_weights(self._weights_of(hp.values["tuner/trial_id"]))
        best_epoch = _BestEpoch(
            self._weights_of(trial.trial_id),
            monitor=objective.name,
            mode=objective.direction,
            save_best_only=True,
            save_weights_only=True,
        )
        begin = hp.values.get(f"{TUNERS_OWN}initial_epoch", 0)
        best_epoch.first = begin + self._first_epoch(trial)
        report = keras.callbacks.LambdaCallback(
            on_epoch_end=lambda epoch, logs: self._on_epoch(1, logs[objective.name])
        )
        with warnings.catch_warnings():
            # A trial's acceptance rate says it, instead of a warning in each epoch.
            warnings.filterwarnings("ignore", message=".*accepted no sample")
            return self.hypermodel.fit(
                hp, model, callbacks=[best_epoch, report], **options
            )

    def _first_epoch(self, trial: Trial) -> int:
        """Returns which epoch of a training is the first that counts, from 0."""
        values = trial.hyperparameters.values
        settings = self.hypermodel.settings_of(trial.hyperparameters)
        begin = values.get(f"{TUNERS_OWN}initial_epoch", 0)
        epochs = values.get(f"{TUNERS_OWN}epochs", settings.epochs) - begin
        # A training that Hyperband ends within the warm-up has no other.
        return min(max(_space.first_epoch(settings) - begin, 0), epochs - 1)

    def load_model(self, trial: Trial) -> RSFTModel:
        model = self.hypermodel.build(trial.hyperparameters)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The optimizer's state is left behind.
            model.load_weights(self._weights_of(trial.trial_id))
        return model

    def _weights_of(self, trial_id: str) -> str:
        return str(Path(self.get_trial_dir(trial_id)) / "checkpoint.weights.h5")


def make_tuner(
    hypermodel: RSFTHyperModel, options: SearchConfig, folder: Path
) -> TrialsTuner:
    """Returns a tuner, with the trials that `folder/trials` has already."""
    project = {"directory": str(folder), "project_name": "trials"}
    shared = {
        "objective": keras_tuner.Objective(options.objective, options.direction),
        "seed": hypermodel.settings.seed + 1,  # Keras Tuner takes 0 for any seed.
    }
    name = options.oracle if options.tuner == BATCHED else options.tuner
    if name == "bayesian" and importlib.util.find_spec("sklearn") is None:
        raise ImportError(
            "The Bayesian oracle needs scikit-learn. "
            'Install it with: pip install "keras_rsft[search]"'
        )
    if name == HYPERBAND:
        oracle = _ORACLES[name](max_epochs=hypermodel.settings.epochs, **shared)
        oracle.max_trials = options.max_trials
    else:
        oracle = _ORACLES[name](max_trials=options.max_trials, **shared)
    if options.tuner != BATCHED:
        return OneByOneTuner(oracle, hypermodel, **project)
    return BatchedTuner(
        oracle,
        hypermodel,
        parallel_trials=options.parallel_trials,
        halvings=options.halvings,
        **project,
    )
