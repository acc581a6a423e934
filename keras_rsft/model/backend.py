"""Which training step Keras's backend needs.

`BackendStep` goes before `keras.Model` among the bases of a model. Only the module of
the backend in use is imported.
"""

from __future__ import annotations

import keras

BACKEND = keras.backend.backend()

if BACKEND == "tensorflow":
    from keras_rsft.model.tensorflow_step import TensorFlowStep as BackendStep
elif BACKEND == "jax":
    from keras_rsft.model.jax_step import JaxStep as BackendStep
elif BACKEND == "torch":
    from keras_rsft.model.torch_step import TorchStep as BackendStep
else:
    raise ImportError(
        "keras_rsft trains under Keras's backends tensorflow, jax and torch. Received: "
        f"{BACKEND}. Set KERAS_BACKEND=tensorflow, or leave it out."
    )

__all__ = ["BACKEND", "BackendStep"]
