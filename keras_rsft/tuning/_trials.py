"""Runs trials, reads their results and compares with plain training."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import keras_tuner
import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft.config import FROZEN, SearchConfig, TrainConfig
from keras_rsft.features._store import FeatureSet
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training._head import best_of_all_epochs, head_probabilities, train_head
from keras_rsft.tuning._choice import COMPLETED, TrialOutcome, trainable_of
from keras_rsft.tuning._folder import read_results
from keras_rsft.tuning._tuner import TrialsTuner

PLAIN = "accept-all"
# Hyperband's own numbers, which are among the values of its trials.
TUNERS_OWN = "tuner/"


@dataclasses.dataclass(frozen=True, eq=False)
class ChosenTrial:
    """The trial that was chosen."""

    outcome: TrialOutcome
    head_outcome: TrialOutcome
    settings: TrainConfig
    head: RSFTModel
    test_accuracy: Callable[[], float]
    base_model: Path | None = None


def run_trials(
    tuner: TrialsTuner,
    options: SearchConfig,
    *,
    progress: bool = True,
    workers: Callable[[], AbstractContextManager] | None = None,
) -> tuple[TrialOutcome, ...]:
    """Trains all trials that are left, here or by workers, and returns all."""
    oracle, ended = tuner.oracle, len(tuner.oracle.end_order)
    epochs = tuner.hypermodel.settings.epochs if workers is None else 1
    seen: list[float] = []
    with progress_bar(
        "Searching" if workers is None else "Waiting for workers",
        total=options.max_trials * epochs,
        unit="trials" if workers else "epochs",
        done=ended * epochs,
        visible=progress,
    ) as advance:
        if workers is None:

            def report(heads: int, value: float) -> None:
                seen.append(value)
                advance(heads, state_of(oracle, options, seen))

            tuner.search(on_epoch=report)
        elif ended < options.max_trials:
            with workers() as trials_left:
                while trials_left():
                    now = len(oracle.end_order)
                    advance(now - ended, state_of(oracle, options))
                    ended = now
    return outcomes_of(tuner)


def state_of(
    oracle: keras_tuner.Oracle, options: SearchConfig, values: Sequence[float] = ()
) -> str:
    """Says how far a search is; `values` are of trials that have not ended yet."""
    ended = [oracle.trials[name] for name in tuple(oracle.end_order)]
    said = f"{len(ended)} of {options.max_trials} trials"
    scores = [trial.score for trial in ended if trial.status == COMPLETED]
    known = [value for value in (*scores, *values) if math.isfinite(value)]
    if known:
        best = max(known) if options.direction == "max" else min(known)
        said += f", best {options.objective} {best:.4f}"
    return said


def outcomes_of(tuner: keras_tuner.Tuner) -> tuple[TrialOutcome, ...]:
    """Returns what became of all trials, in the order in which they began."""
    oracle = tuner.oracle
    return tuple(outcome_of(oracle.trials[name]) for name in oracle.start_order)


def outcome_of(trial: Any) -> TrialOutcome:
    """Returns what became of one of Keras Tuner's trials."""
    values = trial.hyperparameters.values
    first_epoch = values.get(f"{TUNERS_OWN}initial_epoch", 0)
    completed = trial.status == COMPLETED
    names = trial.metrics.metrics if completed else ()
    lines = (trial.message or "").strip().splitlines()
    return TrialOutcome(
        trial_id=trial.trial_id,
        status=trial.status,
        values={k: v for k, v in values.items() if not k.startswith(TUNERS_OWN)},
        metrics={name: trial.metrics.get_last_value(name) for name in names},
        epochs=first_epoch + trial.best_step + 1 if completed else 0,
        message=lines[-1] if lines else None,
    )


def settings_of_outcome(tuner: keras_tuner.Tuner, outcome: TrialOutcome) -> TrainConfig:
    """Returns how a trial was trained, up to its best epoch."""
    trial = tuner.oracle.trials[outcome.trial_id]
    settings = tuner.hypermodel.settings_of(trial.hyperparameters)
    return dataclasses.replace(settings, epochs=max(outcome.epochs, 1))


def head_of_outcome(tuner: keras_tuner.Tuner, outcome: TrialOutcome) -> RSFTModel:
    """Returns a completed trial's model, with the weights of its best epoch."""
    with warnings.catch_warnings():
        # Of optimizers: Keras Tuner reloads weights alone.
        warnings.simplefilter("ignore")
        return tuner.load_model(tuner.oracle.trials[outcome.trial_id])


def side_by_side(
    tuner: keras_tuner.Tuner,
    options: SearchConfig,
    outcomes: Sequence[TrialOutcome],
    chosen: ChosenTrial,
    folder: Path,
) -> dict[str, Any]:
    """Returns the chosen setting and plain fine-tuning, measured on the test split."""
    kept = read_results(folder)
    same = {"chosen_trial": chosen.outcome.trial_id, "trials": len(outcomes)}
    if kept is not None and same.items() <= kept.items():
        return {name: kept[name] for name in ("chosen_trial", "chosen", "plain")}
    test = tuner.hypermodel.features.test
    plain = [one for one in outcomes if is_plain(tuner, one)]
    if plain:
        sign = 1 if options.direction == "max" else -1
        best = max(plain, key=lambda one: sign * one.metrics[options.objective])
        plain_row = {"trial": best.trial_id}
        plain_row |= _row(best, test, head_accuracy(head_of_outcome(tuner, best), test))
    else:
        plain_row = _trained_plainly(tuner, options, chosen.head_outcome)
    return {
        "chosen_trial": chosen.outcome.trial_id,
        "chosen": _row(chosen.outcome, test, chosen.test_accuracy),
        "plain": plain_row,
    }


def is_plain(tuner: keras_tuner.Tuner, outcome: TrialOutcome) -> bool:
    """Says whether a trial is a completed one of a head that accepts everything."""
    return (
        outcome.status == COMPLETED
        and trainable_of(outcome) == FROZEN
        and settings_of_outcome(tuner, outcome).policy.name == PLAIN
    )


def head_accuracy(head: RSFTModel, test: FeatureSet) -> Callable[[], float]:
    """Returns what measures a head on kept features."""

    def measured() -> float:
        classes = head_probabilities(head, test).argmax(axis=-1)
        return float(np.mean(classes == test.labels))

    return measured


def _row(
    outcome: TrialOutcome, test: FeatureSet, accuracy: Callable[[], float]
) -> dict[str, Any]:
    row = {
        "validation_accuracy": outcome.metrics["val_accuracy"],
        "acceptance_rate": outcome.metrics["acceptance_rate"],
    }
    if len(test):
        row["test_accuracy"] = accuracy()
    return row


def _trained_plainly(
    tuner: keras_tuner.Tuner, options: SearchConfig, chosen: TrialOutcome
) -> dict[str, Any]:
    hypermodel = tuner.hypermodel
    settings = settings_of_outcome(tuner, chosen)
    policy = dataclasses.replace(settings.policy, name=PLAIN, class_floor=0.0)
    epochs = hypermodel.settings.epochs
    best_epoch = best_of_all_epochs(options.objective, options.direction, epochs=epochs)
    trained = train_head(
        hypermodel.features,
        dataclasses.replace(settings, policy=policy, epochs=epochs),
        callbacks=[best_epoch],
        progress=False,
    )
    names = ("validation_accuracy", "acceptance_rate", "test_accuracy")
    return {name: trained.results[name] for name in names if name in trained.results}
