"""Puts a search together: features once, trials, a choice, a look at the test split."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import keras_tuner

from keras_rsft.backbones import build_classifier
from keras_rsft.data import ImageData
from keras_rsft.errors import DataError
from keras_rsft.features import FeatureSet
from keras_rsft.finetuning import (
    SplitFeatures,
    TrainingSettings,
)
from keras_rsft.finetuning.feature_source import open_features
from keras_rsft.finetuning.run_folder import CLASSES_FILE, HEAD_FILE, MODEL_FILE
from keras_rsft.model import RSFTModel
from keras_rsft.result_folder import write_json
from keras_rsft.searching.choice import (
    COMPLETED,
    Choice,
    TrialOutcome,
    choose_trial,
)
from keras_rsft.searching.hypermodel import RSFTHyperModel
from keras_rsft.searching.names import SearchOptions
from keras_rsft.searching.oracles import make_tuner
from keras_rsft.searching.pictures import draw_heat_maps
from keras_rsft.searching.search_folder import (
    identity_of,
    open_search,
    replaced,
    write_results,
)
from keras_rsft.searching.space import Space
from keras_rsft.searching.trials import (
    head_of_outcome,
    run_trials,
    settings_of_outcome,
    side_by_side,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Search:
    """What came out of a search.

    Attributes:
        outcomes: All trials, in the order in which they began.
        choice: Which setting to use, and why.
        settings: How to train with it: `finetune(settings=...)` gives its model.
        head: The chosen trial's `RSFTModel` over features, of its best epoch.
        results: The chosen setting and plain fine-tuning side by side, for each its
            `validation_accuracy`, its `test_accuracy` where there is a test split,
            and its `acceptance_rate`; the reason of the choice; the seconds.
        tuner: The Keras Tuner, for `get_best_models` and the like.
        folder: Where the search was written.
    """

    outcomes: tuple[TrialOutcome, ...]
    choice: Choice
    settings: TrainingSettings
    head: RSFTModel
    results: dict[str, Any]
    tuner: keras_tuner.Tuner
    folder: Path


def search(
    data: ImageData | str | os.PathLike,
    *,
    output: str | os.PathLike,
    options: SearchOptions | None = None,
    space: Space | None = None,
    clean_validation: bool = False,
    backbone: str = "resnet50",
    weights: str = "imagenet",
    image_size: int | None = None,
    precision: str = "auto",
    views: int = 1,
    feature_precision: str = "float32",
    settings: TrainingSettings | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    command: str | None = None,
    **changes: Any,
) -> Search:
    """Searches for the policy, its threshold and the learning rate of a new head.

    The base runs once, for all trials. The same call goes on with a search that was
    stopped; trials that ended are kept. The test split is looked at once, when the
    choice has been made.

    Args:
        data: Loaded images, or what `load_images` takes.
        output: The search's folder. It may exist only if it holds this very search.
        options: Tuner, trials, objective and so on. Default: `SearchOptions()`.
        space: What is searched. Default: `SearchSpace()`.
        clean_validation: Judge trials by the validation split's right labels.
            Default False: by the given ones.
        backbone: Name of a base or path of a `.keras` file. Default ResNet50.
        weights: `"imagenet"`, `"none"`, or a file. Default `"imagenet"`.
        image_size: Side of the square images in pixels. Default: the base's.
        precision: `"auto"`, `"float32"` or `"bfloat16"`, for the base's pass.
        views: Views kept of each training image, at least 1. Default 1.
        feature_precision: How features are kept: `"float32"` or, in half the space,
            `"float16"`. Default float32.
        settings: Epochs, batch size and seed, and every number that the space leaves
            open. Default: `TrainingSettings()`.
        cache_dir: Where features are kept. Default: the user's cache folder.
        progress: Show progress bars. Default True.
        command: The command line that asked for this, for the record.
        **changes: Single options, as in `search(data, tuner="grid", ...)`.

    Raises:
        InvalidArgument: If an argument cannot be used, or the folder holds another
            search.
        DataError: If there is no validation split, or its right labels are wanted
            and not known.
        TrainingStalled: If every trial failed or accepted too little.
        WeightsUnavailable: If the base's weights cannot be had.
    """
    options = dataclasses.replace(options or SearchOptions(), **changes)
    settings = settings or TrainingSettings()
    opened = open_features(
        data,
        backbone=backbone,
        weights=weights,
        image_size=image_size,
        precision=precision,
        views=views,
        feature_precision=feature_precision,
        seed=settings.seed,
        cache_dir=cache_dir,
        progress=progress,
    )
    found = search_features(
        opened.features,
        output=output,
        options=options,
        space=space,
        clean_validation=clean_validation,
        settings=settings,
        progress=progress,
        source=opened.origin,
        command=command,
    )
    model = build_classifier(
        opened.float32_base(), opened.data.num_classes, head=found.head.model
    )
    replaced(found.folder / MODEL_FILE, model.save)
    return found


def search_features(
    features: SplitFeatures,
    *,
    output: str | os.PathLike,
    options: SearchOptions | None = None,
    space: Space | None = None,
    clean_validation: bool = False,
    settings: TrainingSettings | None = None,
    progress: bool = True,
    source: Mapping[str, Any] | None = None,
    command: str | None = None,
) -> Search:
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

    Raises:
        InvalidArgument: As in `search`.
        DataError: As in `search`.
        TrainingStalled: As in `search`.
    """
    started = time.perf_counter()
    options = options or SearchOptions()
    features = _judged(features, clean_validation=clean_validation)
    hypermodel = RSFTHyperModel(
        features, settings=settings, space=space, progress=progress
    )
    identity = identity_of(hypermodel, options, source or {})
    with open_search(output, identity) as folder:
        with contextlib.redirect_stdout(io.StringIO()):  # "Reloading Tuner from ..."
            tuner = make_tuner(hypermodel, options, folder)
        outcomes = run_trials(tuner, options, progress=progress)
        choice = choose_trial(
            outcomes,
            objective=options.objective,
            validation_size=len(features.validation),
            min_acceptance=options.min_acceptance,
        )
        chosen = settings_of_outcome(tuner, choice.chosen)
        head = head_of_outcome(tuner, choice.chosen)
        results = side_by_side(tuner, options, outcomes, choice.chosen, head, folder)
        results |= {
            "reason": choice.reason,
            "settings": dataclasses.asdict(chosen),
            "trials": len(outcomes),
            "failed": sum(one.status != COMPLETED for one in outcomes),
            "command": command,
            "seconds": time.perf_counter() - started,
        }
        replaced(folder / HEAD_FILE, head.save)
        replaced(
            folder / CLASSES_FILE,
            lambda path: write_json(path, list(features.class_names)),
        )
        draw_heat_maps(outcomes, folder)
        write_results(folder, outcomes, results)
    return Search(outcomes, choice, chosen, head, results, tuner, folder)


def _judged(features: SplitFeatures, *, clean_validation: bool) -> SplitFeatures:
    """Returns the splits with the labels that trials and the choice are judged by."""
    parts = {}
    if clean_validation:
        if features.validation.clean_labels is None:
            raise DataError(
                "The right labels of the validation split are not known. Name them "
                "with `--clean-label-column` or `--clean-label-key`, or leave out "
                "`--clean-validation`."
            )
        parts["validation"] = _with_right_labels(features.validation)
    if features.test.clean_labels is not None:
        parts["test"] = _with_right_labels(features.test)
    return dataclasses.replace(features, **parts)


def _with_right_labels(part: FeatureSet) -> FeatureSet:
    return part.with_labels(part.clean_labels, part.clean_labels)
