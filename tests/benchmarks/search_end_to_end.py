"""A whole search, features included, against one pass of the base and Keras Tuner.

ResNet50 with random weights at 224 pixels on JPEG files. `keras-rsft search` is run
whole, as a command in a fresh process. The pass is that of the base over the same
files, kept as the search keeps it. Keras Tuner's random search trains the usual
end-to-end model, frozen base and new head, on the same files; a few of its batches
are timed, without the first of each trial, and scaled to all trials and epochs.

    python tests/benchmarks/search_end_to_end.py --images 2000 --trials 64
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from article_loop import printed_number, seconds_of
from extraction_rate import write_photos

BATCH_SIZE = 32
# Of the stock search: trials that are timed, and batches of each.
TIMED_TRIALS, TIMED_BATCHES = 2, 5

ONE_PASS = """
import sys, time
import keras_rsft as rsft
from keras_rsft.features._extract import choose_dtype
data = rsft.load_images(sys.argv[1])
base = rsft.load_backbone("resnet50", weights="none", dtype=choose_dtype())
started = time.perf_counter()
for split in (data.train, data.validation, data.test):
    rsft.extract_features(base, split, cache_dir=sys.argv[2], progress=False)
print(time.perf_counter() - started)
"""

STOCK = """
import sys, time
import keras, keras_tuner
folder, output, batch_size, trials, batches = sys.argv[1], sys.argv[2], *map(
    int, sys.argv[3:]
)

class Clock(keras.callbacks.Callback):
    seconds, images = 0.0, 0
    def on_train_batch_begin(self, batch, logs=None):
        self.started = time.perf_counter()
    def on_train_batch_end(self, batch, logs=None):
        if batch > 0:
            Clock.seconds += time.perf_counter() - self.started
            Clock.images += batch_size

def build(hp):
    base = keras.applications.ResNet50(
        weights=None, include_top=False, pooling="avg", input_shape=(224, 224, 3)
    )
    base.trainable = False
    inputs = keras.Input((224, 224, 3))
    pixels = keras.applications.resnet50.preprocess_input(inputs)
    outputs = keras.layers.Dense(2, activation="softmax")(base(pixels, training=False))
    model = keras.Model(inputs, outputs)
    rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        "sparse_categorical_crossentropy", metrics=["accuracy"],
    )
    return model

photos = keras.utils.image_dataset_from_directory(
    folder, image_size=(224, 224), batch_size=batch_size, seed=0
)
tuner = keras_tuner.RandomSearch(
    build, objective="accuracy", max_trials=trials, directory=output
)
tuner.search(photos.take(batches + 1), epochs=1, callbacks=[Clock()], verbose=0)
print(Clock.seconds / Clock.images)
"""


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--trials", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=20)
    arguments = parser.parse_args()
    count, trials, epochs = arguments.images, arguments.trials, arguments.epochs
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = folder / "photos"
        photos.mkdir()
        write_photos(photos, count, 256, 224)
        kept = str(folder / "kept by the pass")
        command = [sys.executable, "-c", ONE_PASS, str(photos), kept]
        started = time.perf_counter()
        one_pass = printed_number(command)
        with_start_up = time.perf_counter() - started
        whole = seconds_of(
            [sys.executable, "-m", "keras_rsft.cli", "search", str(photos),
             "--weights", "none", "--max-trials", str(trials), "--epochs", str(epochs),
             "--output", str(folder / "search"), "--cache-dir", str(folder / "kept")],
            cwd=folder,
        )  # fmt: skip
        numbers = map(str, (BATCH_SIZE, TIMED_TRIALS, TIMED_BATCHES))
        stock_image = printed_number(
            [sys.executable, "-c", STOCK, str(photos), str(folder / "stock"), *numbers]
        )
    # What is trained on in the search; that stock trials also validate is left out.
    trained = round(0.7 * count)
    stock = stock_image * trained * epochs * trials
    print(f"{count} images, ResNet50 at 224 pixels, {trials} trials of {epochs} epochs")
    print(f"one pass of the base      {one_pass:9.1f} s  "
          f"({count / one_pass:.1f} images/s)")  # fmt: skip
    print(f"the same with start-up    {with_start_up:9.1f} s")
    print(f"keras-rsft search, whole  {whole:9.1f} s")
    print(f"stock Keras Tuner         {stock:9.0f} s  "
          f"({1 / stock_image:.1f} images/s on {TIMED_TRIALS} trials of "
          f"{TIMED_BATCHES} batches, scaled)")  # fmt: skip
    print(f"search / pass             {whole / one_pass:9.2f}")
    print(f"search / with start-up    {whole / with_start_up:9.2f}")
    print(f"stock / search            {stock / whole:9.0f}")


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as failed:
        sys.exit(failed.stderr if isinstance(failed.stderr, str) else str(failed))
