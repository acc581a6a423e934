"""The features of a data set's splits, computed by one process or by several."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import keras

from keras_rsft.cluster import DEFAULT_PATIENCE, Cluster
from keras_rsft.data import SampleData
from keras_rsft.features import FeatureSet, FrozenBase
from keras_rsft.features.extraction import (
    FeaturePass,
    make_pass,
    open_kept,
    run_alone,
    run_together,
)


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """The kept features of a data set."""

    train: FeatureSet
    validation: FeatureSet
    test: FeatureSet
    class_names: tuple[str, ...]

    @property
    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """`(id, reason)` of every image that could not be read."""
        parts = (self.train, self.validation, self.test)
        return tuple(pair for part in parts for pair in part.unreadable)


def extract_all(
    base: keras.Model,
    data: SampleData,
    *,
    views: int = 1,
    seed: int = 0,
    feature_precision: str = "float32",
    cache_dir: str | os.PathLike | None = None,
    progress: bool = True,
    cluster: Cluster | None = None,
    patience: float = DEFAULT_PATIENCE,
    device_names: Sequence[str] = (),
) -> SplitFeatures:
    """Runs the base over all splits, or reads what was kept of that.

    Args:
        base: Frozen base, images to features.
        data: The images.
        views: Views of each training image; the other splits have one.
        seed: Seed of the random views.
        feature_precision: How features are kept, as in `extract_features`.
        cache_dir: Where features are kept. Default: the user's cache folder.
        progress: Show progress bars.
        cluster: Processes that call this together, each to run the base on its share.
            They need the same images and a `cache_dir` that all of them see. Default:
            this one alone.
        patience: Seconds without progress after which another worker is given up.
            Default 600.
        device_names: Devices of this process that share the work. Default:
            TensorFlow's own choice of one.

    Raises:
        WorkerLost: If another worker does not do its part.
        DataError: If no image of a split can be read.
    """
    passes = feature_passes(
        base,
        data,
        views=views,
        seed=seed,
        feature_precision=feature_precision,
        cache_dir=cache_dir,
        progress=progress,
        device_names=device_names,
    )
    if cluster is not None and not cluster.is_alone:
        run_together(passes, cluster, patience=patience)
    else:
        for work in passes:
            run_alone(work)
    splits = (data.train, data.validation, data.test)
    kept = {
        split.name: open_kept(work.folder, split)
        for split, work in zip(splits, passes, strict=True)
    }
    return SplitFeatures(**kept, class_names=data.class_names)


def feature_passes(
    base: keras.Model | FrozenBase,
    data: SampleData,
    *,
    views: int,
    device_names: Sequence[str] = (),
    **options: Any,
) -> list[FeaturePass]:
    """Returns the passes that `extract_all` makes, for `run_together`.

    Args:
        base: Base, images to features; or a `FrozenBase` of it, taken as it is.
        data: The images.
        views: Views of each training image.
        device_names: As in `extract_all`.
        **options: As `extract_all` takes them.
    """
    splits = (data.train, data.validation, data.test)
    num_images = sum(map(len, splits)) + (views - 1) * len(data.train)
    if not isinstance(base, FrozenBase):
        base = FrozenBase(base, num_images=num_images, device_names=device_names)
    return [
        make_pass(base, split, views=views if split is data.train else 1, **options)
        for split in splits
    ]
