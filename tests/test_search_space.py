"""What is searched, and what is refused before a search begins."""

from __future__ import annotations

import keras_tuner
import numpy as np
import pytest

from keras_rsft.config import PolicyConfig, SearchConfig, SearchSpace, TrainConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.tuning._space import (
    check_space,
    first_epoch,
    settings_of_values,
    values_of,
)

GIVEN = TrainConfig(policy=PolicyConfig("keep-fraction", keep_fraction=0.6))


def sampled(space, **values):
    """What a space returns where an oracle has chosen these values."""
    hp = keras_tuner.HyperParameters()
    hp.values = values
    return values_of(space, hp), hp


def test_only_the_numbers_of_the_chosen_policy_are_active():
    space = SearchSpace(policies=("accept-all", "loss-threshold", "article"))
    values, hp = sampled(space, policy="loss-threshold", optimizer="sgd")
    assert set(values) == {
        "learning_rate", "optimizer", "policy", "relative_threshold", "warmup_epochs",
    }  # fmt: skip
    assert {one.name for one in hp.space if hp.is_active(one)} == set(values)
    values, _ = sampled(space, policy="article", optimizer="adamw")
    assert {"threshold", "weight_decay"} <= set(values)
    assert "warmup_epochs" not in values


def test_thresholds_are_relative_and_the_articles_is_absolute():
    relative = settings_of_values(
        {"policy": "loss-threshold", "relative_threshold": 0.5}, GIVEN
    )
    assert relative.policy.threshold is None
    assert relative.policy.relative_threshold == 0.5
    assert relative.policy.level == "sample"
    article = settings_of_values({"policy": "article", "threshold": 2.0}, GIVEN).policy
    assert (article.name, article.level) == ("loss-threshold", "batch")
    assert (article.threshold, article.warmup_epochs) == (2.0, 0.0)


def test_the_threshold_of_auto_is_a_probability():
    values, _ = sampled(SearchSpace(), policy="auto", optimizer="sgd")
    assert set(values) == {"learning_rate", "optimizer", "policy", "right_probability"}
    policy = settings_of_values({**values, "right_probability": 0.75}, GIVEN).policy
    assert (policy.name, policy.threshold) == ("auto", 0.75)
    # A loss that another policy was given is no probability.
    by_loss = TrainConfig(policy=PolicyConfig("loss-threshold", threshold=1.5))
    assert settings_of_values({"policy": "auto"}, by_loss).policy.threshold is None


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"warmup_epochs": 5, "epochs": 2}, (1, 1)),
        ({"warmup_epochs": 5, "epochs": 6}, (5, 5)),
        ({"policy": "auto", "epochs": 1}, (0, 0)),
        ({"policy": "accept-all", "epochs": 9}, (2, 0)),
        ({"policy": "article", "threshold": 2.0}, (0, 0)),
    ],
)
def test_no_training_ends_inside_its_own_warm_up(values, expected):
    settings = settings_of_values({"policy": "keep-fraction"} | values, GIVEN)
    assert (settings.policy.warmup_epochs, first_epoch(settings)) == expected


def test_what_is_left_open_is_taken_from_the_settings():
    settings = settings_of_values({"learning_rate": 0.5}, GIVEN)
    assert settings.learning_rate == 0.5
    assert settings.policy == GIVEN.policy


def test_an_absolute_threshold_and_epochs():
    space = SearchSpace(
        threshold=(0.5, 2.5), epochs=(5, 20), policies=("loss-threshold", "article")
    )
    values, hp = sampled(
        space, policy="loss-threshold", optimizer="sgd", threshold=1.5, epochs=7
    )
    settings = settings_of_values(values, GIVEN)
    assert settings.policy.name == "loss-threshold"
    assert (settings.policy.threshold, settings.epochs) == (1.5, 7)
    assert "relative_threshold" not in {one.name for one in hp.space}


def test_a_range_of_one_value_is_fixed():
    space = SearchSpace(
        learning_rate=(0.01, 0.01), warmup_epochs=(2, 2), policies=("keep-fraction",)
    )
    values, _ = sampled(space)
    assert values["learning_rate"] == 0.01
    assert values["warmup_epochs"] == 2


def test_every_sample_can_be_trained():
    oracle = keras_tuner.oracles.RandomSearchOracle("val_loss", max_trials=50, seed=1)
    space = SearchSpace(policies=("accept-all", "self-paced", "keep-fraction"))
    for policy in space.policies:
        _, hp = sampled(space, policy=policy, optimizer="adamw")
        oracle.update_space(hp)
    for trial in range(50):
        hp = oracle.get_space()
        hp.values = oracle.populate_space(str(trial))["values"]
        settings = settings_of_values(values_of(space, hp), GIVEN)
        assert 1e-4 <= settings.learning_rate <= 1e-1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"learning_rate": (0.1, 0.01)}, "learning_rate.*lowest and the highest"),
        ({"learning_rate": (0.0, 0.1)}, "above 0"),
        ({"learning_rate": (0.1,)}, "learning_rate"),
        ({"relative_threshold": (np.nan, 1.0)}, "relative_threshold"),
        ({"keep_fraction": (0.5, 1.1)}, "at most 1"),
        ({"warmup_epochs": (-1, 2)}, "at least 0"),
        ({"policies": ()}, "one or more names"),
        ({"policies": "auto"}, "one or more names"),
        ({"policies": ("keep-fractoin",)}, "Did you mean 'keep-fraction'"),
        ({"optimizers": ("sdg",)}, "sdg"),
        ({"threshold": (0.0, 1.0)}, "above 0"),
        ({"epochs": (1, 2.5)}, "whole numbers"),
        ({"right_probability": (0.5, 1.5)}, "at most 1"),
    ],
)
def test_contradictory_ranges_are_refused(wrong, message):
    with pytest.raises(InvalidArgument, match=message):
        SearchSpace(**wrong)


@pytest.mark.parametrize(
    "space, message",
    [
        (lambda hp: {}, "empty"),
        (lambda hp: {"learning_rate": hp.Fixed("rate", 0.1)}, "empty"),
        (lambda hp: 0.1, "must return a dict"),
        (lambda hp: {"rate": hp.Float("rate", 0.1, 0.2)}, "hyperparameter must be one"),
        (lambda hp: {"learning_rate": hp.Float("r", -1.0, 1.0)}, "learning_rate"),
        (lambda hp: {"threshold": 1.0, "relative_threshold": 1.0}, "both"),
        ({"learning_rate": 0.1}, "Received: dict"),
    ],
)
def test_a_space_of_ones_own_is_tried_before_the_first_trial(space, message):
    with pytest.raises(InvalidArgument, match=message):
        check_space(space, GIVEN)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"objective": "val_acuracy"}, "Did you mean 'val_accuracy'"),
        ({"max_trials": 0}, "max_trials"),
        ({"tuner": "hyper"}, "Did you mean 'hyperband'"),
        ({"oracle": "gird"}, "Did you mean 'grid'"),
        ({"min_acceptance": 1.5}, "min_acceptance"),
        ({"halvings": -1}, "halvings"),
        ({"tuner": "random", "halvings": 1}, "option of the batched tuner"),
        ({"tuner": "grid", "oracle": "grid"}, "option of the batched tuner"),
    ],
)
def test_options_are_checked(wrong, message):
    with pytest.raises(InvalidArgument, match=message):
        SearchConfig(**wrong)
