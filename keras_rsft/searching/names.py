"""What a search can be asked for."""
# ruff: noqa

from keras_rsft.config import (
    ALL,
    ARTICLE,
    BATCHED,
    FROZEN,
    HYPERBAND,
    LAST_BLOCK,
    OBJECTIVES,
    SEARCHED_POLICIES,
    SearchConfig as SearchOptions,
    UNFREEZE_NAMES as TRAINABLE_NAMES,
)
