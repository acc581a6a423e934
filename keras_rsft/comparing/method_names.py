"""Names of methods."""
# ruff: noqa

from keras_rsft.config import (
    AUTO,
    CLEANLAB,
    CLEAN_SUBSET,
    EARLY_STOPPING,
    METHOD_NAMES,
    PLAIN,
    WEIGHT_DECAY,
    WITH_AUTO,
    check_methods,
    has_cleanlab,
    require_cleanlab,
)
