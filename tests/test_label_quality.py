"""How many labels are wrong, and which, from features alone."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from keras_rsft._stats import proportion_interval
from keras_rsft.data._labels import asymmetric_noise, symmetric_noise
from keras_rsft.errors import DataError
from keras_rsft.features._store import FeatureSet
from keras_rsft.label_quality import _noise as noise_module
from keras_rsft.label_quality import _regression as regression_module
from keras_rsft.label_quality._audit import LabelQuality, audit_labels
from keras_rsft.label_quality._noise import (
    calibrated,
    fit_noise,
    softmax,
    true_label_posterior,
)
from keras_rsft.label_quality._regression import LeftOutRegression


@pytest.fixture
def feature_set(tmp_path):
    """Writes features and opens them under labels."""

    def build(values, labels):
        path = tmp_path / "features.bin"
        np.asarray(values, np.float32).tofile(path)
        ids = np.array([f"photos/{i}.jpg" for i in range(len(labels))])
        return FeatureSet(path, np.asarray(labels, np.int32), ids, values.shape[1])

    return build


def clusters(count=600, num_classes=4, dim=12, spread=1.0, seed=0):
    """Samples around one centre a class; returns features and right labels."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(num_classes, dim)) * 1.2
    labels = np.arange(count) % num_classes
    return centres[labels] + spread * rng.normal(size=(count, dim)), labels


def noisy(labels, kind, rate, num_classes=4, seed=1):
    return kind(labels, rate, num_classes=num_classes, rng=np.random.default_rng(seed))


class TestRegression:
    @pytest.mark.parametrize("dim", [5, 60])  # Fewer and more than there are samples.
    def test_scores_equal_those_of_a_fit_without_the_sample(self, feature_set, dim):
        values, labels = clusters(count=40, dim=dim)
        weights = np.linspace(0.2, 1.0, 40).astype(np.float32)
        regression = LeftOutRegression(feature_set(values, labels), 4, seed=0)
        scores = regression.left_out_scores(weights)
        inputs = np.hstack(
            [(values - values.mean(0)) / values.std(0), np.ones((40, 1))]
        )
        targets = np.eye(4)[labels]
        penalty = np.diag([regression._ridge] * dim + [1e-3])
        for place in (0, 17, 39):
            kept = np.arange(40) != place
            weighted = inputs[kept] * weights[kept, None]
            fit = np.linalg.solve(
                weighted.T @ inputs[kept] + penalty, weighted.T @ targets[kept]
            )
            np.testing.assert_allclose(scores[place], inputs[place] @ fit, atol=1e-4)

    def test_a_sample_without_weight_has_no_influence(self, feature_set):
        values, labels = clusters(count=60)
        weights = np.ones(60, np.float32)
        weights[7] = 0.0
        scores = []
        for label in (0, 1):
            given = labels.copy()
            given[7] = label
            regression = LeftOutRegression(feature_set(values, given), 4, seed=0)
            scores.append(regression.left_out_scores(weights))
        np.testing.assert_array_equal(*scores)

    def test_chunks_do_not_change_the_scores(self, feature_set, monkeypatch):
        features = feature_set(*clusters(count=100))
        whole = audit_labels(features, num_classes=4, progress=False)
        monkeypatch.setattr(regression_module, "CHUNK_ROWS", 7)
        monkeypatch.setattr(noise_module, "CHUNK_VALUES", 50)
        pieces = audit_labels(features, num_classes=4, progress=False)
        np.testing.assert_allclose(whole.out_of_sample, pieces.out_of_sample, atol=1e-4)

    def test_some_samples_are_enough_to_choose_the_ridge(
        self, feature_set, monkeypatch
    ):
        values, labels = clusters()
        features = feature_set(values, noisy(labels, symmetric_noise, 0.3))
        monkeypatch.setattr(regression_module, "MAX_ROWS_TO_CHOOSE", 200)
        assert audit_labels(
            features, num_classes=4, progress=False
        ).noise_rate == pytest.approx(0.3, abs=0.05)


class TestNoise:
    def test_posterior_by_hand(self):
        # Class 0 has 0.8; a label 1 is given to class 0 in 0.1, to class 1 in 0.9
        # of the cases: 0.08 against 0.18.
        posterior = true_label_posterior(
            np.array([[0.8, 0.2]]), np.array([[0.9, 0.1], [0.1, 0.9]]), np.array([1])
        )
        np.testing.assert_allclose(posterior, [[0.08 / 0.26, 0.18 / 0.26]])

    def test_posterior_where_the_right_class_is_known(self):
        noise = np.array([[0.9, 0.1], [0.2, 0.8]])
        probabilities = np.array([[0.8, 0.2], [0.8, 0.2]])
        known = np.array([1, -1])
        found = true_label_posterior(probabilities, noise, np.array([0, 0]), known)
        # 0.8 * 0.9 against 0.2 * 0.2, where nobody has looked.
        np.testing.assert_allclose(found, [[0.0, 1.0], [0.72 / 0.76, 0.04 / 0.76]])

    @pytest.mark.parametrize("classes, share", [(3, 0.4), (4, 0.31), (10, 0.4)])
    def test_known_labels_that_contradict_the_scores(self, classes, share):
        """Many of them once drove the calibration to infinity."""
        rng = np.random.default_rng(0)
        right = rng.integers(classes, size=600)
        scores = np.eye(classes)[right] + rng.normal(0, 0.2, (600, classes))
        given = np.where(rng.random(600) < share, (right + 1) % classes, right)
        scores = scores.astype(np.float32)
        calibration, _, _ = fit_noise(scores, given, known=given)

        def likelihood(probabilities):
            return np.log(probabilities[np.arange(600), given]).mean()

        found = likelihood(calibrated(scores, calibration))
        assert found > max(likelihood(softmax(s * scores)) for s in range(1, 13))

    def test_finds_which_class_is_mistaken_for_which(self):
        rng = np.random.default_rng(0)
        right = rng.integers(0, 3, 6000)
        scores = np.eye(3)[right] + 0.2 * rng.normal(size=(6000, 3))
        labels = np.where((right == 0) & (rng.random(6000) < 0.4), 2, right)
        _, noise, _ = fit_noise(scores, labels)
        np.testing.assert_allclose(
            noise, [[0.6, 0, 0.4], [0, 1, 0], [0, 0, 1]], atol=0.03
        )

    def test_hard_samples_are_not_taken_for_wrong_labels(self, monkeypatch):
        rng = np.random.default_rng(0)
        scores = rng.normal(size=(6000, 3)).astype(np.float32)
        # Scores of the classes differ in what they say; no one sharpness fits them.
        likely = softmax(scores @ np.array([[6, 2, 0], [0, 6, 0], [0, 0, 2.0]]))
        labels = (likely.cumsum(axis=1) < rng.random((6000, 1))).sum(axis=1)

        def found():
            calibration, noise, _ = fit_noise(scores, labels)
            error = np.abs(calibrated(scores, calibration) - likely).mean()
            return error, 1 - np.diag(noise).mean()

        error, rate = found()
        assert error < 0.02
        assert rate < 0.02
        monkeypatch.setattr(noise_module, "CALIBRATION_RIDGE", 1e6)  # One sharpness.
        one_error, one_rate = found()
        assert one_error > 3 * error
        assert one_rate > 2 * rate

    @pytest.mark.parametrize("classes", [50, 150])
    @pytest.mark.parametrize("rate", [0.0, 0.3])
    def test_many_small_classes(self, feature_set, classes, rate):
        rng = np.random.default_rng(0)
        right = rng.integers(classes, size=20 * classes)
        values = 0.3 * rng.normal(size=(classes, 256))[right]
        values += rng.normal(size=values.shape)
        other = rng.integers(classes, size=len(right))
        given = np.where(rng.random(len(right)) < rate, other, right)
        found = audit_labels(
            feature_set(values, given), num_classes=classes, progress=False
        )
        wrong = np.mean(given != right)
        assert found.noise_rate == pytest.approx(wrong, abs=0.05)
        assert np.mean(found.looks_wrong == (given != right)) > 0.9

    def test_some_samples_choose_the_calibration_and_all_fit_the_matrix(self):
        rng = np.random.default_rng(0)
        right = rng.integers(0, 2, 2000)
        scores = np.eye(2)[right] + 0.2 * rng.normal(size=(2000, 2))
        labels = np.where((right == 0) & (np.arange(2000) >= 200), 1, right)
        chosen = np.arange(2000) < 200  # Among these no label is wrong.
        _, noise, _ = fit_noise(scores, labels, chosen=chosen)
        expected = np.bincount(labels[right == 0], minlength=2) / np.sum(right == 0)
        np.testing.assert_allclose(noise[0], expected, atol=0.05)

    def test_softmax_of_large_scores(self):
        np.testing.assert_allclose(softmax(np.array([[1000.0, 1000.0]])), [[0.5, 0.5]])


class TestExamination:
    @pytest.mark.parametrize(
        "kind,rate", [(symmetric_noise, 0.2), (symmetric_noise, 0.5),
                      (asymmetric_noise, 0.3)],
    )  # fmt: skip
    def test_finds_the_rate_and_the_wrong_labels(self, feature_set, kind, rate):
        values, labels = clusters()
        given = noisy(labels, kind, rate)
        found = audit_labels(feature_set(values, given), num_classes=4, progress=False)
        assert found.noise_rate == pytest.approx(rate, abs=0.05)
        assert found.reason is None
        wrong = given != labels
        rejected = ~found.accept_mask()
        assert rejected[wrong].mean() > 0.85
        assert rejected[~wrong].mean() < 0.1
        assert found.suspicion[wrong].mean() > found.suspicion[~wrong].mean() + 0.4
        assert f"About {100 * found.noise_rate:.1f} %" in found.describe()

    @pytest.mark.parametrize("dropped", [False, True])
    def test_what_a_review_left_is_not_taken_for_clean(self, feature_set, dropped):
        values, clean = clusters(count=1200, spread=1.3)
        before = feature_set(values, noisy(clean, symmetric_noise, 0.3))
        found = audit_labels(before, num_classes=4, progress=False)
        looked = np.zeros(1200, bool)
        looked[np.argsort(-found.suspicion)[:280]] = True
        after = dataclasses.replace(
            before,
            labels=np.where(looked, clean, before.labels).astype(np.int32),
            reviewed=looked,
            before_review=before,
        )
        remains = np.flatnonzero(~looked | (before.labels == clean) | (not dropped))
        after = after.take(remains)
        examined = audit_labels(after, num_classes=4, progress=False)
        wrong = after.labels != clean[remains]
        assert 0.03 < wrong.mean() < 0.12
        assert examined.noise_rate == pytest.approx(wrong.mean(), abs=0.02)
        assert np.all(examined.right_probability[after.reviewed] == 1.0)
        rejected = ~examined.accept_mask()
        assert rejected[wrong].mean() > 0.5 > 10 * rejected[~wrong].mean()
        # Judged by what is left alone, the noise is mostly overlooked.
        alone = dataclasses.replace(after, reviewed=None, before_review=None)
        blind = audit_labels(alone, num_classes=4, progress=False)
        assert blind.noise_rate < wrong.mean() / 2

    def test_held_out_labels_are_judged_by_the_training_split(self, feature_set):
        values, labels = clusters(count=900)
        given = noisy(labels, asymmetric_noise, 0.3)
        whole = feature_set(values, given)
        train, held_out = whole.take(np.arange(600)), whole.take(np.arange(600, 900))
        alone = audit_labels(train, num_classes=4, progress=False)
        found = audit_labels(train, num_classes=4, held_out=[held_out], progress=False)
        np.testing.assert_array_equal(found.out_of_sample, alone.out_of_sample)
        (other,) = found.held_out
        wrong = given[600:] != labels[600:]
        assert other.noise_rate == pytest.approx(wrong.mean(), abs=0.06)
        first = np.argsort(-other.suspicion)[: wrong.sum()]
        assert wrong[first].mean() > 0.9
        # Their own labels have no part in it.
        turned = dataclasses.replace(held_out, labels=(held_out.labels + 1) % 4)
        (others,) = audit_labels(
            train, num_classes=4, held_out=[turned], progress=False
        ).held_out
        np.testing.assert_array_equal(others.out_of_sample, other.out_of_sample)

    def test_noise_that_training_labels_do_not_show_is_possible(self, feature_set):
        values, labels = clusters(count=900, spread=0.5)
        given = labels.copy()
        given[850:860] = (given[850:860] + 1) % 4
        whole = feature_set(values, given)
        parts = whole.take(np.arange(600)), whole.take(np.arange(600, 900))
        (found,) = audit_labels(
            parts[0], num_classes=4, held_out=parts[1:], progress=False
        ).held_out
        np.testing.assert_array_equal(
            np.flatnonzero(found.looks_wrong), range(250, 260)
        )

    def test_hard_samples_count_less_but_no_class_does(self, feature_set):
        values, labels = clusters(count=1200, spread=1.3)
        between = values[labels == 2].mean(axis=0) - values[labels == 3].mean(axis=0)
        values[labels == 3] += 0.6 * between  # Harder to tell from class 2.
        given = noisy(labels, symmetric_noise, 0.3)
        found = audit_labels(feature_set(values, given), num_classes=4, progress=False)
        weights, accepted = found.weights, found.accept_mask()
        assert weights.dtype == np.float32
        assert 0 <= weights.min() < weights.max() <= 1
        means = [weights[accepted & (given == label)].mean() for label in range(4)]
        assert max(means) < 1.1 * min(means)
        likely = np.sqrt(1 - found.suspicion)
        easy, hard = accepted & (given < 2), accepted & (given >= 2)
        assert likely[hard].mean() < 0.9 * likely[easy].mean()
        order = np.flatnonzero(given == 3)[np.argsort(likely[given == 3])]
        assert (np.diff(weights[order]) >= 0).all()
        reviewed = np.zeros(1200, bool)
        reviewed[order[:5]] = True
        known = dataclasses.replace(found, reviewed=reviewed)
        assert (known.weights[reviewed] == 1).all()

    def test_right_labels_are_all_kept(self, feature_set):
        found = audit_labels(feature_set(*clusters()), num_classes=4, progress=False)
        assert found.accept_mask().all()
        assert (found.weights == 1).all()
        assert found.describe().startswith("Hardly any training label")

    def test_labels_at_random_are_all_kept_and_it_is_said(self, feature_set):
        values, labels = clusters()
        given = np.random.default_rng(5).permutation(labels)
        found = audit_labels(feature_set(values, given), num_classes=4, progress=False)
        assert found.accept_mask().all()
        assert "labels fit the features no better than chance" in found.describe()

    @pytest.mark.parametrize("count,num_classes", [(10, 5), (2000, 1000), (6, 2)])
    def test_too_few_samples_to_judge(self, feature_set, count, num_classes):
        values, labels = clusters(count=count, num_classes=num_classes)
        found = audit_labels(
            feature_set(values, labels), num_classes=num_classes, progress=False
        )
        assert found.accept_mask().all()
        assert found.noise_rate == 0.0
        assert "too few to judge" in found.describe()
        np.testing.assert_allclose(found.out_of_sample.sum(axis=1), 1.0, rtol=1e-5)

    def test_a_class_of_one_sample_is_kept(self, feature_set):
        values, labels = clusters()
        given = noisy(labels, symmetric_noise, 0.3)
        given[0] = 4
        found = audit_labels(feature_set(values, given), num_classes=5, progress=False)
        assert found.accept_mask()[0]

    def test_no_class_is_dropped_whole(self):
        labels = np.repeat([0, 1], 20).astype(np.int32)
        right = np.r_[np.ones(20), np.linspace(0.0, 0.19, 20)].astype(np.float32)
        found = LabelQuality(np.full((40, 2), 0.5), right, 0.5, np.eye(2), labels)
        accepted = found.accept_mask(class_floor=0.12)  # 2.4 of 20: at least 3.
        np.testing.assert_array_equal(np.flatnonzero(accepted[20:]), [17, 18, 19])
        assert found.accept_mask(class_floor=0.0)[20:].sum() == 1
        for threshold, count in ((0.15, 20 + 5), (0.19, 20 + 3), (1.0, 20 + 3)):
            mask = found.accept_mask(threshold=threshold, class_floor=0.12)
            assert mask.sum() == count

    def test_a_threshold_says_how_likely_right_is_right_enough(self):
        labels = np.zeros(10, np.int32)
        right = np.linspace(0.0, 0.9, 10).astype(np.float32)
        found = LabelQuality(np.full((10, 2), 0.5), right, 0.5, np.eye(2), labels)
        counts = [found.accept_mask(threshold=one).sum() for one in (0.05, 0.55, 0.85)]
        assert counts == [9, 4, 1]
        assert found.accept_mask().sum() == 4  # From 0.6 on.
        assert "6 of 10 look wrong and are left out; of the other 4" in found.describe()
        assert (
            "9 of 10 are right with a probability below 0.85 and are left out; of the "
            "other 1"
        ) in found.describe(0.85)

    def test_features_that_are_not_finite_are_refused(self, feature_set):
        values, labels = clusters(count=50)
        values[3, 2] = np.nan
        with pytest.raises(DataError, match=r"1 of 50 samples.*photos/3\.jpg"):
            audit_labels(feature_set(values, labels), num_classes=4, progress=False)

    def test_a_feature_that_never_varies(self, feature_set):
        values, labels = clusters()
        values[:, 0] = 3.0
        given = noisy(labels, symmetric_noise, 0.2)
        found = audit_labels(feature_set(values, given), num_classes=4, progress=False)
        assert found.noise_rate == pytest.approx(0.2, abs=0.05)

    def test_the_same_seed_gives_the_same_numbers(self, feature_set):
        values, labels = clusters()
        features = feature_set(values, noisy(labels, symmetric_noise, 0.3))
        first, second = (
            audit_labels(features, num_classes=4, progress=False) for _ in "12"
        )
        np.testing.assert_array_equal(first.right_probability, second.right_probability)


class TestAccuracy:
    """Estimated against right labels that the estimate does not see."""

    @pytest.fixture
    def judged(self, feature_set):
        """Returns the audit of held-out samples, their right labels, predictions."""

        def judge(kind, rate, seed=0):
            values, labels = clusters(count=1800, spread=1.6, seed=seed)
            given = noisy(labels, kind, rate, seed=seed) if rate else labels
            whole = feature_set(values, given)
            parts = whole.take(np.arange(1200)), whole.take(np.arange(1200, 1800))
            found = audit_labels(
                parts[0], num_classes=4, held_out=parts[1:], progress=False
            )
            # A model that knows half of the features, and so makes mistakes.
            centres = [values[labels == c].mean(axis=0)[:6] for c in range(4)]
            distances = values[1200:, None, :6] - np.array(centres)
            predicted = np.square(distances).sum(axis=2).argmin(axis=1)
            return found.held_out[0], labels[1200:], predicted

        return judge

    @pytest.mark.parametrize("count, credit", [(4, 1.0), (100_000, 1.5)])
    def test_credits_by_hand(self, count, credit):
        # Two equally likely classes, a quarter of the labels wrong: the label moves a
        # probability from 0.5 to 0.75 or 0.25. Its variance of 0.25 shrinks by 0.0625
        # a sample; the prior knows another 0.25: 4 x 0.25 / (4 x 0.0625 + 0.25) = 2.
        # With many samples 4, as by the inverse of the noise matrix.
        noise = np.array([[0.75, 0.25], [0.25, 0.75]])
        even, given = np.full((count, 2), 0.5, np.float32), np.arange(count) % 2
        quality = LabelQuality(even, even[:, 0], 0.25, noise, given)
        expected = np.array([[credit, 1 - credit], [1 - credit, credit]])
        np.testing.assert_allclose(quality.credits[:2], expected, atol=1e-4)
        np.testing.assert_allclose(np.linalg.inv(noise)[0], [1.5, -0.5])
        reviewed = dataclasses.replace(quality, reviewed=np.arange(count) < 2)
        np.testing.assert_array_equal(reviewed.credits[:2], np.eye(2))
        trusted = dataclasses.replace(quality, reason="No sign of wrong labels")
        np.testing.assert_array_equal(trusted.credits[:2], np.eye(2))

    def test_the_credits_of_the_predictions_are_the_accuracy(self, judged):
        quality, _, predicted = judged(asymmetric_noise, 0.3)
        credit = quality.credits[np.arange(600), predicted]
        assert quality.accuracy(predicted).value == pytest.approx(credit.mean())
        other = quality.out_of_sample.argmax(axis=1)
        gain = quality.accuracy(predicted).value - quality.accuracy(other).value
        assert quality.gain(predicted, other).value == pytest.approx(gain)

    @pytest.mark.parametrize(
        "kind, rate", [(symmetric_noise, 0.4), (asymmetric_noise, 0.3)]
    )
    def test_is_near_what_right_labels_would_say(self, judged, kind, rate):
        misses, covered = [], 0
        for seed in range(5):
            quality, right, predicted = judged(kind, rate, seed)
            truth = np.mean(predicted == right)
            found = quality.accuracy(predicted)
            misses.append(abs(found.value - truth))
            covered += found.low <= truth <= found.high
            assert np.mean(predicted == quality.labels) < truth - 0.15
            assert found.low < found.value < found.high < found.low + 0.15
        assert np.mean(misses) < 0.04
        assert covered == 5

    def test_a_model_that_knows_more_than_the_features_is_believed(self, judged):
        covered = 0
        for seed in range(10):
            quality, right, _ = judged(symmetric_noise, 0.4, seed)
            knowing = np.where(np.arange(600) % 20, right, (right + 1) % 4)
            found = quality.accuracy(knowing)
            covered += found.low < 0.95 < found.high
        assert covered >= 7

    def test_without_wrong_labels_is_the_plain_accuracy(self, judged):
        quality, right, predicted = judged(symmetric_noise, 0)
        found = quality.accuracy(predicted)
        assert found.value == np.mean(predicted == right)
        assert found[1:] == pytest.approx(
            proportion_interval(np.sum(predicted == right), 600)
        )
        low, _ = proportion_interval(600, 600)
        assert quality.accuracy(right) == (1.0, low, 1.0)

    def test_a_gain_is_paired(self, judged):
        quality, right, predicted = judged(asymmetric_noise, 0.3)
        better = quality.out_of_sample.argmax(axis=1)  # By all features.
        gain = quality.gain(better, predicted)
        truth = np.mean(better == right) - np.mean(predicted == right)
        assert 0 < gain.low < truth < gain.high
        alone = quality.accuracy(better), quality.accuracy(predicted)
        assert gain.high - gain.low < sum(one.high - one.low for one in alone)
        assert quality.gain(predicted, predicted) == (0.0, 0.0, 0.0)
        back = quality.gain(predicted, better)
        assert back == pytest.approx((-gain.value, -gain.high, -gain.low))

    def test_reviewed_labels_are_known(self, judged):
        quality, right, predicted = judged(symmetric_noise, 0.4)
        known = dataclasses.replace(quality, labels=right, reviewed=np.ones(600, bool))
        assert known.accuracy(predicted).value == np.mean(predicted == right)
        assert quality.with_right_labels(right).accuracy(predicted) == known.accuracy(
            predicted
        )

    def test_a_review_of_the_wrong_labels_first_is_no_random_sample(self, judged):
        misses = []
        for seed in range(5):
            quality, right, predicted = judged(symmetric_noise, 0.4, seed)
            looked = np.zeros(600, bool)
            looked[np.argsort(-quality.suspicion)[:200]] = True
            after = dataclasses.replace(
                quality,
                labels=np.where(looked, right, quality.labels),
                right_probability=np.where(looked, 1.0, quality.right_probability),
                reviewed=looked,
            )
            truth = np.mean(predicted == right)
            misses.append(abs(after.accuracy(predicted).value - truth))
        assert np.mean(misses) < 0.04  # By the noise matrix: 0.2.

    def test_labels_that_cannot_be_judged_give_none(self, feature_set):
        values, labels = clusters()
        given = np.random.default_rng(5).permutation(labels)
        features = feature_set(values, given)
        held_out = [features.take(np.arange(50))]
        (found,) = audit_labels(
            features, num_classes=4, held_out=held_out, progress=False
        ).held_out
        assert found.accuracy(given[:50]) is None
        few = features.take(np.arange(6))
        (found,) = audit_labels(
            few, num_classes=4, held_out=[few], progress=False
        ).held_out
        assert found.accuracy(few.labels) is None
        assert found.gain(few.labels, few.labels) is None
