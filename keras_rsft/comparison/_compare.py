"""Compares methods on the same cached features."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from keras_rsft._progress import progress_bar
from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._storage import (
    CONFIG_FILE,
    NumberedFolder,
    json_value,
    open_place,
    write_csv,
    write_json,
)
from keras_rsft.comparison._methods import (
    MethodSummary,
    Outcome,
    Trial,
    Verdict,
    judge,
    run_method,
    summarize,
)
from keras_rsft.config import (
    AUTO_WEIGHT_DECAY,
    CLEAN_SUBSET,
    CLEANLAB,
    EARLY_STOPPING,
    METHOD_NAMES,
    WEIGHT_DECAY,
    TrainConfig,
    check_methods,
    has_cleanlab,
)
from keras_rsft.data._labels import add_label_noise, parse_noise
from keras_rsft.data._samples import SampleData
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._batches import positions_of
from keras_rsft.training._features import SplitFeatures, open_features

NOISY_SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Several methods on one data set, side by side.

    Attributes:
        outcomes: One for each method and seed.
        summaries: For each method: means, intervals, difference to `plain`.
        verdict: Which method is ahead, or which are tied.
        notes: What was left out, and why; one sentence each.
        config: Everything that is needed to repeat the comparison.
        noisy_data: For each seed, the data with the labels made wrong on purpose;
            empty without `noise`.
        folder: Where the comparison was written, or None.
    """

    outcomes: tuple[Outcome, ...]
    summaries: dict[str, MethodSummary]
    verdict: Verdict
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    noisy_data: dict[int, SampleData] = dataclasses.field(
        default_factory=dict, repr=False
    )
    folder: Path | None = None

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.report._notebook import comparison_html

        return comparison_html(self)


def compare(
    data: SampleData | str | os.PathLike,
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    noise: str | None = None,
    backbone: str = "resnet50",
    weights: str = "imagenet",
    image_size: int | None = None,
    precision: str = "auto",
    views: int = 1,
    feature_precision: str = "float32",
    settings: TrainConfig | None = None,
    output: str | os.PathLike | NumberedFolder | None = None,
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Comparison:
    """Trains a head with each of several methods on the same cached features.

    The seed changes the initial weights, the order of the samples and the labels
    that `noise` makes wrong. Accuracy is measured on the test split, against the
    right labels where they are known.

    Args:
        data: Loaded images, or what `load_images` takes.
        methods: Names out of `METHOD_NAMES`; `plain` is always among them.
            Default: all that can run on this data.
        seeds: How many seeds, at least 1, from `settings.seed` on. Default 5.
        noise: Labels of the training and validation splits are made wrong on
            purpose, as in `add_label_noise`. Default: none.
        backbone: Name of a backbone or path of a `.keras` file. Default ResNet50.
        weights: `"imagenet"`, `"none"`, or a file. Default `"imagenet"`.
        image_size: Side of the square images in pixels. Default: the backbone's.
        precision: `"auto"`, `"float32"` or `"bfloat16"`, for the backbone's pass.
        views: Augmentations cached of each training image, at least 1. Default 1.
        feature_precision: How features are cached: `"float32"` or, in half the space,
            `"float16"`. Default float32.
        settings: How each head is trained; the numbers of `settings.policy` are
            those of the methods that are policies. Without early stopping, which is a
            method. Default: `TrainConfig()`.
        output: Folder of the comparison, which must not exist, or
            `NumberedFolder("compare-photos")` for the next number. It is taken at once
            and appears whole at the end. Default: none is written.
        cache_dir: Where features are cached. Default: the user's cache folder.
        progress: Show progress bars. Default True.
        command: The command line that asked for this, for the record.

    Returns:
        Outcomes, means with intervals, and a verdict.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data has no test split, or lacks what a method that was
            asked for by name needs.
        ImportError: If `cleanlab` is asked for by name and not installed.
        WeightsUnavailable: If the backbone's weights cannot be had.
    """
    require_tensorflow_backend("`compare`")
    settings = settings or TrainConfig()
    _check(settings, seeds)
    methods = check_methods(methods)
    if noise is not None:
        parse_noise(noise)

    with contextlib.ExitStack() as stack:
        place = None  # Taken before the work, not after it.
        if output is not None:
            place = stack.enter_context(open_place(output, {"kind": "comparison"}))
        source = open_features(
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
        noisy_data = {}
        for seed in range(settings.seed, settings.seed + seeds):
            if noise is not None:
                noisy_data[seed] = add_label_noise(
                    source.data, noise, seed=seed, splits=NOISY_SPLITS
                )

        def features_of(seed: int) -> SplitFeatures:
            if noise is None:
                return source.features
            return relabelled(source.features, noisy_data[seed])

        comparison = compare_features(
            features_of,
            methods=methods,
            seeds=seeds,
            settings=settings,
            progress=progress,
        )
        comparison = dataclasses.replace(
            comparison,
            config={
                "command": command,
                **source.origin,
                "methods": list(comparison.summaries),
                "seeds": seeds,
                "noise": noise,
                **dataclasses.asdict(settings),
            },
            noisy_data=noisy_data,
            folder=None if place is None else place.folder,
        )
        if place is not None:
            place.write(lambda folder: _write_files(folder, comparison))
    return comparison


def compare_features(
    features: SplitFeatures | Callable[[int], SplitFeatures],
    *,
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    settings: TrainConfig | None = None,
    progress: bool = True,
) -> Comparison:
    """Compares methods on features that are cached already; writes nothing."""
    require_tensorflow_backend("`compare_features`")
    settings = settings or TrainConfig()
    _check(settings, seeds)
    methods = check_methods(methods)
    features_of = features if callable(features) else lambda seed: features
    first = features_of(settings.seed)
    if not len(first.test):
        raise DataError("A comparison needs a test split, and there is none.")
    missing, notes = _missing(first, settings), []
    if methods is None:
        methods = tuple(name for name in METHOD_NAMES if name not in missing)
        notes = [f"{name} was left out: {why}" for name, why in missing.items()]
    for name in methods:
        if name in missing:
            raise DataError(f"The method {name} cannot run: {missing[name]}")
    outcomes = []
    with progress_bar(
        "Comparing", total=seeds * len(methods), unit="heads", visible=progress
    ) as advance:
        for seed in range(settings.seed, settings.seed + seeds):
            labelled = features_of(seed)
            test = labelled.test.with_right_labels()
            trial = Trial(
                features=dataclasses.replace(labelled, test=test),
                settings=dataclasses.replace(settings, seed=seed),
            )
            for name in methods:
                outcomes.append(run_method(name, trial))
                advance(1)
    verdict = judge(outcomes)
    return Comparison(tuple(outcomes), summarize(outcomes), verdict, tuple(notes))


def relabelled(features: SplitFeatures, data: SampleData) -> SplitFeatures:
    """Returns the same features under the labels that a data set gives their ids."""
    parts = {}
    for name in ("train", "validation", "test"):
        part, split = getattr(features, name), getattr(data, name)
        rows = positions_of(part, split)
        clean = None if split.clean_labels is None else split.clean_labels[rows]
        parts[name] = part.with_labels(split.labels[rows], clean)
    return dataclasses.replace(features, **parts)


def _missing(features: SplitFeatures, settings: TrainConfig) -> dict[str, str]:
    """Returns the methods that cannot run on this data, each with the reason."""
    missing = {}
    if settings.weight_decay is not None:
        for name in (WEIGHT_DECAY, AUTO_WEIGHT_DECAY):
            missing[name] = "every method here has a weight decay already."
    if not len(features.validation):
        missing[EARLY_STOPPING] = "it needs a validation split."
    if not has_cleanlab():
        missing[CLEANLAB] = 'it needs `pip install "keras_rsft[compare]"`.'
    train = features.train
    if train.clean_labels is None:
        missing[CLEAN_SUBSET] = "the right labels are not known."
    elif (train.labels == train.clean_labels).all():
        missing[CLEAN_SUBSET] = "all labels are right."
    return missing


def _check(settings: TrainConfig, seeds: int) -> None:
    if settings.early_stopping is not None:
        raise InvalidArgument(
            "A comparison has early stopping as a method of its own. Leave "
            "`early_stopping` out of the settings."
        )
    if seeds < 1:
        raise InvalidArgument(f"`seeds` must be at least 1. Received: {seeds}.")
    if not 0 <= settings.seed <= 2**31 - seeds:
        raise InvalidArgument(
            f"Each of the {seeds} seeds from `settings.seed` on must be in "
            f"[0, 2**31). Received: settings.seed={settings.seed}."
        )


def _write_files(folder: Path, comparison: Comparison) -> None:
    columns = [field.name for field in dataclasses.fields(Outcome)]
    columns[columns.index("test_right")] = "test_accuracy"
    rows = ([getattr(one, name) for name in columns] for one in comparison.outcomes)
    write_csv(folder / "comparison.csv", columns, rows)
    summary = {
        "verdict": comparison.verdict,
        "methods": comparison.summaries,
        "notes": comparison.notes,
    }
    write_json(folder / "summary.json", json_value(summary))
    write_json(folder / CONFIG_FILE, comparison.config)
    if comparison.noisy_data:
        header = ("seed", "id", "split", "given_label", "clean_label")
        labels = _label_rows(comparison.noisy_data)
        write_csv(folder / "labels.csv", header, labels)


def _label_rows(noisy_data: dict[int, SampleData]) -> Iterable[tuple]:
    for seed, data in noisy_data.items():
        names = data.class_names
        for split in (data.train, data.validation):
            right = split.labels if split.clean_labels is None else split.clean_labels
            for sample_id, given, clean in zip(
                split.ids, split.labels, right, strict=True
            ):
                yield seed, sample_id, split.name, names[given], names[clean]
