"""The look ahead of `fit --dry-run`: its numbers, its verdict, and what it leaves."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from made_features import feature_set

from keras_rsft import cli
from keras_rsft._stats import paired_share_interval
from keras_rsft.config import FeatureConfig, PolicyConfig, TrainConfig
from keras_rsft.data._labels import apply_corrections
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import audit_labels
from keras_rsft.report._summary import about
from keras_rsft.training import _pilot as pilot
from keras_rsft.training._features import open_features
from keras_rsft.training._pilot import (
    _cross_tried,
    _gain,
    paired_gain,
    run_pilot,
    share_interval,
    verdict,
)

pytestmark = pytest.mark.usefixtures("eager")


def test_the_gain_is_paired():
    plain = np.array([True, True, False, False])
    rejecting = np.array([True, True, True, False])
    mean, low, high = paired_gain(plain, rejecting)
    assert mean == 0.25
    assert (low, high) == paired_share_interval(1, 0, 4)


def test_four_images_of_a_thousand_are_no_likely_gain():
    """An exact sign test of four against none has p = 1/8."""
    plain, rejecting = np.zeros((2, 1000), bool)
    rejecting[:4] = True
    assert "cannot tell" in verdict("auto", None, paired_gain(plain, rejecting))
    rejecting[:8] = True
    assert "likely to help" in verdict("auto", None, paired_gain(plain, rejecting))


def test_the_interval_of_a_share_stays_inside():
    assert share_interval(np.zeros(10)) == (0, 0, 0)
    mean, low, high = share_interval(np.full(100, 0.5, np.float32))
    assert (mean, low, high) == pytest.approx((0.5, 0.402, 0.598), abs=1e-3)
    assert share_interval(np.array([0.0, 0.9]))[1:] == (0, 1)


@pytest.mark.parametrize(
    "policy, reason, gain, expected",
    [
        ("auto", "No sign of wrong labels", None, "changes nothing"),
        ("auto", None, (0.05, 0.01, 0.09), "likely to help: +5.0 points"),
        ("auto", None, (0.05, -0.01, 0.11), "cannot tell"),
        ("keep-fraction", "No sign", (-0.05, -0.09, -0.01), "do harm"),
        ("loss-threshold", None, None, "accepted no sample"),
    ],
)
def test_the_verdict_follows_its_rule(policy, reason, gain, expected):
    assert expected in verdict(policy, reason, gain)


def test_durations_look_no_more_exact_than_they_are():
    texts = [about(seconds) for seconds in (0.2, 12.3, 600, 7200)]
    assert texts == ["less than a second", "about 12 s", "about 10 min", "about 2.0 h"]


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.slow
def test_each_half_is_judged_by_a_head_of_the_other(tmp_path, drawn):
    """What has labels by lot is known by heart, and not what was held out of it."""
    kept = feature_set(tmp_path, "train", 80, seed=0)
    by_lot = np.random.default_rng(1).permutation(kept.labels)
    labels = by_lot if drawn else kept.labels
    kept = dataclasses.replace(kept, labels=labels)
    settings = TrainConfig(
        policy=PolicyConfig("accept-all"), epochs=10, learning_rate=0.1
    )
    finished = []
    predicted, _, step_seconds = _cross_tried(
        kept, ("a", "b", "c"), settings, finished.append
    )
    assert predicted.shape == (80,)
    assert (np.count_nonzero(predicted == labels) > 40) != drawn
    assert step_seconds > 0
    assert finished == [1, 1]


def test_no_head_learns_of_the_other_half_by_a_review(tmp_path, monkeypatch):
    kept = feature_set(tmp_path, "train", 80, seed=0)
    reviewed = dataclasses.replace(kept, reviewed=np.ones(80, bool), before_review=kept)
    halves = []
    real = pilot.train_head
    monkeypatch.setattr(
        pilot,
        "train_head",
        lambda one, *a, **k: halves.append(one.train) or real(one, *a, **k),
    )
    settings = TrainConfig(policy=PolicyConfig("accept-all"), epochs=1)
    _cross_tried(reviewed, ("a", "b", "c"), settings, lambda count: None)
    assert [(one.reviewed, one.before_review) for one in halves] == [(None, None)] * 2
    assert not set(halves[0].ids) & set(halves[1].ids)


@pytest.fixture(scope="module")
def pilot_of(photo_folder, tiny_base_file, tmp_path_factory):
    data = load_images(photo_folder)
    kept = tmp_path_factory.mktemp("kept")

    def run(policy, **options):
        how = {"epochs": 3, "batch_size": 32, "learning_rate": 0.05}
        how |= {name: options.pop(name) for name in how if name in options}
        settings = TrainConfig(policy=policy, **how)
        chosen, cache = options.pop("data", data), options.pop("cache_dir", kept)
        features = FeatureConfig(str(tiny_base_file), cache_dir=cache)
        return run_pilot(chosen, features=features, settings=settings, **options)

    return run


def test_a_pilot_on_few_images(pilot_of, photo_folder):
    data = load_images(photo_folder)
    pilot = pilot_of(PolicyConfig("keep-fraction", warmup_epochs=1), sample=12)
    assert pilot.num_images == 12
    assert pilot.largest_class[1] >= pilot.smallest_class[1] > 0
    assert pilot.policy == "keep-fraction"
    assert 0 <= pilot.plain_accuracy <= 1
    # Too few to judge labels by: the given ones count.
    assert pilot.plain_accuracy_right is None
    assert pilot.gain[0] == pytest.approx(pilot.policy_accuracy - pilot.plain_accuracy)
    assert pilot.images_left == sum(map(len, (data.train, data.validation, data.test)))
    assert pilot.pass_seconds > 0
    assert pilot.training_seconds > 0


def test_the_gain_is_by_right_labels(tmp_path):
    """A gain of 25 points; a fifth of the labels is wrong as plain is often wrong."""
    sample = feature_set(tmp_path, "train", 1200, seed=0, wrong=0.2)
    clean, given = sample.clean_labels, sample.labels
    luck = np.random.default_rng(0).random((2, 1200))
    plain = np.where(luck[0] < 0.35, clean + 1, clean) % 3
    rejecting = np.where(luck[1] < 0.1, clean + 2, clean) % 3
    truth = np.mean(rejecting == clean) - np.mean(plain == clean)
    by_given = paired_gain(plain == given, rejecting == given)
    assert by_given[2] < truth
    found = audit_labels(sample, num_classes=3, progress=False)
    known = _gain(found.with_right_labels(clean), sample, plain, rejecting)
    assert known == paired_gain(plain == clean, rejecting == clean)
    unknown = dataclasses.replace(sample, clean_labels=None)
    value, low, high = _gain(found, unknown, plain, rejecting)
    assert by_given[0] < low < truth < high
    assert value == pytest.approx(truth, abs=0.04)
    blind = dataclasses.replace(found, can_judge=False)
    assert _gain(blind, unknown, plain, rejecting) == by_given


@pytest.mark.parametrize(
    ("policy", "epochs", "with_plain", "seconds"),
    [
        (PolicyConfig("keep-fraction"), 3, False, 2 + 3 * 4 * 0.5),
        (PolicyConfig("keep-fraction"), 30, False, 2 + 30 * 4 * 0.5),
        (PolicyConfig("keep-fraction"), 3, True, 2 * (2 + 3 * 4 * 0.5)),
        (PolicyConfig("accept-all"), 3, True, 2 + 3 * 4 * 0.5),
    ],
)
def test_the_expected_time_is_that_of_all_epochs_and_heads(
    pilot_of, photo_folder, monkeypatch, policy, epochs, with_plain, seconds
):
    count = len(load_images(photo_folder).train)
    tried = np.zeros(count, int), 2.0, 0.5
    monkeypatch.setattr(pilot, "_cross_tried", lambda *a, **k: tried)
    found = pilot_of(
        policy, epochs=epochs, batch_size=-(-count // 4), with_plain=with_plain
    )
    assert found.training_seconds == seconds


def test_a_sample_of_all_images_is_kept_for_the_run(pilot_of, photo_folder):
    data = load_images(photo_folder)
    pilot_of(PolicyConfig("accept-all"), sample=500)
    pilot = pilot_of(PolicyConfig("accept-all"), sample=500)
    assert pilot.num_images == len(data.train)
    assert pilot.images_left == len(data.validation) + len(data.test)
    assert pilot.policy == "auto"  # Tried although the run would be plain.


@pytest.mark.slow
def test_images_that_a_review_dropped_leave_nothing_to_run(
    pilot_of, photo_folder, tiny_base_file, tmp_path
):
    data = load_images(photo_folder)
    config = FeatureConfig(str(tiny_base_file), cache_dir=tmp_path / "kept")
    open_features(data, config, progress=False)
    dropped, label = data.train.ids[0], data.class_names[data.train.labels[0]]
    rows = f"id,given_label,decision,new_label\n{dropped},{label},drop,\n"
    (tmp_path / "corrections.csv").write_text(rows)
    pilot = pilot_of(
        PolicyConfig("accept-all"),
        data=apply_corrections(data, tmp_path / "corrections.csv"),
        cache_dir=tmp_path / "kept",
        sample=12,
    )
    assert (pilot.images_left, pilot.pass_seconds) == (0, 0)


def test_a_policy_that_accepts_nothing_is_told(pilot_of):
    pilot = pilot_of(PolicyConfig(threshold=1e-9, warmup_epochs=1))
    assert pilot.policy_accuracy is None
    assert "accepted no sample" in pilot.verdict


def test_wrong_labels_are_counted(pilot_of, monkeypatch):
    examine = pilot.audit_labels

    def with_a_third_wrong(*arguments, **options):
        found = examine(*arguments, **options)
        right = np.resize(np.float32([1.0, 1.0, 0.0]), found.right_probability.shape)
        return dataclasses.replace(found, right_probability=right, can_judge=True)

    monkeypatch.setattr(pilot, "audit_labels", with_a_third_wrong)
    share, low, high = pilot_of(PolicyConfig()).noise_rate
    assert share == pytest.approx(1 / 3, abs=0.02)
    assert 0 < low < share < high < 1


def test_too_few_images_are_refused(pilot_of):
    with pytest.raises(InvalidArgument, match="needs 4"):
        pilot_of(PolicyConfig(), sample=3)


def test_the_option_of_fit(photo_folder, tiny_base_file, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status = cli.main(
        ["fit", str(photo_folder), "--backbone", str(tiny_base_file), "--epochs", "2",
         "--cache-dir", "kept", "--dry-run"]
    )  # fmt: skip
    out = capsys.readouterr().out
    assert status == 0
    assert "Training labels expected wrong" in out
    assert "Held-out accuracy, plain" in out
    assert "given labels" in out
    assert "Accuracy on the test split" not in out
    assert not (tmp_path / "runs").exists()
    command = f"keras-rsft fit {photo_folder} --backbone {tiny_base_file} --epochs 2"
    assert f"  {command} --cache-dir kept\n" in out
