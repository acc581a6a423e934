"""Wraps your own model in an RSFTModel and trains it with `model.fit`.

A third of the labels are noisy. The data is synthetic, so the program runs anywhere,
on Keras' TensorFlow, JAX and PyTorch backends:

    python examples/custom_training.py
    KERAS_BACKEND=jax python examples/custom_training.py
"""

import keras
import numpy as np

import keras_rsft as rsft

CLASSES, SAMPLES, WRONG = 4, 2000, 0.33


def make_data(seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns inputs, given labels (a third of them noisy) and clean labels."""
    rng = np.random.default_rng(seed)
    right = rng.integers(0, CLASSES, SAMPLES)
    inputs = rng.normal(size=(SAMPLES, 16)).astype("float32")
    inputs[:, :CLASSES] += 2.0 * np.eye(CLASSES, dtype="float32")[right]
    wrong = rng.random(SAMPLES) < WRONG
    shift = rng.integers(1, CLASSES, SAMPLES)
    return inputs, np.where(wrong, (right + shift) % CLASSES, right), right


def train(policy: rsft.Policy) -> float:
    """Trains a small network under a policy; returns its accuracy on clean labels."""
    keras.utils.set_random_seed(0)
    inputs, given, _ = make_data(seed=0)
    test_inputs, _, test_labels = make_data(seed=1)
    network = keras.Sequential(
        [
            keras.Input((16,)),
            keras.layers.Dense(64, activation="relu"),
            keras.layers.Dense(CLASSES, activation="softmax"),
        ]
    )
    model = rsft.RSFTModel(network, policy)
    model.compile(
        keras.optimizers.SGD(0.05, momentum=0.9),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
    )
    history = model.fit(inputs, given, batch_size=32, epochs=20, verbose=0)
    accuracy = np.mean(
        network.predict(test_inputs, verbose=0).argmax(-1) == test_labels
    )
    print(
        f"{type(policy).__name__:14} accepted "
        f"{history.history['acceptance_rate'][-1]:4.0%}  test accuracy {accuracy:.1%}"
    )
    return float(accuracy)


if __name__ == "__main__":
    steps = SAMPLES // 32
    train(rsft.AcceptAll())
    train(rsft.LossThreshold(1.0, warmup_steps=steps))
    train(rsft.KeepFraction(1 - WRONG, ramp_steps=2 * steps))
