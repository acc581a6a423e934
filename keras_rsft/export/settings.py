"""What can be asked of an export."""
# ruff: noqa

from keras_rsft.config import (
    FORMATS,
    WEIGHT_DTYPES,
    ExportConfig as ExportSettings,
)
