"""From data and a `FeatureConfig` to the cached features of all splits."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import keras

from keras_rsft._runtime import DEFAULT_TIMEOUT, Cluster
from keras_rsft.backbones._load import load_backbone
from keras_rsft.config import FeatureConfig, feature_config, is_fixed_network
from keras_rsft.data._samples import ImageData, SampleData
from keras_rsft.data._sources import load_images
from keras_rsft.features._extract import (
    FeaturePass,
    FrozenBackbone,
    choose_precision,
    keep_shares,
    open_cached,
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


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource:
    """Features, the data and the backbone that they come from."""

    data: SampleData
    backbone: keras.Model
    features: SplitFeatures
    config: FeatureConfig
    progress: bool = True
    on_note: Callable[[str], None] = lambda text: None

    @property
    def images(self) -> ImageData:
        """The data: a backbone that can learn takes images."""
        return cast(ImageData, self.data)

    @property
    def origin(self) -> dict[str, Any]:
        """Where the features come from, for a run's record."""
        origin = {"data": self.data.source, **dataclasses.asdict(self.config)}
        del origin["cache_dir"]
        origin["image_size"] = list(self.backbone.input_shape[1:3]) or None
        if self.data.corrections is not None:
            origin["corrections"] = self.data.corrections.record()
        return origin

    def float32_backbone(self) -> keras.Model:
        """Returns the backbone in float32: saved models run on any machine."""
        if self.config.dtype == "float32":
            return self.backbone
        return load_configured(dataclasses.replace(self.config, dtype="float32"))


def resolve(
    data: SampleData | str | os.PathLike, features: FeatureConfig | str | None
) -> tuple[SampleData, FeatureConfig]:
    """Returns the samples, and which of their features are asked for."""
    if not isinstance(data, SampleData):
        data = load_images(os.fspath(data))
    return data, feature_config(features, data.kind)


def choose_dtype(config: FeatureConfig) -> str:
    """Returns the dtype that a backbone computes in."""
    if config.dtype == "auto" and is_fixed_network(str(config.backbone)):
        return "float32"
    return choose_precision(config.dtype)


def load_configured(config: FeatureConfig) -> keras.Model:
    """Loads the backbone of a resolved configuration."""
    return load_backbone(
        str(config.backbone),
        weights=config.weights,
        image_size=config.image_size,
        precision=choose_dtype(config),
    )


def open_features(
    data: SampleData,
    config: FeatureConfig,
    *,
    seed: int = 0,
    progress: bool = True,
    cluster: Cluster | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    device_names: Sequence[str] = (),
    on_backbone: Callable[[keras.Model], None] = lambda backbone: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> FeatureSource:
    """Loads the backbone, and computes or reads the features."""
    config = dataclasses.replace(config, dtype=choose_dtype(config))
    backbone = load_configured(config)
    on_backbone(backbone)
    features = extract_all(
        backbone,
        data,
        config,
        seed=seed,
        progress=progress,
        cluster=cluster,
        timeout=timeout,
        device_names=device_names,
    )
    return FeatureSource(data, backbone, features, config, progress, on_note)


def extract_all(
    backbone: keras.Model,
    data: SampleData,
    config: FeatureConfig,
    *,
    seed: int = 0,
    progress: bool = True,
    cluster: Cluster | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    device_names: Sequence[str] = (),
) -> SplitFeatures:
    """Runs the backbone over all splits, or reads the cached features."""
    passes = feature_passes(
        backbone, data, config, seed=seed, progress=progress, device_names=device_names
    )
    if cluster is not None and not cluster.is_alone:
        run_together(passes, cluster, timeout=timeout)
    else:
        for work in passes:
            run_alone(work)
    splits = (data.train, data.validation, data.test)
    opened = {
        split.name: open_cached(work.folder, split)
        for split, work in zip(splits, passes, strict=True)
    }
    return SplitFeatures(**opened, class_names=data.class_names)


def feature_passes(
    backbone: keras.Model | FrozenBackbone,
    data: SampleData,
    config: FeatureConfig,
    *,
    seed: int = 0,
    progress: bool = True,
    device_names: Sequence[str] = (),
) -> list[FeaturePass]:
    """Returns the passes that `extract_all` makes."""
    splits = (data.train, data.validation, data.test)
    more = (config.augmentations - 1) * len(data.train)
    if not isinstance(backbone, FrozenBackbone):
        backbone = FrozenBackbone(
            backbone,
            num_images=sum(map(len, splits)) + more,
            device_names=device_names,
        )
    return [
        FeaturePass(
            backbone,
            split,
            cache_dir=config.cache_dir,
            views=config.augmentations if split is data.train else 1,
            seed=seed,
            feature_precision=config.cache_dtype,
            progress=progress,
        )
        for split in splits
    ]


def keep_share(
    data: SampleData,
    config: FeatureConfig,
    *,
    seed: int,
    progress: bool,
    cluster: Cluster,
    timeout: float = DEFAULT_TIMEOUT,
) -> None:
    """Computes one process's share of the features, and waits for nobody."""
    passes = feature_passes(
        load_configured(config), data, config, seed=seed, progress=progress
    )
    keep_shares(passes, cluster, timeout=timeout)
