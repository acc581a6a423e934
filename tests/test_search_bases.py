"""A search that trains the backbone on from its best heads: results, resuming."""

from __future__ import annotations

import csv
import dataclasses
import json

import keras
import numpy as np
import pytest
from made_bases import changed_layers, network, save_three_blocks

from keras_rsft._predict import predict_files
from keras_rsft.backbones._load import load_backbone
from keras_rsft.cli._commands import chosen_words
from keras_rsft.config import FeatureConfig, SearchSpace, TrainConfig, UnfreezeConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.report._page import write_report
from keras_rsft.training._resume import TrainingClock, memory_of
from keras_rsft.tuning import _backbone_trials as backbone_trials
from keras_rsft.tuning import _search as search_run
from keras_rsft.tuning._choice import Choice
from keras_rsft.tuning._search import search

pytestmark = pytest.mark.usefixtures("eager")

SETTINGS = TrainConfig(epochs=3, batch_size=8, unfreeze=UnfreezeConfig(1, epochs=2))
SPACE = SearchSpace(
    learning_rate=(0.03, 0.1), policies=("accept-all", "keep-fraction"),
    keep_fraction=(0.6, 0.8), warmup_epochs=(0, 0), optimizers=("sgd",),
)  # fmt: skip
TIMES = ("training_seconds",)


class Killed(BaseException):
    """Nothing catches it: a stand-in for `kill -9`."""


@pytest.fixture(scope="module")
def base_file(tmp_path_factory):
    return save_three_blocks(tmp_path_factory.mktemp("base") / "three.keras")


@pytest.fixture(scope="module")
def run(noisy_photos, base_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def call(output, **options):
        given = {
            "features": FeatureConfig(str(base_file), cache_dir=cache),
            "settings": SETTINGS, "space": SPACE,
            "max_trials": 4, "unfreeze": ("frozen", "last-block"),
        }  # fmt: skip
        return search(noisy_photos, output=output, progress=False, **(given | options))

    return call


@pytest.fixture(scope="module")
def patched():
    """Changes what this module's fixtures call, for as long as they are made."""
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def counted(patched):
    """Trainings of the base by trial, of which one can be killed before it begins."""
    called, train_unfrozen = [], backbone_trials.train_unfrozen

    def counting(part, trained, *arguments, **options):
        called.append(trained.model.policy.name)
        if len(called) == counting.dies_at:
            raise Killed
        return train_unfrozen(part, trained, *arguments, **options)

    counting.dies_at, counting.called = None, called
    patched.setattr(backbone_trials, "train_unfrozen", counting)
    return counting


@pytest.fixture(scope="module")
def stopped(run, counted, tmp_path_factory):
    """Killed between two strategies; the same call goes on."""
    folder, notes = tmp_path_factory.mktemp("runs") / "stopped", []
    counted.dies_at = 2
    with pytest.raises(Killed):
        run(folder, on_note=notes.append)
    counted.dies_at = None
    before = len(counted.called)
    found = run(folder, on_note=notes.append)
    return found, notes, len(counted.called) - before


@pytest.fixture(scope="module")
def found(stopped):
    return stopped[0]


def rows_of(found):
    with (found.folder / "trials.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def of_base(found):
    return [one for one in found.outcomes if one.values["unfreeze"] == "last-block"]


def test_it_goes_on_with_what_is_not_there(stopped):
    _, notes, trainings = stopped
    assert trainings == 1
    assert (
        notes[0] == "The backbone learns: the last block from 2 heads, 4 epochs in all."
    )
    assert notes[1].endswith("(accept-all), 1 of 2.")
    assert "are cached: " in notes[2]
    assert notes[3].endswith("(keep-fraction), 2 of 2.")
    assert (
        notes[4] == "The backbone learns: the last block from 1 head, 2 epochs in all."
    )
    assert notes[5].endswith("(keep-fraction), 1 of 1.")
    assert len(notes) == 6


@pytest.mark.slow
def test_as_if_it_had_not_been_stopped(found, run, patched, tmp_path):
    whole = run(tmp_path / "whole")
    for one, other in zip(found.outcomes, whole.outcomes, strict=True):
        assert one.values == other.values
        for name in one.metrics.keys() - TIMES:
            assert one.metrics[name] == other.metrics[name]


def test_rows_of_trials(found):
    rows = rows_of(found)
    assert [row["unfreeze"] for row in rows] == ["frozen"] * 4 + ["last-block"] * 2
    assert {row["status"] for row in rows} == {"COMPLETED"}
    for row in rows[4:]:
        head = rows[int(row["trial"].removeprefix("last-block-"))]
        assert row["policy"] == head["policy"]
        assert row["learning_rate"] == head["learning_rate"]
        rate = min(0.1 * float(head["learning_rate"]), 1e-3)
        assert float(row["backbone_learning_rate"]) == pytest.approx(rate)
        assert int(head["epochs"]) < int(row["epochs"]) <= int(head["epochs"]) + 2
        # 6 x 7 x 3 x 3 and 7 of the convolution, 7 x 3 and 3 of the head.
        assert float(row["trainable_weights"]) == 385 + 24
        assert float(row["training_seconds"]) > 0
    assert {row["policy"] for row in rows[4:]} == {"accept-all", "keep-fraction"}


def test_a_trial_in_the_folder_of_keras_tuner(found):
    one = of_base(found)[0]
    folder = found.folder / "backbone_trials" / f"trial_{one.trial_id}"
    kept = json.loads((folder / "trial.json").read_text())
    assert kept["status"] == "COMPLETED"
    assert kept["hyperparameters"]["values"]["unfreeze"] == "last-block"
    assert {path.name for path in folder.iterdir()} == {
        "trial.json", "model.keras", "validation_predictions.npy",
    }  # fmt: skip
    best = found.backbone_tuner.get_best_hyperparameters()[0]
    assert best.get("unfreeze") == "last-block"
    assert len(found.backbone_tuner.get_best_models(2)) == 2


def test_the_last_block_alone_changes(found, base_file):
    given = load_backbone(str(base_file))
    for one in of_base(found):
        model = found.backbone_tuner.load_model(
            found.backbone_tuner.oracle.trials[one.trial_id]
        )
        base, head = model.layers[1:]
        assert changed_layers(given, base) == {"block3_conv"}
        name = found.backbone_tuner.head_of(one).trial_id
        begun = found.tuner.load_model(found.tuner.oracle.trials[name]).model
        assert changed_layers(begun, head) == {"scores"}


def test_the_table_of_strategies(found):
    kept = json.loads((found.folder / "results.json").read_text())
    rows = kept["strategies"]
    assert rows == found.results["strategies"]
    first = [(row["unfreeze"], row["rejects"]) for row in rows[:1] + rows[-2:]]
    assert first == [("frozen", False), ("last-block", False), ("last-block", True)]
    assert sum(row["chosen"] for row in rows) == 1
    assert all(row["seconds"] > 0 for row in rows)
    by_trial = {one.trial_id: one for one in found.outcomes}
    for row in rows:
        accuracy = by_trial[row["trial"]].metrics["val_accuracy"]
        assert row["validation_accuracy"] == accuracy
    page = write_report(found).read_text()
    assert "How much of the backbone to train" in page
    assert "last-block-" in page
    assert "Weights" in found._repr_html_()


def test_the_test_split_is_looked_at_once(found, run, monkeypatch):
    monkeypatch.setattr(
        search_run, "_row", lambda *_: pytest.fail("The test split is read again.")
    )
    again = run(found.folder)
    assert again.outcomes == found.outcomes


@pytest.fixture(scope="module")
def tuned(found, run):
    """The same search, made to choose the trial that rejects with the last block."""

    def choose(outcomes, *_, **__):
        (one,) = [
            one
            for one in outcomes
            if one.trial_id.startswith("last-block")
            and one.values["policy"] == "keep-fraction"
        ]
        errors = {each.trial_id: 0.0 for each in outcomes}
        return Choice(one, one, "Chosen for the test.", errors)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_run, "choose_trial", choose)
        return run(found.folder)


def test_the_folder_has_the_chosen_model(tuned, photo_folder):
    name = tuned.choice.chosen.trial_id
    trial = tuned.folder / "backbone_trials" / f"trial_{name}" / "model.keras"
    own, other = (
        keras.saving.load_model(path) for path in (tuned.folder / "model.keras", trial)
    )
    for one, another in zip(own.weights, other.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), another.numpy())
    (prediction,) = predict_files(tuned.folder, [photo_folder / "green" / "05.png"])
    assert prediction.label in ("blue", "green", "red")
    chosen = tuned.results["chosen"]
    assert chosen["unfreeze"] == "last-block"
    assert 0 <= chosen["test_accuracy"] <= 1
    assert tuned.results["plain"]["trial"] != name
    command = chosen_words(tuned)
    assert "--unfreeze=1" in command
    assert f"unfreeze_epochs={tuned.settings.unfreeze.epochs}" in command


@pytest.mark.slow
def test_the_command_trains_the_same_model(
    tuned, call, photo_folder, base_file, tmp_path
):
    status, _, err = call(
        "fit", photo_folder, *chosen_words(tuned), "--noise", "symmetric:0.25",
        "--backbone", base_file,
        "--cache-dir", tmp_path / "kept", "--output", tmp_path / "again",
    )  # fmt: skip
    assert status == 0, err
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    # `fit` makes training labels wrong alone; the validation split is another.
    assert again["unfrozen_test_accuracy"] == pytest.approx(
        tuned.results["chosen"]["test_accuracy"]
    )


@pytest.mark.slow
def test_a_model_card_says_that_the_base_was_trained(tuned, call, tmp_path):
    status, output, error = call("export", tuned.folder, "--verify")
    assert (status, error) == (0, "")
    assert "same as the run" in output
    (card,) = tmp_path.glob("saved_models/*/1/README.md")
    assert "A part of the backbone was trained too." in card.read_text()


@pytest.mark.slow
def test_heads_of_another_tuner(run, tmp_path):
    one = run(
        tmp_path / "run", tuner="random", max_trials=1,
        space=dataclasses.replace(SPACE, policies=("keep-fraction",)),
    )  # fmt: skip
    assert [row["trial"] for row in one.results["strategies"]] == ["0", "last-block-0"]


@pytest.mark.slow
def test_all_of_the_base_is_added_later(found, run, counted, stop_at, base_file):
    names = ("last-block", "all")
    begun = len(counted.called)
    heads = {one.trial_id: one.epochs for one in found.outcomes}
    plain = next(r for r in found.results["strategies"] if not r["rejects"])
    stop_at(heads[plain["trial"]] + 1)
    with pytest.raises(KeyboardInterrupt):
        run(found.folder, unfreeze=names)
    more = run(found.folder, unfreeze=names)
    assert len(counted.called) - begun == 3  # One of them was stopped half way.
    assert more.outcomes[:6] == found.outcomes
    given = load_backbone(str(base_file))
    for one in more.outcomes[6:]:
        assert one.values["unfreeze"] == "all"
        model = more.backbone_tuner.load_model(
            more.backbone_tuner.oracle.trials[one.trial_id]
        )
        changed = changed_layers(given, model.layers[1])
        assert changed == {"block1_conv", "block2_conv", "block3_conv"}


class TestRefused:
    @pytest.fixture(autouse=True)
    def no_pass(self, monkeypatch):
        def fail(*_, **__):
            raise AssertionError("The base was run.")

        monkeypatch.setattr("keras_rsft.training._features.feature_passes", fail)

    @pytest.mark.parametrize("base", ["onnx:some.onnx@imagenet", "savedmodel:some@0:1"])
    def test_a_base_without_keras_layers(self, run, base, tmp_path):
        with pytest.raises(InvalidArgument, match=r"no Keras layers.*--unfreeze"):
            run(tmp_path / "run", features=base)
        assert not (tmp_path / "run").exists()

    def test_a_base_in_which_nothing_can_learn(self, run, tmp_path):
        images = keras.Input((16, 16, 3))
        pooled = keras.layers.GlobalAveragePooling2D()(images)
        keras.Model(images, pooled).save(tmp_path / "pooled.keras")
        with pytest.raises(InvalidArgument, match="no Keras layer that could learn"):
            run(tmp_path / "run", features=str(tmp_path / "pooled.keras"))

    def test_features_alone(self, found):
        with pytest.raises(InvalidArgument, match="Features alone"):
            search_run.search_features(
                found.tuner.hypermodel.features, output=found.folder,
                options=dataclasses.replace(
                    search_run.SearchConfig(), unfreeze=("all",)
                ),
            )  # fmt: skip


def test_a_last_block_that_is_all_there_is():
    from keras_rsft.tuning._backbone_trials import learnable

    base, names = network(), ("frozen", "last-block", "all")
    assert learnable(base, names, SETTINGS) == ("frozen", "last-block")
    assert learnable(base, ("frozen", "all"), SETTINGS) == ("frozen", "all")
    assert learnable(base, ("frozen",), SETTINGS) == ("frozen",)


def test_a_clock_remembers_seconds_alone():
    clock = TrainingClock()
    clock.on_epoch_end(0)
    assert "seconds" in memory_of(clock)
    assert "_lap" not in memory_of(clock)
    assert clock.seconds >= 0


class TestCommandLine:
    @pytest.fixture
    def search(self, call, tmp_path, photo_folder, base_file):
        def run(*arguments):
            return call(
                "search", photo_folder, "--backbone", base_file, "--epochs", 2,
                "--batch-size", 8, "--cache-dir", tmp_path / "kept", "--max-trials", 2,
                "--policies", "accept-all", *arguments,
            )  # fmt: skip

        return run

    @pytest.mark.slow
    def test_end_to_end(self, search, call, tmp_path):
        status, out, err = search(
            "--unfreeze-choices", "last-block", "--set", "unfreeze_epochs=1", "--json",
            "--set", "unfreeze_learning_rate=1e-4", "--output", "run",
        )  # fmt: skip
        assert status == 0, err
        document = json.loads(out)
        rows = document["results"]["strategies"]
        assert [row["unfreeze"] for row in rows] == ["frozen", "last-block"]
        settings = json.loads((tmp_path / "run" / "search.json").read_text())
        assert settings["settings"]["unfreeze"]["epochs"] == 1
        assert "The backbone learns: the last block from 1 head" in err
        assert "How much of the backbone to train" in err
        assert call("review", "run", "--no-browser")[0] == 0

    @pytest.mark.parametrize(
        "arguments, message",
        [
            (["--unfreeze-choices", "last"], "Did you mean 'last-block'?"),
            (["--set", "unfreeze_epochs=2"], "with `--unfreeze-choices`"),
            (["--unfreeze-choices", "all", "--set", "unfreeze_epochs=0"], "at least 1"),
            (["--unfreeze-choices=all", "--backbone", "onnx:x@0:1"], "`--unfreeze-"),
        ],
    )
    def test_mistakes(self, search, arguments, message):
        status, _, err = search(*arguments)
        assert status == 2
        assert message in err
