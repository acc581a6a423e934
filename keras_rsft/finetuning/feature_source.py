"""Where kept features come from: images, a base, and how the two were brought together.

The first step of a run, of a comparison and of a search.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Sequence
from typing import Any

import keras

from keras_rsft.backbones import load_backbone
from keras_rsft.backbones.base_name import is_fixed_network, require_takes
from keras_rsft.cluster import DEFAULT_PATIENCE, Cluster
from keras_rsft.data import SampleData, load_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.features.extraction import choose_precision, keep_shares
from keras_rsft.finetuning.split_features import (
    SplitFeatures,
    extract_all,
    feature_passes,
)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource:
    """Features, and what they were computed from.

    Attributes:
        data: The images, or texts.
        base: The frozen base, in the precision of the pass.
        features: The kept features of the splits.
        origin: Data, corrections if there are any, backbone, weights, image size,
            precision and views, for the record.
    """

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
    """Lists the images, loads the base, and computes or reads the features.

    Args:
        data: Loaded images or texts, or what `load_images` takes.
        backbone: As in `load_backbone`.
        weights: As in `load_backbone`.
        image_size: As in `load_backbone`.
        precision: `"float32"`, `"bfloat16"`, or `"auto"`.
        views: Views of each training image, at least 1.
        seed: Seed of the random views.
        cache_dir: Where features are kept; None: the user's cache folder.
        progress: Show progress bars.
        feature_precision: How features are kept, `"float32"` or `"float16"`.
        cluster: Processes that compute them together, as in `extract_all`.
        patience: How long to wait for a worker of it, as in `extract_all`.
        on_base: Called with the base before it is run, to refuse it.
        device_names: As in `extract_all`.

    Raises:
        InvalidArgument: If an argument cannot be used.
        DataError: If the data cannot be trained on.
        WeightsUnavailable: If the base's weights cannot be had.
        WorkerLost: If another worker does not do its part.
    """
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
    """Computes one process's share of the features, and waits for nobody.

    Once all shares are there, whoever asks for the features gets them.

    Args:
        data: As in `open_features`, like the others.
        backbone: The base.
        weights: Its weights.
        image_size: Side of its images.
        precision: Of its pass.
        cluster: How many shares there are, and which is this process's.
        patience: How long to wait for another process with the same share.
        **options: `views`, `seed`, `feature_precision`, `cache_dir` and `progress`.

    Raises:
        InvalidArgument: If an argument cannot be used.
        WeightsUnavailable: If the base's weights cannot be had.
        WorkerLost: If another process computes the same share for that long.
    """
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
        raise InvalidArgument(
            f"A text has one view. Received: views={views}. Leave out `--views`."
        )
    base = load_backbone(
        backbone, weights=weights, image_size=image_size, precision=precision
    )
    return data, base, precision


def precision_for(backbone: str | os.PathLike, precision: str) -> str:
    """Returns what a base computes in: `choose_precision`, where there is a choice."""
    if precision == "auto" and is_fixed_network(os.fspath(backbone)):
        return "float32"
    return choose_precision(precision)
