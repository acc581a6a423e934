"""Segmentation with noisy masks: reject pictures, or single pixels.

One or two real handwritten digits from 0 to 4 lie on a coloured texture; the mask gives
each pixel the digit's class or background. The masks of 40 % of the training pictures
are noisy: shifted, eroded, with holes, or of another class. A small decoder on the
feature maps of a frozen backbone trains on everything, on the pictures with the
smallest losses, or on single pixels (`level="element"`): those with a loss below the
running mean of their class plus one standard deviation. One threshold for all classes
would reject the few pixels of the digits before the decoder learns them.

    pip install "keras_rsft[demo]" matplotlib
    python examples/segmentation.py

prints a table (mean and range over seeds) and draws `segmentation.png`. Needs no
network.
"""

import argparse

import keras
import numpy as np
from matplotlib.figure import Figure
from scipy.ndimage import binary_erosion, zoom
from sklearn.datasets import load_digits

import keras_rsft as rsft

SIDE, CLASSES, WRONG, BATCH = 96, 6, 0.4, 16  # Class 0 is the background.
# Which digits the pictures show. `tests/benchmarks/example_settings.py` chose policies
# and epochs on VALIDATION pictures, as noisy as those of training. TEST pictures have
# clean labels and were not used for any choice.
TRAIN, VALIDATION, TEST = slice(600), slice(750, None), slice(600, 750)


def make_pictures(digits, names, count: int, seed: int):
    """Pastes digits on textures; returns pictures and masks of half their side."""
    rng = np.random.default_rng(seed)
    down, right = np.mgrid[:SIDE, :SIDE, :1][:2]
    pictures = np.zeros((count, SIDE, SIDE, 3), "float32")
    masks = np.zeros((count, SIDE, SIDE), "int32")
    for picture, mask in zip(pictures, masks, strict=True):
        waves = np.sin(down * rng.uniform(-0.5, 0.5, 3) + right * rng.uniform(-1, 1, 3))
        picture[:] = 70 + 30 * waves + rng.normal(0, 15, picture.shape)
        for left in rng.permutation([0, 48])[: rng.integers(1, 3)]:
            one = rng.integers(len(digits))
            digit = zoom(digits[one], rng.integers(5, 7), order=1)
            size, corner = len(digit), (rng.integers(0, 97 - len(digit)), left)
            region = tuple(slice(start, start + size) for start in corner)
            inside = digit > 6
            picture[region][inside] = (
                rng.uniform(130, 255, 3) * digit[inside, None] / 16
            )
            mask[region][inside] = 1 + names[one]
    return np.clip(pictures, 0, 255), masks[:, ::2, ::2]


def spoil(masks: np.ndarray, seed: int) -> np.ndarray:
    """Shifts, erodes, cuts or swaps the classes of 40 % of the masks."""
    rng = np.random.default_rng([1, seed])  # Independent of the pictures.
    given = masks.copy()
    for one in np.flatnonzero(rng.random(len(masks)) < WRONG):
        mask, kind = given[one], rng.integers(4)
        if kind == 0:
            mask[:] = np.roll(mask, rng.choice([-6, 6], 2), axis=(0, 1))
        elif kind == 1:
            mask[~binary_erosion(mask > 0, iterations=2)] = 0
        elif kind == 2:
            for top, left in rng.integers(0, 36, (4, 2)):
                mask[top : top + 12, left : left + 12] = 0
        else:
            swapped = 1 + (mask + rng.integers(0, CLASSES - 2)) % (CLASSES - 1)
            mask[:] = np.where(mask > 0, swapped, 0)
    return given


def frozen_maps(weights: str) -> keras.Model:
    """Returns the frozen backbone: pictures to maps `(24, 24, 176)`, three depths."""
    backbone = rsft.load_backbone(
        "efficientnet_lite0", weights=weights, image_size=SIDE
    )
    network = backbone.get_layer("efficientnet_lite0")
    maps = [
        keras.layers.UpSampling2D(scale)(network.get_layer(f"block{number}_add").output)
        for number, scale in ((2, 1), (4, 2), (10, 4))
    ]
    return keras.Model(network.input, keras.layers.Concatenate()(maps))


def train(policy: rsft.Policy, maps, masks, seed: int, **fit_options):
    """Trains a new decoder under a policy."""
    keras.utils.set_random_seed(seed)
    decoder = keras.Sequential(
        [
            keras.layers.BatchNormalization(center=False, scale=False),
            keras.layers.Conv2D(32, 1, activation="relu"),
            keras.layers.Conv2D(32, 3, padding="same", activation="relu"),
            keras.layers.UpSampling2D(2, interpolation="bilinear"),
            keras.layers.Conv2D(CLASSES, 3, padding="same", activation="softmax"),
        ]
    )
    model = rsft.RSFTModel(decoder, policy)
    model.compile(keras.optimizers.Adam(2e-3), "sparse_categorical_crossentropy")
    log = model.fit(maps, masks, batch_size=BATCH, verbose=0, **fit_options)
    return model, log.history["acceptance_rate"][-1]


def mean_iou(masks: np.ndarray, predicted: np.ndarray) -> float:
    """Returns the intersection over union, averaged over the classes."""
    pairs = np.bincount(
        masks.ravel() * CLASSES + predicted.ravel(), minlength=CLASSES**2
    )
    table = pairs.reshape(CLASSES, CLASSES)
    union = table.sum(0) + table.sum(1) - np.diag(table)
    return float(np.mean(np.diag(table) / np.maximum(union, 1)))


def rejected_pixels(model, maps, masks) -> np.ndarray:
    """Returns which pixels of the training masks the trained model rejects."""
    predicted = model.predict(maps, verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(masks, predicted)
    if model.policy.level == "element":
        return ~np.asarray(model.policy(losses, masks))
    accepted = np.asarray(model.policy(keras.ops.mean(losses, axis=(1, 2))))
    return np.broadcast_to(~accepted[:, None, None], masks.shape)


def draw(path: str, pictures, given, right, rejected) -> None:
    """Draws pictures with a noisy mask, the mask, and its rejected pixels."""
    spoiled = np.flatnonzero((given != right).sum(axis=(1, 2)) > 30)[:6]
    figure = Figure(figsize=(9, 4.8), layout="constrained")
    for column, one in zip(figure.subplots(3, 6).T, spoiled, strict=False):
        column[0].imshow(pictures[one].astype("uint8"))
        column[1].imshow(given[one], cmap="tab10", vmin=0, vmax=9, interpolation="none")
        wrong = given[one] != right[one]
        # Red: noisy, rejected; orange: noisy, accepted; blue: clean, rejected.
        kinds = np.where(wrong, np.where(rejected[one], 3, 2), 1 * rejected[one])
        colors = np.array([[255] * 3, [80, 130, 220], [250, 170, 60], [200, 30, 40]])
        column[2].imshow(colors[kinds].astype("uint8"), interpolation="none")
    figure.suptitle(
        "Pictures, their given masks, and of these\n"
        "red: wrong, rejected.  orange: wrong, learnt.  blue: right, rejected."
    )
    for axes in figure.axes:
        axes.set_axis_off()
    figure.savefig(path, dpi=100)


def main() -> None:
    """Trains each method with each seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=400, help="training pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: each method's own")
    parser.add_argument("--weights", default="imagenet", help="imagenet or none")
    parser.add_argument("--figure", default="segmentation.png")
    options = parser.parse_args()

    digits, names = load_digits(n_class=CLASSES - 1, return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    pictures, right = make_pictures(digits[TRAIN], names[TRAIN], options.samples, 0)
    tests, answers = make_pictures(digits[TEST], names[TEST], options.samples, 2)
    backbone = frozen_maps(options.weights)
    maps, test_maps = (backbone.predict(x, verbose=0) for x in (pictures, tests))

    steps = -(-options.samples // BATCH)  # Per epoch.

    def reject_pictures() -> rsft.Policy:
        return rsft.KeepFraction(1 - WRONG, ramp_steps=3 * steps)

    def reject_pixels() -> rsft.Policy:
        return rsft.RunningThreshold(
            1.0, num_classes=CLASSES, level="element", warmup_steps=3 * steps
        )

    methods = {
        "plain": (rsft.AcceptAll, 16),
        "pictures rejected": (reject_pictures, 12),
        "pixels rejected": (reject_pixels, 18),
        "right masks only": (rsft.AcceptAll, 20),
    }
    print(f"{'':18} mean IoU                accepted  wrong pixels rejected  of all")
    for name, (make_policy, epochs) in methods.items():
        rows = []
        for seed in range(options.seeds):
            spoiled = spoil(right, seed)
            given = right if name == "right masks only" else spoiled
            length = options.epochs or epochs
            model, accepted = train(make_policy(), maps, given, seed, epochs=length)
            iou = mean_iou(answers, model.predict(test_maps, verbose=0).argmax(-1))
            rejected = rejected_pixels(model, maps, given)
            rows.append((iou, accepted, rejected[spoiled != right].mean(),
                         rejected.mean()))  # fmt: skip
            if name == "pixels rejected" and seed == 0:
                draw(options.figure, pictures, given, right, rejected)
        iou, *shares = np.transpose(rows)
        accepted, found, refused = (100 * np.mean(share) for share in shares)
        print(
            f"{name:18} {iou.mean():.3f} ({iou.min():.3f} to {iou.max():.3f})  "
            f"{accepted:7.1f}%  {found:20.1f}%  {refused:5.1f}%"
        )


if __name__ == "__main__":
    main()
