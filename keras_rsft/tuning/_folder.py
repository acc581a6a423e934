"""The folder of a search."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras_tuner
import numpy as np

from keras_rsft import _storage
from keras_rsft._storage import RESULTS_FILE, SEARCH_FILE, replaced
from keras_rsft.config import UNFREEZE_NAMES, SearchConfig
from keras_rsft.errors import InvalidArgument, WorkerLost
from keras_rsft.report import _charts, _record
from keras_rsft.report._charts import UNUSED, Axis, HeatMap
from keras_rsft.training._features import SplitFeatures
from keras_rsft.tuning._choice import UNFREEZE, TrialOutcome
from keras_rsft.tuning._space import explored
from keras_rsft.tuning._tuner import RSFTHyperModel

# Folder -------------------------------------------------------------------------------

TRIALS_FILE = "trials.csv"
# Options that may change from one call to the next without another meaning of trials.
_FREE_OPTIONS = ("max_trials", "parallel_trials", "min_acceptance", "unfreeze")
_CHANGED = {"data": "another data set or backbone", "space": "another search space"}


def identity_of(
    hypermodel: RSFTHyperModel, options: SearchConfig, source: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns what must stay the same for a search to resume, as JSON can hold it."""
    space = explored(hypermodel.space).get_config()["space"]
    if callable(hypermodel.space):  # It may also return what it does not search.
        space.append(dict(hypermodel.space(keras_tuner.HyperParameters())))
    features, given = hypermodel.features, dataclasses.asdict(options)
    samples: list[bytes] = []
    for part in (features.train, features.validation):
        names = [part.path.parent.name, *map(str, part.ids)]  # The key comes first.
        labels = np.ascontiguousarray(part.labels, np.int32)
        samples += ["\n".join(names).encode(), labels.tobytes()]
    identity = _storage.run_identity(
        # Every engine gives the same features.
        {name: part for name, part in source.items() if name != "engine"},
        features.class_names,
        samples,
        space=space,
        settings=dataclasses.asdict(hypermodel.settings),
        options={k: v for k, v in given.items() if k not in _FREE_OPTIONS},
    )
    return {name: part for name, part in identity.items() if name != "versions"}


@contextlib.contextmanager
def open_search(output: str | os.PathLike, identity: dict[str, Any]) -> Iterator[Path]:
    """Makes a search's folder, or opens it to resume, for this process alone."""
    folder = Path(output).absolute()
    is_new = not folder.exists()
    if is_new:
        _storage.check_new_folder(folder)
        with _storage.written_whole(folder) as partial:
            _storage.write_json(partial / SEARCH_FILE, identity)
    else:
        _check_same(folder, identity)
        _storage.require_no_links(folder)
    busy = InvalidArgument(
        f"Another process is searching in {folder}. Wait for it, or choose another "
        "`--output`."
    )
    with _storage.locked(folder / ".lock", timeout=0, taken=busy):
        try:
            yield folder
        except BaseException:
            if is_new and not any(folder.glob("*/trial_*")):
                # It has not begun, and the rest would refuse a corrected command.
                shutil.rmtree(folder, ignore_errors=True)
            raise


def join_search(
    output: str | os.PathLike, identity: dict[str, Any], *, timeout: float
) -> Path:
    """Returns the folder of a search that a chief leads, once it is there."""
    folder = Path(output).absolute()
    until = time.monotonic() + timeout
    while not (folder / SEARCH_FILE).exists():
        if time.monotonic() > until:
            raise WorkerLost(
                f"No chief has begun a search in {folder} within {timeout:g} seconds. "
                "Start it, and give chief and workers the same `--output`, on a disk "
                "that all of them see."
            )
        time.sleep(0.5)
    _check_same(folder, identity)
    return folder


def next_search_folder(name: str, root: str | os.PathLike = "runs") -> Path:
    """Returns the first `ROOT/search-NAME-N` that does not exist or is not finished."""

    def is_taken(folder: Path) -> bool:
        is_search = (folder / SEARCH_FILE).exists()
        return folder.exists() and (not is_search or (folder / RESULTS_FILE).exists())

    folders = _storage.numbered(root, f"search-{name}")
    return next(folder for folder in folders if not is_taken(folder))


def write_tables(
    folder: Path, features: SplitFeatures, outcomes: Sequence[TrialOutcome]
) -> None:
    """Writes the trials, and the samples with the labels that they were judged by."""
    values = sorted({name for one in outcomes for name in one.values})
    metrics = sorted({name for one in outcomes for name in one.metrics})
    trials = [
        [
            one.trial_id,
            one.status,
            *(one.values.get(name, "") for name in values),
            one.epochs,
            *(one.metrics.get(name, "") for name in metrics),
            one.message or "",
        ]
        for one in outcomes
    ]
    header = ["trial", "status", *values, "epochs", *metrics, "message"]
    samples = [
        [str(sample_id), split, features.class_names[label]]
        for split in ("train", "validation", "test")
        for part in [getattr(features, split)]
        for sample_id, label in zip(part.ids, part.labels, strict=True)
    ]
    for file, names, rows in (
        (TRIALS_FILE, header, trials),
        (_storage.SAMPLES_FILE, ["id", "split", "given_label"], samples),
    ):
        write = functools.partial(_storage.write_csv, header=names, rows=rows)
        replaced(folder / file, write)


def write_hparams(
    folder: Path, outcomes: Sequence[TrialOutcome], options: SearchConfig
) -> None:
    """Writes the trials for TensorBoard's HParams page, if `tensorboard` is there."""
    if importlib.util.find_spec("tensorboard") is None:
        return
    import tensorflow as tf
    from tensorboard.plugins.hparams import api, api_pb2, summary

    for one in outcomes:
        target = folder / "tensorboard" / f"trial_{one.trial_id}"
        if target.exists():
            continue
        status = api_pb2.STATUS_SUCCESS if one.completed else api_pb2.STATUS_FAILURE
        with _storage.written_whole(target) as partial:
            writer = tf.summary.create_file_writer(str(partial))
            with writer.as_default(step=one.epochs), tf.summary.record_if(True):
                values = {"tuner": options.tuner, **one.values}
                api.hparams(values, trial_id=one.trial_id)
                for name, value in one.metrics.items():
                    tf.summary.scalar(name, value)
                if not one.completed:
                    tf.summary.text("message", one.message or "no reason given")
                ended = summary.session_end_pb(status).SerializeToString()
                tf.summary.experimental.write_raw_pb(ended)
            writer.close()


def write_results(folder: Path, results: dict[str, Any]) -> None:
    replaced(folder / RESULTS_FILE, lambda path: _storage.write_json(path, results))


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    known = _storage.read_json(folder / SEARCH_FILE)
    if not isinstance(known, dict):
        raise InvalidArgument(
            f"{folder} exists and is not the folder of a search. Nothing is "
            "overwritten: choose another `--output`."
        )
    other = []
    for part, now in identity.items():
        was = known.get(part)
        if was != now and (part in _CHANGED or not isinstance(was, dict)):
            other.append(_CHANGED.get(part, f"other {part}"))
        elif was != now:
            changed = (
                f"{k} {was.get(k)}, now {now[k]}" for k in now if was.get(k) != now[k]
            )
            other.append(f"other {part} ({'; '.join(changed)})")
    if other:
        raise InvalidArgument(
            f"{folder} holds a search with {' and '.join(other)}, whose trials cannot "
            "be mixed with new ones. Choose another `--output`, or repeat the first "
            "command to resume."
        )


# Pictures -----------------------------------------------------------------------------

# How selective a trial is, by the names of the hyperparameters that say so.
SELECTIVITY = {
    "right_probability": "least probability of a right label",
    "relative_threshold": "threshold / ln(classes)",
    "threshold": "threshold of the batch",
    "keep_fraction": "kept fraction",
}
_SHOWN = {
    "val_accuracy_estimated": "validation accuracy",
    "acceptance_rate": "acceptance rate",
}
_CELLS = 8
_LOGARITHMIC = ("learning_rate", "weight_decay", "backbone_learning_rate")
# In this order; the other names of a space follow.
_FIRST = (UNFREEZE, "policy", "optimizer", "learning_rate")
_TICKS = 5


def write_pictures(
    heads: Sequence[TrialOutcome],
    outcomes: Sequence[TrialOutcome],
    options: SearchConfig,
    folder: Path,
) -> None:
    """Writes the heat maps of the heads and the parallel coordinates of all trials."""
    svg = {}
    if maps := [one for name in SELECTIVITY if (one := heat_map(heads, name))]:
        svg[_record.HEAT_MAP_FILE] = _charts.heat_maps_svg(maps)
    if completed := [one for one in outcomes if one.completed]:
        svg[_record.PARALLEL_COORDINATES_FILE] = _charts.parallel_coordinates_svg(
            axes_of(completed, options.objective),
            higher_is_better=options.direction == "max",
        )
    for name, text in svg.items():
        write = functools.partial(Path.write_text, data=text, encoding="utf-8")
        replaced(folder / name, write)


def heat_map(outcomes: Sequence[TrialOutcome], name: str) -> HeatMap | None:
    """Returns the means over completed trials that have a number, None without any."""
    shown = [
        one
        for one in outcomes
        if one.completed and {name, "learning_rate"} <= one.values.keys()
    ]
    if not shown:
        return None
    rates = np.array([one.values["learning_rate"] for one in shown], float)
    numbers = np.array([one.values[name] for one in shown], float)
    rate_edges = np.exp(_edges(np.log(rates)))
    # Rounding must not leave the lowest and the highest outside of their cells.
    rate_edges[0] = min(rate_edges[0], rates.min())
    rate_edges[-1] = max(rate_edges[-1], rates.max())
    edges = _edges(numbers)
    counts = np.histogram2d(numbers, rates, (edges, rate_edges))[0]
    means = {}
    for metric, title in _SHOWN.items():
        values = np.array([one.metrics[metric] for one in shown])
        sums = np.histogram2d(numbers, rates, (edges, rate_edges), weights=values)[0]
        means[title] = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    return HeatMap(SELECTIVITY[name], rates, numbers, rate_edges, edges, means)


def _edges(values: np.ndarray) -> np.ndarray:
    """Returns the edges of even cells; of few distinct values each has its own."""
    distinct = np.unique(values)
    if len(distinct) == 1:
        half = max(abs(distinct[0]), 1.0) / 10
        return np.array([distinct[0] - half, distinct[0] + half])
    if len(distinct) <= _CELLS:
        middles = (distinct[1:] + distinct[:-1]) / 2
        first, last = 2 * distinct[0] - middles[0], 2 * distinct[-1] - middles[-1]
        return np.array([first, *middles, last])
    return np.linspace(distinct[0], distinct[-1], _CELLS + 1)


def axes_of(outcomes: Sequence[TrialOutcome], objective: str) -> list[Axis]:
    """Returns the axes: hyperparameters that differ, acceptance rate, objective."""
    names = {name: None for one in outcomes for name in one.values}
    ordered = [name for name in _FIRST if name in names]
    ordered += [name for name in names if name not in _FIRST]
    columns = {name: [one.values.get(name) for one in outcomes] for name in ordered}
    axes = [
        _axis(name, values) for name, values in columns.items() if len(set(values)) > 1
    ]
    for name in dict.fromkeys(("acceptance_rate", objective)):
        title = name.removesuffix("_estimated")  # Beside others there is no room.
        axes.append(_axis(title, [one.metrics[name] for one in outcomes]))
    return axes


def _axis(name: str, values: list[Any]) -> Axis:
    used = [value for value in values if value is not None]
    if all(isinstance(value, (int, float)) for value in used):
        logarithmic = name in _LOGARITHMIC
        numbers = np.log10(used) if logarithmic else np.array(used, float)
        shown = np.unique(numbers)
        if len(shown) > _TICKS or not all(isinstance(value, int) for value in used):
            shown = np.linspace(numbers.min(), numbers.max(), _TICKS)
        labels = [f"{v:.3g}" for v in (10.0**shown if logarithmic else shown)]
    else:
        known = {name: rank for rank, name in enumerate(UNFREEZE_NAMES)}  # By cost.
        labels = sorted({*map(str, used)}, key=lambda name: (known.get(name, 0), name))
        numbers = np.array([labels.index(str(value)) for value in used], float)
        shown = np.arange(len(labels), dtype=float)
    low, high = numbers.min(), numbers.max()
    if low == high:
        scaled, ticks = np.full(len(used), 0.5), {0.5: labels[0]}
    else:
        scaled = (numbers - low) / (high - low)
        ticks = dict(zip(((shown - low) / (high - low)).tolist(), labels, strict=True))
    if len(used) < len(values):
        ticks = {UNUSED: "not used"} | ticks
    positions = np.full(len(values), UNUSED)
    positions[[value is not None for value in values]] = scaled
    return Axis(name, positions, ticks)
