"""Intervals by hand, and the verdict on both sides of its boundary."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rsft._stats import (
    Interval,
    mean_interval,
    paired_interval,
    paired_right_interval,
    paired_share_interval,
    t_quantile,
)
from keras_rsft.comparison._compare import Comparison
from keras_rsft.comparison._methods import Outcome, judge, recovered_share, summarize
from keras_rsft.label_quality._audit import Estimate
from keras_rsft.report._summary import comparison_summary

IMAGES = 1000


def outcomes_of(accuracies):
    """What the less accurate gets right of 1000 images, the more accurate does too."""
    return [
        Outcome(name, seed, 1.0, stalled="stuck")
        if accuracy is None
        else Outcome(name, seed, 1.0, np.arange(IMAGES) < round(accuracy * IMAGES))
        for name, values in accuracies.items()
        for seed, accuracy in enumerate(values)
    ]


class TestIntervals:
    def test_by_hand(self):
        """Mean 3, deviation sqrt(2.5), five values: 2.7764 x sqrt(2.5 / 5)."""
        interval = mean_interval([1, 2, 3, 4, 5])
        assert interval.mean == 3
        assert interval.half_width == pytest.approx(1.96321, abs=1e-4)
        assert interval.low == pytest.approx(1.03679, abs=1e-4)
        assert interval.high == pytest.approx(4.96321, abs=1e-4)

    def test_pairs_vary_less_than_what_they_are_made_of(self):
        interval = paired_interval([2, 12, 23], [1, 11, 21])
        assert interval.mean == pytest.approx(4 / 3)
        assert interval.half_width == pytest.approx(4.3027 / 3, abs=1e-4)
        with pytest.raises(ValueError, match="zip"):
            paired_interval([1, 2], [1])

    def test_one_value_says_nothing_about_chance(self):
        assert mean_interval([0.5]) == Interval(0.5, math.inf)
        one = np.array([[True, False, True]])
        assert paired_right_interval(one, ~one) == (-1, 1)

    def test_seeds_and_items_by_hand(self):
        """Seeds differ by 12 and 8 of 98; 8 items by 1 and 4 by a half."""
        ones = np.zeros((2, 98), bool)
        ones[0, :12] = ones[1, :8] = True
        low, high = paired_right_interval(ones, np.zeros_like(ones))
        over_seeds = 12.7062 * 2 / 98  # The mean of two errs by half their distance.
        over_items = 1.959964 * math.sqrt((10 / 100 - 0.1**2) / 100)
        half = math.hypot(over_seeds, over_items)
        assert (low, high) == pytest.approx((0.1 - half, 0.1 + half))

    def test_the_table_agrees_with_scipy_and_is_never_too_small(self):
        stats = pytest.importorskip("scipy.stats")
        for degrees in range(1, 200):
            exact = stats.t.ppf(0.975, degrees)
            assert exact - 1e-4 < t_quantile(degrees) < exact * 1.0421
            if degrees <= 30:
                assert t_quantile(degrees) == pytest.approx(exact, abs=1e-4)

    @given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(-1, 1))
    def test_a_shift_moves_the_mean_alone(self, values, shift):
        one, other = (mean_interval([v + s for v in values]) for s in (0.0, shift))
        assert other.mean == pytest.approx(one.mean + shift, abs=1e-9)
        assert other.half_width == pytest.approx(one.half_width, abs=1e-6)

    @pytest.mark.parametrize("only_one, only_other", [(4, 0), (30, 10), (0, 7)])
    def test_seeds_that_change_nothing_leave_the_chance_of_the_items(
        self, only_one, only_other
    ):
        ones, others = np.ones((2, 5, 200), bool)
        others[:, :only_one] = False
        ones[:, 200 - only_other :] = False
        expected = paired_share_interval(only_one, only_other, 200)
        assert paired_right_interval(ones, others) == pytest.approx(expected)
        swapped = paired_right_interval(others, ones)
        assert swapped == pytest.approx((-expected[1], -expected[0]))

    @pytest.mark.parametrize("by_seed", [0.0, 0.1, 0.4])
    @pytest.mark.parametrize("seeds", [2, 5])
    def test_equally_good_methods_are_rarely_told_apart(self, by_seed, seeds):
        """Of 400 pairs no more than 5 % and twice the error of that count."""
        rng = np.random.default_rng(0)

        def right(shared):  # Each method has its own hard items, and seeds have luck.
            hard = rng.normal(0, 0.3, 200)
            luck = rng.normal(0, by_seed, (seeds, 1))
            rest = rng.normal(0, by_seed, (seeds, 200))
            return shared + hard + luck + rest < 1.3

        wrong = 0
        for _ in range(400):
            shared = rng.normal(size=200)
            low, high = paired_right_interval(right(shared), right(shared))
            wrong += low > 0 or high < 0
        assert wrong <= 20 + 2 * math.sqrt(400 * 0.05 * 0.95)

    def test_recovered(self):
        assert recovered_share(0.8, 0.6, 0.9) == pytest.approx(2 / 3)
        assert recovered_share(0.6, 0.6, 0.9) == 0
        assert recovered_share(0.5, 0.6, 0.9) == pytest.approx(-1 / 3)
        assert recovered_share(0.8, 0.9, 0.9) is None


class TestTable:
    NAMES = ("Method", "Test", "vs. plain", "Given", "Accepted", "Recovered", "Seconds")

    @pytest.mark.parametrize(
        "given, methods, left_out",
        [
            (0.5, ["plain", "clean-subset", "gce"], "Given"),
            (0.4, ["plain", "gce"], "Recovered"),
            (0.4, ["plain", "clean-subset", "gce"], "Seconds"),
        ],
    )
    def test_columns_that_say_something(self, given, methods, left_out):
        accuracies = {"plain": 0.5, "gce": 0.6, "clean-subset": 0.7}
        accuracies = {name: [accuracies[name]] * 2 for name in methods}
        outcomes = [
            dataclasses.replace(
                one, test_accuracy_given=one.test_accuracy - 0.5 + given
            )
            for one in outcomes_of(accuracies)
        ]
        found = Comparison(
            tuple(outcomes), summarize(outcomes), judge(outcomes), "estimated"
        )
        shown = comparison_summary(found)
        (table,) = shown.tables
        assert table.columns == tuple(n for n in self.NAMES if n != left_out)
        assert "which nobody knows" in shown.notes[0]
        if left_out != "Given":
            place = table.columns.index("Given")
            assert table.rows[0][place] == "40.0"
            assert "Given: by the given labels." in shown.notes[0]


class TestVerdict:
    def test_a_lead_larger_than_chance_wins(self):
        verdict = judge(outcomes_of({"plain": [0.5, 0.6], "gce": [0.7, 0.8]}))
        assert (verdict.winner, verdict.tied) == ("gce", ("gce",))
        assert verdict.sentence == (
            "gce is ahead: 20.0 points over the next, plain "
            "(95 % interval over seeds and test samples: +17.9 to +22.0)."
        )

    @pytest.mark.parametrize("lead, winner", [(4, None), (6, "gce")])
    def test_seeds_that_agree_do_not_make_a_lead_of_few_images(self, lead, winner):
        accuracies = {"plain": [0.9] * 5, "gce": [0.9 + lead / IMAGES] * 5}
        assert judge(outcomes_of(accuracies)).winner == winner

    def test_at_the_boundary_nobody_wins(self):
        """Leads 1 and 3 of mean 2: half width 12.7062 > 2. Equal: a lead of 0."""
        near = judge(outcomes_of({"plain": [0.5, 0.5], "gce": [0.51, 0.53]}))
        assert near.winner is None
        assert near.tied == ("gce", "plain")
        assert near.sentence == (
            "No method is ahead by more than what other seeds and test samples may "
            "change: gce and plain are tied."
        )
        equal = judge(outcomes_of({"plain": [0.5, 0.6], "gce": [0.5, 0.6]}))
        assert equal.winner is None

    @pytest.mark.parametrize("error, winner", [(0.04, "gce"), (0.06, None)])
    def test_an_estimated_lead_has_the_error_of_the_estimate(self, error, winner):
        """5 points in each of two seeds; the interval of each is +-`error`."""

        class Quality:
            can_judge, reason = True, None

            def gain(self, ones, others):
                value = 0.05 * (ones[0] - others[0])
                return Estimate(value, value - error, value + error)

        accuracies = {"plain": [0.9] * 2, "gce": [0.95] * 2}
        outcomes = [
            dataclasses.replace(one, predicted=np.full(3, int(one.method == "gce")))
            for one in outcomes_of(accuracies)
        ]
        found = judge(outcomes, Quality())
        assert found.winner == winner
        if winner:
            assert "+1.0 to +9.0" in found.sentence
        assert judge(outcomes).winner == "gce"

    def test_only_those_within_chance_are_named(self):
        verdict = judge(
            outcomes_of(
                {"plain": [0.1, 0.2], "article": [0.60, 0.66], "gce": [0.61, 0.65]}
                | {"keep-fraction": [0.6, 0.7]}
            )
        )
        assert verdict.tied == ("keep-fraction", "article", "gce")
        assert verdict.sentence.endswith("keep-fraction, article and gce are tied.")

    def test_the_runner_up_is_not_the_only_rival(self):
        """A third whose accuracy varies a lot may still be the best."""
        verdict = judge(
            outcomes_of(
                {"gce": [0.7, 0.7, 0.7], "plain": [0.68, 0.68, 0.68]}
                | {"article": [0.5, 0.9, 0.6]}
            )
        )
        assert verdict.tied == ("gce", "article")

    def test_the_clean_subset_and_a_stalled_method_do_not_compete(self):
        outcomes = outcomes_of(
            {"plain": [0.5, 0.6], "gce": [0.7, 0.8]}
            | {"clean-subset": [0.9, 0.9], "article": [0.99, None]}
        )
        assert judge(outcomes).winner == "gce"
        summaries = summarize(outcomes)
        assert summaries["article"].stalled == 1
        assert summaries["article"].test_accuracy.mean == 0.99
        assert summaries["article"].difference_to_plain is None
        assert summaries["article"].recovered is None
        assert summaries["gce"].recovered == pytest.approx(0.2 / 0.35)
        assert summaries["gce"].difference_to_plain.mean == pytest.approx(0.2)

    def test_one_seed_and_one_method(self):
        assert "One seed" in judge(outcomes_of({"plain": [0.5], "gce": [0.9]})).sentence
        alone = judge(outcomes_of({"plain": [0.5, 0.6]}))
        assert alone.winner is None
        assert "two methods" in alone.sentence
