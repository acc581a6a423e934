"""The data that `fit` takes, with the index of each sample."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import numpy as np
from keras.src.trainers.data_adapters.array_data_adapter import (
    ArrayDataAdapter,
    can_convert_arrays,
)
from keras.src.trainers.data_adapters.data_adapter_utils import get_torch_dataloader
from keras.src.trainers.data_adapters.py_dataset_adapter import PyDatasetAdapter
from keras.src.trainers.data_adapters.tf_dataset_adapter import make_class_weight_map_fn

from keras_rsft.errors import DataError, InvalidArgument

unpacked = keras.utils.unpack_x_y_sample_weight

HOW_TO_NUMBER = (
    "Give `fit` arrays or a `PyDataset`; a `tf.data.Dataset` is numbered by "
    "`rsft.with_ids(dataset)`, before it is shuffled."
)


def with_ids(dataset: Any) -> Any:
    """Numbers the samples of a `tf.data.Dataset`, so that a ledger can name them.

    Call it before the data set is shuffled, repeated or augmented at random: a sample
    must have the same number in each epoch.

    ```python
    photos = keras.utils.image_dataset_from_directory(
        "photos/", batch_size=None, shuffle=False
    )
    train = rsft.with_ids(photos).shuffle(1000).batch(32)
    ```

    Args:
        dataset: `tf.data.Dataset` of `(x, y)` or `(x, y, sample_weight)`, of single
            samples or of batches: of batches where the first axes of all parts agree.

    Returns:
        A `tf.data.Dataset` of `(x, y, sample_weight or None, sample_index)`, int32
        indices from 0 in the data set's order, as `RSFTModel.fit` takes it.

    Raises:
        InvalidArgument: If it is no such data set.
        DataError: If its first element changes from one pass to the next.

    Example:
        >>> import tensorflow as tf
        >>> import keras_rsft as rsft
        >>> batches = tf.data.Dataset.from_tensor_slices(([[1.0]] * 3, [0, 1, 0]))
        >>> batches = rsft.with_ids(batches).batch(2)
        >>> [index.numpy().tolist() for x, y, weight, index in batches]
        [[0, 1], [2]]
    """
    import tensorflow as tf

    spec = getattr(dataset, "element_spec", None)
    if not (isinstance(spec, tuple) and len(spec) in (2, 3)):
        raise InvalidArgument(
            "`with_ids` takes a `tf.data.Dataset` of (x, y) or (x, y, sample_weight). "
            f"Received: {type(dataset).__name__} of {spec}. "
            "Arrays and a `PyDataset` need no numbers: give them to `fit` as they are."
        )
    for first, again in zip(dataset.take(1), dataset.take(1), strict=True):
        parts = zip(keras.tree.flatten(first), keras.tree.flatten(again), strict=True)
        if not all(_same(one, other) for one, other in parts):
            raise DataError(
                "The data set's first element changes from one pass to the next, so "
                "that a number would not stay with its sample. Call `with_ids` before "
                "`shuffle` and before random augmentation; "
                "`image_dataset_from_directory` takes shuffle=False."
            )
    shapes = [part.shape for part in keras.tree.flatten(spec)]
    leading = {shape[0] if shape.rank else "none" for shape in shapes}
    batched = len(leading) == 1 and "none" not in leading

    @tf.autograph.experimental.do_not_convert
    def number(start: tf.Tensor, element: tuple) -> tuple:
        if not batched:
            return start + 1, (*unpacked(element), start)
        rows = tf.shape(keras.tree.flatten(element[1])[0])[0]
        return start + rows, (*unpacked(element), start + tf.range(rows))

    return dataset.scan(np.int32(0), number)


def _same(one: Any, other: Any) -> bool:
    one, other = (getattr(part, "values", part) for part in (one, other))
    return one.shape == other.shape and bool((one.numpy() == other.numpy()).all())


# Kinds of data ------------------------------------------------------------------------


class Samples:
    """The training samples of one `fit`: in order, or as its epochs shuffle them."""

    def __init__(
        self,
        batches: Callable[[], Iterator[tuple]],
        steps: int | None,
        targets: list[tuple[np.ndarray, Any]] | None = None,
    ):
        self._batches, self._steps = batches, steps
        self._targets = targets
        self.failure: DataError | None = None  # In a thread of `tf.data`.

    def batches(self) -> Iterator[tuple[Any, Any, np.ndarray]]:
        """Yields inputs, targets and indices, each sample once."""
        targets = []
        for x, y, _, index in self._batches():
            targets.append((np.asarray(index), keras.tree.map_structure(np.asarray, y)))
            yield x, y, targets[-1][0]
        self._targets = self._targets or targets

    @property
    def targets(self) -> list[tuple[np.ndarray, Any]]:
        """Indices and targets; reads all data once, if they are not arrays."""
        if self._targets is None:
            collections.deque(self.batches(), 0)
        return self._targets or []

    @property
    def count(self) -> int | None:
        """How many samples there are; None where that is not known without a pass."""
        if self._targets is None:
            return None
        return sum(len(index) for index, _ in self._targets)

    @property
    def steps(self) -> int:
        """How many batches an epoch has."""
        return self._steps or len(self.targets)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """The given labels, int32 `(n,)`."""
        index = np.concatenate([part for part, _ in self.targets])
        labels = np.concatenate([class_labels(y) for _, y in self.targets])
        seen = np.bincount(index)
        if not (seen == 1).all():
            raise DataError(
                f"Each of {len(seen):,} samples must come once in an epoch. Received: "
                f"{(seen == 0).sum():,} that do not come, {(seen > 1).sum():,} that "
                "come more than once. Leave out `drop_remainder`, `take` and `repeat`."
            )
        return labels[np.argsort(index)]

    def inputs(self, rows: np.ndarray) -> dict[int, Any]:
        """Returns the inputs of some samples, by index."""
        wanted, found = set(rows.tolist()), {}
        for x, _, index in self.batches():
            for at in np.flatnonzero(np.isin(index, rows)):
                found[int(index[at])] = keras.tree.map_structure(
                    lambda part, at=at: np.asarray(part[at]), x
                )
            if len(found) == len(wanted):
                break
        return found


def class_labels(y: Any) -> np.ndarray:
    """Returns the classes of targets, int32; raises InvalidArgument if they are none.

    Integers, whole floats, or one row of probabilities a sample.
    """
    if not isinstance(y, (dict, list, tuple)) and y is not None:
        values = np.asarray(y)
        if values.ndim == 2 and values.shape[1] > 1:
            if (values >= 0).all() and np.allclose(values.sum(axis=1), 1, atol=1e-3):
                return values.argmax(axis=1).astype(np.int32)
        elif values.ndim in (1, 2) and values.dtype.kind in "iufb":
            numbers = values.reshape(-1)
            if (numbers >= 0).all() and (numbers == np.floor(numbers)).all():
                return numbers.astype(np.int32)
    shape = keras.tree.map_structure(lambda part: getattr(part, "shape", None), y)
    raise InvalidArgument(
        "The policy, or the ledger, needs one class a sample: integers from 0, or "
        f"one-hot rows. Received: targets of shape {shape}. Use a policy by loss, such "
        "as LossThreshold, and RejectionLedger(ids, labels)."
    )


class _IndexedArrays(ArrayDataAdapter):
    """Arrays as Keras gives them, with the index of each row."""

    _inputs: Any

    def __init__(self, *arrays: Any, filled: bool = False, **options: Any):
        super().__init__(*arrays, **options)
        x, y, weight = unpacked(self._inputs)
        if not self._num_samples:
            raise DataError("There is no sample to train on. Received: empty arrays.")
        if weight is None and filled:  # Replicas cannot be handed a None.
            weight = np.ones(self._num_samples, keras.config.floatx())
        index = np.arange(self._num_samples, dtype=np.int32)
        self._inputs = (x, y, weight, index)


def numbered(
    x: Any, y: Any, weight: Any, *, needed: bool, **options: Any
) -> tuple[Any, Samples] | None:
    """Returns what `fit` takes in place of `x` and all else, and its samples.

    None where the data have no numbers, or need none.
    """
    if are_arrays(x, y, weight):
        return _number_arrays(x, y, weight, **options)
    chosen = {name: options[name] for name in ("shuffle", "class_weight")}
    if isinstance(x, keras.utils.PyDataset) and needed and y is None:
        batches = _IndexedBatches(x, **chosen)
        return batches, batches.samples
    if not has_index(x):
        return None
    samples = _samples_of(x)
    if (by_class := chosen["class_weight"]) is not None:
        weighted = make_class_weight_map_fn(by_class)
        x = x.map(lambda x, y, weight, index: (*weighted(x, y, weight), index))
    return x, samples


def _number_arrays(
    x: Any, y: Any, weight: Any, *, batch_size: int | None, **options: Any
) -> tuple[Any, Samples]:
    adapter = _IndexedArrays(x, y, weight, batch_size=batch_size, **options)
    size = adapter.batch_size

    def batches() -> Iterator[tuple]:
        return _IndexedArrays(x, y, weight, batch_size=size).get_numpy_iterator()

    _, given, _, index = adapter._inputs
    steps = options["steps"] or adapter.num_batches
    return adapter, Samples(batches, steps, [(index, given)])


class _Batches(keras.utils.PyDataset):
    """A `PyDataset` that says which batch is which."""

    def __init__(self, data: keras.utils.PyDataset):
        super().__init__(data.workers, data.use_multiprocessing, data.max_queue_size)
        self._data = data
        self.on_epoch_begin, self.on_epoch_end = data.on_epoch_begin, data.on_epoch_end

    @property
    def num_batches(self) -> int | None:
        return self._data.num_batches

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self._data[index]


class _IndexedBatches(PyDatasetAdapter):
    """A `PyDataset` with the index of each row; a batch must stay what it was."""

    def __init__(self, data: keras.utils.PyDataset, **options: Any):
        super().__init__(_Batches(data), **options)
        if data.num_batches is None:
            raise InvalidArgument(
                "Samples are numbered in a `PyDataset` of known length. Received: one "
                "without `__len__`. Give it one, or use a policy by loss and no ledger."
            )
        self.samples = Samples(self._in_order, data.num_batches)

    def _in_order(self) -> Iterator[tuple]:
        start = 0
        for number in range(self.num_batches):
            _, batch = self.py_dataset[number]
            x, y, weight = unpacked(super()._standardize_batch(batch))
            end = start + len(keras.tree.flatten(y)[0])
            yield x, y, weight, np.arange(start, end, dtype=np.int32)
            start = end

    def _standardize_batch(self, numbered: tuple[int, Any]) -> tuple[Any, np.ndarray]:
        number, batch = numbered
        batch = super()._standardize_batch(batch)
        index, known = self.samples.targets[number]
        pairs = (keras.tree.flatten(y) for y in (unpacked(batch)[1], known))
        if not all(map(np.array_equal, *pairs)):
            self.samples.failure = DataError(
                f"Batch {number} of the `PyDataset` has other samples than before, so "
                "that nobody can say which they are. Keep the order in `__getitem__` "
                "(no shuffling in `on_epoch_end`): `fit` shuffles the batches."
            )
            raise self.samples.failure
        return batch, index

    def get_tf_dataset(self) -> Any:
        # A generator of `tf.data` cannot yield None.
        return super().get_tf_dataset().map(lambda b, index: (*unpacked(b), index))

    def get_numpy_iterator(self) -> Iterator[tuple]:
        return _flat(super().get_numpy_iterator())

    def get_jax_iterator(self) -> Iterator[tuple]:
        return _flat(super().get_jax_iterator())

    def get_torch_dataloader(self) -> Any:
        return get_torch_dataloader(_flat(self._get_iterator()))


def _flat(batches: Iterator[tuple]) -> Iterator[tuple]:
    return ((*unpacked(batch), index) for batch, index in batches)


def _samples_of(dataset: Any) -> Samples:
    """Returns the samples of a `tf.data.Dataset` that `with_ids` has numbered."""
    steps = int(dataset.cardinality())
    tensors = keras.backend.backend() == "tensorflow"

    def batches() -> Iterator[tuple]:
        if steps == -1:  # Infinite.
            raise InvalidArgument(
                "The labels are read in one pass over the data set, and this one has "
                "no end. Leave out `repeat()` and `steps_per_epoch`: `fit` begins it "
                "anew in each epoch."
            )
        for batch in dataset:
            yield batch if tensors else keras.tree.map_structure(_array, batch)

    return Samples(batches, None if steps < 0 else steps)


def steps_of(samples: Samples | None, data: Any) -> int:
    """Returns how many batches an epoch of what `fit` takes has."""
    if samples is not None:
        return samples.steps
    if hasattr(data, "cardinality"):
        steps = int(data.cardinality())
        if steps > 0:
            return steps
    raise InvalidArgument(
        "A policy by name counts its warm-up in epochs, and these data do not say how "
        "many batches an epoch has. Give `fit` `steps_per_epoch`, or a policy such as "
        "LossThreshold(1.5, warmup_steps=100)."
    )


def _array(part: Any) -> Any:
    return None if part is None else part.numpy()


def has_index(data: Any) -> bool:
    """Says whether data are a `tf.data.Dataset` of batches with sample indices."""
    spec = getattr(data, "element_spec", None)
    return hasattr(data, "map") and isinstance(spec, tuple) and len(spec) == 4


def are_arrays(*parts: Any) -> bool:
    """Says whether Keras takes the parts as arrays."""
    return parts[0] is not None and can_convert_arrays(parts)
