"""Detection with noisy boxes and classes: reject pictures, or single boxes.

One to three real handwritten digits from 0 to 4 lie on a coloured texture. On the
feature map of a frozen backbone, 6 x 6 cells, one head predicts the class at each cell,
another the box centred there. 30 % of the training objects are noisy: another class, or
a box that is moved and half or twice as large. At `level="element"` the policy rejects
cells whose summed loss is above 1.5 ln(classes), worse than a guess. At sample level it
rejects pictures by the mean over their cells.

    pip install "keras_rsft[demo]" matplotlib
    python examples/detection.py

prints a table (mean and range over seeds) and draws `detection.png`. Needs no network.
"""

import argparse
import math

import keras
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from scipy.ndimage import zoom
from sklearn.datasets import load_digits

import keras_rsft as rsft

SIDE, CELL, CLASSES, WRONG, BATCH = 96, 16, 6, 0.3, 32  # Class 0: nothing here.
# Which digits the pictures show. `tests/benchmarks/example_settings.py` chose policies
# and epochs on VALIDATION pictures, as noisy as those of training. TEST pictures have
# clean labels and were not used for any choice.
TRAIN, VALIDATION, TEST = slice(600), slice(750, None), slice(600, 750)


def make_pictures(digits, names, count: int, seed: int):
    """Returns pictures, the classes of their cells `(n, 6, 6)` and boxes `(.., 5)`.

    A box is the centre within the cell, the logarithms of width and height in
    units of 32 pixels, and 1 where there is an object.
    """
    rng = np.random.default_rng(seed)
    down, right = np.mgrid[:SIDE, :SIDE, :1][:2]
    pictures = np.zeros((count, SIDE, SIDE, 3), "float32")
    kinds = np.zeros((count, SIDE // CELL, SIDE // CELL), "int32")
    boxes = np.zeros((*kinds.shape, 5), "float32")
    for picture, kind, box in zip(pictures, kinds, boxes, strict=True):
        waves = np.sin(down * rng.uniform(-0.5, 0.5, 3) + right * rng.uniform(-1, 1, 3))
        picture[:] = 70 + 30 * waves + rng.normal(0, 15, picture.shape)
        for quarter in rng.permutation(4)[: rng.integers(1, 4)]:
            one = rng.integers(len(digits))
            inside = zoom(digits[one], rng.uniform(3.5, 6), order=1)
            inside = inside[np.ix_((inside > 6).any(1), (inside > 6).any(0))]
            size = np.array(inside.shape)
            corner = 48 * np.array(divmod(quarter, 2)) + rng.integers(0, 49 - size)
            region = tuple(
                slice(a, b) for a, b in zip(corner, corner + size, strict=True)
            )
            color = rng.uniform(130, 255, 3) * inside[..., None] / 16
            picture[region] = np.where(inside[..., None] > 6, color, picture[region])
            (row, column), offset = divmod(corner + size / 2, CELL)
            cell = int(row), int(column)
            kind[cell] = 1 + names[one]
            box[cell] = (*offset / CELL, *np.log(size / 32), 1)
    return np.clip(pictures, 0, 255), kinds, boxes


def spoil(kinds: np.ndarray, boxes: np.ndarray, seed: int):
    """Adds noise to 30 % of the objects; returns kinds, boxes and which are noisy."""
    rng = np.random.default_rng([1, seed])  # Independent of the pictures.
    kinds, boxes = kinds.copy(), boxes.copy()
    wrong = (kinds > 0) & (rng.random(kinds.shape) < WRONG)
    swapped = wrong & (rng.random(kinds.shape) < 0.5)
    other = 1 + (kinds + rng.integers(0, CLASSES - 2, kinds.shape)) % (CLASSES - 1)
    kinds[swapped] = other[swapped]
    moved = wrong & ~swapped
    boxes[moved, :2] = rng.random((moved.sum(), 2))
    boxes[moved, 2:4] += rng.choice([-math.log(2), math.log(2)], (moved.sum(), 1))
    return kinds, boxes, wrong


def frozen_map(weights: str) -> keras.Model:
    """Returns the frozen backbone: pictures to maps `(6, 6, 304)` from two depths."""
    backbone = rsft.load_backbone(
        "efficientnet_lite0", weights=weights, image_size=SIDE
    )
    network = backbone.get_layer("efficientnet_lite0")
    maps = [network.get_layer(f"block{number}_add").output for number in (10, 14)]
    maps[1] = keras.layers.UpSampling2D(2)(maps[1])
    return keras.Model(network.input, keras.layers.Concatenate()(maps))


def box_loss(box, predicted):
    """Returns the mean absolute error of each box, 0 where there is no object."""
    error = keras.ops.abs(box[..., :4] - predicted)
    return box[..., 4] * keras.ops.mean(error, axis=-1)


def train(policy: rsft.Policy, maps, kinds, boxes, seed: int, **fit_options):
    """Trains new heads for class and box under a policy."""
    keras.utils.set_random_seed(seed)
    inputs = keras.Input(maps.shape[1:])
    x = keras.layers.BatchNormalization(center=False, scale=False)(inputs)
    x = keras.layers.Conv2D(64, 3, padding="same", activation="relu")(x)
    outputs = {
        "kind": keras.layers.Conv2D(CLASSES, 1, activation="softmax", name="kind")(x),
        "box": keras.layers.Conv2D(4, 1, name="box")(x),
    }
    model = rsft.RSFTModel(keras.Model(inputs, outputs), policy)
    model.compile(
        keras.optimizers.Adam(1e-3),
        loss={"kind": "sparse_categorical_crossentropy", "box": box_loss},
        loss_weights={"kind": 1.0, "box": 4.0},
    )
    targets = {"kind": kinds, "box": boxes}
    log = model.fit(maps, targets, batch_size=BATCH, verbose=0, **fit_options)
    return model, log.history["acceptance_rate"][-1]


def corners(boxes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first and the last corner of the boxes of all cells, in pixels."""
    cells = np.moveaxis(np.mgrid[: SIDE // CELL, : SIDE // CELL], 0, -1)
    centres, sizes = (cells + boxes[..., :2]) * CELL, 32 * np.exp(boxes[..., 2:4])
    return centres - sizes / 2, centres + sizes / 2


def f1_score(model, maps, kinds, boxes) -> float:
    """Returns F1 of the objects found: right cell, right class, IoU of at least 0.5."""
    predicted = model.predict(maps, verbose=0)
    found = predicted["kind"].argmax(-1)
    (first, last), (own_first, own_last) = corners(boxes), corners(predicted["box"])
    shared = np.minimum(last, own_last) - np.maximum(first, own_first)
    shared = np.prod(np.maximum(shared, 0), axis=-1)
    areas = np.prod(last - first, axis=-1) + np.prod(own_last - own_first, axis=-1)
    hits = (kinds > 0) & (found == kinds) & (shared >= (areas - shared) / 2)
    return 2 * hits.sum() / ((found > 0).sum() + (kinds > 0).sum())


def rejected_cells(model, maps, kinds, boxes) -> np.ndarray:
    """Returns which cells of the training pictures the trained model rejects."""
    predicted = model.predict(maps, verbose=0)
    losses = keras.losses.sparse_categorical_crossentropy(kinds, predicted["kind"])
    losses = losses + 4.0 * box_loss(boxes, predicted["box"])
    if model.policy.level == "element":
        return ~np.asarray(model.policy(losses))
    accepted = np.asarray(model.policy(keras.ops.mean(losses, axis=(1, 2))))
    return np.broadcast_to(~accepted[:, None, None], kinds.shape)


def draw(path: str, pictures, kinds, boxes, wrong, rejected) -> None:
    """Draws the given boxes of pictures with rejected boxes."""
    figure = Figure(figsize=(9, 5), layout="constrained")
    chosen = np.flatnonzero((rejected & (kinds > 0)).any(axis=(1, 2)))
    for axes, one in zip(figure.subplots(2, 4).flat, chosen, strict=False):
        axes.imshow(pictures[one].astype("uint8"))
        axes.set_axis_off()
        for cell in map(tuple, np.argwhere(kinds[one]).tolist()):
            (top, left), (bottom, right) = (end[cell] for end in corners(boxes[one]))
            color = "red" if rejected[one][cell] else "lime"
            style = "--" if wrong[one][cell] else "-"
            axes.add_patch(
                Rectangle((left, top), right - left, bottom - top, fill=False,
                          color=color, linestyle=style, linewidth=2)
            )  # fmt: skip
            axes.text(
                left + 1, top - 2, kinds[one][cell] - 1, color=color, clip_on=True
            )
    figure.suptitle("Dashed: a wrong class or box. Red: rejected. Green: learnt.")
    figure.savefig(path, dpi=100)


def main() -> None:
    """Trains each method with each seed and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=1000, help="training pictures")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, help="default: each method's own")
    parser.add_argument("--weights", default="imagenet", help="imagenet or none")
    parser.add_argument("--figure", default="detection.png")
    options = parser.parse_args()

    digits, names = load_digits(n_class=CLASSES - 1, return_X_y=True)
    digits = digits.reshape(-1, 8, 8)
    pictures, *right = make_pictures(digits[TRAIN], names[TRAIN], options.samples, 0)
    tests, *answers = make_pictures(digits[TEST], names[TEST], options.samples, 2)
    backbone = frozen_map(options.weights)
    maps, test_maps = (backbone.predict(x, verbose=0) for x in (pictures, tests))

    steps = -(-options.samples // BATCH)  # Per epoch.

    def reject_pictures() -> rsft.Policy:
        return rsft.KeepFraction(1 - WRONG, ramp_steps=4 * steps)

    def reject_boxes() -> rsft.Policy:
        return rsft.LossThreshold(
            1.5 * math.log(CLASSES), level="element", warmup_steps=4 * steps
        )

    methods = {
        "plain": (rsft.AcceptAll, 22),
        "pictures rejected": (reject_pictures, 22),
        "boxes rejected": (reject_boxes, 24),
        "right objects only": (rsft.AcceptAll, 22),
    }
    print(
        f"{'':18} F1 at half a box        accepted  wrong objects rejected  right ones"
    )
    for name, (make_policy, epochs) in methods.items():
        rows = []
        for seed in range(options.seeds):
            *given, wrong = spoil(*right, seed)
            given = right if name == "right objects only" else given
            length = options.epochs or epochs
            model, accepted = train(make_policy(), maps, *given, seed, epochs=length)
            rejected = rejected_cells(model, maps, *given)
            fine = (right[0] > 0) & ~wrong
            rows.append((f1_score(model, test_maps, *answers), accepted,
                         rejected[wrong].mean(), rejected[fine].mean()))  # fmt: skip
            if name == "boxes rejected" and seed == 0:
                draw(options.figure, pictures, *given, wrong, rejected)
        score, *shares = np.transpose(rows)
        accepted, found, lost = (100 * np.mean(share) for share in shares)
        print(
            f"{name:18} {score.mean():.3f} ({score.min():.3f} to {score.max():.3f})  "
            f"{accepted:7.1f}%  {found:21.1f}%  {lost:9.1f}%"
        )


if __name__ == "__main__":
    main()
