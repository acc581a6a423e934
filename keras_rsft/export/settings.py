"""What can be asked of an export. Imports nothing heavy: the command line reads it."""

from __future__ import annotations

import dataclasses

from keras_rsft.errors import InvalidArgument

WEIGHT_DTYPES_OF_FORMAT = {
    "saved-model": ("float32", "float16"),
    "litert": ("float32", "float16", "int8"),
    "onnx": ("float32",),
}
FORMATS = tuple(WEIGHT_DTYPES_OF_FORMAT)
WEIGHT_DTYPES = ("float32", "float16", "int8")


@dataclasses.dataclass(frozen=True)
class ExportSettings:
    """The format of an export and its options.

    Attributes:
        file_format: `"saved-model"`, `"litert"` or `"onnx"`.
        weight_dtype: `"float32"`; `"float16"` for the first two; `"int8"`
            (dynamic-range quantisation) for LiteRT.
        version: Version of a SavedModel, at least 1. None: the next free one.
        top_k: How many classes a SavedModel names in `top_labels`, or None.

    Raises:
        InvalidArgument: If the options do not fit the format.
    """

    file_format: str = "saved-model"
    weight_dtype: str = "float32"
    version: int | None = None
    top_k: int | None = None

    def __post_init__(self):
        if self.file_format not in FORMATS:
            raise InvalidArgument(
                f"The format must be one of {', '.join(FORMATS)}. "
                f"Received: {self.file_format!r}."
            )
        known = WEIGHT_DTYPES_OF_FORMAT[self.file_format]
        if self.weight_dtype not in known:
            raise InvalidArgument(
                f"The format {self.file_format} stores weights as {' or '.join(known)}."
                f" Received: {self.weight_dtype!r}."
            )
        if self.file_format != "saved-model" and (self.version or self.top_k):
            raise InvalidArgument(
                "A version and the most probable classes can be chosen for the format "
                f"saved-model only. Received: the format {self.file_format}."
            )
