"""The devices a training runs on."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

from keras_rsft._runtime import Cluster, check_strategy
from keras_rsft.errors import InvalidArgument, WorkerLost
from keras_rsft.features._batches import BatchShare

# Seconds without a heartbeat after which a worker is lost, and the others stop.
SECONDS_UNTIL_LOST = 20
# Seconds that the first worker waits for the last one to start.
SECONDS_TO_START = 300
_LOST = (
    tf.errors.UnavailableError,
    tf.errors.AbortedError,
    tf.errors.DeadlineExceededError,
    tf.errors.CancelledError,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Devices:
    name: str = "none"
    strategy: tf.distribute.Strategy | None = None
    cluster: Cluster = dataclasses.field(default_factory=Cluster)

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the results: the only one, or the first."""
        return self.cluster.is_chief

    @property
    def local_names(self) -> tuple[str, ...]:
        """Names of this process's devices; none for TensorFlow's own choice."""
        return () if self.strategy is None else self.strategy.extended.worker_devices

    @property
    def share(self) -> BatchShare | None:
        """Which rows of a batch are trained on here; None for all of them."""
        if self.strategy is None:
            return None
        count = len(self.local_names)
        replicas = self.strategy.num_replicas_in_sync
        return BatchShare(replicas, first=self.cluster.index * count, count=count)

    def describe(self) -> str:
        count = len(self.local_names)
        devices = f"{count} device{'s' if count > 1 else ''}"
        if self.name != "multiworker":
            return f"Training on {devices}."
        role = " and writes the run" if self.is_chief else ""
        return (
            f"Worker {self.cluster.index} of {len(self.cluster)} trains on {devices}"
            f"{role}."
        )

    def scope(self) -> contextlib.AbstractContextManager:
        return (
            contextlib.nullcontext() if self.strategy is None else self.strategy.scope()
        )

    def distributed(self, dataset: tf.data.Dataset, samples: int, batch: int) -> Any:
        """Returns what `fit` takes of batches already restricted to `share`."""
        if self.strategy is None:
            return dataset
        shared = self.strategy.distribute_datasets_from_function(lambda _: dataset)
        # TensorFlow counts elements, and Keras takes them for steps.
        shared._cardinality = -(-samples // batch)
        return shared

    def from_chief(self, data: bytes) -> bytes:
        """Returns the chief's bytes to every process; all must call it."""
        if self.cluster.is_alone:
            return data
        length = int(self._chiefs(np.array([len(data)], np.int64))[0])
        if length == 0:  # An exchange of nothing ends the process.
            return b""
        padded = np.zeros(-(-length // 8), np.int64)
        if self.is_chief:
            padded.view(np.uint8)[:length] = np.frombuffer(data, np.uint8)
        return self._chiefs(padded).tobytes()[:length]

    def require_same(self, identity: Any) -> None:
        """Raises InvalidArgument where this process was asked for another run."""
        text = json.dumps(identity, sort_keys=True).encode()
        own = hashlib.blake2b(text, digest_size=16).digest()
        if self.from_chief(own) != own:
            raise InvalidArgument(
                "All workers must be started with the same command on the same data, "
                f"with the same package versions. Worker {self.cluster.index} differs "
                "from the chief, worker 0."
            )

    @contextlib.contextmanager
    def heeding_loss(self) -> Iterator[None]:
        try:
            yield
        except _LOST as error:
            if self.cluster.is_alone:
                raise
            raise WorkerLost(
                f"Worker {self.cluster.index} of {len(self.cluster)} has lost another "
                "worker, which was stopped or cannot be reached any more. Start the "
                "same command on all workers again to resume."
            ) from error

    def _chiefs(self, values: np.ndarray) -> np.ndarray:
        strategy: Any = self.strategy

        def value_of(context: tf.distribute.experimental.ValueContext) -> tf.Tensor:
            chiefs = context.replica_id_in_sync_group == 0
            return tf.constant(values if chiefs else np.zeros_like(values))

        with self.heeding_loss():
            parts = strategy.experimental_distribute_values_from_function(value_of)
            return strategy.reduce("SUM", parts, axis=None).numpy()


ONE_DEVICE = Devices()


def open_devices(name: str) -> Devices:
    """Makes a strategy ready; for several workers, waits for all of them."""
    cluster = check_strategy(name)
    if name == "none":
        return ONE_DEVICE
    if name == "mirrored":
        found = tf.config.list_logical_devices("GPU")
        found = found or tf.config.list_logical_devices("CPU")
        names = [device.name for device in found]
        return Devices(name, tf.distribute.MirroredStrategy(names))
    from tensorflow.python.eager import context

    # The strategy configures this itself, and leaves no way to say how long to wait.
    service = context.context()
    configure: Callable = service.configure_coordination_service
    service.configure_coordination_service = functools.partial(
        configure,
        heartbeat_timeout_in_ms=1000 * SECONDS_UNTIL_LOST,
        cluster_register_timeout_in_ms=1000 * SECONDS_TO_START,
    )
    try:
        return Devices(name, tf.distribute.MultiWorkerMirroredStrategy(), cluster)
    except RuntimeError as error:
        raise InvalidArgument(
            "Several workers must be connected before TensorFlow is used for anything "
            "else: open the strategy at the start of the program."
        ) from error
    except (*_LOST, tf.errors.UnknownError) as error:
        raise WorkerLost(
            f"Worker {cluster.index} of {len(cluster)} could not reach the others "
            f"within {SECONDS_TO_START} seconds. Are they started, with the addresses "
            f"of TF_CONFIG? ({error.message})"
        ) from error
    finally:
        service.configure_coordination_service = configure
