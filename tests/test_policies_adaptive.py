"""Moving thresholds and floors: hand-worked values and their boundaries."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies._rules import (
    grown_threshold,
    running_moments,
    running_percentile,
    threshold_from_moments,
    threshold_from_percentile,
    with_class_floor,
)
from keras_rsft.policies._threshold import (
    KeepFraction,
    LossMixture,
    LossThreshold,
    RunningThreshold,
    SelfPaced,
)

NAN, INF = float("nan"), float("inf")


def floats(*values):
    return np.array(values, "float32")


class TestGrownThreshold:
    @pytest.mark.parametrize("step, expected", [(0, 1.0), (5, 2.0**0.5), (20, 4.0)])
    def test_by_hand(self, step, expected):
        assert float(grown_threshold(step, 1.0, 2.0, 10)) == pytest.approx(expected)

    def test_policy_grows_after_the_warm_up_and_stops(self):
        policy = SelfPaced(
            1.0, growth=2.0, growth_steps=1, max_threshold=3.0, warmup_steps=1
        )
        losses = floats(0.9, 1.5, 2.9, 3.1)
        seen = [np.array(policy(losses)).sum() for _ in range(4)]
        # Warm-up, then thresholds of 1, 2, and 4 cut down to 3.
        assert seen == [4, 1, 2, 3]


class TestRunningThreshold:
    def test_moments_by_hand(self):
        moments = running_moments(
            np.zeros((2, 3), "float32"),
            floats(1.0, 3.0, NAN, 5.0),
            floats(1, 1, 1, 0, 0, 0, 0, 1).reshape(2, 4),
            0.5,
        )
        # Group 0 sees 1 and 3, group 1 sees 5.
        np.testing.assert_allclose(moments, [[0.5, 2.0, 1.0], [0.5, 5.0, 0.0]])
        thresholds = threshold_from_moments(moments, 2.0)
        np.testing.assert_allclose(thresholds, [2 + 2 * 1.0, 5.0])

    @pytest.mark.parametrize("level, spread", [(1000.0, 0.05), (0.7, 0.3)])
    def test_moments_are_those_of_all_batches_weighted(self, level, spread):
        batches = np.random.default_rng(0).normal(level, spread, (50, 64)).astype("f4")
        moments = np.zeros((1, 3), "float32")
        for batch in batches:
            moments = running_moments(moments, batch, np.ones((1, 64), "f4"), 0.9)
        weights = np.repeat(0.9 ** np.arange(49, -1, -1), 64)
        losses = batches.astype(np.float64).ravel()
        mean = np.average(losses, weights=weights)
        deviation = np.sqrt(np.average((losses - mean) ** 2, weights=weights))
        found = threshold_from_moments(moments, 2.0)
        np.testing.assert_allclose(found - mean, [2 * deviation], atol=0.01 * spread)

    def test_a_group_that_saw_nothing_keeps_its_statistics(self):
        before = floats(0.5, 1.0, 2.5).reshape(1, 3)
        after = running_moments(before, floats(NAN, INF), np.ones((1, 2), "f4"), 0.5)
        np.testing.assert_array_equal(after, before)
        unseen = threshold_from_moments(np.zeros((1, 3), "float32"), 0.0)
        assert np.isinf(unseen).all()

    def test_each_class_has_its_own(self):
        policy = RunningThreshold(num_classes=2, momentum=0.0)
        losses = floats(0.1, 0.3, 8.0, 9.0)
        accepted = policy(losses, np.array([0, 0, 1, 1], "int32"))
        assert np.array(accepted).tolist() == [True, False, True, False]
        together = RunningThreshold(momentum=0.0)(losses)
        assert np.array(together).tolist() == [True, True, False, False]

    def test_trials_broadcast(self):
        losses = np.random.default_rng(0).random((3, 8)).astype("float32")
        members = np.ones((1, 8), "float32")
        moments = running_moments(np.zeros((3, 1, 3), "f4"), losses, members, 0.9)
        for trial in range(3):
            alone = running_moments(np.zeros((1, 3), "f4"), losses[trial], members, 0.9)
            np.testing.assert_allclose(moments[trial], alone, rtol=1e-5)

    def test_one_huge_loss_is_forgotten(self):
        policy = RunningThreshold(num_classes=2, momentum=0.5)
        policy(floats(1e30, 1.0), np.array([0, 1], "int32"))
        labels = np.array([0, 0, 1, 1], "int32")
        for _ in range(60):
            accepted = policy(floats(1.0, 3.0, 1.0, 3.0), labels)
        assert np.array(accepted).tolist() == [True, False, True, False]

    @pytest.mark.parametrize(
        "percentile, first, second",
        [(0.5, 1.0, 5.0), (0.51, 3.0, 5.0), (1.0, 4.0, 5.0)],
    )
    def test_percentiles_by_hand(self, percentile, first, second):
        losses = floats(1.0, 3.0, 0.5, 4.0, 5.0, NAN)
        members = floats(1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 1, 1).reshape(2, 6)
        before = floats(1.0, 7.0, 0.0, 0.0).reshape(2, 2)
        after = running_percentile(before, losses, members, percentile, 0.75)
        # A quarter of this batch's percentile is mixed in; the NaN does not count.
        expected = [[1.0, 0.75 * 7 + 0.25 * first], [0.25, 0.25 * second]]
        np.testing.assert_allclose(after, expected)
        thresholds = threshold_from_percentile(after)
        np.testing.assert_allclose(thresholds, [expected[0][1], second])

    def test_percentiles_of_trials_broadcast(self):
        losses = np.random.default_rng(0).random((3, 8)).astype("float32")
        members = np.ones((1, 8), "float32")
        zeros = np.zeros((3, 1, 2), "float32")
        together = running_percentile(zeros, losses, members, 0.7, 0.9)
        for trial in range(3):
            alone = running_percentile(zeros[0], losses[trial], members, 0.7, 0.9)
            np.testing.assert_allclose(together[trial], alone, rtol=1e-5)

    def test_by_percentile(self):
        policy = RunningThreshold(percentile=0.75, momentum=0.5)
        accepted = policy(floats(0.1, 0.3, 8.0, 9.0))
        assert np.array(accepted).tolist() == [True, True, False, False]
        again = RunningThreshold.from_config(policy.get_config())
        assert again.percentile == 0.75

    @pytest.mark.parametrize("wrong", [0.0, 1.1])
    def test_percentile_is_a_share(self, wrong):
        with pytest.raises(InvalidArgument, match="percentile"):
            RunningThreshold(percentile=wrong)
        with pytest.raises(InvalidArgument, match="without `deviations`"):
            RunningThreshold(1.0, percentile=0.5)

    def test_needs_classes(self):
        with pytest.raises(InvalidArgument, match="class by class"):
            RunningThreshold(num_classes=2)(floats(1.0))


class TestClassFloor:
    def test_adds_the_smallest_losses_of_each_class(self):
        losses = floats(1.0, 5.0, 4.0, 6.0, NAN)
        labels = np.array([0, 1, 1, 1, 1], "int32")
        accepted = floats(1, 0, 0, 0, 0).astype(bool)
        # A third of three finite losses of class 1 is one: the smallest.
        floor = with_class_floor(accepted, losses, labels, 1 / 3)
        assert np.array(floor).tolist() == [True, False, True, False, False]
        more = with_class_floor(accepted, losses, labels, 0.34)
        assert np.array(more).tolist() == [True, True, True, False, False]

    @pytest.mark.parametrize("share, count", [(0.0, 0), (0.1, 2), (1.0, 20)])
    def test_boundaries_and_ties(self, share, count):
        rejected = np.zeros(20, bool)
        labels = np.zeros(20, "int32")
        floor = with_class_floor(rejected, np.ones(20, "float32"), labels, share)
        assert np.flatnonzero(floor).tolist() == list(range(count))

    def test_trials_broadcast(self):
        rng = np.random.default_rng(0)
        losses = rng.random((3, 9)).astype("float32")
        labels = rng.integers(0, 3, 9)
        rejected = np.zeros((3, 9), bool)
        together = np.array(with_class_floor(rejected, losses, labels, 0.5))
        for trial in range(3):
            alone = with_class_floor(rejected[trial], losses[trial], labels, 0.5)
            np.testing.assert_array_equal(together[trial], alone)

    @pytest.mark.parametrize(
        "policy",
        [
            LossThreshold(1e-6, class_floor=0.5),
            KeepFraction(0.01, class_floor=0.5),
            SelfPaced(1e-6, growth_steps=1, class_floor=0.5),
            RunningThreshold(-1e6, class_floor=0.5),
        ],
    )
    def test_holds_whatever_a_policy_decides(self, policy):
        losses = floats(1.0, 2.0, 3.0, 4.0)
        accepted = np.array(policy(losses, np.array([0, 0, 1, 1], "int32")))
        assert accepted.tolist() == [True, False, True, False]

    def test_needs_classes_and_a_share(self):
        with pytest.raises(InvalidArgument, match="class by class"):
            LossThreshold(1.0, class_floor=0.5)(floats(1.0))
        with pytest.raises(InvalidArgument, match=r"in \[0, 1\]"):
            LossThreshold(1.0, class_floor=1.5)


@pytest.mark.parametrize(
    "make",
    [
        lambda: SelfPaced(0.0, growth_steps=1),
        lambda: SelfPaced(1.0, growth=0.9, growth_steps=1),
        lambda: SelfPaced(1.0, growth_steps=0),
        lambda: SelfPaced(1.0, growth_steps=1, max_threshold=-1.0),
        lambda: RunningThreshold(NAN),
        lambda: RunningThreshold(momentum=1.0),
        lambda: RunningThreshold(num_classes=0),
        lambda: LossMixture(1.0),
        lambda: LossMixture(warmup_steps=-1),
    ],
)
def test_numbers_out_of_range_are_refused(make):
    with pytest.raises(InvalidArgument, match="Received"):
        make()


@pytest.mark.parametrize(
    "policy",
    [SelfPaced(math.inf, growth_steps=1), RunningThreshold(1e6), LossMixture()],
)
def test_losses_that_are_not_finite_are_rejected(policy):
    accepted = np.array(policy(floats(1.0, NAN, INF, 2.0)))
    assert accepted.tolist() == [True, False, False, True]
