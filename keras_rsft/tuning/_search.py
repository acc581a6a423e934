"""Runs a search: features once, trials, a choice, a look at the test split."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

import keras
import keras_tuner
import numpy as np

from keras_rsft import _runtime, _storage
from keras_rsft._progress import progress_bar
from keras_rsft._storage import MODEL_FILE, RESULTS_FILE, replaced
from keras_rsft.backbones._build import build_classifier
from keras_rsft.config import FeatureConfig, SearchConfig, TrainConfig
from keras_rsft.data._samples import SampleData
from keras_rsft.errors import DataError, InvalidArgument, TrainingStalled
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training import _features
from keras_rsft.training._features import FeatureSource, SplitFeatures
from keras_rsft.training._head import (
    ESTIMATED_ACCURACY,
    HELD_OUT,
    accuracies,
    best_of_all_epochs,
    given_credits,
    train_head,
)
from keras_rsft.training._unfreeze import require_layers_to_train
from keras_rsft.tuning import _backbone_trials, _folder
from keras_rsft.tuning._backbone_trials import BackboneTuner
from keras_rsft.tuning._choice import (
    GIVEN_ACCURACY,
    PLAIN,
    Choice,
    TrialOutcome,
    choose_trial,
)
from keras_rsft.tuning._space import Space
from keras_rsft.tuning._tuner import RSFTHyperModel, TrialsTuner, make_tuner

Splits = TypeVar("Splits", SplitFeatures, SampleData)
_POLL_SECONDS = 0.2


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Search:
    """The trials of a search, its choice and how it does on the test split.

    Attributes:
        outcomes: All trials, in the order in which they began.
        choice: Which setting to use, and why.
        settings: How to train with it: `finetune(settings=...)` gives its model.
        head: The chosen trial's `RSFTModel` over features, of its best epoch; where
            layers of the backbone were unfrozen, that of the head which it began from.
        results: The chosen setting and plain fine-tuning side by side, for each its
            `validation_accuracy`, its `test_accuracy` where there is a test split,
            and its `acceptance_rate`; the reason of the choice; the seconds. With an
            unfrozen backbone `strategies`, one row for each.
        tuner: The Keras Tuner, for `get_best_models` and the like.
        folder: Where the search was written.
        backbone_tuner: That of the trials that unfroze the backbone, or None.
    """

    outcomes: tuple[TrialOutcome, ...]
    choice: Choice
    settings: TrainConfig
    head: RSFTModel
    results: dict[str, Any]
    tuner: keras_tuner.Tuner
    folder: Path
    backbone_tuner: keras_tuner.Tuner | None = None

    def __repr__(self) -> str:
        from keras_rsft.report._summary import search_summary, summary_text

        return summary_text(search_summary(self))

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.report._notebook import search_html

        return search_html(self)


def search(
    data: Any,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    output: str | os.PathLike,
    options: SearchConfig | None = None,
    space: Space | None = None,
    clean_validation: bool = False,
    features: FeatureConfig | str | None = None,
    settings: TrainConfig | None = None,
    progress: bool = True,
    command: str | None = None,
    worker_commands: Sequence[Sequence[str]] = (),
    worker_timeout: float = _runtime.DEFAULT_TIMEOUT,
    on_note: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Search | None:
    """Searches for the policy, its threshold and the learning rate of a new head.

    With `unfreeze=("frozen", "last-block", "all")` also for how much of the backbone
    to train: the best plain head and the best one that rejects are trained on with its
    last block and with all of it, as `unfreeze` of the settings says. The backbone's
    learning rate is then by default a tenth of the head's, and at most 0.001 with SGD
    and 0.0001 with other optimizers.

    The backbone runs once, for all trials of heads. The same call resumes a search
    that was stopped; trials that ended are kept. The test split is looked at once, when
    the choice has been made.

    Under Keras Tuner's environment variables for several processes this one is the
    chief, which hands out the trials and does the rest, or a worker, which trains.

    Args:
        data: Loaded images or texts, or what `load_data` takes: `(x, y)`, a
            `tf.data.Dataset`, a DataFrame, a folder and so on.
        validation_data: The validation split, as in `load_data`. Default: a part of the
            training samples, or the split that `data` has.
        test_data: The same of the test split.
        output: The search's folder. It may exist only if it holds this very search.
        options: Tuner, trials, objective and so on. Default: `SearchConfig()`.
        space: Ranges, or a function that declares them. Default: `SearchSpace()`.
        clean_validation: Judge trials by the validation split's right labels.
            Default False: by the given ones.
        features: A `FeatureConfig`, or a backbone's name for `FeatureConfig(name)`.
            Default: `FeatureConfig()`.
        settings: Epochs, batch size and seed, and every number that the space leaves
            open. Default: `TrainConfig()`.
        progress: Show progress bars. Default True.
        command: The command line that asked for this, for the record.
        worker_commands: Commands that start the workers on this machine, which train
            instead of this process. Default: none.
        worker_timeout: Seconds after which a chief without workers, or a worker
            without its chief, gives up. Default 600.
        on_note: Called with a line on each step that trains the backbone.
        **changes: Single options, as in `search(data, tuner="grid", ...)`.

    Returns:
        The search; None in a worker, for the chief has it.

    Raises:
        InvalidArgument: If an argument cannot be used, or the folder holds another
            search.
        WorkerLost: If the chief or a worker is gone.
        DataError: If there is no validation split, or its right labels are wanted
            and not known.
        TrainingStalled: If every trial failed or accepted too little.
        WeightsUnavailable: If the backbone's weights cannot be downloaded or read.
    """
    _runtime.require_tensorflow_backend("`search`")
    options = dataclasses.replace(options or SearchConfig(), **changes)
    settings = settings or TrainConfig()
    data, features = _features.resolve(
        data, features, validation_data, test_data, progress
    )
    names = options.unfreeze
    if options.unfrozen:
        require_layers_to_train(features, option="--unfreeze-choices")

    def check(backbone: keras.Model) -> None:
        nonlocal names
        names = _backbone_trials.learnable(backbone, names, settings)

    opened = _features.open_features(
        data,
        features,
        seed=settings.seed,
        progress=progress,
        on_backbone=check,
        on_note=on_note,
    )
    for note in opened.features.one_colour_notes:
        on_note(note)
    if (copies := opened.features.copies) is not None:
        on_note(copies.sentence)
    if names != options.unfreeze:
        on_note(
            "The last block is all that can learn of this backbone: all is left out."
        )
    labelled = judged(opened.data, clean_validation=clean_validation)
    return search_features(
        opened.features,
        output=output,
        options=dataclasses.replace(options, unfreeze=names),
        space=space,
        clean_validation=clean_validation,
        settings=settings,
        progress=progress,
        source=opened.origin,
        command=command,
        worker_commands=worker_commands,
        worker_timeout=worker_timeout,
        whole_model=lambda head: build_classifier(
            opened.float32_backbone(), opened.data.num_classes, head=head
        ),
        backbone_source=dataclasses.replace(opened, data=labelled),
    )


def search_features(
    features: SplitFeatures,
    *,
    output: str | os.PathLike,
    options: SearchConfig | None = None,
    space: Space | None = None,
    clean_validation: bool = False,
    settings: TrainConfig | None = None,
    progress: bool = True,
    source: Mapping[str, Any] | None = None,
    command: str | None = None,
    worker_commands: Sequence[Sequence[str]] = (),
    worker_timeout: float = _runtime.DEFAULT_TIMEOUT,
    whole_model: Callable[[keras.Model], keras.Model] | None = None,
    backbone_source: FeatureSource | None = None,
) -> Search | None:
    """Searches on cached features."""
    _runtime.require_tensorflow_backend("`search_features`")
    started = time.perf_counter()
    options = options or SearchConfig()
    if options.unfrozen and backbone_source is None:
        raise InvalidArgument(
            "Features alone cannot train a backbone. Received: "
            f"unfreeze={options.unfreeze}. Use `search`, which has the images."
        )
    features = judged(features, clean_validation=clean_validation)
    hypermodel = RSFTHyperModel(
        features, settings=settings, space=space, progress=progress
    )
    identity = _folder.identity_of(hypermodel, options, source or {})
    part = _runtime.part_in_search()
    tuner_in = functools.partial(make_tuner, hypermodel, options)
    if part != "alone" or worker_commands:
        from keras_rsft.tuning import _workers
    if part == "worker":
        folder = _folder.join_search(output, identity, timeout=worker_timeout)
        ended = folder / RESULTS_FILE
        _workers.follow(lambda: tuner_in(folder), ended, timeout=worker_timeout)
        return None
    with _folder.open_search(output, identity) as folder:
        tuner = tuner_in(folder)
        workers = None
        if part == "chief" or worker_commands:
            workers = functools.partial(
                _workers.leading, tuner, worker_commands, folder, timeout=worker_timeout
            )
        heads = run_trials(tuner, options, progress=progress, workers=workers)
        backbones = None
        if options.unfrozen and backbone_source is not None:
            backbones = BackboneTuner(tuner, heads, options, backbone_source, folder)
            backbones.search()
            heads = tuple(backbones.heads.values())
        found = _concluded(tuner, options, heads, backbones, folder)
        chosen = found.choice.chosen
        if backbones is not None and chosen.cost:
            trained = backbones.model_file(chosen.trial_id)
            replaced(folder / MODEL_FILE, functools.partial(shutil.copyfile, trained))
        elif whole_model is not None:
            replaced(folder / MODEL_FILE, whole_model(found.head.model).save)
        found.results["command"] = command
        found.results["seconds"] = time.perf_counter() - started
        _folder.write_results(folder, found.results)  # The last: it has ended.
    return found


def judged(splits: Splits, *, clean_validation: bool) -> Splits:
    """Returns the splits with the labels that trials and the choice are judged by.

    Right labels that nobody asked to judge by count as unknown.
    """
    parts = {}
    for name, wanted in (("validation", clean_validation), ("test", True)):
        part = getattr(splits, name)
        if not wanted:
            parts[name] = dataclasses.replace(part, clean_labels=None)
        elif part.clean_labels is not None:
            parts[name] = dataclasses.replace(part, labels=part.clean_labels)
        elif name == "validation":
            raise DataError(
                "The right labels of the validation split are not known. Name them "
                "with `--clean-label-column`, or leave out `--clean-validation`."
            )
    return dataclasses.replace(splits, **parts)


def _concluded(
    tuner: TrialsTuner,
    options: SearchConfig,
    heads: tuple[TrialOutcome, ...],
    backbones: BackboneTuner | None,
    folder: Path,
) -> Search:
    """Chooses among the trials and writes all but the results, which come last."""
    features = tuner.hypermodel.features
    of_backbone = () if backbones is None else backbones.outcomes
    outcomes = (*heads, *of_backbone)
    _folder.write_tables(folder, features, outcomes)
    _folder.write_hparams(folder, outcomes, options)
    _folder.write_pictures(heads, outcomes, options, folder)
    predicted = {one.trial_id: tuner.predicted(one) for one in heads if one.completed}
    if backbones is not None:
        done = [one for one in of_backbone if one.completed]
        predicted |= {one.trial_id: backbones.predicted(one) for one in done}
    credits = credits_of(tuner.hypermodel, options)
    try:
        choice = choose_trial(
            outcomes, options, None if credits is None else predicted, credits
        )
    except TrainingStalled as error:
        # It has ended: with the default folder the next search begins a new one.
        _folder.write_results(folder, {"chosen": None, "reason": str(error)})
        raise TrainingStalled(
            f"{error} See {folder / _folder.TRIALS_FILE} for each trial."
        ) from error
    chosen = choice.chosen
    head = tuner.model_of(chosen if backbones is None else backbones.head_of(chosen))
    cached = _storage.read_json(folder / RESULTS_FILE) or {}
    same = {"chosen_trial": chosen.trial_id, "trials": len(outcomes)}
    if same.items() <= cached.items():  # The test split is not looked at again.
        rows = {name: cached[name] for name in ("chosen", "plain")}
    else:
        plain = _plain_row(tuner, options, outcomes, chosen)
        rows = {"chosen": _row(tuner, backbones, chosen), "plain": plain}
    results = {
        **same,
        **rows,
        "reason": choice.reason,
        "settings": dataclasses.asdict(chosen.settings),
        "test_images": len(features.test),
        "versions": _storage.installed_versions(),
        "failed": sum(not one.completed for one in outcomes),
    }
    if backbones is not None:
        results["strategies"] = _backbone_trials.strategy_rows(
            (*backbones.best_heads, *of_backbone),
            choice,
            head_weights=_backbone_trials.weights_of(head),
        )
    replaced(folder / _storage.HEAD_FILE, head.save)
    write = functools.partial(_storage.write_json, content=list(features.class_names))
    replaced(folder / _storage.CLASSES_FILE, write)
    settings = chosen.settings
    return Search(outcomes, choice, settings, head, results, tuner, folder, backbones)


def credits_of(hypermodel: RSFTHyperModel, options: SearchConfig) -> np.ndarray | None:
    """Returns the credits whose mean is the objective, None where it is a loss."""
    if options.objective == ESTIMATED_ACCURACY:
        return hypermodel.credits
    if options.objective == GIVEN_ACCURACY:
        labels = hypermodel.features.validation.labels
        return given_credits(labels, len(hypermodel.features.class_names))
    return None


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
        scores = [trial.score for trial in trials if trial.score is not None]
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
                    time.sleep(_POLL_SECONDS)
    return tuner.outcomes


def _row(
    tuner: TrialsTuner, backbones: BackboneTuner | None, outcome: TrialOutcome
) -> dict[str, Any]:
    row: dict[str, Any] = {"acceptance_rate": outcome.acceptance}
    by: TrialsTuner | BackboneTuner = tuner
    if backbones is not None:
        row["unfreeze"] = outcome.unfreeze
        by = backbones if outcome.cost else tuner
    predictions = {"validation": by.predicted, "test": by.test_predicted}
    hypermodel = tuner.hypermodel
    for split, quality in zip(HELD_OUT, hypermodel.label_quality.held_out, strict=True):
        part = getattr(hypermodel.features, split)
        if not len(part):
            continue
        # Where right labels are known, they are those that it is judged by.
        by_right = quality if part.clean_labels is None else None
        part = dataclasses.replace(part, clean_labels=None)
        predicted = predictions[split](outcome)
        row |= accuracies(f"{split}_accuracy", predicted, part, by_right)
    return row


def _plain_row(
    tuner: TrialsTuner,
    options: SearchConfig,
    outcomes: Sequence[TrialOutcome],
    chosen: TrialOutcome,
) -> dict[str, Any]:
    """Returns how the best plain trial does, or plain training like the chosen's."""
    plain, hypermodel = [one for one in outcomes if one.is_plain], tuner.hypermodel
    if plain:
        best = max(plain, key=lambda one: one.goodness(options))
        return {"trial": best.trial_id, **_row(tuner, None, best)}
    settings, epochs = chosen.settings, hypermodel.settings.epochs
    policy = dataclasses.replace(settings.policy, name=PLAIN, class_floor=0.0)
    trained = train_head(
        hypermodel.features,
        dataclasses.replace(settings, policy=policy, epochs=epochs, unfreeze=None),
        callbacks=[
            best_of_all_epochs(options.objective, options.direction, epochs=epochs)
        ],
        progress=False,
        label_quality=hypermodel.label_quality,
    )
    names = ("validation_accuracy", "acceptance_rate", "test_accuracy")
    return {
        name: value
        for name, value in trained.results.items()
        if name.startswith(names) and not name.endswith("_clean")  # As in `_row`.
    }
