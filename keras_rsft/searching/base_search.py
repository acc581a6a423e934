"""The second half of a search: the base learns, on from the best heads.

Puts together what `strategies.py` plans and `base_trials.py` trains, for
`search_run.py`, which knows heads alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from keras_rsft.backbones.trainable_part import trainable_part
from keras_rsft.finetuning import TrainingSettings
from keras_rsft.finetuning.stage_two import accuracy_on_images
from keras_rsft.run_files import MODEL_FILE
from keras_rsft.searching.base_trials import BaseSource, BaseTrialsTuner, weights_of
from keras_rsft.searching.choice import TRAINABLE, TrialOutcome, trainable_of
from keras_rsft.searching.names import ALL, FROZEN, LAST_BLOCK, SearchOptions
from keras_rsft.searching.search_folder import replaced
from keras_rsft.searching.strategies import (
    TRAINABLE_FROM,
    best_heads,
    planned_trials,
    strategy_rows,
)
from keras_rsft.searching.trials import (
    ChosenTrial,
    head_accuracy,
    head_of_outcome,
    is_plain,
    settings_of_outcome,
)


@dataclasses.dataclass(frozen=True, eq=False)
class BaseTrials:
    """The trials in which the base learnt.

    Attributes:
        tuner: Theirs.
        outcomes: What became of them.
        best_heads: The trials of heads that this search trains on from.
        source: Images and base.
    """

    tuner: BaseTrialsTuner
    outcomes: tuple[TrialOutcome, ...]
    best_heads: tuple[TrialOutcome, ...]
    source: BaseSource


def learnable(
    base: keras.Model, trainable: Sequence[str], settings: TrainingSettings
) -> tuple[str, ...]:
    """Returns what of a base may learn, without `"all"` where the last block is all.

    Args:
        base: The base.
        trainable: What was asked for, out of `TRAINABLE_NAMES`.
        settings: How to train.

    Raises:
        InvalidArgument: If the base has no such part.
    """
    layers = {
        name: [
            layer.name
            for layer in trainable_part(
                base, TRAINABLE_FROM[name], train_batch_norm=settings.train_batch_norm
            ).layers
        ]
        for name in trainable
        if name != FROZEN
    }
    same = layers.get(LAST_BLOCK) == layers.get(ALL)
    return tuple(one for one in trainable if not (same and one == ALL and layers))


def with_frozen(outcomes: Sequence[TrialOutcome]) -> tuple[TrialOutcome, ...]:
    """Returns trials of heads, with what of the base learnt in them: nothing."""
    return tuple(
        dataclasses.replace(one, values={TRAINABLE: FROZEN, **one.values})
        for one in outcomes
    )


def train_bases(
    heads: keras_tuner.Tuner,
    options: SearchOptions,
    outcomes: Sequence[TrialOutcome],
    source: BaseSource,
    folder: Path,
) -> BaseTrials:
    """Trains what is asked for of the base, on from the best heads.

    Args:
        heads: The tuner of the heads.
        options: What of the base learns, and what is best.
        outcomes: What became of the heads.
        source: Images and base.
        folder: Of the search.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # Keras Tuner tells of going on.
        tuner = BaseTrialsTuner(heads, options, source, folder)
    best = best_heads(
        outcomes,
        lambda one: is_plain(heads, one),
        objective=options.objective,
        min_acceptance=options.min_acceptance,
    )
    tuner.search(planned_trials(best, options.of_base))
    return BaseTrials(tuner, tuner.outcomes(), best, source)


def chosen_trial(
    heads: keras_tuner.Tuner,
    outcomes: Sequence[TrialOutcome],
    chosen: TrialOutcome,
    bases: BaseTrials | None,
) -> ChosenTrial:
    """Returns the chosen trial with its head and, where the base learnt, its model.

    Args:
        heads: The tuner of the heads.
        outcomes: What became of the heads.
        chosen: The choice.
        bases: The trials of the base, or None.
    """
    if bases is None or trainable_of(chosen) == FROZEN:
        head = head_of_outcome(heads, chosen)
        measured = head_accuracy(head, heads.hypermodel.features.test)
        settings = settings_of_outcome(heads, chosen)
        return ChosenTrial(chosen, chosen, settings, head, measured)
    tuner, begun_from = bases.tuner, _head_of(chosen, outcomes, bases)
    settings = dataclasses.replace(
        settings_of_outcome(heads, begun_from),
        trainable_from=TRAINABLE_FROM[trainable_of(chosen)],
        base_epochs=chosen.epochs - begun_from.epochs,
        base_learning_rate=tuner.base_rate_of(chosen),
    )

    def accuracy() -> float:
        model = tuner.load_model(tuner.oracle.trials[chosen.trial_id])
        return accuracy_on_images(model, bases.source.data.test)

    return ChosenTrial(
        chosen,
        begun_from,
        settings,
        head_of_outcome(heads, begun_from),
        accuracy,
        tuner.model_file(chosen.trial_id),
    )


def table_of_strategies(
    heads: keras_tuner.Tuner,
    outcomes: Sequence[TrialOutcome],
    chosen: ChosenTrial,
    bases: BaseTrials,
    head_seconds: float | None,
) -> list[dict[str, Any]]:
    """Returns the best heads and all trials of the base side by side, for the record.

    Args:
        heads: The tuner of the heads.
        outcomes: What became of the heads.
        chosen: The choice.
        bases: The trials of the base.
        head_seconds: Time of one head's training.
    """

    def policy_of(one: TrialOutcome) -> str:
        head = one
        if trainable_of(one) != FROZEN:
            head = _head_of(one, outcomes, bases)
        return settings_of_outcome(heads, head).policy.name

    rows = strategy_rows(
        [*bases.best_heads, *bases.outcomes],
        chosen=chosen.outcome,
        policy_of=policy_of,
        validation_size=len(heads.hypermodel.features.validation),
        head_seconds=head_seconds,
        head_weights=weights_of(chosen.head),
    )
    return [dataclasses.asdict(row) for row in rows]


def keep_model(
    chosen: ChosenTrial,
    whole_model: Callable[[keras.Model], keras.Model] | None,
    folder: Path,
) -> None:
    """Keeps the chosen model from images in the search's folder.

    Args:
        chosen: The choice.
        whole_model: Makes it of a head; None where there are no images.
        folder: Of the search.
    """
    if chosen.base_model is not None:
        replaced(
            folder / MODEL_FILE,
            lambda beside: shutil.copyfile(chosen.base_model, beside),
        )
    elif whole_model is not None:
        replaced(folder / MODEL_FILE, whole_model(chosen.head.model).save)


def _head_of(
    outcome: TrialOutcome, outcomes: Sequence[TrialOutcome], bases: BaseTrials
) -> TrialOutcome:
    name = bases.tuner.head_trial_of(outcome)
    return next(one for one in outcomes if one.trial_id == name)
