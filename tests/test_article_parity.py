"""The batch rule against the article's PyTorch loop, decision by decision."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import LossThreshold

STEPS, BATCH, DIM, CLASSES = 300, 16, 12, 10
LEARNING_RATE, MOMENTUM, THRESHOLD = 0.001, 0.9, 2.9


@pytest.fixture(scope="module")
def problem():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(STEPS, BATCH, DIM)).astype("float32")
    y = rng.integers(0, CLASSES, size=(STEPS, BATCH))
    kernel = (rng.normal(size=(DIM, CLASSES)) * 0.3).astype("float32")
    return x, y, kernel, np.zeros(CLASSES, "float32")


def in_numpy(x, y, kernel, bias):
    """The article's loop, with PyTorch's SGD: v = mu v + g, w = w - lr v."""
    weights = [kernel.astype("float64"), bias.astype("float64")]
    velocity = [np.zeros_like(weight) for weight in weights]
    decisions = []
    for inputs, labels in zip(x.astype("float64"), y, strict=True):
        scores = inputs @ weights[0] + weights[1]
        scores -= scores.max(axis=1, keepdims=True)
        probability = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
        loss = -np.log(probability[np.arange(BATCH), labels]).mean()
        decisions.append(bool(loss < THRESHOLD))
        if decisions[-1]:
            error = (probability - np.eye(CLASSES)[labels]) / BATCH
            for i, gradient in enumerate([inputs.T @ error, error.sum(axis=0)]):
                velocity[i] = MOMENTUM * velocity[i] + gradient
                weights[i] -= LEARNING_RATE * velocity[i]
    return decisions, weights


def in_pytorch(x, y, kernel, bias):
    torch = pytest.importorskip("torch")
    layer = torch.nn.Linear(DIM, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(kernel.T))
        layer.bias.copy_(torch.tensor(bias))
    optimizer = torch.optim.SGD(layer.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM)
    criterion = torch.nn.CrossEntropyLoss()
    decisions = []
    for inputs, labels in zip(x, y, strict=True):
        loss = criterion(layer(torch.tensor(inputs)), torch.tensor(labels))
        decisions.append(loss.item() < THRESHOLD)
        if decisions[-1]:
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
    return decisions, [layer.weight.detach().numpy().T, layer.bias.detach().numpy()]


def in_keras(x, y, kernel, bias):
    dense = keras.layers.Dense(CLASSES)
    inner = keras.Sequential([keras.Input((DIM,)), dense])
    dense.set_weights([kernel, bias])
    model = RSFTModel(inner, LossThreshold(THRESHOLD, level="batch", warmup_steps=0))
    model.compile(
        keras.optimizers.SGD(LEARNING_RATE, momentum=MOMENTUM),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    decisions = []
    for inputs, labels in zip(x, y, strict=True):
        model.reset_metrics()
        logs = model.train_on_batch(inputs, labels, return_dict=True)
        decisions.append(logs["acceptance_rate"] == 1.0)
    return decisions, dense.get_weights()


@pytest.mark.parametrize("reference", [in_numpy, in_pytorch])
def test_decisions_and_weights_equal_the_articles(reference, problem):
    decisions, weights = in_keras(*problem)
    expected_decisions, expected_weights = reference(*problem)
    assert decisions == expected_decisions
    assert STEPS * 0.1 < sum(decisions) < STEPS * 0.9, "both branches are taken"
    for weight, expected in zip(weights, expected_weights, strict=True):
        np.testing.assert_allclose(weight, expected, rtol=0, atol=1e-6)
