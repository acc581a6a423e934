"""What needs Keras's TensorFlow backend says so, in one sentence."""

from __future__ import annotations

from keras_rsft.errors import InvalidArgument


def require_tensorflow_backend(what: str, *, instead: str = "") -> None:
    """Refuses what works under Keras's TensorFlow backend alone.

    Args:
        what: What was asked for, to begin a sentence with.
        instead: A sentence that says what else can be done, or nothing.

    Raises:
        InvalidArgument: If Keras runs on another backend.
    """
    import keras

    backend = keras.backend.backend()
    if backend != "tensorflow":
        hint = instead or "Set KERAS_BACKEND=tensorflow before Keras is imported."
        raise InvalidArgument(
            f"{what} needs Keras's TensorFlow backend. Received: {backend}. {hint}"
        )
