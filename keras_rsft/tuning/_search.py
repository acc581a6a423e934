"""Runs a search: features once, trials, a choice, a look at the test split."""

from __future__ import annotations

import dataclasses
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from keras_rsft._runtime import (
    DEFAULT_TIMEOUT,
    part_in_search,
    require_tensorflow_backend,
)
from keras_rsft._storage import (
    CLASSES_FILE,
    HEAD_FILE,
    RESULTS_FILE,
    installed_versions,
    replaced,
    write_json,
)
from keras_rsft.backbones._build import build_classifier
from keras_rsft.config import FeatureConfig, SearchConfig, TrainConfig
from keras_rsft.data._samples import SampleData
from keras_rsft.errors import DataError, InvalidArgument, TrainingStalled
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.training._features import (
    FeatureSource,
    SplitFeatures,
    open_features,
    resolve,
)
from keras_rsft.training._unfreeze import require_layers_to_train
from keras_rsft.tuning._backbone_trials import (
    BackboneTrials,
    chosen_trial,
    keep_model,
    learnable,
    table_of_strategies,
    train_backbones,
    with_frozen,
)
from keras_rsft.tuning._choice import (
    COMPLETED,
    Choice,
    TrialOutcome,
    choose_trial,
    trainable_of,
)
from keras_rsft.tuning._folder import (
    TRIALS_FILE,
    identity_of,
    join_search,
    note_head_seconds,
    open_search,
    write_hparams,
    write_pictures,
    write_results,
    write_samples,
    write_trials,
)
from keras_rsft.tuning._space import Space
from keras_rsft.tuning._trials import ChosenTrial, run_trials, side_by_side
from keras_rsft.tuning._tuner import RSFTHyperModel, make_tuner


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """What came out of a search.

    Attributes:
        outcomes: All trials, in the order in which they began.
        choice: Which setting to use, and why.
        settings: How to train with it: `finetune(settings=...)` gives its model.
        head: The chosen trial's `RSFTModel` over features, of its best epoch; where a
            part of the base learnt, that of the head which it began from.
        results: The chosen setting and plain fine-tuning side by side, for each its
            `validation_accuracy`, its `test_accuracy` where there is a test split,
            and its `acceptance_rate`; the reason of the choice; the seconds. With a
            base that learns `strategies`, one row for each.
        tuner: The Keras Tuner, for `get_best_models` and the like.
        folder: Where the search was written.
        base_tuner: That of the trials in which the base learnt, or None.
    """

    outcomes: tuple[TrialOutcome, ...]
    choice: Choice
    settings: TrainConfig
    head: RSFTModel
    results: dict[str, Any]
    tuner: keras_tuner.Tuner
    folder: Path
    base_tuner: keras_tuner.Tuner | None = None

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.report._notebook import search_html

        return search_html(self)


def search(
    data: SampleData | str | os.PathLike,
    *,
    output: str | os.PathLike,
    options: SearchConfig | None = None,
    space: Space | None = None,
    clean_validation: bool = False,
    features: FeatureConfig | str | None = None,
    settings: TrainConfig | None = None,
    progress: bool = True,
    command: str | None = None,
    worker_commands: Sequence[Sequence[str]] = (),
    worker_timeout: float = DEFAULT_TIMEOUT,
    on_note: Callable[[str], None] = lambda text: None,
    **changes: Any,
) -> Search | None:
    """Searches for the policy, its threshold and the learning rate of a new head.

    With `unfreeze=("frozen", "last-block", "all")` also for how much of the base to
    train: the best plain head and the best one that rejects are trained on with its
    last block and with all of it, as `unfreeze` of the settings says. The base's
    learning rate is then by default a tenth of the head's, and at most 0.001 with SGD
    and 0.0001 with other optimizers.

    The base runs once, for all trials of heads. The same call goes on with a search
    that was stopped; trials that ended are kept. The test split is looked at once, when
    the choice has been made.

    Under Keras Tuner's environment variables for several processes this one is the
    chief, which hands out the trials and does the rest, or a worker, which trains.

    Args:
        data: Loaded images, or what `load_images` takes.
        output: The search's folder. It may exist only if it holds this very search.
        options: Tuner, trials, objective and so on. Default: `SearchConfig()`.
        space: What is searched. Default: `SearchSpace()`.
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
        on_note: Called with what is done next where the base learns, in one line.
        **changes: Single options, as in `search(data, tuner="grid", ...)`.

    Returns:
        What was found; None in a worker, for the chief has it.

    Raises:
        InvalidArgument: If an argument cannot be used, or the folder holds another
            search.
        WorkerLost: If the chief or a worker is gone.
        DataError: If there is no validation split, or its right labels are wanted
            and not known.
        TrainingStalled: If every trial failed or accepted too little.
        WeightsUnavailable: If the base's weights cannot be had.
    """
    require_tensorflow_backend("`search`")
    options = dataclasses.replace(options or SearchConfig(), **changes)
    settings = settings or TrainConfig()
    data, features = resolve(data, features)
    if options.of_base:
        require_layers_to_train(features)
    parts = list(options.unfreeze)

    def check(base: keras.Model) -> None:
        parts[:] = learnable(base, options.unfreeze, settings)

    opened = open_features(
        data,
        features,
        seed=settings.seed,
        progress=progress,
        on_backbone=check,
        on_note=on_note,
    )
    if len(parts) < len(options.unfreeze):
        on_note("The last block is all that can learn of this base: all is left out.")
    base_source = dataclasses.replace(
        opened, data=judged_data(opened.data, clean_validation=clean_validation)
    )

    def whole_model(head: keras.Model) -> keras.Model:
        return build_classifier(
            opened.float32_backbone(), opened.data.num_classes, head=head
        )

    return search_features(
        opened.features,
        output=output,
        options=dataclasses.replace(options, unfreeze=tuple(parts)),
        space=space,
        clean_validation=clean_validation,
        settings=settings,
        progress=progress,
        source=opened.origin,
        command=command,
        worker_commands=worker_commands,
        worker_timeout=worker_timeout,
        whole_model=whole_model,
        base_source=base_source,
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
    worker_timeout: float = DEFAULT_TIMEOUT,
    whole_model: Callable[[keras.Model], keras.Model] | None = None,
    base_source: FeatureSource | None = None,
) -> Search | None:
    """Searches on features that are kept already.

    Args:
        features: The splits.
        output: As in `search`.
        options: As in `search`.
        space: As in `search`.
        clean_validation: As in `search`.
        settings: As in `search`.
        progress: Show a progress bar over the trials. Default True.
        source: Where the features come from; part of what makes a search the same.
        command: As in `search`.
        worker_commands: As in `search`.
        worker_timeout: As in `search`.
        whole_model: Makes of the chosen head the model from images that is kept in
            the folder. Default None: the head alone is kept.
        base_source: Images and base, for trials in which the base learns. Default
            None: there are none.

    Returns:
        As in `search`.

    Raises:
        InvalidArgument: As in `search`.
        WorkerLost: As in `search`.
        DataError: As in `search`.
        TrainingStalled: As in `search`.
    """
    require_tensorflow_backend("`search_features`")
    started = time.perf_counter()
    options = options or SearchConfig()
    if options.of_base and base_source is None:
        raise InvalidArgument(
            "Features alone cannot train a base. Received: "
            f"unfreeze={options.unfreeze}. Use `search`, which has the images."
        )
    features = judged_features(features, clean_validation=clean_validation)
    hypermodel = RSFTHyperModel(
        features, settings=settings, space=space, progress=progress
    )
    identity, part = identity_of(hypermodel, options, source or {}), part_in_search()
    tuner_in = functools.partial(make_tuner, hypermodel, options)
    if part == "worker":
        from keras_rsft.tuning._workers import follow

        folder = join_search(output, identity, timeout=worker_timeout)
        ended = folder / RESULTS_FILE
        follow(lambda: tuner_in(folder), ended, timeout=worker_timeout)
        return None
    with open_search(output, identity) as folder:
        tuner = tuner_in(folder)
        before, began = len(tuner.oracle.end_order), time.perf_counter()
        workers = None
        if part == "chief" or worker_commands:
            from keras_rsft.tuning._workers import leading

            workers = functools.partial(
                leading, tuner, worker_commands, folder, timeout=worker_timeout
            )
        outcomes = run_trials(tuner, options, progress=progress, workers=workers)
        head_seconds = note_head_seconds(
            folder, time.perf_counter() - began, len(tuner.oracle.end_order) - before
        )
        bases = None
        if options.of_base and base_source is not None:
            outcomes = with_frozen(outcomes)
            bases = train_backbones(tuner, options, outcomes, base_source, folder)
        found, chosen = _concluded(tuner, options, outcomes, bases, folder)
        if bases is not None:
            found.results["strategies"] = table_of_strategies(
                tuner, outcomes, chosen, bases, head_seconds
            )
        keep_model(chosen, whole_model, folder)
        results = found.results | {
            "command": command,
            "seconds": time.perf_counter() - started,
        }
        write_results(folder, results)  # The last: they say that it has ended.
    return dataclasses.replace(found, results=results)


def judged_features(
    features: SplitFeatures, *, clean_validation: bool
) -> SplitFeatures:
    """Returns the splits with the labels that trials and the choice are judged by."""
    validation = features.validation
    if clean_validation:
        if validation.clean_labels is None:
            raise DataError(
                "The right labels of the validation split are not known. Name them "
                "with `--clean-label-column`, or leave out "
                "`--clean-validation`."
            )
        validation = validation.with_right_labels()
    test = features.test.with_right_labels()
    return dataclasses.replace(features, validation=validation, test=test)


def judged_data(data: SampleData, *, clean_validation: bool) -> SampleData:
    """Returns the images with the same labels as `judged_features`."""
    parts = {}
    for name, wanted in (("validation", clean_validation), ("test", True)):
        split = getattr(data, name)
        if wanted and split.clean_labels is not None:
            parts[name] = dataclasses.replace(split, labels=split.clean_labels)
    return dataclasses.replace(data, **parts)


def _concluded(
    tuner: keras_tuner.Tuner,
    options: SearchConfig,
    heads: tuple[TrialOutcome, ...],
    bases: BackboneTrials | None,
    folder: Path,
) -> tuple[Search, ChosenTrial]:
    """Chooses among the trials and writes all but the results, which come last."""
    features = tuner.hypermodel.features
    outcomes = heads if bases is None else (*heads, *bases.outcomes)
    write_samples(folder, features)
    write_trials(folder, outcomes)
    write_hparams(folder, outcomes, options)
    write_pictures(heads, outcomes, options, folder)
    try:
        choice = choose_trial(
            outcomes,
            objective=options.objective,
            validation_size=len(features.validation),
            min_acceptance=options.min_acceptance,
        )
    except TrainingStalled as error:
        # It has ended: with the default folder the next search begins a new one.
        write_results(folder, {"chosen": None, "reason": str(error)})
        raise TrainingStalled(
            f"{error} What became of each trial is in {folder / TRIALS_FILE}."
        ) from error
    chosen = chosen_trial(tuner, heads, choice.chosen, bases)
    settings, head = chosen.settings, chosen.head
    results = side_by_side(tuner, options, outcomes, chosen, folder)
    if bases is not None:
        results["chosen"]["trainable"] = trainable_of(choice.chosen)
    results |= {
        "reason": choice.reason,
        "settings": dataclasses.asdict(settings),
        "trials": len(outcomes),
        "test_images": len(features.test),
        "versions": installed_versions(),
        "failed": sum(one.status != COMPLETED for one in outcomes),
    }
    replaced(folder / HEAD_FILE, head.save)
    replaced(
        folder / CLASSES_FILE,
        lambda path: write_json(path, list(features.class_names)),
    )
    base_tuner = None if bases is None else bases.tuner
    found = Search(outcomes, choice, settings, head, results, tuner, folder, base_tuner)
    return found, chosen
