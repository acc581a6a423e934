"""Several labels per image, some of them noisy: reject single labels.

Each picture shows two to four real handwritten digits; its labels say which of the ten
digits are there. Each label is flipped with a probability of 15 %, so four of five
pictures have a noisy label, and rejecting whole pictures leaves little to learn from.
`level="element"` rejects single labels of a picture and trains on the others: here it
rejects losses above a running percentile, kept separately for "there" and "not there".

    pip install "keras_rsft[demo]" matplotlib
    python examples/multi_label.py

prints a table (mean and range over seeds) and draws `multi_label.png`. The policies are
given the noise rate. Needs no network.
"""

import argparse

import keras
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import zoom
from sklearn.datasets import load_digits
from sklearn.metrics import average_precision_score

import keras_rsft as rsft

SIDE, DIGITS, WRONG, BATCH = 128, 10, 0.15, 32
# Which digits the pictures show. `tests/benchmarks/example_settings.py` chose policies
# and epochs on VALIDATION pictures, as noisy as those of training. TEST pictures have
# clean labels and were not used for any choice.
TRAIN, VALIDATION, TEST = slice(1200), slice(1500, None), slice(1200, 1500)


def make_pictures(digits, names, count: int, seed: int):
    """Pastes two to four digits, each in a quarter; returns pictures and labels."""
    rng = np.random.default_rng(seed)
    pictures = rng.uniform(0, 60, (count, SIDE, SIDE)).astype("float32")
    labels = np.zeros((count, DIGITS), "int32")
    for picture, label in zip(pictures, labels, strict=True):
        for quarter in rng.permutation(4)[: rng.integers(2, 5)]:
            one, scale = rng.integers(len(digits)), rng.integers(6, 8)
            digit = np.clip(zoom(digits[one], scale, order=1), 0, 16) * 255 / 16
            size = len(digit)
            corner = 64 * np.array(divmod(quarter, 2)) + rng.integers(0, 65 - size, 2)
            region = picture[tuple(slice(start, start + size) for start in corner)]
            np.maximum(region, digit, out=region)
            label[names[one]] = 1
    return np.repeat(pictures[..., None], 3, axis=-1), labels


def spoil(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Flips 15 % of the labels; returns labels and which are noisy."""
    rng = np.random.default_rng([1, seed])  # Independent of the pictures.
    wrong = rng.random(labels.shape) < WRONG
    return np.where(wrong, 1 - labels, labels), wrong


def train(policy: rsft.Policy, features, labels, seed: int, **fit_options):
    """Trains a new head of ten binary outputs under a policy."""
    keras.utils.set_random_seed(seed)
    standardise = keras.layers.BatchNormalization(center=False, scale=False)
    head = keras.Sequential(
        [standardise, keras.layers.Dense(DIGITS, activation="sigmoid")]
    )
    model = rsft.RSFTModel(head, policy)
    model.compile(keras.optimizers.Adam(1e-3), "binary_crossentropy")
    log = model.fit(features, labels, batch_size=BATCH, verbose=0, **fit_options)
    return model, log.history["acceptance_rate"][-1]


def rejected_labels(model, features, labels) -> np.ndarray:
    """Returns which labels of the training pictures the trained model rejects."""
    predicted = model.predict(features, verbose=0)
    losses = keras.losses.binary_crossentropy(labels[..., None], predicted[..., None])
    if model.policy.level == "element":
        return ~np.asarray(model.policy(losses, labels))
    accepted = np.asarray(model.policy(keras.ops.mean(losses, axis=1)))
    return np.repeat(~accepted[:, None], DIGITS, axis=1)


def draw(path: str, pictures, given, right, rejected) -> None:
    """Draws the first pictures with their given labels, rejected ones framed."""
    figure = Figure(figsize=(10, 6.4), layout="constrained")
    for axes, picture, *labels in zip(
        figure.subplots(2, 4).flat, pictures, given, right, rejected, strict=False
    ):
        axes.imshow(picture.astype("uint8"))
        axes.set_axis_off()
        for digit, (said, true, refused) in enumerate(zip(*labels, strict=True)):
            axes.text(
                4 + 12 * digit, 140, digit, color="black" if said else "lightgray",
                bbox={"facecolor": "mistyrose" if said != true else "white",
                      "edgecolor": "red" if refused else "none"},
            )  # fmt: skip
    figure.suptitle(
        "Black: given as there. Pink: given wrongly. Red frame: the label is rejected."
    )
    figure.savefig(path, dpi=100)


def main() -> None:
    """Trains each method with each seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1500, help="training pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: each method's own")
    parser.add_argument("--weights", default="imagenet", help="imagenet or none")
    parser.add_argument("--figure", default="multi_label.png")
    options = parser.parse_args()

    digits, names = load_digits(return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    pictures, right = make_pictures(digits[TRAIN], names[TRAIN], options.samples, 0)
    tests, answers = make_pictures(digits[TEST], names[TEST], options.samples, 2)
    backbone = rsft.load_backbone(
        "efficientnet_lite0", weights=options.weights, image_size=SIDE
    )
    features, test_features = (
        backbone.predict(x, verbose=0) for x in (pictures, tests)
    )

    steps = -(-options.samples // BATCH)  # Per epoch.

    def reject_pictures() -> rsft.Policy:
        return rsft.KeepFraction(1 - WRONG, ramp_steps=3 * steps)

    def reject_labels() -> rsft.Policy:
        return rsft.RunningThreshold(
            percentile=0.9, num_classes=2, level="element", warmup_steps=3 * steps
        )

    methods = {
        "plain": (rsft.AcceptAll, 6),
        "pictures rejected": (reject_pictures, 6),
        "labels rejected": (reject_labels, 8),
        "right labels only": (rsft.AcceptAll, 8),
    }
    print(f"{'':18} mean average precision  accepted  wrong labels rejected  of all")
    for name, (make_policy, epochs) in methods.items():
        rows = []
        for seed in range(options.seeds):
            given, wrong = spoil(right, seed)
            given = right if name == "right labels only" else given
            length = options.epochs or epochs
            model, accepted = train(make_policy(), features, given, seed, epochs=length)
            scores = model.predict(test_features, verbose=0)
            rejected = rejected_labels(model, features, given)
            rows.append(
                (
                    average_precision_score(answers, scores),
                    accepted,
                    rejected[wrong].mean(),
                    rejected.mean(),
                )
            )
            if name == "labels rejected" and seed == 0:
                draw(options.figure, pictures, given, right, rejected)
        precision, *shares = np.transpose(rows)
        accepted, found, refused = (100 * np.mean(share) for share in shares)
        print(
            f"{name:18} {precision.mean():.3f} ({precision.min():.3f} to "
            f"{precision.max():.3f})  {accepted:7.0f}%  {found:20.0f}%  {refused:5.0f}%"
        )


if __name__ == "__main__":
    main()
