"""Decisions: hand-worked values, boundaries, and properties over random losses."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from keras_rsft.errors import InvalidArgument
from keras_rsft.policies._policy import Policy
from keras_rsft.policies._rules import (
    accept_batch_below,
    accept_below,
    keep_smallest,
    ramped_keep_fraction,
)
from keras_rsft.policies._threshold import AcceptAll, KeepFraction, LossThreshold

NAN, INF = float("nan"), float("inf")

losses_of_any_kind = arrays(
    "float32",
    st.integers(1, 12),
    elements=st.one_of(
        st.sampled_from([0.0, 0.5, 1.0, NAN, INF]),
        st.floats(0.0, 100.0, width=32, allow_subnormal=False),
    ),
)
distinct_losses = st.lists(
    st.integers(1, 10_000), min_size=1, max_size=12, unique=True
).map(lambda values: np.array(values, "float32"))
fractions = st.sampled_from([0.01, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.75, 0.99, 1.0])


def mask_of(judge, losses, *numbers):
    """Calls a pure function on float32 losses; the mask comes back as a list."""
    return np.array(judge(np.array(losses, "float32"), *numbers)).tolist()


@pytest.fixture(scope="module")
def every_policy():
    """Policies that accept as much as they can."""
    return (
        AcceptAll(),
        LossThreshold(1e6),
        LossThreshold(1.0, warmup_steps=10**9),
        LossThreshold(1e6, level="batch"),
        LossThreshold(1.0, level="batch", warmup_steps=10**9),
        KeepFraction(1.0),
    )


def steps_seen(policy):
    return int(policy.steps_seen.numpy())


@pytest.mark.parametrize(
    "losses, expected",
    [
        ([0.0, 0.9999, 1.0, 1.0001], [True, True, False, False]),  # strictly below
        ([NAN, INF, 0.5], [False, False, True]),
        ([], []),
    ],
)
def test_accept_below(losses, expected):
    assert mask_of(accept_below, losses, 1.0) == expected


@pytest.mark.parametrize(
    "losses, accepted",
    [
        ([0.5, 1.25], True),  # mean 0.875
        ([0.5, 1.5], False),  # mean 1.0: not strictly below
        ([0.0, 3.0], False),  # mean 1.5, although one sample is below
        ([0.1, NAN], False),
        ([0.1, INF], False),
        ([0.1, -INF], False),
    ],
)
def test_accept_batch_below(losses, accepted):
    assert mask_of(accept_batch_below, losses, 1.0) == [accepted, accepted]


@pytest.mark.parametrize(
    "losses, keep, expected",
    [
        ([4.0, 1.0, 3.0, 2.0], 0.5, [0, 1, 0, 1]),
        ([4.0, 1.0, 3.0, 2.0], 1.0, [1, 1, 1, 1]),
        ([3.0, 1.0, 2.0], 0.5, [0, 1, 1]),  # 1.5 rounds up to 2
        ([3.0, 1.0, 2.0], 0.49, [0, 1, 0]),  # 1.47 rounds down to 1
        ([5.0, 4.0, 3.0, 2.0, 1.0], 0.5, [0, 0, 1, 1, 1]),  # 2.5 -> 3: not to even
        ([9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0], 0.15, [0] * 8 + [1, 1]),  # 1.5 again
        ([2.0, 1.0], 0.01, [0, 1]),  # never none
        ([1.0, 1.0, 1.0, 1.0], 0.5, [1, 1, 0, 0]),  # of equals the earlier
        ([2.0, 1.0, 1.0, 1.0], 0.5, [0, 1, 1, 0]),
        ([NAN, 5.0, INF, 4.0, -INF], 0.5, [0, 0, 0, 1, 0]),  # half of the two finite
        ([NAN, 5.0, INF, 4.0], 1.0, [0, 1, 0, 1]),
        ([NAN, INF, -INF], 1.0, [0, 0, 0]),
        ([7.0], 0.3, [1]),
    ],
)
def test_keep_smallest(losses, keep, expected):
    assert mask_of(keep_smallest, losses, keep) == [bool(e) for e in expected]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_keep_smallest_counts_right_in_any_float_type(dtype):
    # bfloat16 has no 257 and float16 no 2049: ranks must not be counted in them.
    losses = keras.ops.cast(np.arange(4096) % 7, dtype)
    kept = np.array(keep_smallest(losses, 0.5))
    assert kept.sum() == 2048
    assert kept[np.arange(4096) % 7 < 3].all()


@pytest.mark.parametrize(
    "step, ramp_steps, expected",
    [
        (0, 10, 1.0),
        (1, 10, 0.96),
        (5, 10, 0.8),
        (10, 10, 0.6),
        (1000, 10, 0.6),
        (0, 1, 1.0),
        (1, 1, 0.6),
        (0, 0, 0.6),
        (3, 0, 0.6),
    ],
)
def test_ramped_keep_fraction(step, ramp_steps, expected):
    share = float(ramped_keep_fraction(step, 0.6, ramp_steps))
    assert share == pytest.approx(expected, abs=1e-6)


def test_a_ramp_ends_at_the_very_fraction():
    for share in np.linspace(0.01, 1.0, 100, dtype="float32"):
        assert np.array(ramped_keep_fraction(4, share, 4)) == share
        assert np.array(ramped_keep_fraction(0, share, 4)) == 1.0
    assert np.array(KeepFraction(0.15)(np.arange(10, dtype="float32"))).sum() == 2
    # 58.5, of which float32 has a little less.
    assert np.array(keep_smallest(np.arange(90, dtype="float32"), 0.65)).sum() == 59


@pytest.mark.parametrize(
    "judge, numbers",
    [
        (accept_below, [0.5, 1.5, 3.0]),
        (accept_batch_below, [0.5, 1.5, 3.0]),
        (keep_smallest, [0.2, 0.5, 1.0]),
    ],
)
def test_a_leading_axis_of_trials_equals_trial_by_trial(judge, numbers):
    losses = np.random.default_rng(1).gamma(1.0, 1.5, (3, 8)).astype("float32")
    losses[1, 2], losses[2, 5] = NAN, INF
    together = mask_of(judge, losses, np.array(numbers, "float32")[:, None])
    one_by_one = [
        mask_of(judge, row, n) for row, n in zip(losses, numbers, strict=True)
    ]
    assert together == one_by_one
    # One batch of losses judged by every trial's own number.
    shared = mask_of(judge, losses[:1].repeat(3, axis=0), np.array(numbers)[:, None])
    assert shared == [mask_of(judge, losses[0], n) for n in numbers]


def test_a_ramp_broadcasts_over_trials():
    keep = np.array([[0.5], [0.8]], "float32")
    shares = np.array(ramped_keep_fraction(5, keep, 10))
    np.testing.assert_allclose(shares, [[0.75], [0.9]], atol=1e-6)


@given(losses_of_any_kind, fractions)
def test_keep_smallest_is_a_stable_sort_cut_off(losses, keep):
    kept = np.array(keep_smallest(losses, keep))
    finite = np.flatnonzero(np.isfinite(losses))
    count = max(1, int(np.floor(np.float32(len(finite)) * np.float32(keep) + 0.5001)))
    in_order = finite[np.argsort(losses[finite], kind="stable")]
    assert np.flatnonzero(kept).tolist() == sorted(in_order[:count].tolist())
    dropped = np.isfinite(losses) & ~kept
    if kept.any() and dropped.any():
        assert losses[kept].max() <= losses[dropped].min()


@given(distinct_losses, fractions, st.randoms(use_true_random=False))
def test_keep_smallest_does_not_depend_on_the_order(losses, keep, random):
    order = list(range(len(losses)))
    random.shuffle(order)
    kept = np.array(keep_smallest(losses, keep))
    np.testing.assert_array_equal(keep_smallest(losses[order], keep), kept[order])


@given(losses_of_any_kind)
def test_no_policy_accepts_what_is_not_finite(every_policy, losses):
    for policy in every_policy:
        assert not np.array(policy(losses))[~np.isfinite(losses)].any()


@pytest.mark.parametrize(
    "policy",
    [
        LossThreshold(0.5, level="batch"),
        LossThreshold(0.5, level="batch", warmup_steps=9),
    ],
    ids=["threshold", "warm-up"],
)
def test_a_batch_with_a_loss_of_nan_is_rejected_whole(policy):
    assert mask_of(policy, [0.1, NAN, 0.2]) == [False] * 3
    assert mask_of(policy, [0.1, 0.3, 0.2]) == [True] * 3


@pytest.mark.parametrize("level", ["sample", "batch"])
def test_warm_up_counts_steps(level):
    policy = LossThreshold(1.0, level=level, warmup_steps=2)
    decisions = [mask_of(policy, [2.0, 3.0]) for _ in range(3)]
    assert decisions == [[True, True], [True, True], [False, False]]
    assert steps_seen(policy) == 3


def test_a_ramp_counts_steps():
    policy = KeepFraction(0.25, ramp_steps=3)
    kept = [sum(mask_of(policy, [1.0, 2.0, 3.0, 4.0])) for _ in range(5)]
    assert kept == [4, 3, 2, 1, 1]


def test_a_ramp_begins_after_the_warm_up():
    policy = KeepFraction(0.25, ramp_steps=3, warmup_steps=2)
    kept = [sum(mask_of(policy, [1.0, 2.0, 3.0, 4.0])) for _ in range(6)]
    assert kept == [4, 4, 4, 3, 2, 1]


@pytest.mark.parametrize(
    "policy, variable, value",
    [
        (LossThreshold(1.0), "threshold", 2.5),
        (KeepFraction(0.25), "keep_fraction", 0.5),
    ],
    ids=["threshold", "keep_fraction"],
)
def test_numbers_are_live(policy, variable, value):
    losses = [0.5, 2.0, 3.0, 4.0]
    assert mask_of(policy, losses) == [True, False, False, False]
    getattr(policy, variable).assign(value)
    assert mask_of(policy, losses) == [True, True, False, False]


@pytest.mark.parametrize(
    "policy",
    [
        AcceptAll(name="mine"),
        LossThreshold(1.5, level="batch", warmup_steps=7, name="mine"),
        KeepFraction(0.7, ramp_steps=20, name="mine"),
    ],
    ids=["AcceptAll", "LossThreshold", "KeepFraction"],
)
def test_config_round_trip(policy):
    stored = keras.saving.serialize_keras_object(policy)
    restored = keras.saving.deserialize_keras_object(stored)
    assert type(restored) is type(policy)
    assert restored.get_config() == policy.get_config()
    assert restored.name == "mine"
    assert restored.level == policy.level
    assert [float(v) for v in restored.variables] == [
        float(v) for v in policy.variables
    ]


def test_policies_have_no_trainable_weights_and_stay_float32(dtype_policy):
    dtype_policy("mixed_float16")
    for policy in (AcceptAll(), LossThreshold(1.5), KeepFraction(0.7)):
        assert policy.trainable_variables == []
    # 2.0001 is 2.0 in half precision: the boundary must not move.
    assert mask_of(LossThreshold(2.0001), [2.00005, 2.0001]) == [True, False]


@pytest.mark.parametrize("value", [0, 0.0, -1.0, NAN, True, "1.5", None])
def test_threshold_must_be_positive(value):
    with pytest.raises(InvalidArgument, match=r"`threshold`.*Received: threshold="):
        LossThreshold(value)


@pytest.mark.parametrize("value", [0, -0.5, 1.01, INF, NAN, True, "0.5", None])
def test_keep_fraction_must_be_a_share(value):
    with pytest.raises(InvalidArgument, match=r"`keep_fraction`.*Received: keep_fra"):
        KeepFraction(value)


@pytest.mark.parametrize("value", [-1, 2.0, True, "3", None])
@pytest.mark.parametrize(
    "build, name",
    [
        (lambda value: LossThreshold(1.0, warmup_steps=value), "warmup_steps"),
        (lambda value: KeepFraction(0.5, ramp_steps=value), "ramp_steps"),
        (lambda value: AcceptAll(warmup_steps=value), "warmup_steps"),
    ],
    ids=["warmup_steps", "ramp_steps", "of any policy"],
)
def test_steps_must_be_whole(build, name, value):
    with pytest.raises(InvalidArgument, match=rf"`{name}`.*Received: {name}="):
        build(value)


def test_level_must_be_known():
    with pytest.raises(InvalidArgument, match=r"`level`.*Received: level='epoch'"):
        LossThreshold(1.0, level="epoch")


def test_numpy_numbers_are_numbers():
    policy = LossThreshold(np.float32(1.5), warmup_steps=np.int64(2))
    assert float(policy.threshold) == 1.5
    assert KeepFraction(np.float32(0.5)).get_config()["keep_fraction"] == 0.5


def test_a_policy_without_a_rule_says_so():
    with pytest.raises(NotImplementedError):
        Policy()(np.zeros(2, "float32"))
