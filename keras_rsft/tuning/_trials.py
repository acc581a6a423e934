"""Runs trials, reads their results and compares with plain training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft._storage import RESULTS_FILE, read_json
from keras_rsft.config import FROZEN, SearchConfig
from keras_rsft.training._head import best_of_all_epochs, right_answers, train_head
from keras_rsft.tuning._backbone_trials import BackboneTuner
from keras_rsft.tuning._choice import COMPLETED, PLAIN, TrialOutcome
from keras_rsft.tuning._tuner import TrialsTuner


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
    values: list[float] = []  # Of trials that have not ended yet.

    def state() -> str:
        trials = [oracle.trials[name] for name in tuple(oracle.end_order)]
        text = f"{len(trials)} of {options.max_trials} trials"
        scores = [trial.score for trial in trials if trial.status == COMPLETED]
        known = [value for value in (*scores, *values) if math.isfinite(value)]
        if known:
            best = max(known) if options.direction == "max" else min(known)
            text += f", best {options.objective} {best:.4f}"
        return text

    with progress_bar(
        "Searching" if workers is None else "Waiting for workers",
        total=options.max_trials * epochs,
        unit="trials" if workers else "epochs",
        done=ended * epochs,
        visible=progress,
    ) as advance:
        if workers is None:

            def report(heads: int, value: float) -> None:
                values.append(value)
                advance(heads, state())

            tuner.search(on_epoch=report)
        elif ended < options.max_trials:
            with workers() as trials_left:
                while trials_left():
                    now = len(oracle.end_order)
                    advance(now - ended, state())
                    ended = now
    return tuner.outcomes


def side_by_side(
    tuner: TrialsTuner,
    backbones: BackboneTuner | None,
    options: SearchConfig,
    outcomes: Sequence[TrialOutcome],
    chosen: TrialOutcome,
    folder: Path,
) -> dict[str, Any]:
    """Returns the chosen setting and plain fine-tuning, measured on the test split."""
    cached = read_json(folder / RESULTS_FILE) or {}
    same = {"chosen_trial": chosen.trial_id, "trials": len(outcomes)}
    if same.items() <= cached.items():
        return {name: cached[name] for name in ("chosen_trial", "chosen", "plain")}
    plain = [one for one in outcomes if one.is_plain]
    if plain:
        sign = 1 if options.direction == "max" else -1
        best = max(plain, key=lambda one: sign * one.metrics[options.objective])
        plain_row = {"trial": best.trial_id, **_row(tuner, None, best)}
    else:
        plain_row = _trained_plainly(tuner, options, chosen)
    return {
        "chosen_trial": chosen.trial_id,
        "chosen": _row(tuner, backbones, chosen),
        "plain": plain_row,
    }


def _row(
    tuner: TrialsTuner, backbones: BackboneTuner | None, outcome: TrialOutcome
) -> dict[str, Any]:
    row: dict[str, Any] = {
        "validation_accuracy": outcome.metrics["val_accuracy"],
        "acceptance_rate": outcome.acceptance,
    }
    if backbones is not None:
        row["unfreeze"] = outcome.unfreeze
    test = tuner.hypermodel.features.test
    if backbones is not None and outcome.unfreeze != FROZEN:
        row["test_accuracy"] = backbones.test_accuracy(outcome)
    elif len(test):
        right = right_answers(tuner.model_of(outcome), test)
        row["test_accuracy"] = float(np.mean(right))
    return row


def _trained_plainly(
    tuner: TrialsTuner, options: SearchConfig, chosen: TrialOutcome
) -> dict[str, Any]:
    hypermodel = tuner.hypermodel
    settings, epochs = chosen.settings, hypermodel.settings.epochs
    policy = dataclasses.replace(settings.policy, name=PLAIN, class_floor=0.0)
    trained = train_head(
        hypermodel.features,
        dataclasses.replace(settings, policy=policy, epochs=epochs, unfreeze=None),
        callbacks=[
            best_of_all_epochs(options.objective, options.direction, epochs=epochs)
        ],
        progress=False,
    )
    names = ("validation_accuracy", "acceptance_rate", "test_accuracy")
    return {name: trained.results[name] for name in names if name in trained.results}
