"""What TensorBoard is given, read back from the event files."""

from __future__ import annotations

import importlib.util
import json

import numpy as np
import pytest

from keras_rsft import cli
from keras_rsft._ledger import RejectionLedger
from keras_rsft.policies._threshold import LossThreshold
from keras_rsft.training._tensorboard import (
    RejectionTensorBoard,
    free_log_folder,
    hparams_of,
    most_suspicious,
)

pytestmark = pytest.mark.usefixtures("eager")

accumulator = pytest.importorskip(
    "tensorboard.backend.event_processing.event_accumulator"
)


def events_of(folder):
    events = accumulator.EventAccumulator(
        str(folder), size_guidance={"tensors": 0, "images": 0}
    )
    events.Reload()
    return events


def tensors(events, tag):
    import tensorflow as tf

    return {e.step: tf.make_ndarray(e.tensor_proto) for e in events.Tensors(tag)}


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys, photo_folder, tiny_base_file):
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        command = [
            "fit", photo_folder, "--backbone", tiny_base_file, "--epochs", 3,
            "--cache-dir", tmp_path / "kept", "--learning-rate", 0.05,
            "--threshold", 1.06, "--warmup-epochs", 1, *arguments,
        ]  # fmt: skip
        status = cli.main([str(argument) for argument in command])
        return status, capsys.readouterr().err

    return run


def test_a_run_read_back(fit, tmp_path, photo_folder):
    status, err = fit("--tensorboard", "logs", "--noise", "symmetric:0.25")
    assert status == 0, err
    run = tmp_path / "runs" / f"{photo_folder.name}-1"
    events = events_of(tmp_path / "logs" / run.name)
    lines = (run / "metrics.csv").read_text().splitlines()
    columns = lines[0].split(",")
    names = ["loss", "accepted_loss", "acceptance_rate", "val_accuracy"]
    for name in (*names, "val_accuracy_estimated", "val_loss_estimated"):
        written = [float(line.split(",")[columns.index(name)]) for line in lines[1:]]
        read = tensors(events, name)
        assert list(read) == [1, 2, 3]
        assert [float(v) for v in read.values()] == pytest.approx(written, rel=1e-6)
    # Everything is accepted in the warm-up, so that there is no threshold yet.
    assert {k: float(v) for k, v in tensors(events, "threshold").items()} == {
        2: pytest.approx(1.06), 3: pytest.approx(1.06),
    }  # fmt: skip
    counts = {
        name: {
            step: value[:, 2].sum()
            for step, value in tensors(events, f"losses/{name}").items()
        }
        for name in ("accepted", "rejected")
    }
    assert counts["accepted"][1] == 24  # A histogram's third column counts.
    for step in (2, 3):
        accepted, rejected = counts["accepted"][step], counts["rejected"][step]
        assert accepted + rejected == 24
        rate = float(tensors(events, "acceptance_rate")[step])
        assert accepted / 24 == pytest.approx(rate)
        width, height, *images = tensors(events, "rejected_images")[step].tolist()
        assert (int(width), int(height)) == (128, 128)
        assert len(images) == rejected
        assert images[0].startswith(b"\x89PNG")
    assert set(tensors(events, "thresholds")) == {2, 3}
    (text,) = tensors(events, "rejected_samples")[3].ravel()
    assert text.decode().count("\n") == counts["rejected"][3] + 1
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = events.summary_metadata["_hparams_/session_start_info"]
    data = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
    hparams = data.session_start_info.hparams
    assert hparams["policy.name"].string_value == "loss-threshold"
    assert hparams["learning_rate"].number_value == 0.05
    assert hparams["noise"].string_value == "symmetric:0.25"
    assert "weight_decay" not in hparams
    config = json.loads((run / "config.json").read_text())
    assert config["learning_rate"] == 0.05


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_in_its_log_folder(fit, tmp_path, monkeypatch):
    from keras_rsft.training._resume import TrainingCheckpoint

    end_epoch = TrainingCheckpoint.on_epoch_end

    def stopping(self, epoch, logs=None):
        end_epoch(self, epoch, logs)
        if epoch == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(TrainingCheckpoint, "on_epoch_end", stopping)
        assert fit("--tensorboard", "logs")[0] == 130
    status, err = fit("--tensorboard", "logs")
    assert status == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    assert [path.name for path in (tmp_path / "logs").iterdir()] == [run.name]
    events = events_of(tmp_path / "logs" / run.name)
    assert list(tensors(events, "loss")) == [1, 2, 3]
    assert tensors(events, "thresholds")[3][:, 2].sum() == 2  # Of epochs 2 and 3.


def test_without_the_package(fit, tmp_path, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "tensorboard" else found(name, *rest),
    )
    status, err = fit("--tensorboard", "logs")
    assert status == 1
    assert 'pip install "keras_rsft[tensorboard]"' in err
    assert not (tmp_path / "kept").exists()


def test_the_highest_losses_first():
    losses = np.array([1.0, np.nan, 3.0, 5.0, 3.0])
    rejected = np.array([True, True, True, False, True])
    assert most_suspicious(losses, rejected, 3).tolist() == [1, 2, 4]
    assert most_suspicious(losses, ~rejected, 0).tolist() == []


def test_settings_become_flat():
    assert hparams_of(
        {"a": 1, "b": None, "c": {"d": "x", "e": float("nan")}, "f": [1], "g": True}
    ) == {"a": 1, "c.d": "x", "g": True}


def test_a_log_folder_of_its_own(tmp_path):
    assert free_log_folder(tmp_path, "run") == tmp_path / "run"
    (tmp_path / "run").mkdir()
    (tmp_path / "run-1").mkdir()
    assert free_log_folder(tmp_path, "run") == tmp_path / "run-2"


def test_hostile_names_stay_in_their_cell(tmp_path, small_data, make_model):
    import keras

    from keras_rsft.model._rsft_model import RSFTModel

    x, y = small_data
    ids = np.array([f"|<script>\n`{number}`" for number in range(len(x))])
    ledger = RejectionLedger(ids, y)
    board = RejectionTensorBoard(
        tmp_path / "log", ledger, class_names=("=a|", "[b](c)", "*c*"), max_images=4
    )
    import tensorflow as tf

    index = np.arange(len(x), dtype=np.int32)
    batches = tf.data.Dataset.from_tensor_slices((x, y, index)).batch(16)
    batches = batches.map(lambda x, y, index: (x, y, None, index))
    model = RSFTModel(make_model(), LossThreshold(0.5))
    model.compile(keras.optimizers.SGD(0.1), "sparse_categorical_crossentropy")
    model.fit(batches, epochs=1, verbose=0, callbacks=[ledger, board])
    (text,) = tensors(events_of(tmp_path / "log"), "rejected_samples")[1].ravel()
    lines = text.decode().splitlines()
    assert len(lines) == 6
    for line in lines[2:]:
        assert line.count("|") == 4
        assert not set("<`*[") & set(line)
