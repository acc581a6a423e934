"""The choice among trials: fair to the setting that rejects least."""

from __future__ import annotations

import math
from xml.etree import ElementTree

import numpy as np
import pytest

from keras_rsft.config import PolicyConfig, SearchConfig, TrainConfig
from keras_rsft.errors import TrainingStalled
from keras_rsft.report._charts import rate_ticks
from keras_rsft.tuning._choice import TrialOutcome, choose_trial
from keras_rsft.tuning._folder import heat_map, write_pictures


def outcome(name, accuracy, acceptance, *, loss=1.0, policy="accept-all", **values):
    settings = TrainConfig(policy=PolicyConfig(policy))
    metrics = {
        "val_accuracy": accuracy, "val_accuracy_estimated": accuracy,
        "acceptance_rate": acceptance, "val_loss": loss,
    }  # fmt: skip
    return TrialOutcome(name, "COMPLETED", values, metrics, 3, settings=settings)


FAILED = TrialOutcome("f", "FAILED", {}, {}, 0, "The weights became NaN.")


def choose(*outcomes, wrong=None, size=100, least=0.1, objective=None):
    """Chooses; `wrong` has by trial the samples that it gets wrong, else the last."""
    options = SearchConfig(min_acceptance=least)
    if objective is not None:
        return choose_trial(outcomes, SearchConfig(objective=objective))
    predicted = {}
    for one in outcomes:
        if one.completed:
            count = round(size * (1 - one.metrics["val_accuracy"]))
            rows = range(size - count, size) if wrong is None else wrong[one.trial_id]
            predicted[one.trial_id] = np.zeros(size, int)
            predicted[one.trial_id][list(rows)] = 1
            assert count == len(rows)
    credits = np.eye(2)[np.zeros(size, int)]
    return choose_trial(outcomes, options, predicted, credits)


def test_all_right_on_few_samples_is_not_certain():
    trials = outcome("a", 1.0, 0.6), outcome("b", 14 / 15, 1.0), outcome("c", 0.8, 1.0)
    assert choose(*trials, size=15).errors["b"] > 1 / 15
    assert choose(*trials, size=1500).errors["b"] < 1 / 15


def test_noise_is_that_of_the_difference_on_the_same_samples():
    trials = outcome("a", 0.90, 0.6), outcome("b", 0.88, 0.8), outcome("c", 0.88, 0.8)
    wrong = {"a": range(10), "b": range(12), "c": range(88, 100)}
    choice = choose(*trials, wrong=wrong)
    # By hand, as Agresti and Min have it: 2 or 22 samples of which one is right.
    of_b = math.sqrt((3 / 102 - (2 / 102) ** 2) / 102)
    of_c = math.sqrt((23 / 102 - (2 / 102) ** 2) / 102)
    assert choice.errors == pytest.approx({"a": 0.0, "b": of_b, "c": of_c})
    # One standard error: c may be as good as a, b not.
    assert of_b < 0.02 < of_c


def test_of_equally_good_ones_the_most_typical_is_taken():
    """The best is right by luck where two others agree that it is not."""
    trials = outcome("a", 0.90, 1.0), outcome("b", 0.88, 0.6), outcome("c", 0.87, 0.7)
    wrong = {"a": range(10), "b": range(88, 100), "c": range(87, 100)}
    choice = choose(*trials, wrong=wrong)
    assert (choice.chosen.trial_id, choice.best.trial_id) == ("b", "a")
    assert "agreement with the other trials: 0.8800 against 0.9000" in choice.reason
    assert f"a standard error of {choice.noise:.4f}" in choice.reason


@pytest.mark.parametrize("right, chosen", [(97, "a"), (86, "c")])
def test_auto_is_preferred_where_it_may_be_as_good(right, chosen):
    trials = outcome("a", right / 100, 1.0), outcome("b", 0.70, 1.0)
    trials += (outcome("c", 0.85, 0.7, policy="auto"),)
    wrong = {"a": range(right, 100), "b": range(70, 100), "c": range(15)}
    choice = choose(*trials, wrong=wrong)
    assert (choice.chosen.trial_id, choice.best.trial_id) == (chosen, "a")
    assert ("no other is better by more than" in choice.reason) == (chosen == "c")


def test_what_is_worse_has_hardly_a_vote():
    bad = {name: range(60, 100) for name in "cdefgh"}
    trials = outcome("a", 0.90, 1.0), *(outcome(name, 0.60, 0.7) for name in bad)
    choice = choose(*trials, wrong={"a": range(10)} | bad)
    # All six agree with one another, and that is no reason.
    assert choice.chosen.trial_id == "a"


def test_more_samples_mean_less_noise():
    trials = outcome("a", 0.90, 1.0), outcome("b", 0.88, 0.6), outcome("c", 0.87, 0.7)
    few = {"a": range(10), "b": range(88, 100), "c": range(87, 100)}
    many = {
        name: range(100 * rows.start, 100 * rows.stop) for name, rows in few.items()
    }
    assert choose(*trials, wrong=few, size=100).chosen.trial_id == "b"
    assert choose(*trials, wrong=many, size=10_000).chosen.trial_id == "a"


def test_of_equal_ones_the_least_selective_is_taken():
    choice = choose(outcome("a", 0.90, 0.8), outcome("b", 0.90, 0.9))
    assert choice.chosen.trial_id == "b"


def test_a_setting_that_accepts_too_little_is_never_chosen():
    trials = outcome("a", 0.95, 0.05), outcome("b", 0.60, 0.5), FAILED
    assert choose(*trials).chosen.trial_id == "b"
    with pytest.raises(TrainingStalled, match=r"at least 60% .* highest was 50%"):
        choose(*trials, least=0.6)


def test_losses_are_compared_as_they_are():
    trials = outcome("a", 0.5, 0.5, loss=0.30), outcome("b", 0.9, 1.0, loss=0.31)
    choice = choose(*trials, objective="val_loss")
    assert (choice.chosen.trial_id, choice.noise) == ("a", 0.0)
    tied = outcome("a", 0.5, 0.5, loss=0.3), outcome("b", 0.9, 1.0, loss=0.3)
    choice = choose(*tied, objective="val_loss")
    assert choice.chosen.trial_id == "b"
    assert "rejects the least" in choice.reason


def test_where_all_failed_the_first_reason_is_told():
    with pytest.raises(TrainingStalled, match=r"All 2 trials failed.*NaN"):
        choose(FAILED, FAILED)


def of_backbone(name, accuracy, acceptance, unfreeze):
    return outcome(name, accuracy, acceptance, unfreeze=unfreeze)


@pytest.mark.parametrize(
    "accuracies, chosen",
    [
        # Here a point or less counts as equal; frozen before last block before all.
        ((0.90, 0.90, 0.90), "frozen"),
        ((0.89, 0.89, 0.90), "frozen"),
        ((0.80, 0.89, 0.90), "last-block"),
        ((0.80, 0.80, 0.90), "all"),
    ],
)
def test_inside_the_noise_the_cheapest_is_taken(accuracies, chosen):
    names = ("frozen", "last-block", "all")
    # What costs more rejects less, which is not what comes first.
    trials = [
        of_backbone(name, accuracy, 0.5 + 0.2 * cost, name)
        for cost, (name, accuracy) in enumerate(zip(names, accuracies, strict=True))
    ]
    choice = choose(*trials)
    assert choice.chosen.trial_id == chosen
    assert chosen in choice.reason


def test_of_equally_expensive_ones_the_more_typical_is_taken():
    trials = (
        of_backbone("frozen", 0.70, 1.0, "frozen"),
        of_backbone("plain", 0.88, 1.0, "all"),
        of_backbone("other", 0.87, 1.0, "all"),
        of_backbone("rejecting", 0.90, 0.7, "all"),
    )
    wrong = {
        "frozen": range(30), "plain": range(88, 100), "other": range(87, 100),
        "rejecting": range(10),
    }  # fmt: skip
    choice = choose(*trials, wrong=wrong)
    assert choice.chosen.trial_id == "plain"
    assert "of those that train all of the backbone: " in choice.reason


def test_what_accepts_too_little_is_not_chosen_for_being_cheap():
    trials = (
        of_backbone("a", 0.9, 0.05, "frozen"),
        of_backbone("b", 0.9, 0.5, "last-block"),
    )
    assert choose(*trials).chosen.trial_id == "b"


class TestHeatMap:
    TRIALS = (
        outcome("a", 0.5, 1.0, learning_rate=0.01, relative_threshold=0.5),
        outcome("b", 0.7, 0.8, learning_rate=0.01, relative_threshold=0.5),
        outcome("c", 0.9, 0.6, learning_rate=0.1, relative_threshold=1.0),
        outcome("d", 0.1, 1.0, learning_rate=0.1),
        FAILED,
    )

    def test_means_in_cells(self):
        found = heat_map(self.TRIALS, "relative_threshold")
        np.testing.assert_allclose(
            found.means["validation accuracy"], [[0.6, np.nan], [np.nan, 0.9]]
        )
        np.testing.assert_allclose(
            found.means["acceptance rate"], [[0.9, np.nan], [np.nan, 0.6]]
        )
        np.testing.assert_allclose(found.edges, [0.25, 0.75, 1.25])
        middle = math.sqrt(0.01 * 0.1)
        np.testing.assert_allclose(found.rate_edges[1], middle)

    def test_many_values_share_cells_and_none_is_lost(self):
        rng = np.random.default_rng(0)
        trials = [
            outcome(str(n), 1.0, 1.0, learning_rate=rate, keep_fraction=kept)
            for n, (rate, kept) in enumerate(rng.uniform(1e-4, 1.0, (50, 2)))
        ]
        found = heat_map(trials, "keep_fraction")
        assert found.means["validation accuracy"].shape == (8, 8)
        edges = found.edges, found.rate_edges
        points = np.array([list(t.values.values())[::-1] for t in trials]).T
        assert np.histogram2d(*points, edges)[0].sum() == 50

    def test_the_pictures_are_written(self, tmp_path):
        write_pictures(self.TRIALS, self.TRIALS, SearchConfig(), tmp_path)
        names = ["heatmap.svg", "parallel_coordinates.svg"]
        assert sorted(p.name for p in tmp_path.iterdir()) == names
        for name in names:
            text = (tmp_path / name).read_text()
            assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
            # Ink and paper follow light and dark.
            assert text.count("prefers-color-scheme: dark") == 1
            assert "nan" not in text

    @pytest.mark.parametrize(
        "low, high, ticks",
        [
            (1e-4, 1.0, [0.0001, 0.001, 0.01, 0.1, 1.0]),
            (1.3e-4, 2.6e-3, [0.0002, 0.0005, 0.001, 0.002]),
            (0.004, 0.2, [0.01, 0.03, 0.1]),
            (0.0011, 0.0019, [0.0014]),
            (1e-9, 1e-1, [1e-9, 1e-7, 1e-5, 1e-3, 1e-1]),
        ],
    )
    def test_ticks_do_not_crowd(self, low, high, ticks):
        assert rate_ticks(low, high) == ticks

    def test_nothing_to_draw(self, tmp_path):
        write_pictures([FAILED], [FAILED], SearchConfig(), tmp_path)
        assert list(tmp_path.iterdir()) == []
