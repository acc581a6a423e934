"""Heads trained together equal heads trained alone, decision by decision."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
from made_features import CLASSES, DIM, feature_set, split_features

from keras_rsft.config import PolicyConfig, TrainConfig
from keras_rsft.errors import InvalidArgument
from keras_rsft.label_quality._audit import audit_labels
from keras_rsft.training._head import (
    ESTIMATED_ACCURACY,
    best_of_all_epochs,
    predicted_classes,
    train_head,
)
from keras_rsft.tuning._batched import BatchedHeads
from keras_rsft.tuning._space import first_epoch, update_rule

pytestmark = pytest.mark.usefixtures("eager")

BATCH = 16


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


SETTINGS = TrainConfig(epochs=5, batch_size=BATCH, learning_rate=0.02)
FEW_EPOCHS = dataclasses.replace(SETTINGS, epochs=3)
POLICIES = {
    "accept-all": PolicyConfig("accept-all"),
    "below": PolicyConfig("loss-threshold", threshold=1.15, warmup_epochs=0),
    "below, warm-up": PolicyConfig("loss-threshold", threshold=0.6, warmup_epochs=1.5),
    "article": PolicyConfig(
        "loss-threshold", threshold=1.05, level="batch", warmup_epochs=0.4
    ),
    "article, warm-up": PolicyConfig(
        "loss-threshold", threshold=0.9, level="batch", warmup_epochs=1
    ),
    "keep-fraction": PolicyConfig("keep-fraction", keep_fraction=0.6),
    "auto": PolicyConfig("auto"),
    "auto, strict": PolicyConfig("auto", threshold=0.95),
}
OPTIMIZERS = {
    "sgd": {},
    "sgd without momentum": {"momentum": 0.0, "learning_rate": 0.1},
    "sgd with decay": {"weight_decay": 0.1},
    "adam": {"optimizer": "adam"},
    "adamw": {"optimizer": "adamw"},
    "adamw with decay": {"optimizer": "adamw", "weight_decay": 0.2},
}


def trained_together(features, settings, **options):
    """Trains heads of one update rule, 5 epochs unless told otherwise."""
    label_quality = None
    if any(one.policy.name == "auto" for one in settings):
        label_quality = audit_labels(
            features.train, num_classes=CLASSES, progress=False
        )
        assert math.isfinite(label_quality.loss_limit)  # So that it is in play.
    return BatchedHeads(features, settings[0]).train(settings, label_quality, **options)


def assert_equal_to_alone(features, settings, together):
    for row, one in enumerate(settings):
        best = best_of_all_epochs(
            "val_accuracy", "max", epochs=one.epochs, first=first_epoch(one)
        )
        alone = train_head(features, one, callbacks=[best], progress=False)
        assert together.best_epochs[row] == best.best_epoch
        kernel, bias = alone.model.model.get_layer("scores").get_weights()
        np.testing.assert_allclose(together.kernels[row], kernel, atol=1e-4)
        np.testing.assert_allclose(together.biases[row], bias, atol=1e-4)
        # Counts of samples, so any other decision in any epoch would show.
        np.testing.assert_allclose(
            together.history["acceptance_rate"][row],
            alone.history["acceptance_rate"],
            atol=1e-6,
        )
        predicted = predicted_classes(alone.model, features.validation)
        np.testing.assert_array_equal(together.predicted[row], predicted)
        for name in (
            "loss", "accepted_loss", "val_loss", "val_accuracy", ESTIMATED_ACCURACY,
        ):  # fmt: skip
            np.testing.assert_allclose(
                together.history[name][row], alone.history[name], atol=1e-4
            )


@pytest.mark.parametrize(
    "optimizer, policies",
    [
        ("sgd", tuple(POLICIES)),
        pytest.param(
            "adam", ("article, warm-up", "keep-fraction"), marks=pytest.mark.slow
        ),
    ],
)
def test_each_policy_equals_the_ordinary_path(features, optimizer, policies):
    settings = [
        dataclasses.replace(FEW_EPOCHS, policy=POLICIES[name], optimizer=optimizer)
        for name in policies
    ]
    together = trained_together(features, settings)
    rates = together.history["acceptance_rate"]
    assert len({tuple(row) for row in rates.tolist()}) == len(policies)
    assert_equal_to_alone(features, settings, together)


@pytest.mark.slow
def test_what_was_reviewed_is_accepted_as_on_the_ordinary_path(features):
    before = features.train
    labels, reviewed = before.labels.copy(), np.arange(len(before)) % 3 == 0
    labels[reviewed] = before.clean_labels[reviewed]
    train = dataclasses.replace(
        before, labels=labels, reviewed=reviewed, before_review=before
    )
    features = dataclasses.replace(features, train=train)
    settings = [
        dataclasses.replace(FEW_EPOCHS, policy=POLICIES[name])
        for name in ("accept-all", "below", "article", "auto")
    ]
    together = trained_together(features, settings)
    assert_equal_to_alone(features, settings, together)


@pytest.mark.parametrize("rule", ["sgd", pytest.param("adam", marks=pytest.mark.slow)])
def test_each_optimizer_equals_the_ordinary_path(features, rule):
    settings = [
        dataclasses.replace(FEW_EPOCHS, policy=POLICIES["below, warm-up"], **changes)
        for name, changes in OPTIMIZERS.items()
        if name.startswith(rule)
    ]
    together = trained_together(features, settings)
    assert_equal_to_alone(features, settings, together)


def test_views_are_drawn_as_on_the_ordinary_path(features, tmp_path):
    train = feature_set(tmp_path, "views", 37, seed=3, augmentations=3)
    features = dataclasses.replace(features, train=train)
    settings = [dataclasses.replace(SETTINGS, policy=POLICIES["accept-all"])]
    assert_equal_to_alone(features, settings, trained_together(features, settings))


def test_blocks_of_an_epoch_follow_each_other(features, monkeypatch):
    settings = [dataclasses.replace(SETTINGS, policy=POLICIES["below, warm-up"])]
    whole = trained_together(features, settings)
    module = "keras_rsft.tuning._batched"
    monkeypatch.setattr(f"{module}._BLOCK_BYTES", 4 * DIM * BATCH * 2)
    monkeypatch.setattr(f"{module}._VALIDATION_ROWS", 10)
    blocks = trained_together(features, settings)
    np.testing.assert_allclose(blocks.kernels, whole.kernels, atol=1e-6)
    for name, values in whole.history.items():
        np.testing.assert_allclose(blocks.history[name], values, atol=1e-5)


def test_a_head_that_accepts_nothing_stays_as_it_was(features):
    hopeless = PolicyConfig("loss-threshold", threshold=1e-6, warmup_epochs=0)
    settings = [
        dataclasses.replace(SETTINGS, policy=policy, weight_decay=0.1)
        for policy in (hopeless, POLICIES["accept-all"])
    ]
    together = trained_together(features, settings)
    assert not together.kernels[0].any()
    assert not together.biases[0].any()
    assert (together.history["acceptance_rate"][0] == 0).all()
    assert together.kernels[1].all()


def test_a_head_that_diverges_leaves_the_others_alone(features):
    policy = POLICIES["accept-all"]
    settings = [
        dataclasses.replace(SETTINGS, policy=policy, learning_rate=rate)
        for rate in (1e38, 0.02)
    ]
    together = trained_together(features, settings)
    assert together.diverged.tolist() == [True, False]
    alone = trained_together(features, settings[1:])
    np.testing.assert_allclose(together.kernels[1], alone.kernels[0], atol=1e-6)


def test_a_row_that_is_not_finite_is_rejected_by_all(features, tmp_path):
    """One NaN must not reach the gradients through the product."""
    train = feature_set(tmp_path, "broken", 37, seed=3)
    values = np.array(train.features)
    policies = [POLICIES[name] for name in ("accept-all", "article", "keep-fraction")]
    settings = [
        dataclasses.replace(SETTINGS, policy=policy, epochs=2) for policy in policies
    ]
    heads = BatchedHeads(dataclasses.replace(features, train=train), settings[0])
    values[5] = np.nan
    values.tofile(train.path)  # After the moments were taken.
    together = heads.train(settings)
    assert np.isfinite(together.kernels).all()
    np.testing.assert_allclose(together.history["acceptance_rate"][0], 36 / 37)


def test_the_estimated_accuracy_is_the_mean_of_the_credits(features):
    settings = [dataclasses.replace(SETTINGS, policy=POLICIES["accept-all"])]
    credits = np.random.default_rng(0).normal(size=(len(features.validation), CLASSES))
    together = trained_together(
        features, settings, credits=credits, objective=ESTIMATED_ACCURACY
    )
    values = together.history[ESTIMATED_ACCURACY][0]
    assert together.best_epochs[0] == np.argmax(values)
    credited = credits[np.arange(len(credits)), together.predicted[0]]
    assert values.max() == pytest.approx(credited.mean(), rel=1e-5)


def test_an_epoch_of_the_warm_up_is_never_the_best(features):
    policy = dataclasses.replace(POLICIES["below"], warmup_epochs=3)
    settings = [dataclasses.replace(SETTINGS, policy=policy)]
    # The loss falls, so that the first epoch that counts has the highest.
    together = trained_together(features, settings, objective="loss", direction="max")
    assert together.best_epochs[0] == 3


def test_the_best_epoch_is_kept(features):
    settings = [dataclasses.replace(SETTINGS, policy=POLICIES["accept-all"])]
    # The loss falls, so that the first epoch has the highest.
    together = trained_together(features, settings, objective="loss", direction="max")
    assert together.best_epochs[0] == 0
    alone = train_head(
        features, dataclasses.replace(settings[0], epochs=1), progress=False
    )
    kernel = alone.model.model.get_layer("scores").get_weights()[0]
    np.testing.assert_allclose(together.kernels[0], kernel, atol=1e-4)


def test_halving_drops_the_worse_half(features):
    rates = (1e-6, 0.02, 1e-5, 0.05)
    settings = [
        dataclasses.replace(SETTINGS, policy=POLICIES["accept-all"], learning_rate=rate)
        for rate in rates
    ]
    seen = []
    halved = trained_together(
        features, settings, halvings=1, objective="val_loss", direction="min",
        on_epoch=lambda heads, best: seen.append(heads),
    )  # fmt: skip
    assert seen == [4, 4, 2, 2, 2]
    losses = halved.history["val_loss"]
    assert np.isnan(losses).sum(axis=1).tolist() == [3, 0, 3, 0]
    whole = trained_together(features, settings, objective="val_loss", direction="min")
    np.testing.assert_allclose(halved.kernels[[1, 3]], whole.kernels[[1, 3]], atol=1e-6)
    assert (halved.best_epochs[[0, 2]] == 1).all()


@pytest.mark.parametrize(
    "changes, what",
    [
        ({"optimizer": "rmsprop"}, "the optimizer rmsprop, only sgd, adam, adamw"),
        ({"policy": PolicyConfig("self-paced")}, "the policy self-paced"),
        ({"policy": PolicyConfig("accept-all", class_floor=0.1)}, "class floor of 0.1"),
    ],
)
def test_what_cannot_be_batched_names_a_tuner_that_can(changes, what):
    with pytest.raises(InvalidArgument, match=f"{what}.*use the tuner random"):
        update_rule(dataclasses.replace(SETTINGS, **changes))
