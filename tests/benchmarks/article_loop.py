"""The RSFT article's PyTorch loop against `keras-rsft fit`, on the same images.

ResNet50 with random weights at 224 pixels, batch 32. The loop's time is measured
on some steps and scaled to all epochs, which is said in the table; `fit` is run
whole, as a command in a fresh process, start-up included.

    python tests/benchmarks/article_loop.py --torch-python /path/to/python
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from extraction_rate import write_photos

TORCH_LOOP = """
import sys, time, torch
from torchvision import models
steps = int(sys.argv[1])
model = models.resnet50(weights=None)
for parameter in model.parameters():
    parameter.requires_grad = False
model.fc = torch.nn.Linear(model.fc.in_features, 10)
optimizer = torch.optim.SGD(model.fc.parameters(), lr=0.001, momentum=0.9)
criterion = torch.nn.CrossEntropyLoss()
inputs, labels = torch.rand(32, 3, 224, 224), torch.randint(0, 10, (32,))
for step in range(steps + 1):
    if step == 1:
        started = time.perf_counter()
    loss = criterion(model(inputs), labels)
    if loss.item() < 100.0:
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
print((time.perf_counter() - started) / (32 * steps))
"""

START_UP = """
import sys
import keras_rsft as rsft
rsft.load_backbone("resnet50", weights="none")
rsft.load_images(sys.argv[1])
"""

FORWARD = """
import sys, time
import tensorflow as tf
import keras_rsft as rsft
from keras_rsft.features._extract import choose_dtype
base = rsft.load_backbone("resnet50", weights="none", dtype=choose_dtype())
forward = tf.function(lambda images: base(images, training=False))
images = tf.random.uniform((32, 224, 224, 3), 0, 255)
forward(images).numpy()
steps = int(sys.argv[1])
started = time.perf_counter()
for _ in range(steps):
    forward(images).numpy()
print((time.perf_counter() - started) / (32 * steps))
"""


def seconds_of(command: list[str], **options) -> float:
    """Runs a command and returns the time it took."""
    started = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True, **options)
    return time.perf_counter() - started


def printed_number(command: list[str], **options) -> float:
    """Runs a command and returns the number that it prints."""
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, **options
    )
    return float(done.stdout.strip().splitlines()[-1])


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=9600)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--steps", type=int, default=10, help="measured of the loop")
    parser.add_argument("--torch-python", default=sys.executable)
    arguments = parser.parse_args()
    count, epochs, steps = arguments.images, arguments.epochs, str(arguments.steps)
    environment = os.environ | {"TF_ENABLE_ONEDNN_OPTS": "1"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        photos = folder / "photos"
        photos.mkdir()
        write_photos(photos, count, 256, 224)
        loop = printed_number([arguments.torch_python, "-c", TORCH_LOOP, steps])
        forward = printed_number(
            [sys.executable, "-c", FORWARD, steps], env=environment
        )
        start_up = seconds_of(
            [sys.executable, "-c", START_UP, str(photos)], env=environment
        )
        fit = seconds_of(
            [sys.executable, "-m", "keras_rsft.cli", "fit", str(photos), "--weights",
             "none", "--policy", "accept-all", "--epochs", str(epochs),
             "--cache-dir", str(folder / "kept")],
            cwd=folder,
        )  # fmt: skip
    article = loop * count * epochs
    once = forward * count + start_up
    print(f"{count} images, {epochs} epochs, ResNet50 at 224 pixels")
    print(f"article's loop            {article:9.1f} s  "
          f"({1 / loop:.1f} images/s on {steps} steps, scaled)")  # fmt: skip
    print(f"keras-rsft fit, whole     {fit:9.1f} s")
    print(f"one forward + start-up    {once:9.1f} s  "
          f"({1 / forward:.1f} images/s; start-up {start_up:.1f} s)")  # fmt: skip
    print(f"loop / fit                {article / fit:9.1f}")
    print(f"fit / (forward + start)   {fit / once:9.2f}")


if __name__ == "__main__":
    main()
