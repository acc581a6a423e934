"""The embedded example: real digits, wrong labels put in, with and without rejection.

Owns the choice of data, noise and settings; all the work is done by the other
rooms. Needs no network: the images ship with scikit-learn, the weights with a
package of the extra `demo`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

from keras_rsft.data import ImageData, ImageSplit, add_label_noise, load_images
from keras_rsft.export import export_saved_model
from keras_rsft.finetuning import (
    NumberedFolder,
    Run,
    TrainingSettings,
    finetune,
    train_head,
)
from keras_rsft.policy_choice import PolicyChoice

BACKBONE = "efficientnet_lite0"
IMAGE_SIZE = 96
NOISE = "symmetric:0.3"
EPOCHS = 30


@dataclasses.dataclass(frozen=True)
class DemoResult:
    """What the demo found.

    Attributes:
        run: The run with rejection, written to its folder.
        exported: Folder of the exported SavedModel.
        sample_image: An image of the test split, for trying `predict`.
        train_size: Number of training images.
        wrong_labels: Number of training labels that were made wrong.
        test_size: Number of test images.
        results: For `"plain"`, `"rsft"` and `"right labels only"`: test
            accuracy, acceptance rate and rejected shares, as in `Run.results`.
    """

    run: Run
    exported: Path
    sample_image: Path
    train_size: int
    wrong_labels: int
    test_size: int
    results: dict[str, dict[str, float]]


def run_demo(
    *,
    seed: int = 0,
    output: str | os.PathLike | None = None,
    export_directory: str | os.PathLike = Path("saved_models") / "digits",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    command: str | None = None,
) -> DemoResult:
    """Fine-tunes on digits with 30 % wrong training labels, three ways.

    Args:
        seed: Seed of the noise and of the training. Default 0.
        output: Run folder. Default: the next free `runs/demo-N`.
        export_directory: Where the exported model's next version goes.
        cache_dir: Where features are kept. Default: the user's cache folder.
        progress: Show progress bars. Default True.
        command: The command line, for the record.

    Returns:
        The results side by side; validation and test labels stay right.
    """
    output = NumberedFolder("demo") if output is None else Path(output)
    data = add_label_noise(_digits(), NOISE, seed=seed)
    settings = TrainingSettings(epochs=EPOCHS, seed=seed)
    run = finetune(
        data,
        backbone=BACKBONE,
        image_size=IMAGE_SIZE,
        precision="float32",
        settings=settings,
        output=output,
        cache_dir=cache_dir,
        progress=progress,
        command=command,
    )
    noisy = run.features
    right = dataclasses.replace(
        noisy, train=noisy.train.with_labels(noisy.train.clean_labels)
    )
    plain_settings = dataclasses.replace(settings, policy=PolicyChoice("accept-all"))
    results = {
        "plain": run.against_plain.results,
        "rsft": run.results,
        "right labels only": train_head(
            right, plain_settings, progress=progress
        ).results,
    }
    sample_image = run.folder / "sample.png"
    sample_image.write_bytes(data.test.encoded(0))
    wrong = data.train.labels != data.train.clean_labels
    return DemoResult(
        run=run,
        exported=export_saved_model(
            run.model, export_directory, class_names=run.class_names
        ),
        sample_image=sample_image,
        train_size=len(data.train),
        wrong_labels=int(wrong.sum()),
        test_size=len(data.test),
        results=results,
    )


def _digits() -> ImageData:
    """Returns the digits, whose labels are known to be right in every split."""
    data = load_images("digits")

    def known(split: ImageSplit) -> ImageSplit:
        return split.with_labels(split.labels, split.labels)

    return dataclasses.replace(
        data,
        train=known(data.train),
        validation=known(data.validation),
        test=known(data.test),
    )
