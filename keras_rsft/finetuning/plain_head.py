"""Trains a plain head beside one that rejects, and compares them image by image."""

from __future__ import annotations

import dataclasses

import numpy as np

from keras_rsft.finetuning.devices import ONE_DEVICE, Devices
from keras_rsft.finetuning.head_training import (
    TrainedHead,
    head_probabilities,
    train_head,
)
from keras_rsft.finetuning.settings import TrainingSettings
from keras_rsft.finetuning.split_features import SplitFeatures
from keras_rsft.policy_choice import PolicyChoice


@dataclasses.dataclass(frozen=True)
class AgainstPlain:
    """How often a head with rejection and a plain one were right on the same images.

    Attributes:
        split: `"test"`, or `"validation"` where there is no test split.
        images: Number of images.
        both_right: Images that both get right, by the given labels.
        only_rejection_right: Images that only the head with rejection gets right.
        only_plain_right: Images that only the plain head gets right.
        wrong_labels: How many of these labels are known to be wrong; None where the
            right labels are not known.
        history: Each logged value of the plain head, one number an epoch.
        results: Final numbers of the plain head, as in `Run.results`.
    """

    split: str
    images: int
    both_right: int
    only_rejection_right: int
    only_plain_right: int
    wrong_labels: int | None
    history: dict[str, list[float]]
    results: dict[str, float]


def train_against_plain(
    features: SplitFeatures,
    trained: TrainedHead,
    settings: TrainingSettings,
    *,
    progress: bool = True,
    devices: Devices = ONE_DEVICE,
) -> AgainstPlain | None:
    """Trains a head that accepts everything, all else equal, and compares.

    Args:
        features: The splits.
        trained: The head with rejection.
        settings: How it was trained.
        progress: Show a progress bar. Default True.
        devices: What to train on. Default: one device.

    Returns:
        The comparison; None where the head's policy accepts everything, or there is
        neither a test nor a validation split.
    """
    parts = {"test": features.test, "validation": features.validation}
    judged = next(((name, part) for name, part in parts.items() if len(part)), None)
    if trained.model.policy.accepts_every_finite_sample or judged is None:
        return None
    plain = train_head(
        features,
        dataclasses.replace(settings, policy=PolicyChoice("accept-all")),
        progress=progress,
        called="Training the plain head for comparison",
        devices=devices,
        curves=True,
    )
    name, part = judged
    right, plain_right = (
        head_probabilities(model, part).argmax(axis=-1) == part.labels
        for model in (trained.model, plain.model)
    )
    clean = part.clean_labels
    return AgainstPlain(
        split=name,
        images=len(part),
        both_right=int(np.sum(right & plain_right)),
        only_rejection_right=int(np.sum(right & ~plain_right)),
        only_plain_right=int(np.sum(plain_right & ~right)),
        wrong_labels=None if clean is None else int(np.sum(clean != part.labels)),
        history=plain.history,
        results=plain.results,
    )
