"""Ranks backbones by a quick head on a sample of the data."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rsft._runtime import require_tensorflow_backend
from keras_rsft._stats import NORMAL_QUANTILE
from keras_rsft.backbones._foreign import weights_bytes
from keras_rsft.backbones._load import check_backbone_name
from keras_rsft.config import FeatureConfig, feature_config
from keras_rsft.data._arrays import load_data
from keras_rsft.data._splits import stratified_sample
from keras_rsft.errors import DataError, InvalidArgument, WeightsUnavailable
from keras_rsft.features import _extract
from keras_rsft.label_quality._audit import MIN_NOISE_RATE, LabelQuality, audit_labels
from keras_rsft.training._features import choose_engine, load_configured

DEFAULT_SAMPLE = 1000
# Errors of one backbone, after which the others are still ranked.
_OWN_TROUBLE = (
    InvalidArgument, WeightsUnavailable, DataError, ImportError, tf.errors.OpError
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class RankedBackbone:
    name: str
    accuracy: float
    accuracy_error: float
    behind: float
    behind_error: float
    seconds_per_image: float
    weights_bytes: int
    dim: int
    image_size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class BackboneRanking:
    """Backbones by expected accuracy.

    Attributes:
        ranked: The backbones, the best first.
        failed: Name and reason of each backbone that could not be used.
        num_images: Images that were looked at.
        num_classes: Classes.
        noise_rate: Fraction of the labels that look wrong, a mean over the backbones.
        counts_right_labels: Whether each label counts by how likely it is right, as
            `noise_rate` is not negligible; else all count the same.
    """

    ranked: tuple[RankedBackbone, ...]
    failed: tuple[tuple[str, str], ...]
    num_images: int
    num_classes: int
    noise_rate: float
    counts_right_labels: bool


def rank_backbones(
    data: Any,
    backbones: Sequence[str | os.PathLike],
    *,
    sample: int = DEFAULT_SAMPLE,
    features: FeatureConfig | None = None,
    seed: int = 0,
    progress: bool = True,
) -> BackboneRanking:
    """Scores backbones on a stratified sample of the training images.

    The expected accuracy is that of the ridge regression of `audit_labels`, each
    sample predicted from the others (Allen, 1974). Where labels look wrong, agreement
    with them would count for mistakes too: then each label counts by the probability
    that it is right, a mean over the backbones, so that none is judged by its own
    opinion alone. Where only the given labels counted, wrong ones spread evenly over
    the classes would lower all accuracies without changing their order.

    Args:
        data: Loaded images or texts, or what `load_data` takes: `(x, y)`, a
            `tf.data.Dataset`, a DataFrame, a folder and so on.
        backbones: Names, as in `load_backbone`.
        sample: Most images to look at, at least 2. Default 1000.
        features: Which features of all backbones, without augmentations. Default:
            `FeatureConfig()`.
        seed: Chooses the sample. Default 0.
        progress: Show progress bars. Default True.

    Returns:
        The backbones, the best first, and those that could not be used, with the
        reason.

    Raises:
        InvalidArgument: A name is not known, before anything is loaded.
        WeightsUnavailable: No backbone could be used.
    """
    require_tensorflow_backend("`rank_backbones`")
    names = list(dict.fromkeys(os.fspath(name) for name in backbones))
    if not names or sample < 2:
        raise InvalidArgument(
            "Expected at least one backbone, and a sample of at least 2 images. "
            f"Received: {names}, sample={sample}."
        )
    if features is not None and features.backbone is not None:
        raise InvalidArgument(
            "The names of the backbones come in `backbones`. Received: "
            f"features.backbone={features.backbone!r}."
        )
    for name in names:
        check_backbone_name(name)
    data = load_data(data, progress=progress)
    shared = features or FeatureConfig()
    configs = [
        feature_config(dataclasses.replace(shared, backbone=name), data.kind)
        for name in names
    ]
    chosen = stratified_sample(data.train.labels, sample, seed=seed)
    images = data.train.take(chosen)
    measured, failed = [], []
    for name, config in zip(names, configs, strict=True):
        try:
            backbone = load_configured(config)
            frozen = _extract.FrozenBackbone(
                backbone, num_images=len(images), engine=choose_engine(config)
            )
            cached = _extract.extract_features(
                frozen,
                images,
                cache_dir=config.cache_dir,
                cache_dtype=config.cache_dtype,
                progress=progress,
            )
            quality = audit_labels(
                cached, num_classes=data.num_classes, progress=progress
            )
            costs: dict[str, Any] = {
                "name": name,
                "seconds_per_image": _extract.seconds_per_image(frozen, images),
                "weights_bytes": weights_bytes(backbone),
                "dim": frozen.dim,
                "image_size": frozen.image_size,
            }
            measured.append((quality, costs))
        except _OWN_TROUBLE as error:
            failed.append((name, str(error)))
    if not measured:
        reasons = "\n".join(f"{name}: {reason}" for name, reason in failed)
        raise WeightsUnavailable(f"None of the backbones can be used.\n{reasons}")
    weights = label_weights([quality for quality, _ in measured])
    noise_rate = float(1.0 - weights.mean())
    counted = noise_rate >= MIN_NOISE_RATE
    if not counted:
        weights = np.ones_like(weights)
    rights = [one.out_of_sample.argmax(axis=1) == one.labels for one, _ in measured]
    best = max(rights, key=lambda right: weights @ right)
    ranked = []
    for (_, costs), right in zip(measured, rights, strict=True):
        accuracy, accuracy_error = weighted_mean(right, weights)
        behind, behind_error = weighted_mean(best.astype(float) - right, weights)
        one = RankedBackbone(
            accuracy=accuracy,
            accuracy_error=accuracy_error,
            behind=behind,
            behind_error=behind_error,
            **costs,
        )
        ranked.append(one)
    ranked.sort(key=lambda one: (-one.accuracy, one.seconds_per_image))
    return BackboneRanking(
        ranked=tuple(ranked),
        failed=tuple(failed),
        num_images=len(weights),
        num_classes=data.num_classes,
        noise_rate=noise_rate,
        counts_right_labels=counted,
    )


def label_weights(label_qualities: Sequence[LabelQuality]) -> np.ndarray:
    """Returns how likely each label is right, float64 `(n,)`: a mean over backbones."""
    judges = [one.right_probability for one in label_qualities if one.can_judge]
    if not judges:
        return np.ones(len(label_qualities[0].labels))
    return np.asarray(np.mean(judges, axis=0, dtype=np.float64))


def weighted_mean(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Returns a weighted mean, and half of its 95 % interval."""
    total = float(weights.sum())
    mean = float(weights @ values) / total
    error = float(np.sqrt(np.sum(np.square(weights * (values - mean))))) / total
    return mean, NORMAL_QUANTILE * error
