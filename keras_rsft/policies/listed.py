"""Policies that go by a list of samples made before training."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_rsft.errors import InvalidArgument
from keras_rsft.examination import Examination
from keras_rsft.policies.policy import Policy


@keras.saving.register_keras_serializable(package="keras_rsft")
class AcceptListed(Policy):
    """Accepts the training samples that a list, made before training, accepts.

    The data set must say which samples a batch holds: it yields
    `(x, y, sample_weight or None, sample_index)`, as `TrainingBatches` does with
    `sample_index=True`. The list is saved with the model.

    Args:
        accept: Boolean array of shape `(n,)`, one entry a training sample; or the
            number `n`, to accept all of `n` samples.

    Raises:
        InvalidArgument: If `accept` is not as above, or accepts nothing; when
            called, if there is no `sample_index`.
    """

    def __init__(self, accept: Any, **kwargs: Any):
        super().__init__(**kwargs)
        if isinstance(accept, Integral) and not isinstance(accept, bool):
            accept = np.ones(int(accept), bool)
        accept = np.asarray(accept)
        if accept.ndim != 1 or accept.dtype != bool or not accept.any():
            raise InvalidArgument(
                "`accept` must be a boolean for each training sample, at least one of "
                f"them True. Received: shape {accept.shape}, dtype {accept.dtype}."
            )
        self.listed = self.add_weight(
            name="listed",
            shape=accept.shape,
            dtype="bool",
            initializer=lambda shape, dtype: ops.convert_to_tensor(accept),
        )

    def decide(
        self,
        per_sample_loss: Any,
        step: Any,
        labels: Any = None,
        sample_index: Any = None,
    ) -> Any:
        del per_sample_loss, step, labels
        if sample_index is None:
            raise InvalidArgument(
                f"{type(self).__name__} must be told which samples a batch holds. "
                "Received: no sample_index. Let the data set yield "
                "(x, y, sample_weight or None, sample_index)."
            )
        return ops.take(self.listed, sample_index, axis=0)

    def get_config(self) -> dict[str, Any]:
        return super().get_config() | {"accept": int(self.listed.shape[0])}


@keras.saving.register_keras_serializable(package="keras_rsft")
class AutoPolicy(AcceptListed):
    """Accepts the samples whose label is likely right; the command line's default.

    Needs no clean labels and no noise rate, and keeps every sample where nothing
    looks wrong. `keras_rsft.examination` says how labels are examined.

    ```python
    found = rsft.examine_labels(train_features, num_classes)
    print(found.describe())
    model = rsft.RSFTModel(head, rsft.AutoPolicy(found))
    ```

    Args:
        examination: What `examine_labels` found; or the number of samples, to
            accept all of them.

    Raises:
        InvalidArgument: If `examination` is neither.
    """

    def __init__(self, examination: Examination | int, **kwargs: Any):
        if isinstance(examination, Examination):
            examination = examination.accept_mask()
        super().__init__(examination, **kwargs)

    def get_config(self) -> dict[str, Any]:
        config = super().get_config()
        config["examination"] = config.pop("accept")
        return config
