"""What very many images cost on 1, 8 and 64 GPUs, on paper, from measured rates.

Measured on this machine: decoding per core, bytes of an image and of a kept row, the
rate of the disk, putting shares together, training a head on rows in memory, and, to
compare with, ResNet50 on these cores. What a GPU does, what it costs and how it is
connected are assumptions: this machine need not have one, so they are arguments, and
the defaults say where they come from. Nothing below the line "On paper" was measured.

    python tests/benchmarks/scale_on_paper.py
    python tests/benchmarks/scale_on_paper.py --gpu-images-per-second 4000 --epochs 5
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path

HOUR = 3600.0
GPUS = (1, 8, 64)
DIM = 2048

# ResNet50 v1.5 in TensorFlow on one A100 40 GB, mixed precision without XLA, batches of
# 32 as `extract_features` has them. Batches of 256 reach 3,229. NVIDIA,
# DeepLearningExamples, TensorFlow/Classification/ConvNets/resnet50v1.5/README.md,
# "Inference performance: NVIDIA DGX A100", container 20.06.
GPU_IMAGES = 1974.0
# AWS p4d.24xlarge, on demand in us-east-1, 21.96 USD an hour: 8 A100 40 GB, 96 virtual
# cores, 400 Gbit/s. Here: an eighth of it. Prices change; look them up.
GPU_PRICE = 2.74
GPU_CORES = 12
GPU_NETWORK = 400e9 / 8 / 8
# Of the shared file system, for all machines together. A round number; ask whoever runs
# it.
STORAGE = 10e9


@dataclasses.dataclass(frozen=True)
class Measured:
    """Rates of this machine, a second.

    Attributes:
        decoded: Images that one core reads, decodes and resizes.
        image_bytes: Of one JPEG file.
        row_bytes: Of one kept row and its index.
        written: Bytes to the disk.
        joined: Bytes of finished shares that are put together.
        trained: Rows that a head is trained on.
        computed: Images through the base, on all cores of this machine.
    """

    decoded: float
    image_bytes: float
    row_bytes: float
    written: float
    joined: float
    trained: float
    computed: float


@dataclasses.dataclass(frozen=True)
class Assumed:
    """What is rented, for each GPU.

    Attributes:
        computed: Images a second through the base.
        price: Of an hour.
        cores: That come with it.
        network: Bytes a second.
        storage: Bytes a second of the shared file system, for all together.
    """

    computed: float = GPU_IMAGES
    price: float = GPU_PRICE
    cores: float = GPU_CORES
    network: float = GPU_NETWORK
    storage: float = STORAGE


@dataclasses.dataclass(frozen=True)
class Sheet:
    """The costs of one number of GPUs.

    Attributes:
        gpus: How many.
        limits: Images a second that each part of the pass allows, by name.
        pass_hours: All images through the base.
        join_hours: Putting the shares together, by one process.
        head_hours: Training a head, by one process.
        cores_needed: So that decoding keeps up with the base.
        network_needed: Bytes a second of one GPU's machine, at the rate of the pass.
        cost: Where the other GPUs are given back after the pass.
        cost_held: Where all are paid for until the end.
    """

    gpus: int
    limits: dict[str, float]
    pass_hours: float
    join_hours: float
    head_hours: float
    cores_needed: float
    network_needed: float
    cost: float
    cost_held: float

    @property
    def bottleneck(self) -> str:
        """What limits the pass."""
        return min(self.limits, key=self.limits.get)

    @property
    def hours(self) -> float:
        """From the first image to the trained head."""
        return self.pass_hours + self.join_hours + self.head_hours

    @property
    def longest(self) -> str:
        """What takes longest."""
        parts = {
            "the pass": self.pass_hours,
            "putting shares together": self.join_hours,
            "the head": self.head_hours,
        }
        return max(parts, key=parts.get)


def sheet(
    measured: Measured, assumed: Assumed, *, images: float, gpus: int, epochs: float
) -> Sheet:
    """Does the sum for one number of GPUs, a process for each.

    Args:
        measured: Rates of this machine.
        assumed: What is rented.
        images: How many.
        gpus: How many, at least 1.
        epochs: Of the head.
    """
    moved = measured.image_bytes + measured.row_bytes
    limits = {
        "the base on the GPUs": gpus * assumed.computed,
        "decoding on the cores": gpus * assumed.cores * measured.decoded,
        "each machine's network": gpus * assumed.network / moved,
        "the shared storage": assumed.storage / moved,
    }
    rate = min(limits.values())
    pass_hours = images / rate / HOUR
    kept = images * measured.row_bytes
    join_hours = kept / measured.joined / HOUR if gpus > 1 else 0.0
    trained = min(measured.trained, assumed.storage / measured.row_bytes)
    head_hours = epochs * images / trained / HOUR
    alone = join_hours + head_hours
    return Sheet(
        gpus=gpus,
        limits=limits,
        pass_hours=pass_hours,
        join_hours=join_hours,
        head_hours=head_hours,
        cores_needed=gpus * assumed.computed / measured.decoded,
        network_needed=rate / gpus * moved,
        cost=assumed.price * (gpus * pass_hours + alone),
        cost_held=assumed.price * gpus * (pass_hours + alone),
    )


def measure(photos: int, rows: int, classes: int, batch_size: int) -> Measured:
    """Measures on this machine, which should have nothing else to do."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")  # As the command line has it.
    import extraction_rate
    import more_than_memory

    import keras_rsft as rsft

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "photos").mkdir()
        extraction_rate.write_photos(folder / "photos", photos, 500, 400)
        split = rsft.load_images(
            str(folder / "photos"), validation_fraction=0.01, test_fraction=0.01
        ).train
        sizes = [file.stat().st_size for file in (folder / "photos").rglob("*.jpg")]
        base = rsft.load_backbone("resnet50", weights="none", dtype="float32")
        written, joined = disk_rates(folder)
        features = more_than_memory.make_features(folder, rows, DIM, 0.06)
        return Measured(
            decoded=decoded_a_core(split),
            image_bytes=sum(sizes) / len(sizes),
            row_bytes=features.row_bytes + 8,
            written=written,
            joined=joined,
            trained=trained_rows(features, classes, batch_size),
            computed=computed_images(base, split),
        )


def decoded_a_core(split) -> float:
    """Returns images for each second of any core: reading, decoding, resizing."""
    rates = []
    for _ in range(3):
        started = time.process_time()
        count = sum(1 for _ in split.images(224))
        rates.append(count / (time.process_time() - started))
    return max(rates)


def computed_images(base, split) -> float:
    """Returns images a second through the base, from memory, without the first call."""
    import tensorflow as tf

    from keras_rsft.features._extract import FrozenBackbone

    forward = FrozenBackbone(base).forward
    batch = tf.stack([image for _, image in split.images(224).take(32)])
    forward(batch)
    started = time.perf_counter()
    for _ in range(10):
        forward(batch).numpy()
    return 10 * len(batch) / (time.perf_counter() - started)


def disk_rates(folder: Path, pieces: int = 16) -> tuple[float, float]:
    """Returns bytes a second written, and put together with checksums, both synced."""
    from keras_rsft.features._shares import append_file

    content = os.urandom(2**24)
    started = time.perf_counter()
    with (folder / "part").open("wb") as file:
        for _ in range(pieces):
            file.write(content)
        file.flush()
        os.fsync(file.fileno())
    written = pieces * len(content) / (time.perf_counter() - started)
    started = time.perf_counter()
    with (folder / "whole").open("wb") as file:
        append_file(folder / "part", file, lambda done: None)
        file.flush()
        os.fsync(file.fileno())
    return written, pieces * len(content) / (time.perf_counter() - started)


def trained_rows(features, classes: int, batch_size: int) -> float:
    """Returns rows a second that a head is trained on, without the first call."""
    import keras

    import keras_rsft as rsft

    head = rsft.build_head(DIM, classes, moments=features.moments())
    model = rsft.RSFTModel(head, rsft.LossThreshold(100.0))
    model.compile(
        keras.optimizers.SGD(0.01, momentum=0.9),
        "sparse_categorical_crossentropy",
        steps_per_execution=64,
    )
    features = features.with_labels(features.labels % classes)
    fed = rsft.TrainingBatches(features, batch_size=batch_size, seed=0)
    model.fit(fed.dataset.take(64), verbose=0, shuffle=False)
    started = time.perf_counter()
    model.fit(fed.dataset, callbacks=[fed.callback], verbose=0, shuffle=False)
    return len(features) / (time.perf_counter() - started)


def print_measured(measured: Measured, classes: int, batch_size: int) -> None:
    """Prints what was measured."""
    print(f"Measured on this machine ({os.cpu_count()} cores)\n")
    for name, value in (
        ("JPEG 500 x 400, bytes", f"{measured.image_bytes:,.0f}"),
        ("read, decoded, resized; images/s a core", f"{measured.decoded:,.0f}"),
        ("ResNet50 float32, all cores; images/s", f"{measured.computed:,.0f}"),
        ("a kept row in float16 and its index, bytes", f"{measured.row_bytes:,.0f}"),
        ("written to the disk; MB/s", f"{measured.written / 1e6:,.0f}"),
        ("shares put together; MB/s", f"{measured.joined / 1e6:,.0f}"),
        (
            f"head of {classes} classes, batches of {batch_size}; rows/s",
            f"{measured.trained:,.0f}",
        ),
    ):
        print(f"  {name:52}{value:>14}")


def print_sheets(
    measured: Measured, assumed: Assumed, sheets: list[Sheet], images: float
) -> None:
    """Prints assumptions and the table."""
    kept = images * measured.row_bytes
    print(
        f"\nOn paper: {images:,.0f} images. Assumed for each GPU: "
        f"{assumed.computed:,.0f} images/s, {assumed.cores:.0f} cores as fast as "
        f"these,\n{assumed.network / 1e9:.2f} GB/s of network, {assumed.price:.2f} USD "
        f"an hour; storage {assumed.storage / 1e9:.0f} GB/s for all together.\n"
        f"Images {images * measured.image_bytes / 1e12:.1f} TB, features "
        f"{kept / 1e12:.2f} TB, twice that while shares are put together.\n"
    )
    rows = [
        ("GPUs", "gpus", "{:,}"),
        ("the pass, hours", "pass_hours", "{:,.2f}"),
        ("putting shares together, hours", "join_hours", "{:,.2f}"),
        ("the head, hours", "head_hours", "{:,.2f}"),
        ("together, hours", "hours", "{:,.2f}"),
        ("cores so that decoding keeps up", "cores_needed", "{:,.0f}"),
        ("network of each GPU in the pass, MB/s", "network_needed", "{:,.0f}"),
        ("USD, others given back after the pass", "cost", "{:,.0f}"),
        ("USD, all held to the end", "cost_held", "{:,.0f}"),
    ]
    for name, field, form in rows:
        scale = 1e-6 if field == "network_needed" else 1
        cells = (form.format(getattr(one, field) * scale) for one in sheets)
        print(f"  {name:40}" + "".join(f"{cell:>14}" for cell in cells))
    for one in sheets:
        rate = one.limits[one.bottleneck]
        print(
            f"\nGPUs: {one.gpus}. The pass is limited by {one.bottleneck} "
            f"({rate:,.0f} images/s). Most time goes into {one.longest}."
        )
        for name, limit in sorted(one.limits.items(), key=lambda pair: pair[1]):
            print(f"    {name:28}{limit:>14,.0f} images/s")


def main() -> None:
    """Measures, does the sums and prints them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=float, default=100e6)
    parser.add_argument("--epochs", type=float, default=20)
    parser.add_argument("--classes", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--photos", type=int, default=400, help="to measure with")
    parser.add_argument("--rows", type=int, default=60_000, help="to measure with")
    parser.add_argument("--gpu-images-per-second", type=float, default=GPU_IMAGES)
    parser.add_argument("--gpu-price", type=float, default=GPU_PRICE)
    parser.add_argument("--gpu-cores", type=float, default=GPU_CORES)
    parser.add_argument("--gpu-network", type=float, default=GPU_NETWORK)
    parser.add_argument("--storage", type=float, default=STORAGE, help="bytes a second")
    parser.add_argument(
        "--head-rows-per-second", type=float, help="default: what is measured here"
    )
    arguments = parser.parse_args()
    measured = measure(
        arguments.photos, arguments.rows, arguments.classes, arguments.batch_size
    )
    print_measured(measured, arguments.classes, arguments.batch_size)
    if arguments.head_rows_per_second is not None:
        measured = dataclasses.replace(measured, trained=arguments.head_rows_per_second)
    assumed = Assumed(
        computed=arguments.gpu_images_per_second,
        price=arguments.gpu_price,
        cores=arguments.gpu_cores,
        network=arguments.gpu_network,
        storage=arguments.storage,
    )
    sheets = [
        sheet(
            measured, assumed, images=arguments.images, gpus=gpus,
            epochs=arguments.epochs,
        )
        for gpus in GPUS
    ]  # fmt: skip
    print_sheets(measured, assumed, sheets, arguments.images)


if __name__ == "__main__":
    main()
