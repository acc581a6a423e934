"""Whether a policy in one's own model does harm, and whether `fit` says so.

Digits with wrong training labels: a small network from scratch on their pixels, and a
new head on frozen EfficientNet-Lite0 features. For each policy: test accuracy by right
labels, fraction accepted in the last epoch, and whether `fit` warned, with the words of
the first warning. A warning is due where a policy is far below plain training.

    python tests/benchmarks/harm.py
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

import keras_rsft as rsft
from keras_rsft.data._samples import ImageSplit

NOISE_RATES = (0.0, 0.2, 0.4)
POLICIES: dict[str, Callable[[], Any]] = {
    "accept-all": lambda: "accept-all",
    "auto": lambda: "auto",
    "0.5, 100 steps": lambda: rsft.LossThreshold(0.5, warmup_steps=100),
    "1.0, 100 steps": lambda: rsft.LossThreshold(1.0, warmup_steps=100),
    "1.5, 100 steps": lambda: rsft.LossThreshold(1.5, warmup_steps=100),
    "2.0, 100 steps": lambda: rsft.LossThreshold(2.0, warmup_steps=100),
    "1.5, 40 steps": lambda: rsft.LossThreshold(1.5, warmup_steps=40),
    "2.0, 40 steps": lambda: rsft.LossThreshold(2.0, warmup_steps=40),
}
EPOCHS = 15


def network(x: np.ndarray) -> keras.Model:
    """Returns a small convolutional network with random weights."""
    layers = keras.layers
    return keras.Sequential(
        [
            keras.Input(x.shape[1:]),
            layers.Conv2D(32, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu", padding="same"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(64, activation="relu"),
            layers.Dense(10, activation="softmax"),
        ]
    )


def head(x: np.ndarray) -> keras.Model:
    """Returns a new head on features."""
    return rsft.build_head(x.shape[1], 10, moments=(x.mean(axis=0), x.var(axis=0)))


def pixels_of(split: ImageSplit) -> np.ndarray:
    return np.stack([image.numpy() / 255 for _, image in split.images(16)])


def main() -> None:
    """Prints a row for each network, noise rate and policy."""
    digits = rsft.load_images("digits")
    backbone = rsft.load_backbone("efficientnet_lite0", image_size=96)
    splits = (digits.train, digits.test)
    inputs = {
        "from scratch": (network, [pixels_of(one) for one in splits]),
        "pretrained": (
            head,
            [np.array(rsft.extract_features(backbone, s).features) for s in splits],
        ),
    }
    columns = ("network", "wrong", "policy", "accuracy", "accepted", "warned")
    print("{:14}{:>6}  {:16}{:>9}{:>9}  {}".format(*columns))
    words = []
    for name, (build, (x, x_test)) in inputs.items():
        for rate in NOISE_RATES:
            data = digits
            if rate:
                data = rsft.add_label_noise(digits, f"symmetric:{rate}", seed=0)
            for policy, make in POLICIES.items():
                keras.utils.set_random_seed(0)
                model = rsft.RSFTModel(build(x), make())
                model.compile(
                    "adam", "sparse_categorical_crossentropy", metrics=["accuracy"]
                )
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    history = model.fit(
                        x, data.train.labels, epochs=EPOCHS, verbose=0
                    ).history
                said = [str(one.message) for one in caught]
                harm = [one for one in said if "still has to learn" in one]
                words += harm
                stalled = any("accepted no sample" in one for one in said)
                accuracy = model.evaluate(x_test, digits.test.labels, verbose=0)[1]
                accepted = history["acceptance_rate"][-1]
                print(
                    f"{name:14}{rate:6.0%}  {policy:16}{accuracy:9.1%}{accepted:9.1%}  "
                    f"{'harm' if harm else 'stalled' if stalled else '-'}",
                    flush=True,
                )
    print(words[0] if words else "No policy did harm.")


if __name__ == "__main__":
    main()
