"""The scores against closed forms and definitions, on cases small enough for that."""

from __future__ import annotations

import math

import numpy as np
import pytest

from keras_rsft.data.partition import stratified_sample
from keras_rsft.errors import InvalidArgument
from keras_rsft.ranking.scores import h_score, kendall_tau, ledoit_wolf, log_me


def clusters(count=60, dim=4, classes=3, distance=2.0, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centres = distance * np.eye(classes, dim)
    return centres[labels] + rng.normal(size=(count, dim)), labels


def direct_evidence(features, target, alpha, beta):
    """Log density of the target: a Gaussian of covariance FF^T/alpha + I/beta."""
    count = len(target)
    covariance = features @ features.T / alpha + np.eye(count) / beta
    _, determinant = np.linalg.slogdet(covariance)
    distance = target @ np.linalg.solve(covariance, target)
    return -0.5 * (distance + determinant + count * math.log(2 * math.pi))


@pytest.mark.parametrize("count, dim", [(12, 3), (6, 9)])
def test_log_me_is_the_largest_evidence(count, dim):
    features, labels = clusters(count, dim)
    steps = np.exp(np.linspace(-9, 9, 181))
    expected = []
    for label in range(3):
        target = (labels == label).astype(float)
        # Along alpha on a grid, and for each the best beta on a grid around it.
        found = max(
            direct_evidence(features, target, alpha, beta)
            for alpha in steps[::3]
            for beta in steps[::3]
        )
        expected.append(found / count)
    assert log_me(features, labels) == pytest.approx(np.mean(expected), abs=5e-3)
    assert log_me(features, labels) >= np.mean(expected) - 1e-4


def test_log_me_does_not_depend_on_the_unit():
    features, labels = clusters()
    assert log_me(1000 * features, labels) == pytest.approx(log_me(features, labels))


def test_scores_are_higher_for_clearer_features():
    unclear, clear = (clusters(distance=distance)[0] for distance in (0.5, 5.0))
    labels = clusters()[1]
    for score in (log_me, h_score):
        assert score(clear, labels) > score(unclear, labels)


def test_h_score_by_hand():
    """Two features, two classes at -1 and 1 of the first, the second without sign."""
    features = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
    labels = np.array([0, 0, 1, 1])
    covariance, shrinkage = ledoit_wolf(features)
    # The covariance is the identity, the target of the shrinkage: it is shrunken whole.
    assert shrinkage == 1.0
    np.testing.assert_array_equal(covariance, np.eye(2))
    assert h_score(features, labels) == 0.0
    # Without shrinkage: trace(I^-1 diag(1, 0)) = 1. With a share a: (1 - a) times that
    # over the shrunken variance, here of a stretched feature, 4 of 4 and 1.
    stretched = features * [2.0, 1.0]
    covariance, shrinkage = ledoit_wolf(stretched)
    assert 0 < shrinkage < 1
    variance = (1 - shrinkage) * 4 + shrinkage * 2.5
    assert covariance[0, 0] == pytest.approx(variance)
    expected = (1 - shrinkage) * 4 / variance
    assert h_score(stretched, labels) == pytest.approx(expected)


def test_h_score_is_the_trace_of_its_definition():
    features, labels = clusters(200, 5)
    covariance, shrinkage = ledoit_wolf(features - features.mean(axis=0))
    means = np.stack([features[labels == label].mean(axis=0) for label in labels])
    between = np.cov(means, rowvar=False, bias=True)
    expected = np.trace(np.linalg.inv(covariance) @ between) * (1 - shrinkage)
    assert h_score(features, labels) == pytest.approx(expected)
    assert 0 < expected < 2


def test_the_shrinkage_is_that_of_scikit_learn():
    covariance = pytest.importorskip("sklearn.covariance")
    features, _ = clusters(30, 50)
    fitted = covariance.LedoitWolf().fit(features)
    shrunken, shrinkage = ledoit_wolf(features - features.mean(axis=0))
    assert shrinkage == pytest.approx(fitted.shrinkage_)
    np.testing.assert_allclose(shrunken, fitted.covariance_)


def test_scores_of_features_that_do_not_vary_are_finite():
    labels = np.array([0, 1, 0, 1])
    for features in (np.zeros((4, 3)), np.ones((4, 3))):
        assert math.isfinite(log_me(features, labels))
        assert h_score(features, labels) == 0.0


@pytest.mark.parametrize(
    "ones, others, expected",
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 2, 4, 3], 4 / 6),
        ([1, 2, 2], [1, 2, 3], 2 / math.sqrt(2 * 3)),
    ],
)
def test_kendall_tau_by_hand(ones, others, expected):
    assert kendall_tau(ones, others) == pytest.approx(expected)


@pytest.mark.parametrize("values", [[], [1.0], [2.0, 2.0]])
def test_kendall_tau_where_there_is_no_order(values):
    assert math.isnan(kendall_tau(values, values))


def test_a_sample_keeps_the_shares_of_the_classes():
    labels = np.repeat([0, 1, 2], [60, 30, 10])
    chosen = stratified_sample(labels, 10)
    assert np.bincount(labels[chosen]).tolist() == [6, 3, 1]
    assert np.all(np.diff(chosen) > 0)
    assert chosen.tolist() == stratified_sample(labels, 10).tolist()
    assert chosen.tolist() != stratified_sample(labels, 10, seed=1).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 99, 100, 500])
def test_a_sample_has_its_size_and_its_classes(count):
    labels = np.repeat([0, 2, 5], [97, 2, 1])
    chosen = stratified_sample(labels, count)
    assert len(chosen) == len(set(chosen)) == min(count, 100)
    if count >= 3:
        assert set(labels[chosen]) == {0, 2, 5}


def test_a_sample_of_none_is_refused():
    with pytest.raises(InvalidArgument, match="at least 1"):
        stratified_sample(np.zeros(3, int), 0)
