"""Regression with noisy targets: predict the angle by which a digit is rotated.

Real handwritten digits are rotated by a known angle of up to 60 degrees; a quarter of
the training angles are then replaced by random ones. A head on the feature map of a
frozen backbone trains on all pictures, or on the three quarters of each batch with the
smallest losses. It minimises the squared error, or the absolute error, which is robust
to noisy targets by itself and is the baseline to beat.

    pip install "keras_rsft[demo]" matplotlib
    python examples/regression.py

prints a table (mean and range over seeds) and draws `regression.png`. The policy is
given the noise rate. Needs no network.
"""

import argparse

import keras
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import rotate, zoom
from sklearn.datasets import load_digits

import keras_rsft as rsft

SIDE, MOST_DEGREES, WRONG, BATCH = 96, 60, 0.25, 32
# Which digits the pictures show. `tests/benchmarks/example_settings.py` chose policies
# and epochs on VALIDATION pictures, as noisy as those of training. TEST pictures have
# clean labels and were not used for any choice.
TRAIN, VALIDATION, TEST = slice(1200), slice(1500, None), slice(1200, 1500)


def make_pictures(digits, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Rotates digits; returns pictures and angles in [-1, 1], units of 60 degrees."""
    rng = np.random.default_rng(seed)
    angles = rng.uniform(-1, 1, count).astype("float32")
    pictures = np.zeros((count, SIDE, SIDE, 3), "float32")
    for picture, angle in zip(pictures, angles, strict=True):
        digit = zoom(digits[rng.integers(len(digits))], 8, order=1)
        turned = rotate(np.pad(digit, 16), angle * MOST_DEGREES, reshape=False, order=1)
        picture[:] = np.clip(turned, 0, 16)[..., None] * 255 / 16
    return pictures, angles


def spoil(angles: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Replaces a quarter of the angles; returns angles and which are noisy."""
    rng = np.random.default_rng([1, seed])  # Independent of the pictures.
    wrong = rng.random(angles.shape) < WRONG
    return np.where(wrong, rng.uniform(-1, 1, angles.shape), angles), wrong


def frozen_map(weights: str) -> keras.Model:
    """Returns the frozen backbone: pictures to spatial maps `(6, 6, 112)`."""
    backbone = rsft.load_backbone(
        "efficientnet_lite0", weights=weights, image_size=SIDE
    )
    network = backbone.get_layer("efficientnet_lite0")
    return keras.Model(network.input, network.get_layer("block10_add").output)


def train(policy: rsft.Policy, loss: str, features, angles, seed: int, **fit_options):
    """Trains a new head with one output under a policy."""
    keras.utils.set_random_seed(seed)
    head = keras.Sequential(
        [
            keras.layers.BatchNormalization(center=False, scale=False),
            keras.layers.Conv2D(16, 1, activation="relu"),
            keras.layers.Flatten(),
            keras.layers.Dropout(0.5),
            keras.layers.Dense(32, activation="relu"),
            keras.layers.Dense(1),
        ]
    )
    model = rsft.RSFTModel(head, policy)
    model.compile(keras.optimizers.Adam(1e-3), loss)
    log = model.fit(features, angles, batch_size=BATCH, verbose=0, **fit_options)
    return model, log.history["acceptance_rate"][-1]


def draw(path: str, given, right, rejected) -> None:
    """Draws given against true angles, rejected samples in red."""
    figure = Figure(figsize=(6, 6), layout="constrained")
    axes = figure.subplots()
    for chosen, color, label in (
        (~rejected, "tab:blue", "accepted"),
        (rejected, "tab:red", "rejected"),
    ):
        x, y = MOST_DEGREES * right[chosen], MOST_DEGREES * given[chosen]
        axes.scatter(x, y, s=8, color=color, alpha=0.6, label=label)
    axes.set(xlabel="right angle in degrees", ylabel="given angle in degrees")
    axes.legend(loc="upper left")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Trains each method with each seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1500, help="training pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: each method's own")
    parser.add_argument("--weights", default="imagenet", help="imagenet or none")
    parser.add_argument("--figure", default="regression.png")
    options = parser.parse_args()

    digits = load_digits().images
    pictures, right = make_pictures(digits[TRAIN], options.samples, 0)
    tests, answers = make_pictures(digits[TEST], options.samples, 2)
    backbone = frozen_map(options.weights)
    features, test_features = (
        backbone.predict(x, verbose=0) for x in (pictures, tests)
    )

    steps = -(-options.samples // BATCH)  # Per epoch.

    def rejecting() -> rsft.Policy:
        return rsft.KeepFraction(1 - WRONG, ramp_steps=5 * steps)

    methods = {
        "plain, squared": (rsft.AcceptAll, "mse", 40),
        "rejecting, squared": (rejecting, "mse", 40),
        "plain, absolute": (rsft.AcceptAll, "mae", 36),
        "rejecting, absolute": (rejecting, "mae", 38),
        "right angles only": (rsft.AcceptAll, "mse", 40),
    }
    print(f"{'':19} error in degrees     accepted  wrong angles rejected  of all")
    for name, (make_policy, loss, epochs) in methods.items():
        rows = []
        for seed in range(options.seeds):
            given, wrong = spoil(right, seed)
            given = right if name == "right angles only" else given
            length = options.epochs or epochs
            model, accepted = train(
                make_policy(), loss, features, given, seed, epochs=length
            )
            predicted = model.predict(test_features, verbose=0)[:, 0]
            errors = np.abs(model.predict(features, verbose=0)[:, 0] - given)
            rejected = ~np.asarray(model.policy(errors.astype("float32")))
            rows.append((MOST_DEGREES * np.abs(predicted - answers).mean(), accepted,
                         rejected[wrong].mean(), rejected.mean()))  # fmt: skip
            if name == "rejecting, absolute" and seed == 0:
                draw(options.figure, given, right, rejected)
        error, *shares = np.transpose(rows)
        accepted, found, refused = (100 * np.mean(share) for share in shares)
        print(
            f"{name:19} {error.mean():5.1f} ({error.min():.1f} to {error.max():.1f})  "
            f"{accepted:8.0f}%  {found:20.0f}%  {refused:5.0f}%"
        )


if __name__ == "__main__":
    main()
