"""From data and a `FeatureConfig` to the cached features of all splits."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import keras
import numpy as np

from keras_rsft._progress import progress_bar
from keras_rsft._runtime import DEFAULT_TIMEOUT
from keras_rsft._storage import open_regular, read_json, replaced
from keras_rsft.backbones._load import load_backbone
from keras_rsft.config import (
    ENGINES,
    IMAGES,
    NOT_REPEATABLE,
    SPLITS,
    FeatureConfig,
    feature_config,
    is_fixed_network,
)
from keras_rsft.data._arrays import load_data
from keras_rsft.data._samples import ImageData, ImageSplit, SampleData
from keras_rsft.features import _extract
from keras_rsft.features._batches import positions_of
from keras_rsft.features._neighbours import before_reviews, copy_groups, with_copies
from keras_rsft.features._store import META_FILE, FeatureSet
from keras_rsft.training._devices import ONE_DEVICE, Devices


@dataclasses.dataclass(frozen=True)
class Copies:
    """Samples that were found more than once, over all splits."""

    groups: int
    different_labels: int
    kept_different: int  # Of these: by a review.
    # By split: held-out copies of samples of an earlier split.
    left_out: dict[str, int]
    remaining: dict[str, int]

    @property
    def sentence(self) -> str:
        """Says in one line how many there are, and what was done."""
        text = (
            f"{self.groups:,} {'group' if self.groups == 1 else 'groups'} of copies, "
            f"{self.different_labels:,} with different labels"
        )
        if self.different_labels:
            are = "label is" if self.different_labels == 1 else "labels are"
            text += f": at least {self.different_labels:,} {are} wrong"
        if self.kept_different:
            text += f", {self.kept_different:,} of them after a review: look again"
        text += "."
        for name, count in self.left_out.items():
            text += f" {_copied_text(count, name)}: left out of the accuracy."
        for name, count in self.remaining.items():
            text += f" {_copied_text(count, name)}: the accuracy there is too good."
        return text


def _copied_text(count: int, split: str) -> str:
    are = "sample is a copy" if count == 1 else "samples are copies"
    return f"{count:,} {split} {are} of samples in other splits"


@dataclasses.dataclass(frozen=True)
class SplitFeatures:
    """Features of the splits.

    `left_out` has, by split, held-out samples whose copy is in an earlier split: their
    labels are audited, but have no part in any accuracy. `copies` is None where there
    are none. `notes` and `unread_files` are those of the data; `one_colour` are the ids
    of images of nearly one colour.
    """

    train: FeatureSet
    validation: FeatureSet
    test: FeatureSet
    class_names: tuple[str, ...]
    left_out: dict[str, FeatureSet] = dataclasses.field(default_factory=dict)
    copies: Copies | None = None
    notes: tuple[str, ...] = ()
    unread_files: dict[str, int] = dataclasses.field(default_factory=dict)
    one_colour: tuple[str, ...] = ()

    @property
    def one_colour_notes(self) -> tuple[str, ...]:
        """Says in a sentence how many images are of nearly one colour, if any are."""
        if not self.one_colour:
            return ()
        count, first = len(self.one_colour), self.one_colour[0]
        are = "image is" if count == 1 else "images are"
        return (
            f"{count:,} {are} of (nearly) one colour, such as {first}. Values of 16 "
            "bits below 4,096 are nearly black, and what is transparent is white.",
        )

    @property
    def copy_of(self) -> dict[str, str]:
        """The id of the first copy of every sample that is a copy of another."""
        parts = (self.train, self.validation, self.test, *self.left_out.values())
        first: dict[int, str] = {}
        found = {}
        for part in parts:
            groups = np.arange(0) if part.groups is None else part.groups
            for group, one in zip(groups.tolist(), part.ids.tolist(), strict=False):
                if (original := first.setdefault(group, one)) != one:
                    found[one] = original
        return found

    @property
    def unreadable(self) -> tuple[tuple[str, str], ...]:
        """`(id, reason)` of every image that could not be read."""
        parts = (self.train, self.validation, self.test)
        return tuple(pair for part in parts for pair in part.unreadable)


# How alike the pixels of copies are at least: correlation of 16 x 16 pixels. Of 1,797
# digits no two are more alike; of 300 photos of 32 x 32 pixels, saved again as JPEG of
# quality 75 or enlarged, the least alike had 0.998.
_PIXELS_ALIKE = 0.997
_PIXELS_SIZE = 16


def _copy_groups(
    parts: list[FeatureSet], data: SampleData, cache: Path, *, progress: bool
) -> np.ndarray:
    """Returns which samples are copies of one another: cached, or looked for."""
    whole = before_reviews(parts)
    # The folders of features are named after the samples and the backbone.
    names = "\0".join([part.path.parent.name for part in whole])
    path = cache / f"copies-{hashlib.sha256(names.encode()).hexdigest()[:32]}.npy"
    with contextlib.suppress(OSError, EOFError, ValueError), open_regular(path) as file:
        groups, checksum = np.split(np.load(file, allow_pickle=False), [-1])
        known = len(groups) == sum(map(len, whole))
        if known and checksum == zlib.crc32(groups.tobytes()):
            return groups
    splits = (data.train, data.validation, data.test)
    originals = [split.before_review or split for split in splits]
    starts = np.cumsum([0, *map(len, whole)])

    def look_same(pairs: np.ndarray) -> np.ndarray:
        wanted = np.unique(pairs)
        pixels = np.zeros((len(wanted), 3 * _PIXELS_SIZE**2), np.float32)
        with progress_bar(
            "Comparing pixels", total=len(wanted), unit="images", visible=progress
        ) as advance:
            for at, (part, split) in enumerate(zip(whole, originals, strict=True)):
                first, last = np.searchsorted(wanted, starts[at : at + 2])
                rows = positions_of(part, split)[wanted[first:last] - starts[at]]
                for index, image in cast(ImageSplit, split.take(rows)).images(
                    _PIXELS_SIZE
                ):
                    values = image.numpy().ravel()
                    values -= values.mean()
                    length = max(float(np.linalg.norm(values)), 1e-6)
                    pixels[first + int(index)] = values / length
                    advance(1)
        one, other = (pixels[np.searchsorted(wanted, side)] for side in pairs.T)
        return np.einsum("ij,ij->i", one, other) >= _PIXELS_ALIKE

    look = look_same if data.kind == IMAGES else None
    groups = copy_groups(whole, look, progress=progress).astype(np.int64)
    with contextlib.suppress(OSError):  # It is found again in no time.
        replaced(path, lambda place: _write_array(place, groups))
    return groups


def _write_array(path: Path, values: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, np.append(values, zlib.crc32(values.tobytes())))


def _apart(
    parts: list[FeatureSet], data: SampleData, groups_of_all: np.ndarray
) -> tuple[SplitFeatures, SampleData]:
    """Leaves copies of samples of earlier splits out of the splits that were cut."""
    parts = with_copies(parts, groups_of_all)
    groups = [np.asarray(part.groups) for part in parts]
    everywhere = np.concatenate(groups)
    labels = np.concatenate([part.labels for part in parts])
    several = np.unique(everywhere, return_counts=True)[1] > 1
    if not several.any():
        return SplitFeatures(parts[0], parts[1], parts[2], data.class_names), data
    reviewed = [
        np.zeros(len(part), bool) if part.reviewed is None else part.reviewed
        for part in parts
    ]

    def of_different_labels(chosen: np.ndarray) -> int:
        pairs = np.stack([everywhere, labels], axis=1)[chosen]
        labelled = np.unique(pairs, axis=0)[:, 0]
        return int((np.unique(labelled, return_counts=True)[1] > 1).sum())

    left_out: dict[str, FeatureSet] = {}
    remaining: dict[str, int] = {}
    changed: dict[str, Any] = {}
    for at, name in enumerate(SPLITS[1:], start=1):
        repeated = np.isin(groups[at], np.concatenate(groups[:at]))
        if not repeated.any():
            continue
        if name not in data.cut or repeated.all():
            remaining[name] = int(repeated.sum())
            continue
        whole, split = parts[at], getattr(data, name)
        copies = whole.take(np.flatnonzero(repeated))
        left_out[name] = dataclasses.replace(copies, unreadable=())
        parts[at] = whole.take(np.flatnonzero(~repeated))
        changed[name] = split.take(np.flatnonzero(~np.isin(split.ids, copies.ids)))
    found = Copies(
        groups=int(several.sum()),
        different_labels=of_different_labels(np.ones(len(labels), bool)),
        kept_different=of_different_labels(np.concatenate(reviewed)),
        left_out={name: len(part) for name, part in left_out.items()},
        remaining=remaining,
    )
    train, validation, test = parts
    names = data.class_names
    features = SplitFeatures(train, validation, test, names, left_out, found)
    return features, dataclasses.replace(data, **changed)


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureSource:
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
        origin = {"data": self.data.source, **dataclasses.asdict(self.config)}
        if self.data.fingerprint is not None:
            origin["data"] += NOT_REPEATABLE
            origin["fingerprint"] = self.data.fingerprint
        del origin["cache_dir"]
        cached = self.features.train.path.parent
        origin["engine"] = (read_json(cached / META_FILE) or {}).get("engine")
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
    data: Any,
    features: FeatureConfig | str | None,
    validation_data: Any = None,
    test_data: Any = None,
    progress: bool = True,
) -> tuple[SampleData, FeatureConfig]:
    """Returns the samples, and which of their features are asked for."""
    data = load_data(
        data, validation_data=validation_data, test_data=test_data, progress=progress
    )
    return data, feature_config(features, data.kind)


def choose_dtype(config: FeatureConfig) -> str:
    if config.dtype == "auto" and (
        is_fixed_network(str(config.backbone)) or config.engine not in ENGINES[:2]
    ):
        return "float32"
    return _extract.choose_dtype(config.dtype)


def choose_engine(config: FeatureConfig) -> str:
    """Returns what is asked for; engines other than TensorFlow compute in float32."""
    return "tensorflow" if choose_dtype(config) == "bfloat16" else config.engine


def load_configured(config: FeatureConfig) -> keras.Model:
    return load_backbone(
        str(config.backbone),
        weights=config.weights,
        image_size=config.image_size,
        dtype=choose_dtype(config),
    )


def open_features(
    data: SampleData,
    config: FeatureConfig,
    *,
    seed: int = 0,
    progress: bool = True,
    devices: Devices = ONE_DEVICE,
    timeout: float = DEFAULT_TIMEOUT,
    on_backbone: Callable[[keras.Model], None] = lambda backbone: None,
    on_note: Callable[[str], None] = lambda text: None,
) -> FeatureSource:
    """Loads the backbone, and runs it over all splits or reads the cached features."""
    config = dataclasses.replace(config, dtype=choose_dtype(config))
    backbone = load_configured(config)
    on_backbone(backbone)
    passes = feature_passes(
        backbone,
        data,
        config,
        seed=seed,
        progress=progress,
        devices=devices,
        on_note=on_note,
    )
    if devices.cluster.is_alone:
        for work in passes:
            _extract.run_alone(work)
    else:
        _extract.run_together(passes, devices.cluster, timeout=timeout)
    splits = (data.train, data.validation, data.test)  # A pass has them uncorrected.
    parts = [
        _extract.open_cached(work.folder, split)
        for split, work in zip(splits, passes, strict=True)
    ]
    groups = _copy_groups(parts, data, passes[0].folder.parent, progress=progress)
    features, data = _apart(parts, data, groups)
    plain = [one for work in passes for one in _extract.images_of_one_colour(work)]
    features = dataclasses.replace(
        features,
        notes=data.notes,
        unread_files=data.unread_files,
        one_colour=tuple(plain),
    )
    return FeatureSource(data, backbone, features, config, progress, on_note)


def feature_passes(
    backbone: keras.Model | _extract.FrozenBackbone,
    data: SampleData,
    config: FeatureConfig,
    *,
    seed: int = 0,
    progress: bool = True,
    devices: Devices = ONE_DEVICE,
    on_note: Callable[[str], None] = lambda text: None,
) -> list[_extract.FeaturePass]:
    splits = (data.train, data.validation, data.test)
    more = (config.augmentations - 1) * len(data.train)
    if not isinstance(backbone, _extract.FrozenBackbone):
        backbone = _extract.FrozenBackbone(
            backbone,
            num_images=sum(map(len, splits)) + more,
            device_names=devices.local_names,
            engine=choose_engine(config),
            on_note=on_note,
        )
    return [
        _extract.FeaturePass(
            backbone,
            split,
            cache_dir=config.cache_dir,
            augmentations=config.augmentations if split is data.train else 1,
            seed=seed,
            cache_dtype=config.cache_dtype,
            progress=progress,
        )
        for split in splits
    ]
