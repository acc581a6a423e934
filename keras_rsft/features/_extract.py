"""Runs a frozen backbone once over a split and caches the features."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import errno
import functools
import hashlib
import itertools
import json
import os
import shutil
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from rich.filesize import decimal

from keras_rsft._progress import progress_bar
from keras_rsft._runtime import DEFAULT_TIMEOUT, Cluster, require_tensorflow_backend
from keras_rsft._storage import locked, make_folder, open_regular, write_json
from keras_rsft.config import CACHE_DTYPES, DTYPES, require_known
from keras_rsft.data._arrays import whole_split
from keras_rsft.data._samples import SampleSplit
from keras_rsft.errors import DataError, WorkerLost
from keras_rsft.features import _shares
from keras_rsft.features._engines import FOLDER, Forward, choose_engine
from keras_rsft.features._shares import Part
from keras_rsft.features._store import (
    FEATURES_FILE,
    INDEX_FILE,
    META_FILE,
    FeatureSet,
    checksum_of,
    open_features,
    read_meta,
)

# Weights as constants are folded once (BatchNorm into convolutions, casts to
# bfloat16): a tenth faster for ResNet50, after four seconds of folding, which pays
# from some 1,500 images on. A graph can hold 2 GB, and is copied while it is folded.
MIN_IMAGES_FOR_CONSTANTS = 2000
MAX_BYTES_AS_CONSTANTS = 2**28


class FrozenBackbone:
    """A backbone as it is now; what is done to its weights later goes unnoticed."""

    def __init__(
        self,
        backbone: keras.Model,
        *,
        num_images: int = 0,
        device_names: Sequence[str] = (),
        engine: str = "tensorflow",
        on_note: Callable[[str], None] = lambda text: None,
    ):
        self.engine, self._on_note = engine, on_note
        self._run: Forward | None = None
        self._backbone = backbone
        self._device_names = tuple(device_names)
        self._num_images = num_images
        self.sample_shape = tuple(backbone.input_shape[1:])
        self.image_size = self.sample_shape[:2]
        self.dim = int(backbone.output_shape[-1])

    @functools.cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: the architecture and every weight."""
        config = json.loads(self._backbone.to_json())
        config.pop("build_config", None)
        described = json.dumps(_nameless(config, {}), sort_keys=True).encode()
        digest = hashlib.blake2b(described, digest_size=16)
        for weight in self._backbone.weights:
            digest.update(np.ascontiguousarray(weight.numpy()).data)
        return digest.hexdigest()

    @functools.cached_property
    def forward(self) -> tf.types.experimental.PolymorphicFunction:
        return self._traced(())

    def open_engine(self, folder: Path, batch: tf.Tensor) -> None:
        """Chooses what runs the backbone, before the first batch."""
        if len(self._device_names) > 1:
            self.engine = "tensorflow"
        if self.engine == "tensorflow" or self._run is not None:
            return
        self.engine, self._run = choose_engine(
            self.engine,
            self.forward,
            folder=folder,
            fingerprint=self.fingerprint,
            batch=batch.numpy(),
            num_batches=self._num_images / len(batch),
            on_note=self._on_note,
        )

    def over(
        self, batches: Iterable[tuple[Any, tf.Tensor]]
    ) -> Iterator[tuple[Any, np.ndarray]]:
        """Runs the backbone over batches, each on one device, all devices at once."""
        if len(self._device_names) < 2:
            yield from ((one, self._computed(images)) for one, images in batches)
            return
        functions = [self._on_device(name) for name in self._device_names]
        waiting: collections.deque = collections.deque()
        with ThreadPoolExecutor(len(functions)) as threads:
            for run, (number, images) in zip(
                itertools.cycle(functions), batches, strict=False
            ):
                waiting.append((number, threads.submit(run, images)))
                if len(waiting) == len(functions):
                    number, features = waiting.popleft()
                    yield number, features.result()
            for number, features in waiting:
                yield number, features.result()

    def _computed(self, images: tf.Tensor) -> np.ndarray:
        if self._run is None:
            return self.forward(images).numpy()
        return self._run(images.numpy())

    def _on_device(self, name: str) -> Any:
        """Returns a function from images to an array, with the weights on a device."""
        with tf.device(name):
            copies = [(v, tf.identity(v.value)) for v in self._backbone.variables]
            run = self._traced(copies).get_concrete_function()

        def on_device(images: tf.Tensor) -> np.ndarray:
            with tf.device(name):
                return run(tf.identity(images)).numpy()

        return on_device

    def _traced(self, copies: Sequence[tuple[Any, tf.Tensor]]) -> Any:
        backbone = self._backbone
        weights: list[tuple[Any, np.ndarray]] = []
        if self._num_images >= MIN_IMAGES_FOR_CONSTANTS:
            weights = [(variable, variable.numpy()) for variable in backbone.variables]
        if sum(value.nbytes for _, value in weights) > MAX_BYTES_AS_CONSTANTS:
            weights = []
        spec = tf.TensorSpec((None, *self.sample_shape), backbone.inputs[0].dtype)

        @tf.function(input_signature=[spec], autograph=False)
        def forward(images: tf.Tensor) -> tf.Tensor:
            constants = [(variable, tf.constant(value)) for variable, value in weights]
            with keras.StatelessScope(state_mapping=constants or copies):
                return tf.cast(backbone(images, training=False), tf.float32)

        return forward


def _nameless(node: Any, positions: Mapping[str, int]) -> Any:
    """Returns a part of a config, in which layers are called by their positions."""
    # Keras numbers its automatic names through a process: the second load of a
    # backbone differs from the first in nothing else.
    if isinstance(node, list):
        return [_nameless(child, positions) for child in node]
    if not isinstance(node, dict):
        return node
    layers = node.get("layers")
    if isinstance(layers, list) and all(
        isinstance(one, dict) and isinstance(one.get("config"), dict) for one in layers
    ):
        names = [one.get("name", one["config"].get("name")) for one in layers]
        positions = {name: position for position, name in enumerate(names)}
        unnamed = [
            _unnamed({**one, "config": _unnamed(one["config"])}) for one in layers
        ]
        node = node | {"layers": unnamed}
        for key in ("input_layers", "output_layers"):
            if key in node:
                node[key] = _by_position(node[key], positions)
    if "keras_history" in node:
        node = node | {"keras_history": _by_position(node["keras_history"], positions)}
    if "trainable" in node:  # Also of a layer within another one.
        node = _unnamed(node)
    return {key: _nameless(value, positions) for key, value in node.items()}


def _unnamed(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key != "name"}


def _by_position(references: Any, positions: Mapping[str, int]) -> Any:
    """Returns references to layers, nested in any way, without their names."""
    if isinstance(references, dict):
        return {key: _by_position(one, positions) for key, one in references.items()}
    if not isinstance(references, list):
        return references
    if references and isinstance(references[0], str):
        name, *rest = references
        return [positions.get(name, name), *rest]
    return [_by_position(one, positions) for one in references]


_CPU_FLAGS = {"avx512_bf16", "amx_bf16"}
_FIRST_GPU_WITH_BFLOAT16 = (8, 0)


def choose_dtype(dtype: str = "auto") -> str:
    require_known("dtype", dtype, DTYPES)
    if dtype != "auto":
        return dtype
    return "bfloat16" if _has_bfloat16() else "float32"


def _has_bfloat16() -> bool:
    gpus = tf.config.list_physical_devices("GPU")
    if gpus:
        details = tf.config.experimental.get_device_details(gpus[0])
        capability = details.get("compute_capability", (0, 0))
        return tuple(capability) >= _FIRST_GPU_WITH_BFLOAT16
    try:
        description = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:  # Not Linux: nothing to ask, so nothing is assumed.
        return False
    return bool(_CPU_FLAGS & set(description.split()))


_LEAST_SECONDS = 1.0
_MOST_BATCHES = 20


def seconds_per_image(
    backbone: FrozenBackbone, split: SampleSplit, *, batch_size: int = 32
) -> float:
    """Measures the pass: reading and decoding images, and the backbone on them."""
    samples = split.inputs(backbone.sample_shape)
    if next(iter(samples.take(1)), None) is None:
        raise DataError(
            f"None of the {len(split)} {split.kind} of {split.name!r} can be read."
        )
    batches = samples.repeat().batch(batch_size).prefetch(2).take(_MOST_BATCHES + 1)
    shape = (-1, *backbone.sample_shape)
    done = backbone.over((len(batch), tf.reshape(batch, shape)) for _, batch in batches)
    started, counted = 0.0, 0
    for number, (count, _) in enumerate(done):
        now = time.perf_counter()
        if number == 0:
            started = now
            continue
        counted += count
        if now - started >= _LEAST_SECONDS:
            break
    return (now - started) / counted


# Part of every key: raise it when decoding, resizing, the format, or how a backbone is
# told from another changes.
FORMAT_VERSION = 3


@dataclasses.dataclass(eq=False)
class FeaturePass:
    """One pass of a backbone over a split, as `extract_features` is asked for it."""

    backbone: keras.Model | FrozenBackbone
    split: SampleSplit
    cache_dir: str | os.PathLike | None = None
    batch_size: int = 32
    augmentations: int = 1
    seed: int = 0
    cache_dtype: str = "float32"
    called: str = "Features"
    progress: bool = True

    def __post_init__(self) -> None:
        while self.split.before_review is not None:
            self.split = self.split.before_review
        root = default_cache_dir() if self.cache_dir is None else Path(self.cache_dir)
        root.mkdir(parents=True, exist_ok=True)
        if not isinstance(self.backbone, FrozenBackbone):
            num_images = self.augmentations * len(self.split)
            self.backbone = FrozenBackbone(self.backbone, num_images=num_images)
        self.frozen = self.backbone
        require_known("cache dtype", self.cache_dtype, CACHE_DTYPES)
        # Names the features of these samples under this backbone, with its weights.
        prints = [self.frozen.fingerprint, self.split.fingerprint]
        seed = self.seed if self.augmentations > 1 else None
        described = [FORMAT_VERSION, *prints, self.augmentations, seed]
        if self.cache_dtype != "float32":
            described.append(self.cache_dtype)
        encoded = json.dumps(described).encode()
        self.folder = root / hashlib.blake2b(encoded, digest_size=16).hexdigest()

    @property
    def is_done(self) -> bool:
        return read_meta(self.folder) is not None

    @property
    def row_bytes(self) -> int:
        itemsize = np.dtype(self.cache_dtype).itemsize
        return itemsize * self.augmentations * self.frozen.dim

    @property
    def meta(self) -> dict[str, Any]:
        return {
            "views": self.augmentations,
            "dim": self.frozen.dim,
            "precision": self.cache_dtype,
            "engine": self.frozen.engine,
        }

    def inputs(self, start: int, stop: int) -> tf.data.Dataset:
        return self.split.inputs(
            self.frozen.sample_shape,
            start=start,
            stop=stop,
            augmentations=self.augmentations,
            seed=self.seed,
        )

    def parts(self, shares: int) -> list[Part]:
        return _shares.parts_of(self.folder, len(self.split), self.batch_size, shares)


def _join_parts(work: FeaturePass, parts: Sequence[Part], timeout: float) -> None:
    """Joins finished parts, verifies the set, and gives it its name."""
    # Verified are each part's checksums against those of its worker, the number of its
    # rows, and that its samples are of its shard, in order, none twice. Afterwards all
    # parts are removed.
    _require_rows(sum(part.rows for part in parts), work.split)
    folder, name, files = work.folder, work.split.name, (FEATURES_FILE, INDEX_FILE)
    shares, joining = _shares.shares_folder(folder), _shares.joining_folder(folder)
    with _shares.held(shares, timeout), contextlib.ExitStack() as stack:
        if not work.is_done:
            shutil.rmtree(joining, ignore_errors=True)  # Of one that was killed.
            joining.mkdir(parents=True)
            sizes = (
                _shares.size_of(part.path / file) for part in parts for file in files
            )
            rows, whole = 0, dict.fromkeys(files, 0)
            opened = [stack.enter_context((joining / one).open("xb")) for one in files]
            advance = stack.enter_context(
                progress_bar(
                    f"{name}: joining shards",
                    total=-(-sum(sizes) // 2**20), unit="MiB", visible=work.progress,
                )
            )  # fmt: skip
            for part in parts:
                record = part.finished() or {"rows": -1, "checksums": {}}
                index = read_index(part.path)
                fault = _shares.index_fault(index, part.stretch, record["rows"])
                for file, target in zip(files, opened, strict=True):
                    checksum, whole[file] = _shares.append_file(
                        part.path / file, target, whole[file], advance
                    )
                    if fault is None and checksum != record["checksums"].get(file):
                        fault = f"{file} is not what was written"
                if fault is not None:
                    shutil.rmtree(part.path, ignore_errors=True)
                    first, last = part.stretch.start, part.stretch.stop - 1
                    raise DataError(
                        f"The shard of {name} from image {first} to {last} is damaged: "
                        f"{fault}. It was removed. Run the same command again, on all "
                        "workers; see that each has an index of its own."
                    )
                rows += len(index)
            for target in opened:
                target.flush()
                os.fsync(target.fileno())
            found = [_one_colour_indices(part.path) for part in parts]
            np.concatenate([np.empty(0, int), *found]).tofile(
                joining / _ONE_COLOUR_FILE
            )
            checksums = {name: f"{value:08x}" for name, value in whole.items()}
            _publish(work, joining, rows, checksums)
        shutil.rmtree(shares, ignore_errors=True)


def append_rows(
    work: FeaturePass, partial: Path, stretch: range
) -> tuple[int, dict[str, str]]:
    """Computes the features of a stretch of the split, after those that are there."""
    split, frozen = work.split, work.frozen
    make_folder(partial)
    features_path, index_path = partial / FEATURES_FILE, partial / INDEX_FILE
    for path in (features_path, index_path):
        open_regular(path, "ab").close()
    # Of what a killed run left, whole batches stay, so that all later ones hold the
    # images that they would have held: the last bits of a feature may depend on what
    # it is computed together with.
    rows = min(
        index_path.stat().st_size // 8, features_path.stat().st_size // work.row_bytes
    )
    rows -= rows % work.batch_size
    index_before = read_index(partial)[:rows]
    if _shares.index_fault(index_before, stretch, rows) is not None:
        rows = 0
    os.truncate(index_path, 8 * rows)
    os.truncate(features_path, work.row_bytes * rows)
    next_index = int(index_before[-1]) + 1 if rows else stretch.start
    needed = work.row_bytes * (stretch.stop - next_index)
    free = shutil.disk_usage(partial).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"The features need {decimal(needed)} and the disk has "
            f"{decimal(free)} free. Choose another folder with `--cache-dir`",
            str(partial),
        )
    samples = work.inputs(next_index, stretch.stop)
    samples = samples.batch(work.batch_size).prefetch(2)
    done = next_index - stretch.start
    paths = (features_path, index_path)
    checksums = {path.name: int(checksum_of(path), 16) for path in paths}
    with (
        open_regular(features_path, "ab", buffering=0) as features_file,
        open_regular(index_path, "ab", buffering=0) as index_file,
        progress_bar(
            f"{work.called} of {split.name}", total=len(stretch), unit=split.kind,
            done=done, visible=work.progress,
        ) as advance,
        ThreadPoolExecutor(1) as writer,
    ):  # fmt: skip

        def write(values: np.ndarray, index: np.ndarray) -> None:
            # The index only after its features are safe.
            for file, array in ((features_file, values), (index_file, index)):
                _append(file, array)
                name = Path(file.name).name
                checksums[name] = zlib.crc32(_bytes_of(array), checksums[name])

        writing: Future | None = None

        def flat_batches() -> Iterator[tuple[np.ndarray, tf.Tensor]]:
            for index, batch in samples:
                _note_one_colour(partial, index, batch)
                flat = tf.reshape(batch, (-1, *frozen.sample_shape))
                frozen.open_engine(work.folder.parent / FOLDER, flat)
                yield index.numpy(), flat

        for index, features in frozen.over(flat_batches()):
            _require_unreadable(work, range(next_index, int(index[-1])), index)
            values = _cached_as(work.cache_dtype, features)
            if writing is not None:
                writing.result()
            # The disk is waited for while the backbone is busy with the next batch.
            writing = writer.submit(write, values, index)
            rows += len(index)
            reached = int(index[-1]) + 1
            advance(reached - next_index)
            next_index = reached
        if writing is not None:
            writing.result()
        _require_unreadable(work, range(next_index, stretch.stop), ())
    if changed := split.reader.changed():
        warnings.warn(
            f"{len(changed):,} files of {split.name} were changed or removed while the "
            f"{split.kind} were read, such as {changed[0]!r}. Run the same command "
            "again to use them as they are now.",
            stacklevel=2,
        )
    return rows, {name: f"{value:08x}" for name, value in checksums.items()}


def read_index(folder: Path) -> np.ndarray:
    """Returns which sample each row of a folder is of."""
    with open_regular(folder / INDEX_FILE) as file:
        return np.fromfile(file, dtype=np.int64)


def _publish(
    work: FeaturePass, filled: Path, rows: int, checksums: Mapping[str, str]
) -> None:
    write_json(
        filled / META_FILE, {"rows": rows, **work.meta, "checksums": dict(checksums)}
    )
    _shares.publish(filled, work.folder)


_ONE_COLOUR_FILE = "one_colour.bin"
_ONE_COLOUR_LEVELS = 16  # Of 256: a photo in fog has more.


def _note_one_colour(folder: Path, index: tf.Tensor, batch: tf.Tensor) -> None:
    """Writes down which images are of nearly one colour."""
    if batch.dtype == tf.string:
        return
    images = batch if batch.shape.rank == 4 else batch[:, 0]
    # Every 64th pixel tells of most that they are not.
    few = np.ptp(images[:, ::8, ::8].numpy(), axis=(1, 2)).max(axis=-1)
    maybe = np.flatnonzero(few <= _ONE_COLOUR_LEVELS)
    levels = [np.ptp(images[at].numpy(), axis=(0, 1)).max() for at in maybe]
    if found := [
        at for at, n in zip(maybe, levels, strict=True) if n <= _ONE_COLOUR_LEVELS
    ]:
        with open_regular(folder / _ONE_COLOUR_FILE, "ab") as file:
            file.write(index.numpy()[found].tobytes())


def _one_colour_indices(folder: Path) -> np.ndarray:
    file = folder / _ONE_COLOUR_FILE
    with contextlib.suppress(FileNotFoundError), open_regular(file) as opened:
        return np.fromfile(opened, np.int64)
    return np.empty(0, np.int64)


def images_of_one_colour(work: FeaturePass) -> list[str]:
    """Returns the ids of images that a finished pass found to be of nearly one."""
    # A pass that was resumed has some twice.
    found = np.unique(_one_colour_indices(work.folder))
    return work.split.ids[found[(found >= 0) & (found < len(work.split))]].tolist()


def _require_rows(rows: int, split: SampleSplit) -> None:
    if rows == 0 and len(split) > 0:
        raise DataError(
            f"None of the {len(split)} {split.kind} of {split.name!r} can be read; "
            f"the first, {split.ids[0]!r}: {split.read_error(0)}."
        )


def _require_unreadable(
    work: FeaturePass, stretch: range, index: Sequence[int] | np.ndarray
) -> None:
    """Raises OSError if a sample that a pass has left out can be read after all."""
    # A disk that failed for a moment must not cost a sample for good.
    split = work.split
    for left_out in np.setdiff1d(stretch, index).tolist():
        if split.read_error(left_out) is not None:
            continue
        if any(True for _ in work.inputs(left_out, left_out + 1)):
            raise OSError(
                errno.EIO,
                f"Could not be read for the features of {split.name}, and could on a "
                "second try. Check the disk that holds it, and run the same command "
                "again: it resumes from here",
                str(split.ids[left_out]),
            )


def _cached_as(dtype: str, values: np.ndarray) -> np.ndarray:
    if dtype == "float32":
        return values
    largest = np.abs(values).max(initial=0.0, where=np.isfinite(values))
    if largest > np.finfo(dtype).max:
        raise DataError(
            f"This backbone has a feature of {largest:.3g}, which float16 cannot hold. "
            "Cache its features in float32: leave out `--set cache_dtype`."
        )
    return values.astype(dtype)


def _append(file: Any, values: np.ndarray) -> None:
    rest = _bytes_of(values)
    try:
        while rest:
            rest = rest[file.write(rest) :]
        os.fsync(file.fileno())
    except OSError as error:  # Which says nothing of the file.
        raise OSError(error.errno, error.strerror, file.name) from error


def _bytes_of(values: np.ndarray) -> memoryview:
    return np.ascontiguousarray(values).data.cast("B")


def extract_features(
    backbone: keras.Model | FrozenBackbone,
    split: Any,
    *,
    cache_dir: str | os.PathLike | None = None,
    batch_size: int = 32,
    augmentations: int = 1,
    seed: int = 0,
    cache_dtype: str = "float32",
    called: str = "Features",
    progress: bool = True,
) -> FeatureSet:
    """Returns the features of a split: cached ones, or those of one pass.

    The pass appends chunk after chunk to a file beside its final place and is
    renamed when it is complete. Interrupted at any moment, the next call resumes
    after the last whole chunk. Two processes that want the same features
    take turns, and shards that several processes have computed are joined. A
    split that images were dropped from is served by the features of the whole one.

    Args:
        backbone: Model from images `(batch, height, width, 3)`, float32 in
            [0, 255], or texts `(batch,)`, to features `(batch, dim)`; or a
            `FrozenBackbone` of one, which serves several splits faster.
        split: The images, or texts, such as `data.train`; or what `load_data` takes,
            such as `(x, y)`, without splits of its own: all of its samples.
        cache_dir: Folder for cached features. Default: `keras_rsft/features` in
            the user's cache folder.
        batch_size: Images per step of the backbone, at least 1. Default 32.
        augmentations: Augmented views cached per image, at least 1; the first is the
            plain image,
            the others are flipped and cropped at random. Default 1.
        seed: Seed of the random augmentations. Default 0.
        cache_dtype: Dtype of the cached features: `"float32"`, the default, or
            `"float16"` for half the disk.
        called: What the progress bar calls them. Default "Features".
        progress: Show a progress bar. Default True.

    Returns:
        The features of all readable images, in the order of the split.

    Raises:
        InvalidArgument: If `cache_dtype` is neither, or the backbone does not
            take such samples.
        DataError: If no image can be read, or a feature is too large for float16.
        OSError: If the disk has no room for the features, or a sample was left out
            that could be read on a second try; the same call resumes.
    """
    require_tensorflow_backend("`extract_features`")
    if not isinstance(split, SampleSplit):
        split = whole_split(split, progress=progress)
    work = FeaturePass(
        backbone, split, cache_dir, batch_size, augmentations, seed, cache_dtype,
        called, progress,
    )  # fmt: skip
    run_alone(work)
    return open_cached(work.folder, split)


def default_cache_dir() -> Path:
    """Returns the folder for cached features, in `XDG_CACHE_HOME` if it is set."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "keras_rsft" / "features"


def run_alone(work: FeaturePass) -> None:
    """Makes a pass, or what is left of it; where another process does, waits for it."""
    with locked(f"{work.folder}.lock"):
        _discard_damaged(work)
        if work.is_done:
            return
        parts = _shares.finished_parts(work.folder, len(work.split))
        if parts is not None:  # Other processes have computed all of it.
            _join_parts(work, parts, DEFAULT_TIMEOUT)
            return
        partial = work.folder.with_name(f"{work.folder.name}.partial")
        rows, checksums = append_rows(work, partial, range(len(work.split)))
        _require_rows(rows, work.split)
        _publish(work, partial, rows, checksums)


def _discard_damaged(work: FeaturePass) -> None:
    """Removes cached features that are not as they were written, and says so."""
    if not os.path.lexists(work.folder):
        return
    try:
        _opened(work.folder, len(work.split))
    except DataError as error:
        warnings.warn(f"{error} They are computed anew.", stacklevel=2)
        _shares.remove(work.folder)


def _opened(folder: Path, count: int) -> tuple[dict[str, Any], np.ndarray]:
    """Returns what is known of a finished folder, and its index, both checked."""
    meta, index = open_features(folder), read_index(folder)
    if fault := _shares.index_fault(index, range(count), meta["rows"]):
        raise DataError(f"The cached features in {folder} are damaged: {fault}.")
    return meta, index


def open_cached(folder: Path, split: SampleSplit) -> FeatureSet:
    """Returns the features in a finished folder, with the labels of the split."""
    whole = None
    if split.before_review is None:
        meta, index = _opened(folder, len(split))
        missing = np.setdiff1d(np.arange(len(split)), index)
        unreadable = [
            (str(split.ids[i]), split.read_error(int(i)) or "unreadable")
            for i in missing
        ]
        sizes = {name: meta[name] for name in ("dim", "augmentations", "dtype")}
        features = FeatureSet(
            folder / FEATURES_FILE, split.labels[index], split.ids[index], **sizes
        )
    else:
        whole = open_cached(folder, split.before_review)
        position_of = {name: at for at, name in enumerate(split.ids.tolist())}
        at = np.array([position_of.get(one, -1) for one in whole.ids.tolist()], int)
        features, index = whole.take(np.flatnonzero(at >= 0)), at[at >= 0]
        unreadable = [pair for pair in whole.unreadable if pair[0] in position_of]
    return dataclasses.replace(
        features,
        labels=split.labels[index],
        clean_labels=None if split.clean_labels is None else split.clean_labels[index],
        reviewed=None if split.reviewed is None else split.reviewed[index],
        before_review=whole,
        unreadable=tuple(unreadable),
    )


def run_together(
    passes: Sequence[FeaturePass], cluster: Cluster, timeout: float = DEFAULT_TIMEOUT
) -> None:
    """Makes passes together with other processes that are called in the same way."""
    keep_shares(passes, cluster, timeout=timeout)
    # All of them before the first is put together: the chief may be the last.
    for work in passes:
        _wait_for_parts(work, cluster, timeout)
    for work in passes:
        parts = work.parts(len(cluster))
        rows = sum(part.rows for part in parts)  # First: they go when the set is there.
        if work.is_done:
            continue
        _require_rows(rows, work.split)
        if cluster.is_chief:
            _join_parts(work, parts, timeout)
            continue
        joining = _shares.joining_folder(work.folder) / FEATURES_FILE
        for _, lost in _shares.watched(functools.partial(dict, {0: joining}), timeout):
            if work.is_done:
                break
            if lost:
                raise WorkerLost(
                    f"All shards of {work.split.name} are finished, and "
                    f"{cluster.named(0)} has not joined them for "
                    f"{timeout:.0f} s. Start the same command there again, and here: "
                    "everything that was computed is cached."
                )


def _wait_for_parts(work: FeaturePass, cluster: Cluster, timeout: float) -> None:
    parts, name = work.parts(len(cluster)), work.split.name
    total, shown = sum(len(part.stretch) for part in parts), 0

    def unfinished() -> dict[int, Path]:
        numbered = enumerate(parts)
        return {at: one.path / INDEX_FILE for at, one in numbered if not one.finished()}

    with progress_bar(
        f"Features of {name}, all workers",
        total=total, unit="images", visible=work.progress,
    ) as advance:  # fmt: skip
        for sizes, lost in _shares.watched(unfinished, timeout):
            done = total - sum(len(parts[at].stretch) - sizes[at] // 8 for at in sizes)
            advance(max(0, done - shown))
            shown = max(done, shown)
            if work.is_done or not sizes:
                return
            if not lost:
                continue
            behind = [
                f"{cluster.named(who)} has {sizes[who] // 8} of the images "
                f"{parts[who].stretch.start} to {parts[who].stretch.stop - 1}"
                for who in lost
            ]
            text = (
                f"Features of {name} are missing, and there is no progress: "
                f"{'; '.join(behind)}. Start the same command there again, and here: "
                "everything that was computed is cached."
            )
            if not all(parts[who].path.exists() for who in lost):
                text += (
                    " If it is running, it is computing other features: all workers "
                    "need the same feature cache, the same images, with the same "
                    "modification times, the same backbone and the same `--set dtype`."
                )
            raise WorkerLost(text)


def keep_shares(
    passes: Sequence[FeaturePass], cluster: Cluster, timeout: float = DEFAULT_TIMEOUT
) -> None:
    """Computes this process's shard of each pass, and waits for nobody."""
    for work in passes:
        # Before any shard is finished: nobody removes what others have joined.
        if os.path.lexists(work.folder):
            with locked(f"{work.folder}.lock", needed=False):
                _discard_damaged(work)
    for work in passes:
        parts = work.parts(len(cluster))
        if work.is_done or cluster.index >= len(parts):
            continue
        part = parts[cluster.index]
        with _shares.held(part.path, timeout):
            if part.finished() is None and not work.is_done:
                part.finish(*append_rows(work, part.path, part.stretch))
