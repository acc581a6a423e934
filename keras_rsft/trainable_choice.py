"""Which part of a base learns."""
# ruff: noqa

from keras_rsft.config import (
    EVERYTHING,
    TrainableFrom,
    checked_trainable,
    parse_trainable,
)
