"""Intervals by hand, and the verdict on both sides of its boundary."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from keras_rsft.comparing import (
    Outcome,
)
from keras_rsft.comparing.intervals import (
    Interval,
    mean_interval,
    paired_interval,
    recovered_share,
    t_quantile,
)
from keras_rsft.comparing.summary import judge, summarize


def outcomes_of(accuracies):
    return [
        Outcome(
            name, seed, 1.0, accuracy, stalled="stuck" if accuracy is None else None
        )
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
        assert not mean_interval([0.5]).excludes_zero

    @pytest.mark.parametrize(
        "mean, half_width, expected",
        [(1, 0.5, True), (1, 1, False), (-1, 1, False), (-1, 0.9, True), (0, 0, False)],
    )
    def test_an_end_at_zero_does_not_exclude_it(self, mean, half_width, expected):
        assert Interval(mean, half_width).excludes_zero is expected

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

    def test_recovered(self):
        assert recovered_share(0.8, 0.6, 0.9) == pytest.approx(2 / 3)
        assert recovered_share(0.6, 0.6, 0.9) == 0
        assert recovered_share(0.5, 0.6, 0.9) == pytest.approx(-1 / 3)
        assert recovered_share(0.8, 0.9, 0.9) is None


class TestVerdict:
    def test_a_lead_larger_than_chance_wins(self):
        verdict = judge(outcomes_of({"plain": [0.5, 0.6], "gce": [0.7, 0.8]}))
        assert (verdict.winner, verdict.tied) == ("gce", ("gce",))
        assert (
            verdict.sentence == "gce is ahead: 20.0 ± 0.0 points over the next, plain."
        )

    def test_at_the_boundary_nobody_wins(self):
        """Leads 1 and 3 of mean 2: half width 12.7062 > 2. Equal: a lead of 0."""
        near = judge(outcomes_of({"plain": [0.5, 0.5], "gce": [0.51, 0.53]}))
        assert near.winner is None
        assert near.tied == ("gce", "plain")
        assert near.sentence == (
            "No method is ahead by more than chance: gce and plain are tied."
        )
        equal = judge(outcomes_of({"plain": [0.5, 0.6], "gce": [0.5, 0.6]}))
        assert equal.winner is None

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
                {"gce": [0.7, 0.7, 0.7], "plain": [0.69, 0.69, 0.69]}
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
