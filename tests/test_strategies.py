"""How much of the backbone to train: what is planned, and the table."""

from __future__ import annotations

import pytest

from keras_rsft.config import PolicyConfig, SearchConfig, TrainConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.report._summary import strategies_table
from keras_rsft.tuning._backbone_trials import (
    backbone_rate,
    best_heads,
    planned_trials,
    strategy_rows,
)
from keras_rsft.tuning._choice import Choice, TrialOutcome


def head(name, accuracy, acceptance, *, loss=1.0, policy="keep-fraction"):
    metrics = {
        "val_accuracy": accuracy, "val_accuracy_estimated": accuracy + 0.05,
        "acceptance_rate": acceptance, "val_loss": loss, "training_seconds": 0.25,
    }  # fmt: skip
    return TrialOutcome(name, "COMPLETED", {}, metrics, 3, settings=settings_of(policy))


def settings_of(policy):
    return TrainConfig(policy=PolicyConfig(policy))


def plain(name, accuracy, **others):
    return head(name, accuracy, 1.0, policy="accept-all", **others)


FAILED = TrialOutcome("f", "FAILED", {}, {}, 0, "NaN.")


def best(*outcomes, objective="val_accuracy", least=0.1):
    options = SearchConfig(objective=objective, min_acceptance=least)
    return [one.trial_id for one in best_heads(outcomes, options)]


class TestBestHeads:
    def test_the_best_plain_and_the_best_rejecting(self):
        trials = (
            plain("a", 0.7), plain("b", 0.8), head("c", 0.9, 0.6), head("d", 0.8, 0.9),
        )  # fmt: skip
        assert best(*trials, FAILED) == ["b", "c"]

    def test_a_loss_is_better_where_it_is_lower(self):
        trials = plain("a", 0.9, loss=0.5), plain("b", 0.5, loss=0.4)
        assert best(*trials, objective="val_loss") == ["b"]

    def test_what_rejects_nothing_is_the_plain_training_once_more(self):
        assert best(plain("a", 0.7), head("b", 0.9, 1.0)) == ["a"]

    def test_what_accepts_too_little_is_passed_over(self):
        trials = head("a", 0.9, 0.05), head("b", 0.8, 0.5)
        assert best(*trials) == ["b"]
        assert best(*trials, least=0.0) == ["a"]

    def test_of_equally_good_ones_the_one_that_rejects_less(self):
        assert best(head("a", 0.9, 0.5), head("b", 0.9, 0.8)) == ["b"]

    def test_none(self):
        assert best(FAILED) == []


def test_the_cheapest_trials_come_first():
    planned = planned_trials(
        [plain("3", 0.8), head("07", 0.9, 0.6)], ("last-block", "all")
    )
    assert list(planned) == ["last-block-3", "last-block-07", "all-3", "all-07"]


@pytest.mark.parametrize(
    "head_rate, optimizer, expected",
    [
        (0.001, "sgd", 1e-4),
        (0.05, "SGD", 1e-3),
        (0.05, "adamw", 1e-4),
        (1e-4, "adam", 1e-5),
    ],
)
def test_the_rate_of_the_backbone(head_rate, optimizer, expected):
    assert backbone_rate(head_rate, optimizer) == pytest.approx(expected)


def test_names_in_any_order_and_the_frozen_backbone_among_them():
    assert SearchConfig(unfreeze=("all", "last-block")).unfreeze == (
        "frozen", "last-block", "all",
    )  # fmt: skip
    assert SearchConfig(unfreeze="all").unfrozen == ("all",)
    assert SearchConfig().unfrozen == ()
    with pytest.raises(InvalidArgument, match="Did you mean 'last-block'"):
        SearchConfig(unfreeze=("frozen", "last_block"))


@pytest.fixture(scope="module")
def rows():
    metrics = {
        "val_accuracy": 0.9, "val_accuracy_estimated": 0.95, "acceptance_rate": 0.7,
        "training_seconds": 64.0, "trainable_weights": 1234.0,
    }  # fmt: skip
    settings = settings_of("keep-fraction")
    trials = (
        TrialOutcome(
            "last-block-c",
            "COMPLETED",
            {"unfreeze": "last-block"},
            metrics,
            5,
            settings=settings,
        ),
        TrialOutcome("all-c", "FAILED", {"unfreeze": "all"}, {}, 0, "NaN.", settings),
        head("c", 0.8, 0.6),
        plain("b", 0.5),
    )
    errors = {"last-block-c": 0.0, "b": 0.05, "c": 0.03, "d": 0.02}
    choice = Choice(head("d", 0.75, 0.9), trials[0], "", errors)
    return strategy_rows(trials, choice, head_weights=30)


class TestRows:
    def test_from_the_cheapest_on_and_the_choice_among_them(self, rows):
        assert [row["trial"] for row in rows] == [
            "b",
            "c",
            "d",
            "last-block-c",
            "all-c",
        ]
        assert [row["chosen"] for row in rows] == [False, False, True, False, False]
        assert [row["rejects"] for row in rows] == [False, True, True, True, True]

    def test_numbers(self, rows):
        frozen, last_block, failed = rows[0], rows[3], rows[4]
        assert (frozen["standard_error"], failed["standard_error"]) == (0.05, None)
        assert (frozen["seconds"], frozen["trainable_weights"]) == (0.25, 30)
        assert (last_block["seconds"], last_block["trainable_weights"]) == (64.0, 1234)
        assert failed["validation_accuracy"] is failed["seconds"] is None

    def test_words(self, rows):
        texts = strategies_table(rows).rows
        assert texts[2] == (
            "frozen", "keep-fraction", "80.0 ± 2.0", "75.0 %", "90.0 %", "0.2 s", "30",
            "chosen",
        )  # fmt: skip
        assert texts[3][5:] == ("64 s", "1,234", "")
        assert texts[4] == ("all", "keep-fraction", "failed", "-", "-", "-", "-", "")
