"""Compares methods on the same cached features."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from keras_rsft import _storage
from keras_rsft._progress import progress_bar
from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._storage import NumberedFolder
from keras_rsft.comparison import _methods
from keras_rsft.comparison._methods import MethodSummary, Outcome, Trial, Verdict
from keras_rsft.config import METHOD_NAMES, FeatureConfig, TrainConfig, check_methods
from keras_rsft.data._labels import add_label_noise, parse_noise
from keras_rsft.data._samples import SampleData
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.features._batches import positions_of
from keras_rsft.training._features import SplitFeatures, open_features, resolve
from keras_rsft.training._head import HELD_OUT, audit_splits

NOISY_SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison:
    """Several methods on one data set, side by side.

    Attributes:
        outcomes: One for each method and seed.
        summaries: For each method: means, intervals, difference to `plain`.
        verdict: Which method is ahead, or which are tied.
        judged_by: Whether the right labels of the test split are `"known"` or
            `"estimated"`, or the `"given"` ones count, as no label can be judged.
        notes: What was left out, and why; one sentence each.
        config: Everything that is needed to repeat the comparison.
        noisy_data: For each seed, the data with the labels made wrong on purpose;
            empty without `noise`.
        folder: Where the comparison was written, or None.
    """

    outcomes: tuple[Outcome, ...]
    summaries: dict[str, MethodSummary]
    verdict: Verdict
    judged_by: str = "known"
    notes: tuple[str, ...] = ()
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    noisy_data: dict[int, SampleData] = dataclasses.field(
        default_factory=dict, repr=False
    )
    folder: Path | None = None

    def __repr__(self) -> str:
        from keras_rsft.report._summary import comparison_summary, summary_text

        return summary_text(comparison_summary(self))

    def _repr_html_(self) -> str:
        """Returns a table and a figure for a notebook."""
        from keras_rsft.report._notebook import comparison_html

        return comparison_html(self)


def compare(
    data: Any,
    *,
    validation_data: Any = None,
    test_data: Any = None,
    methods: Sequence[str] | None = None,
    seeds: int = 5,
    noise: str | None = None,
    features: FeatureConfig | str | None = None,
    settings: TrainConfig | None = None,
    output: str | os.PathLike | NumberedFolder | None = None,
    progress: bool = True,
    command: str | None = None,
) -> Comparison:
    """Trains a head with each of several methods on the same cached features.

    The seed changes the order of the samples, and the labels that `noise` makes wrong.
    Accuracy is measured on the test split by the right labels, known or estimated
    (`LabelQuality.accuracy`). Methods are compared on the same test samples, seed by
    seed. No method sees a right label.

    Args:
        data: Loaded images or texts, or what `load_data` takes: `(x, y)`, a
            `tf.data.Dataset`, a DataFrame, a folder and so on.
        validation_data: The validation split, as in `load_data`. Default: a part of the
            training samples, or the split that `data` has.
        test_data: The same of the test split.
        methods: Names out of `METHOD_NAMES`; `plain` is always among them.
            Default: all that can run on this data.
        seeds: How many seeds, at least 1, from `settings.seed` on. Default 5.
        noise: Labels of the training and validation splits are made wrong on
            purpose, as in `add_label_noise`. Default: none.
        features: A `FeatureConfig`, or a backbone's name for `FeatureConfig(name)`.
            Default: `FeatureConfig()`.
        settings: How each head is trained; the parameters of `settings.policy` are
            those of the methods that are policies. Without early stopping, which is a
            method. Default: `TrainConfig()`.
        output: Folder of the comparison, which must not exist, or
            `NumberedFolder("compare-photos")` for the next number. It is taken at once
            and appears whole at the end. Default: none is written.
        progress: Show progress bars. Default True.
        command: The command line that asked for this, for the record.

    Returns:
        Outcomes, means with intervals, and a verdict.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data has no test split, or lacks what a method that was
            asked for by name needs.
        ImportError: If `cleanlab` is asked for by name and not installed.
        WeightsUnavailable: If the backbone's weights cannot be downloaded or read.
    """
    require_tensorflow_backend("`compare`")
    settings = settings or TrainConfig()
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
    methods = check_methods(methods)
    if noise is not None:
        parse_noise(noise)
    data, features = resolve(data, features, validation_data, test_data, progress)

    with contextlib.ExitStack() as stack:
        place = None  # Taken before the work, not after it.
        if output is not None:
            opened = _storage.open_place(output, {"kind": "comparison"})
            place = stack.enter_context(opened)
        source = open_features(data, features, seed=settings.seed, progress=progress)
        noisy_data = {}

        def features_of(seed: int) -> SplitFeatures:
            if noise is None:
                return source.features
            noisy_data[seed] = add_label_noise(
                source.data, noise, seed=seed, splits=NOISY_SPLITS
            )
            return relabelled(source.features, noisy_data[seed])

        comparison = compare_features(
            features_of,
            methods=methods,
            seeds=seeds,
            settings=settings,
            progress=progress,
        )
        notes = comparison.notes
        if (copies := source.features.copies) is not None:
            notes += (copies.sentence,)
        comparison = dataclasses.replace(
            comparison,
            notes=notes,
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
    settings = settings or TrainConfig()
    methods = check_methods(methods)
    features_of = features if callable(features) else lambda seed: features
    first = features_of(settings.seed)
    if not len(first.test):
        raise DataError("A comparison needs a test split, and there is none.")
    missing, notes = _methods.missing_methods(first, settings), []
    if methods is None:
        methods = tuple(name for name in METHOD_NAMES if name not in missing)
        notes = [f"{name} was left out: {why}" for name, why in missing.items()]
    for name in methods:
        if name in missing:
            raise DataError(f"The method {name} cannot run: {missing[name]}")
    outcomes, judge, judged_by = [], None, "known"
    if first.test.clean_labels is None:  # Then it has the same labels for all seeds.
        audit = audit_splits(first, settings.seed, progress=progress)
        judge = audit.held_out[HELD_OUT.index("test")]
        judged_by = "estimated" if judge.can_judge else "given"
    with progress_bar(
        "Comparing", total=seeds * len(methods), unit="heads", visible=progress
    ) as advance:
        for seed in range(settings.seed, settings.seed + seeds):
            labelled = features_of(seed)
            # No method goes by right labels, which only measure it.
            validation = dataclasses.replace(labelled.validation, clean_labels=None)
            trial = Trial(
                features=dataclasses.replace(labelled, validation=validation),
                settings=dataclasses.replace(settings, seed=seed),
                judge=judge,
            )
            for name in methods:
                outcomes.append(_methods.run_method(name, trial))
                advance(1)
    summaries, verdict = _methods.summarize(outcomes), _methods.judge(outcomes, judge)
    return Comparison(tuple(outcomes), summaries, verdict, judged_by, tuple(notes))


def relabelled(features: SplitFeatures, data: SampleData) -> SplitFeatures:
    """Returns the same features under the labels that a data set gives their ids."""
    parts = {}
    for name in ("train", "validation", "test"):
        part, split = getattr(features, name), getattr(data, name)
        rows = positions_of(part, split)
        clean = None if split.clean_labels is None else split.clean_labels[rows]
        parts[name] = part.with_labels(split.labels[rows], clean)
    return dataclasses.replace(features, **parts)


def _write_files(folder: Path, comparison: Comparison) -> None:
    columns = [field.name for field in dataclasses.fields(Outcome)]
    columns[columns.index("test_right")] = "test_accuracy"
    columns.remove("predicted")
    rows = ([getattr(one, name) for name in columns] for one in comparison.outcomes)
    _storage.write_csv(folder / "comparison.csv", columns, rows)
    summary = {
        "verdict": comparison.verdict,
        "judged_by": comparison.judged_by,
        "methods": comparison.summaries,
        "notes": comparison.notes,
    }
    _storage.write_json(folder / "summary.json", _storage.json_value(summary))
    _storage.write_json(folder / _storage.CONFIG_FILE, comparison.config)
    labels = []
    for seed, data in comparison.noisy_data.items():
        names = data.class_names
        for split in (data.train, data.validation):
            right = split.labels if split.clean_labels is None else split.clean_labels
            known = zip(split.ids, split.labels, right, strict=True)
            for sample_id, given, clean in known:
                row = (seed, sample_id, split.name, names[given], names[clean])
                labels.append(row)
    if labels:
        header = ("seed", "id", "split", "given_label", "clean_label")
        _storage.write_csv(folder / "labels.csv", header, labels)
