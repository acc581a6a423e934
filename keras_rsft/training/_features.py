"""From a source and a backbone to the cached features of its splits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_rsft._runtime import DEFAULT_PATIENCE, Cluster
from keras_rsft.backbones._load import load_backbone
from keras_rsft.config import is_fixed_network, require_takes
from keras_rsft.data._samples import SampleData
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.features._extract import (
    FeaturePass,
    FrozenBase,
    choose_precision,
    keep_shares,
    open_kept,
    run_alone,
    run_together,
)
from keras_rsft.features._store import FeatureSet


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """The cached features of a data set."""

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
    """Runs the base over all splits, or reads the cached features."""
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
    """Returns the passes that `extract_all` makes, over a base or `FrozenBase`."""
    splits = (data.train, data.validation, data.test)
    num_images = sum(map(len, splits)) + (views - 1) * len(data.train)
    if not isinstance(base, FrozenBase):
        base = FrozenBase(base, num_images=num_images, device_names=device_names)
    return [
        FeaturePass(base, split, views=views if split is data.train else 1, **options)
        for split in splits
    ]


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource:
    """Features, what they were computed from, and its record."""

    data: SampleData
    base: keras.Model
    features: SplitFeatures
    origin: dict[str, Any]

    def float32_base(self) -> keras.Model:
        """Returns the base in float32: what is kept and served runs on any machine."""
        if self.origin["precision"] == "float32":
            return self.base
        return load_backbone(
            self.origin["backbone"],
            weights=self.origin["weights"],
            image_size=self.base.input_shape[1:3] or None,
        )


def open_features(
    data: SampleData | str | os.PathLike,
    *,
    backbone: str,
    weights: str,
    image_size: int | None,
    precision: str,
    views: int,
    seed: int,
    cache_dir: str | os.PathLike | None,
    progress: bool,
    feature_precision: str = "float32",
    cluster: Cluster | None = None,
    patience: float = DEFAULT_PATIENCE,
    on_base: Callable[[keras.Model], None] = lambda base: None,
    device_names: Sequence[str] = (),
) -> FeatureSource:
    """Lists the images, loads the base, and computes or reads the features."""
    data, base, precision = _loaded(
        data, backbone, weights, image_size, precision, views
    )
    on_base(base)
    features = extract_all(
        base,
        data,
        views=views,
        seed=seed,
        feature_precision=feature_precision,
        cache_dir=cache_dir,
        progress=progress,
        cluster=cluster,
        patience=patience,
        device_names=device_names,
    )
    origin = {
        "data": data.source,
        "backbone": backbone,
        "weights": weights,
        "image_size": list(base.input_shape[1:3]) or None,
        "precision": precision,
        "views": views,
        "feature_precision": feature_precision,
    }
    if data.corrections is not None:
        origin["corrections"] = data.corrections.record()
    return FeatureSource(data, base, features, origin)


def keep_share(
    data: SampleData | str | os.PathLike,
    *,
    backbone: str,
    weights: str,
    image_size: int | None,
    precision: str,
    cluster: Cluster,
    patience: float = DEFAULT_PATIENCE,
    **options: Any,
) -> None:
    """Computes one process's share of the features, and waits for nobody."""
    views = options["views"]
    data, base, _ = _loaded(data, backbone, weights, image_size, precision, views)
    keep_shares(feature_passes(base, data, **options), cluster, patience=patience)


def _loaded(
    data: SampleData | str | os.PathLike,
    backbone: str,
    weights: str,
    image_size: int | None,
    precision: str,
    views: int,
) -> tuple[SampleData, keras.Model, str]:
    """Returns images and base, and the precision that the base computes in."""
    if views < 1:
        raise InvalidArgument(f"`views` must be at least 1. Received: {views}.")
    precision = precision_for(backbone, precision)
    if not isinstance(data, SampleData):
        data = load_images(data)
    require_takes(backbone, data.kind)
    if data.kind == "texts" and views > 1:
        raise InvalidArgument(f"A text has one view. Received: augmentations={views}.")
    base = load_backbone(
        backbone, weights=weights, image_size=image_size, precision=precision
    )
    return data, base, precision


def precision_for(backbone: str | os.PathLike, precision: str) -> str:
    """Returns what a base computes in: `choose_precision`, where there is a choice."""
    if precision == "auto" and is_fixed_network(os.fspath(backbone)):
        return "float32"
    return choose_precision(precision)
