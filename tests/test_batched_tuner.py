"""Many trials at once, and everything else as Keras Tuner has it."""

from __future__ import annotations

import copy
import dataclasses
import json
import sys

import keras
import keras_tuner
import numpy as np
import pytest
from made_features import split_features

from keras_rsft._ledger import RejectionLedger
from keras_rsft.config import SearchConfig, SearchSpace, TrainConfig
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import KeepFraction
from keras_rsft.training._head import predicted_classes, train_head
from keras_rsft.tuning import _tuner as durable
from keras_rsft.tuning._folder import identity_of
from keras_rsft.tuning._space import first_epoch
from keras_rsft.tuning._tuner import (
    DIVERGED,
    BatchedTuner,
    GridOracle,
    RSFTHyperModel,
    make_tuner,
)

pytestmark = pytest.mark.usefixtures("eager")

SLOW_TUNERS = ("bayesian", "hyperband", "grid")
SETTINGS = TrainConfig(epochs=3, batch_size=16)
SPACE = SearchSpace(learning_rate=(1e-3, 1e-1), optimizers=("sgd", "adamw"))


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


def cut_short(path, write):
    """Writes half of a file beside its place, and then the process is gone."""
    beside = path.with_name(f".partial-{path.name}")
    write(beside)
    content = beside.read_bytes()
    beside.write_bytes(content[: len(content) // 2])
    raise KeyboardInterrupt


def hypermodel_of(features, space=SPACE, settings=SETTINGS):
    return RSFTHyperModel(features, settings=settings, space=space, progress=False)


def random_oracle(max_trials=6, objective="val_accuracy"):
    return keras_tuner.oracles.RandomSearchOracle(
        keras_tuner.Objective(objective, "max" if "acc" in objective else "min"),
        max_trials=max_trials,
        seed=3,
    )


def make(features, folder, *, oracle=None, space=SPACE, **options):
    return BatchedTuner(
        oracle or random_oracle(),
        hypermodel_of(features, space),
        directory=str(folder),
        project_name="trials",
        **options,
    )


@pytest.fixture(scope="module")
def searched(features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    tuner = make(features, folder, parallel_trials=4)
    epochs = []
    tuner.search(on_epoch=lambda heads, best: epochs.append(heads))
    return tuner, epochs


def test_every_trial_is_trained_once(searched):
    tuner, epochs = searched
    assert sum(epochs) == 6 * SETTINGS.epochs
    trials = tuner.oracle.trials.values()
    assert {trial.status for trial in trials} == {"COMPLETED"}
    assert len({str(trial.hyperparameters.values) for trial in trials}) == 6
    assert tuner.remaining_trials == 0


def test_a_trial_has_the_value_and_the_weights_of_its_best_epoch(searched, features):
    tuner, _ = searched
    for trial in list(tuner.oracle.trials.values())[:3]:
        settings = tuner.hypermodel.settings_of(trial.hyperparameters)
        alone = train_head(features, settings, progress=False).history
        warmup = first_epoch(settings)
        behind = alone["val_accuracy"][warmup:]
        assert trial.score == pytest.approx(max(behind))
        assert trial.best_step == warmup + int(np.argmax(behind))
        rate = trial.metrics.get_best_value("acceptance_rate")
        assert rate == pytest.approx(alone["acceptance_rate"][trial.best_step])
        model = tuner.load_model(trial)
        probabilities = model.predict(np.array(features.validation.features), verbose=0)
        right = probabilities.argmax(axis=-1) == features.validation.labels
        assert right.mean() == pytest.approx(trial.score)
        assert int(model.policy.steps_seen) == 7 * (trial.best_step + 1)


def test_the_warm_up_stays_over_where_samples_were_reviewed(features, tmp_path):
    reviewed = np.arange(len(features.train)) == 0
    train = dataclasses.replace(features.train, reviewed=reviewed)
    space = dataclasses.replace(
        SPACE, policies=("loss-threshold",), warmup_epochs=(1, 1)
    )
    tuner = make(
        dataclasses.replace(features, train=train),
        tmp_path, oracle=random_oracle(1), space=space,
    )  # fmt: skip
    tuner.search()
    (trial,) = tuner.oracle.trials.values()
    policy = tuner.load_model(trial).policy
    steps = 7 * (trial.best_step + 1)
    assert int(policy.steps_seen) == int(policy.policy.steps_seen) == steps
    assert policy.threshold_in_use() is not None


def test_the_rest_is_keras_tuner(searched, capsys):
    tuner, _ = searched
    best = tuner.get_best_hyperparameters(2)
    scores = [trial.score for trial in tuner.oracle.get_best_trials(6)]
    assert scores == sorted(scores, reverse=True)
    assert "learning_rate" in best[0].values
    assert len(tuner.get_best_models(2)) == 2
    tuner.results_summary()
    assert "Results summary" in capsys.readouterr().out


def test_a_reload_has_the_trials_and_goes_on(searched, features):
    tuner, _ = searched
    again = make(features, tuner.directory, oracle=random_oracle(max_trials=8))
    assert again.oracle.trials.keys() == tuner.oracle.trials.keys()
    epochs = []
    again.search(on_epoch=lambda heads, best: epochs.append(heads))
    assert sum(epochs) == 2 * SETTINGS.epochs
    one, other = (t.get_best_models()[0].get_weights() for t in (tuner, again))
    assert len(one) == len(other)


def test_what_was_interrupted_is_trained_again(features, tmp_path):
    tuner = make(features, tmp_path)

    def stop(heads, best):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tuner.search(on_epoch=stop)
    assert len(tuner.oracle.ongoing_trials) == 6
    again = make(features, tmp_path)
    again.search()
    assert sorted(again.oracle.trials) == sorted(tuner.oracle.trials)
    assert {t.status for t in again.oracle.trials.values()} == {"COMPLETED"}
    values = {k: t.hyperparameters.values for k, t in tuner.oracle.trials.items()}
    assert values == {
        k: t.hyperparameters.values for k, t in again.oracle.trials.items()
    }


@pytest.mark.parametrize("name", ["batched", "grid", "hyperband", "bayesian"])
def test_a_kill_while_a_file_is_written_loses_no_trial(
    features, tmp_path, monkeypatch, name
):
    """Trials are handed out, and each write from one on is cut in the middle."""
    space = SearchSpace(policies=("accept-all", "keep-fraction"), optimizers=("sgd",))
    options = SearchConfig(tuner=name, max_trials=4)

    def tuner():
        return make_tuner(hypermodel_of(features, space), options, tmp_path)

    first = tuner()
    first.on_search_begin()
    trials = [first.oracle.create_trial(str(number)) for number in range(3)]
    given = [
        trial.hyperparameters.values for trial in trials if trial.hyperparameters.values
    ]
    monkeypatch.setattr(durable, "replaced", cut_short)
    with pytest.raises(KeyboardInterrupt):
        first.on_trial_end(trials[0])
    monkeypatch.undo()
    again = tuner().oracle
    assert [again.trials[t].hyperparameters.values for t in again.start_order] == given
    waiting = {again.create_trial(str(number)).trial_id for number in range(len(given))}
    assert waiting == set(again.start_order)


def test_a_trial_of_which_the_oracle_does_not_know_is_handed_out_anew(
    features, tmp_path
):
    options = SearchConfig(max_trials=2)
    first = make_tuner(hypermodel_of(features), options, tmp_path)
    first.on_search_begin()
    first.oracle.create_trial("a")
    before = (tmp_path / "trials" / "oracle.json").read_bytes()
    first.oracle.create_trial("b")
    (tmp_path / "trials" / "oracle.json").write_bytes(before)
    again = make_tuner(hypermodel_of(features), options, tmp_path)
    assert list(again.oracle.trials) == ["0"]
    assert [again.oracle.create_trial(name).trial_id for name in "ab"] == ["0", "1"]


def test_trials_that_diverge_fail_alone(features, tmp_path):
    def space(hp):
        rates = [1e38, 1.5e38, 2e38, 3e38, 0.01]
        return {
            "learning_rate": hp.Choice("learning_rate", rates),
            "policy": "accept-all",
        }

    oracle = GridOracle(keras_tuner.Objective("val_loss", "min"), max_trials=9)
    tuner = make(features, tmp_path, oracle=oracle, space=space)
    tuner.search()
    trials = list(tuner.oracle.trials.values())
    assert [trial.status for trial in trials].count("FAILED") == 4
    assert len(trials) == 5
    failed = next(trial for trial in trials if trial.status == "FAILED")
    assert "learning rate is too high" in failed.message
    kept = json.loads(
        (tmp_path / "trials" / f"trial_{failed.trial_id}" / "trial.json").read_text()
    )
    assert kept["message"] == failed.message
    assert tuner.get_best_hyperparameters()[0].values == {"learning_rate": 0.01}


@pytest.mark.parametrize(
    "name",
    ["random", *(pytest.param(n, marks=pytest.mark.slow) for n in SLOW_TUNERS)],
)
def test_keras_tuners_own_tuners(features, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, "tensorboard.plugins.hparams", None)
    options = SearchConfig(tuner=name, max_trials=2)
    space = SearchSpace(policies=("accept-all", "keep-fraction"), optimizers=("sgd",))
    tuner = make_tuner(hypermodel_of(features, space), options, tmp_path)
    tuner.search(verbose=0)
    trials = tuner.oracle.trials.values()
    assert {trial.status for trial in trials} == {"COMPLETED"}, [
        t.message for t in trials
    ]
    assert len(trials) == 2
    model = tuner.get_best_models()[0]
    assert model.predict(np.zeros((1, 6)), verbose=0).shape == (1, 3)
    for one in tuner.outcomes:
        predicted = predicted_classes(tuner.model_of(one), features.validation)
        np.testing.assert_array_equal(tuner.predicted(one), predicted)
        credited = tuner.hypermodel.credits[np.arange(len(predicted)), predicted]
        estimated = one.metrics["val_accuracy_estimated"]
        assert estimated == pytest.approx(credited.mean(), abs=1e-6)


def test_a_single_trial_is_judged_after_its_warm_up(features, tmp_path):
    """The loss falls, so that the first epoch that counts has the highest."""
    space = SearchSpace(
        policies=("loss-threshold",), optimizers=("sgd",), warmup_epochs=(2, 2)
    )
    options = SearchConfig(tuner="random", max_trials=1)
    tuner = make_tuner(hypermodel_of(features, space), options, tmp_path)
    tuner.oracle.objective = keras_tuner.Objective("loss", "max")
    tuner.search(verbose=0)
    assert [one.epochs for one in tuner.outcomes] == [3]
    assert int(tuner.get_best_models()[0].policy.steps_seen) == 3 * 7


@pytest.mark.slow
def test_rules_that_no_batch_of_heads_can_train_are_tried_alone(features, tmp_path):
    names = ["self-paced", "running-threshold", "loss-mixture"]

    def space(hp):
        return {"policy": hp.Choice("policy", names)}

    options = SearchConfig(tuner="grid")
    tuner = make_tuner(hypermodel_of(features, space), options, tmp_path)
    tuner.search(verbose=0)
    trials = tuner.oracle.trials.values()
    assert [trial.hyperparameters.values["policy"] for trial in trials] == names
    assert {trial.status for trial in trials} == {"COMPLETED"}, [
        trial.message for trial in trials
    ]


def branching(hp):
    """Declares some hyperparameters within an `if` of Python, one within another."""
    values = {"policy": hp.Choice("policy", ["accept-all", "keep-fraction"])}
    if values["policy"] == "keep-fraction":
        values["keep_fraction"] = hp.Choice("keep_fraction", [0.5, 0.7])
        if values["keep_fraction"] == 0.7:
            values["learning_rate"] = hp.Float("learning_rate", 0.01, 0.1)
    return values


def test_what_a_branch_of_a_space_declares_is_searched(features, tmp_path):
    tuner = make(features, tmp_path, oracle=random_oracle(8), space=branching)
    tuner.search()
    values = [one.values for one in tuner.outcomes]
    assert len({one["learning_rate"] for one in values}) > 4
    assert {one["keep_fraction"] for one in values} == {0.5, 0.7}
    objective = keras_tuner.Objective("val_accuracy", "max")
    for oracle in (GridOracle, keras_tuner.oracles.GridSearchOracle):
        grid = oracle(objective, max_trials=9)
        tuner = make(features, tmp_path / oracle.__name__, oracle=grid, space=branching)
        tuner.search()
        assert {one.status for one in tuner.outcomes} == {"COMPLETED"}


def test_two_spaces_are_not_mixed_in_one_folder(features, tmp_path):
    def other(hp):
        return {"policy": hp.Choice("policy", ["accept-all", "keep-fraction", "auto"])}

    make(features, tmp_path, oracle=random_oracle(1), space=branching).search()
    with pytest.raises(InvalidArgument, match="another search space"):
        make(features, tmp_path, space=other)
    resumed = make(features, tmp_path, space=branching)
    assert len(resumed.outcomes) == 1
    spaces = [
        identity_of(hypermodel_of(features, space), SearchConfig(), {})["space"]
        for space in (branching, other, lambda hp: other(hp) | {"epochs": 2})
    ]
    assert spaces[0] != spaces[1] != spaces[2]


def test_keras_tuners_overrides_leave_a_wrapped_model_as_it_is(tmp_path):
    def build(hp):
        dense = keras.layers.Dense(hp.Int("units", 4, 9), activation="softmax")
        model = RSFTModel(
            keras.Sequential([keras.Input((4,)), dense]), KeepFraction(0.8)
        )
        model.compile("adam", "sparse_categorical_crossentropy", metrics=["accuracy"])
        return model

    x, y = np.random.default_rng(0).normal(size=(32, 4)), np.arange(32) % 4
    for number, override in enumerate(
        ({"optimizer": "rmsprop"}, {"loss": "sparse_categorical_crossentropy"})
    ):
        tuner = keras_tuner.RandomSearch(
            build, keras_tuner.Objective("val_accuracy", "max"), max_trials=1,
            directory=str(tmp_path), project_name=str(number), **override,
        )  # fmt: skip
        tuner.search(x, y, validation_data=(x, y), epochs=1, verbose=0)
        (trial,) = tuner.oracle.trials.values()
        assert trial.status == "COMPLETED"
        names = {"loss", "accuracy", "acceptance_rate", "accepted_loss"}
        assert set(trial.metrics.metrics) == names | {"val_loss", "val_accuracy"}
    with pytest.raises(InvalidArgument, match="Keras Tuner copies callbacks"):
        copy.deepcopy([RejectionLedger()])


def test_a_trial_whose_values_cannot_be_trained_fails_alone(features, tmp_path):
    def space(hp):
        fraction = hp.Choice("fraction", [0.5, 7.0])
        return {"policy": "keep-fraction", "keep_fraction": fraction}

    oracle = GridOracle(keras_tuner.Objective("val_loss", "min"), max_trials=9)
    tuner = make(features, tmp_path, oracle=oracle, space=space)
    tuner.search()
    completed, failed = tuner.oracle.trials.values()
    assert (completed.status, failed.status) == ("COMPLETED", "FAILED")
    assert failed.message.startswith("InvalidArgument: `keep_fraction`")


@pytest.mark.slow
def test_a_single_trial_that_diverges_says_so(features, tmp_path, capfd):
    def space(hp):
        rates = [1e38, 0.01]
        return {
            "learning_rate": hp.Choice("learning_rate", rates),
            "policy": "accept-all",
        }

    tuner = make_tuner(
        hypermodel_of(features, space), SearchConfig(tuner="grid"), tmp_path
    )
    tuner.search(verbose=0)
    failed, completed = tuner.oracle.trials.values()
    assert (failed.status, completed.status) == ("FAILED", "COMPLETED")
    assert failed.message == DIVERGED
    assert "Traceback" not in "".join(capfd.readouterr())


def test_an_exception_in_a_single_trial_is_kept(features, tmp_path):
    hypermodel = hypermodel_of(features)
    hypermodel.build = lambda hp: {}["gone"]
    options = SearchConfig(tuner="random", max_trials=1)
    tuner = make_tuner(hypermodel_of(features), options, tmp_path)
    tuner.hypermodel = hypermodel
    tuner.search(verbose=0)
    (failed,) = tuner.oracle.trials.values()
    assert failed.status == "FAILED"
    assert failed.message.strip().endswith("KeyError: 'gone'")


class TestGrid:
    SPACE = SearchSpace(
        learning_rate=(0.01, 0.01), optimizers=("sgd", "adam"), warmup_epochs=(0, 2),
        policies=("accept-all", "keep-fraction"), keep_fraction=(0.7, 0.7),
    )  # fmt: skip

    def oracle(self, max_trials):
        return GridOracle(
            keras_tuner.Objective("val_loss", "min"), max_trials=max_trials
        )

    def test_all_combinations_are_handed_out_at_once(self, features, tmp_path):
        tuner = make(features, tmp_path, oracle=self.oracle(99), space=self.SPACE)
        trials = tuner._take_trials()
        assert len({str(t.hyperparameters.values) for t in trials}) == len(trials) == 8

    def test_it_goes_on_after_a_stop(self, features, tmp_path):
        first = make(features, tmp_path, oracle=self.oracle(3), space=self.SPACE)
        first.search()
        again = make(features, tmp_path, oracle=self.oracle(99), space=self.SPACE)
        again.search()
        trials = again.oracle.trials.values()
        assert len({str(t.hyperparameters.values) for t in trials}) == len(trials) == 8


class TestRefusals:
    def test_policies_that_cannot_be_batched(self, features, tmp_path):
        space = SearchSpace(policies=("accept-all", "self-paced"))
        with pytest.raises(InvalidArgument, match=r"self-paced.*use the tuner random"):
            make(features, tmp_path, space=space)

    def test_optimizers_that_cannot_be_batched(self, features, tmp_path):
        space = SearchSpace(optimizers=("sgd", "rmsprop"))
        with pytest.raises(InvalidArgument, match="rmsprop"):
            make(features, tmp_path, space=space)

    def test_hyperband(self, features, tmp_path):
        oracle = keras_tuner.oracles.HyperbandOracle("val_accuracy")
        with pytest.raises(InvalidArgument, match="use the tuner hyperband"):
            make(features, tmp_path, oracle=oracle)

    @pytest.mark.parametrize("objective", ["val_f1", ["val_loss", "loss"]])
    def test_an_objective_that_is_not_measured(self, features, tmp_path, objective):
        if isinstance(objective, str):
            objective = keras_tuner.Objective(objective, "max")
        oracle = keras_tuner.oracles.RandomSearchOracle(objective, max_trials=2)
        with pytest.raises(InvalidArgument, match="must be one of loss"):
            make(features, tmp_path, oracle=oracle)

    @pytest.mark.parametrize(
        "name", ["executions_per_trial", "loss", "optimizer", "max_model_size"]
    )
    def test_what_would_be_ignored(self, features, tmp_path, name):
        with pytest.raises(InvalidArgument, match=f"Received: {name}, which"):
            make(features, tmp_path, **{name: 2})

    def test_other_hypermodels(self, tmp_path):
        with pytest.raises(InvalidArgument, match="RSFTHyperModel"):
            BatchedTuner(random_oracle(), lambda hp: None, directory=str(tmp_path))

    def test_no_validation_split(self, features):
        none = dataclasses.replace(
            features.validation, labels=features.validation.labels[:0]
        )
        with pytest.raises(DataError, match="validation split"):
            RSFTHyperModel(dataclasses.replace(features, validation=none))
