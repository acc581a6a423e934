"""Policies by name."""
# ruff: noqa

from keras_rsft.config import (
    LEVELS,
    POLICY_NAMES,
    PolicyConfig as PolicyChoice,
    nearest_name_hint,
    require_known,
    require_used,
)
