"""A whole search: what it leaves, how it goes on, and what it refuses."""

from __future__ import annotations

import csv
import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_features import split_features

from keras_rsft.config import FeatureConfig, SearchConfig, SearchSpace, TrainConfig
from keras_rsft.errors import DataError, InvalidArgument, TrainingStalled
from keras_rsft.training._head import train_head
from keras_rsft.tuning import _search as search_run
from keras_rsft.tuning._folder import identity_of, next_search_folder, open_search
from keras_rsft.tuning._search import search, search_features
from keras_rsft.tuning._tuner import RSFTHyperModel

pytestmark = pytest.mark.usefixtures("eager")

SETTINGS = TrainConfig(epochs=3, batch_size=16)
SPACE = SearchSpace(
    learning_rate=(1e-3, 1e-1), policies=("accept-all", "loss-threshold"),
    optimizers=("sgd",), warmup_epochs=(1, 1),
)  # fmt: skip


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def run(features):
    def call(output, *, features=features, space=SPACE, settings=SETTINGS, **options):
        others = {
            name: options.pop(name) for name in ("clean_validation",) if name in options
        }
        return search_features(
            features, output=output, space=space, settings=settings, progress=False,
            options=SearchConfig(**({"max_trials": 8} | options)), **others,
        )  # fmt: skip

    return call


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    return run(tmp_path_factory.mktemp("runs") / "first")


def test_the_folder_has_all_that_is_needed(found):
    names = {path.name for path in found.folder.iterdir()} - {".lock"}
    assert names >= {
        "search.json", "results.json", "trials.csv", "head.keras", "classes.json",
        "trials", "samples.csv",
    }  # fmt: skip
    with (found.folder / "trials.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["status"] for row in rows} == {"COMPLETED"}
    results = json.loads((found.folder / "results.json").read_text())
    assert results["reason"] == found.choice.reason
    assert set(results["chosen"]) == {
        "validation_accuracy", "validation_accuracy_estimated",
        "validation_accuracy_low", "validation_accuracy_high", "test_accuracy",
        "acceptance_rate",
    }  # fmt: skip


def test_the_chosen_setting_gives_the_same_head_again(found, features):
    again = train_head(features, found.settings, progress=False)
    chosen = found.results["chosen"]
    assert again.results["validation_accuracy"] == pytest.approx(
        chosen["validation_accuracy"]
    )
    np.testing.assert_allclose(
        again.model.model.get_layer("scores").get_weights()[0],
        found.head.model.get_layer("scores").get_weights()[0],
        atol=1e-4,
    )
    assert again.results["test_accuracy"] == pytest.approx(chosen["test_accuracy"])


def test_plain_fine_tuning_is_its_best_trial(found):
    plain = [one for one in found.outcomes if one.values["policy"] == "accept-all"]
    best = max(plain, key=lambda one: one.metrics["val_accuracy_estimated"])
    assert found.results["plain"]["trial"] == best.trial_id
    accuracy = found.results["plain"]["validation_accuracy"]
    assert accuracy == pytest.approx(best.metrics["val_accuracy"])


def test_the_same_command_does_nothing_twice(found, run, monkeypatch):
    monkeypatch.setattr(
        search_run, "_row", lambda *_: pytest.fail("The test split is read again.")
    )
    again = run(found.folder)
    assert repr(again.outcomes) == repr(found.outcomes)  # NaN equals NaN.
    assert again.results["chosen"] == found.results["chosen"]


def test_a_search_has_not_ended_before_its_model_is_kept(features, tmp_path):
    def killed(head):
        raise KeyboardInterrupt

    folder = next_search_folder("x", tmp_path)
    arguments = {
        "output": folder, "space": SPACE, "settings": SETTINGS, "progress": False,
        "options": SearchConfig(max_trials=2),
    }  # fmt: skip
    with pytest.raises(KeyboardInterrupt):
        search_features(features, whole_model=killed, **arguments)
    assert next_search_folder("x", tmp_path) == folder
    search_features(features, whole_model=lambda head: head, **arguments)
    assert (folder / "model.keras").exists()
    assert next_search_folder("x", tmp_path) != folder


@pytest.mark.slow
def test_more_trials_go_on(run, tmp_path):
    first = run(tmp_path / "run", max_trials=3)
    more = run(tmp_path / "run", max_trials=5)
    assert repr(more.outcomes[:3]) == repr(first.outcomes)
    assert len(more.outcomes) == 5
    saved = keras.saving.load_model(more.folder / "head.keras")
    np.testing.assert_array_equal(saved.get_weights()[0], more.head.get_weights()[0])


def test_a_search_never_sees_the_test_split(found, run, features, tmp_path):
    reversed_labels = features.test.with_labels(
        features.test.labels[::-1].copy(), features.test.labels[::-1].copy()
    )
    other = run(
        tmp_path / "run", features=dataclasses.replace(features, test=reversed_labels)
    )
    for one, another in zip(other.outcomes, found.outcomes, strict=True):
        assert one.values == another.values
        for name in one.metrics.keys() - {"training_seconds"}:
            np.testing.assert_equal(one.metrics[name], another.metrics[name])


@pytest.mark.parametrize(
    "changes, what",
    [
        (
            {"space": dataclasses.replace(SPACE, learning_rate=(1e-3, 1.0))},
            "another search space",
        ),
        (
            {"settings": dataclasses.replace(SETTINGS, epochs=4)},
            r"other settings \(epochs 3, now 4\)",
        ),
        (
            {"objective": "val_loss"},
            r"other options \(objective val_accuracy_estimated, now val_loss\)",
        ),
    ],
)
def test_another_search_is_not_mixed_in(found, run, changes, what):
    with pytest.raises(InvalidArgument, match=f"{what}.*cannot be mixed"):
        run(found.folder, **changes)


def test_other_data_is_not_mixed_in(found, run, features):
    labels = features.train.labels.copy()
    labels[0] = (labels[0] + 1) % 3
    other = dataclasses.replace(features, train=features.train.with_labels(labels))
    with pytest.raises(InvalidArgument, match="another data set"):
        run(found.folder, features=other)


@pytest.mark.parametrize("part", ["train", "validation"])
def test_features_of_another_base_are_not_mixed_in(
    found, run, features, tmp_path, part
):
    kept = getattr(features, part)
    path = tmp_path / "another key" / kept.path.name
    path.parent.mkdir()
    (1.0 - kept.all_views).tofile(path)
    other = dataclasses.replace(
        features, **{part: dataclasses.replace(kept, path=path)}
    )
    with pytest.raises(InvalidArgument, match="another data set or backbone"):
        run(found.folder, features=other)


def test_a_folder_of_something_else_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InvalidArgument, match="Nothing is overwritten"):
        run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_two_processes_cannot_share_a_folder(tmp_path):
    with (
        open_search(tmp_path / "run", {}),
        pytest.raises(InvalidArgument, match="Another process"),
        open_search(tmp_path / "run", {}),
    ):
        pass


def test_the_next_folder_is_the_first_unfinished(tmp_path):
    assert next_search_folder("x", tmp_path).name == "search-x-1"
    for number, name in ((1, "results.json"), (2, "search.json")):
        (tmp_path / f"search-x-{number}").mkdir()
        (tmp_path / f"search-x-{number}" / name).write_text("{}")
    assert next_search_folder("x", tmp_path).name == "search-x-2"


def test_validation_by_its_right_labels(run, features, tmp_path):
    wrong = np.roll(features.validation.clean_labels, 1)
    noisy = features.validation.with_labels(wrong, features.validation.clean_labels)
    noisy = dataclasses.replace(features, validation=noisy)
    by_given = run(tmp_path / "given", features=noisy, max_trials=2)
    by_right = run(
        tmp_path / "right", features=noisy, max_trials=2, clean_validation=True
    )
    assert (
        by_right.results["chosen"]["validation_accuracy"]
        > by_given.results["chosen"]["validation_accuracy"]
    )
    unknown = dataclasses.replace(
        features, validation=features.validation.with_labels(wrong)
    )
    with pytest.raises(DataError, match="--clean-validation"):
        run(tmp_path / "no", features=unknown, clean_validation=True)


@pytest.mark.slow
def test_a_search_without_plain_trials_trains_one(run, tmp_path):
    space = dataclasses.replace(SPACE, policies=("keep-fraction",))
    found = run(tmp_path / "run", space=space, max_trials=2)
    plain = found.results["plain"]
    assert plain["acceptance_rate"] == 1
    assert "trial" not in plain


def test_a_search_of_which_nothing_is_left(run, tmp_path):
    space = dataclasses.replace(
        SPACE, policies=("loss-threshold",), relative_threshold=(1e-6, 1e-5),
        warmup_epochs=(0, 0),
    )  # fmt: skip
    folder = tmp_path / "search-x-1"
    with pytest.raises(TrainingStalled, match=r"Raise the thresholds.*trials\.csv"):
        run(folder, space=space, max_trials=2)
    assert len((folder / "trials.csv").read_text().splitlines()) == 3
    assert json.loads((folder / "results.json").read_text())["chosen"] is None
    # It has ended, so that the next search is another one, unless it is asked for.
    assert next_search_folder("x", tmp_path).name == "search-x-2"
    found = run(folder, space=space, max_trials=2, min_acceptance=0.0)
    assert found.results["chosen_trial"] in {"0", "1"}


def test_a_refused_search_leaves_nothing(run, tmp_path):
    space = dataclasses.replace(SPACE, optimizers=("sgd", "rmsprop"))
    with pytest.raises(InvalidArgument, match="rmsprop"):
        run(tmp_path / "run", space=space)
    assert not (tmp_path / "run").exists()


def test_trials_on_the_hparams_page(found):
    plugin = pytest.importorskip("tensorboard.plugins.hparams.plugin_data_pb2")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert len(list((found.folder / "tensorboard").iterdir())) == 8
    one = found.outcomes[-1]
    events = EventAccumulator(
        str(found.folder / "tensorboard" / f"trial_{one.trial_id}"),
        size_guidance={"tensors": 0},
    ).Reload()
    data = plugin.HParamsPluginData()
    contents = events.PluginTagToContent("hparams")
    data.ParseFromString(contents["_hparams_/session_start_info"])
    start = data.session_start_info
    assert start.group_name == one.trial_id
    rate = start.hparams["learning_rate"].number_value
    assert rate == one.values["learning_rate"]
    assert start.hparams["policy"].string_value == one.values["policy"]
    data.ParseFromString(contents["_hparams_/session_end_info"])
    assert data.session_end_info.status == 1  # Success.
    (accuracy,) = events.Tensors("val_accuracy")
    assert accuracy.step == one.epochs
    value = float(tf.make_ndarray(accuracy.tensor_proto))
    assert value == pytest.approx(one.metrics["val_accuracy"])


def test_from_images(photo_folder, tiny_base_file, tmp_path):
    from keras_rsft._predict import predict_files

    found = search(
        str(photo_folder), output=tmp_path / "run",
        features=FeatureConfig(str(tiny_base_file), cache_dir=tmp_path / "kept"),
        max_trials=3, settings=SETTINGS, space=SPACE, progress=False,
    )  # fmt: skip
    (prediction,) = predict_files(found.folder, [photo_folder / "green" / "05.png"])
    assert prediction.label in ("blue", "green", "red")


def test_features_of_another_engine_are_of_the_same_search(features):
    hypermodel = RSFTHyperModel(features, settings=SETTINGS, space=SPACE)
    options = SearchConfig(max_trials=2)
    one, other = (
        identity_of(hypermodel, options, {"data": "x", "engine": engine})
        for engine in ("tensorflow", "openvino")
    )
    assert one == other
