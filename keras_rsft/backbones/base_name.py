"""Names of bases."""
# ruff: noqa

from keras_rsft.config import (
    TEXT_ENCODERS,
    BaseName,
    PixelScale,
    is_fixed_network,
    parse_base_name,
    parse_pixel_scale,
    plain_name,
    require_base_can_learn,
    require_takes,
    takes_texts,
)
