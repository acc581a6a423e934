"""Writes the trials for the HParams page of TensorBoard, whichever tuner ran them.

The package `tensorboard` is optional: without it nothing is written.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import tensorflow as tf

from keras_rsft._storage import written_whole
from keras_rsft.searching.choice import COMPLETED, TrialOutcome
from keras_rsft.searching.names import SearchOptions

TENSORBOARD_FOLDER = "tensorboard"


def write_hparams(
    outcomes: Sequence[TrialOutcome], options: SearchOptions, folder: Path
) -> Path | None:
    """Writes a run for each trial: its hyperparameters, and its best epoch's metrics.

    Trials that are there already are left as they are.

    Args:
        outcomes: All trials.
        options: How they were searched.
        folder: An existing folder; they go to `tensorboard` inside.

    Returns:
        What `tensorboard --logdir` takes, or None without the package.
    """
    if importlib.util.find_spec("tensorboard") is None:
        return None
    place = folder / TENSORBOARD_FOLDER
    for one in outcomes:
        target = place / f"trial_{one.trial_id}"
        if not target.exists():
            with written_whole(target) as partial:
                _write_trial(one, options, partial)
    return place


def _write_trial(outcome: TrialOutcome, options: SearchOptions, folder: Path) -> None:
    from tensorboard.plugins.hparams import api, api_pb2, summary

    completed = outcome.status == COMPLETED
    status = api_pb2.STATUS_SUCCESS if completed else api_pb2.STATUS_FAILURE
    ended = summary.session_end_pb(status).SerializeToString()
    writer = tf.summary.create_file_writer(str(folder))
    with writer.as_default(step=outcome.epochs), tf.summary.record_if(True):
        api.hparams(
            {"tuner": options.tuner, **outcome.values}, trial_id=outcome.trial_id
        )
        for name, value in outcome.metrics.items():
            tf.summary.scalar(name, value)
        if not completed:
            tf.summary.text("message", outcome.message or "no reason given")
        tf.summary.experimental.write_raw_pb(ended)
    writer.close()
