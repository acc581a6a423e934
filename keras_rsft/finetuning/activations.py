"""Whether the activations in front of a trainable part are kept, or computed each time.

Owns the choice and its reasons. Keeping them is the business of `features/`, to which
a front is a base like any other.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from keras_rsft.features.extraction import default_cache_dir
from keras_rsft.result_folder import replaced, write_json

# Activations may take so much of what is free on the disk.
LARGEST_SHARE_OF_DISK = 0.5
# What a disk is trusted to read and write; the system's cache makes it more.
BYTES_A_SECOND = 5e8


@dataclasses.dataclass(frozen=True)
class ActivationCosts:
    """What the choice goes by.

    Attributes:
        images: How many activations there would be: of training images, with all
            views, and of validation images.
        image_bytes: Bytes of one of them on disk.
        free_bytes: Bytes that are free on the disk, without those that are kept yet.
        front_seconds: Time to read and decode an image and run the front on it.
        epochs: How often each is needed, at least 1.
        front_is_preprocessing: True where the front has learnt nothing.
    """

    images: int
    image_bytes: int
    free_bytes: int
    front_seconds: float
    epochs: int
    front_is_preprocessing: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all activations."""
        return self.images * self.image_bytes

    @property
    def seconds_kept(self) -> float:
        """Time for keeping them and for reading them in each epoch."""
        once = self.images * self.front_seconds
        return once + (1 + self.epochs) * self.num_bytes / BYTES_A_SECOND

    @property
    def seconds_anew(self) -> float:
        """Time for computing them in each epoch."""
        return self.epochs * self.images * self.front_seconds


@dataclasses.dataclass(frozen=True)
class ActivationChoice:
    """What was chosen.

    Attributes:
        keep: Whether activations are kept on disk.
        reason: Why, in one line.
    """

    keep: bool
    reason: str


def choose_activations(costs: ActivationCosts, *, cut: str) -> ActivationChoice:
    """Chooses between keeping activations and running the front in each epoch.

    They are kept where they fit into half of what is free on the disk, and reading
    them is faster than computing them anew, the one pass to get them counted.

    Args:
        costs: What is known.
        cut: Name of the layer that the activations go into.
    """
    if costs.front_is_preprocessing:
        return ActivationChoice(
            False,
            f"Nothing that stays as it is comes before {cut}, so images are decoded "
            "in each epoch and no activations are kept.",
        )
    size = f"{costs.num_bytes / 1e9:.2g} GB ({costs.image_bytes / 1e3:.3g} kB an image)"
    free = f"{costs.free_bytes / 1e9:.3g} GB are free"
    times = (
        f"{costs.epochs} epochs take about {costs.seconds_kept:.3g} s with them, "
        f"{costs.seconds_anew:.3g} s without"
    )
    what = f"The activations before {cut} are"
    if costs.num_bytes > LARGEST_SHARE_OF_DISK * costs.free_bytes:
        return ActivationChoice(
            False,
            f"{what} computed anew in each epoch: {size} are more than half of the "
            f"disk's room ({free}).",
        )
    if costs.seconds_kept >= costs.seconds_anew:
        return ActivationChoice(
            False, f"{what} computed anew in each epoch: {size}; {times}."
        )
    return ActivationChoice(True, f"{what} kept: {size}, {free}; {times}.")


def settled_choice(
    path: Path | None, choose: Callable[[], ActivationChoice]
) -> ActivationChoice:
    """Returns the choice that a run made before, or makes and notes it.

    The time and the room on the disk are others after a kill, and both ways differ in
    the last bits.

    Args:
        path: File of the choice; None notes nothing.
        choose: Makes it.
    """
    if path is None:
        return choose()
    try:
        return ActivationChoice(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        choice = choose()
        noted = dataclasses.asdict(choice)
        replaced(path, lambda beside: write_json(beside, noted))
        return choice


def free_bytes(cache_dir: str | Path | None) -> int:
    """Returns how much is free where features are kept."""
    folder = Path(cache_dir) if cache_dir is not None else default_cache_dir()
    folder.mkdir(parents=True, exist_ok=True)
    return shutil.disk_usage(folder).free
