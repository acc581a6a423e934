"""The name of a base: where its network comes from, and what pixel values it wants."""

from __future__ import annotations

import dataclasses
import os

from keras_rsft.errors import InvalidArgument

# Prefixes of names, and whether the name must end with the scale of the pixels.
SCALE_IS_NEEDED = {"hub": False, "savedmodel": True, "onnx": True}

# Names of bases that take texts, as `plain_name` gives them.
TEXT_ENCODERS = ("minilm",)

_IMAGENET_MEAN = (0.485, 0.456, 0.406)
_IMAGENET_STD = (0.229, 0.224, 0.225)
_SCALE_FORMS = (
    "@0:1 (image models of TensorFlow Hub), @-1:1, @0:255 (preprocessing is in the "
    "model), @imagenet (Torchvision, most of timm) or "
    "@MEAN/STD of three channels in [0, 1], such as @0.5:0.5:0.5/0.5:0.5:0.5"
)


@dataclasses.dataclass(frozen=True)
class PixelScale:
    """How a base wants its pixels: `value * factor + offset`, of values in [0, 255]."""

    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @property
    def changes_nothing(self) -> bool:
        return self == PixelScale()


@dataclasses.dataclass(frozen=True)
class BaseName:
    """A name such as `onnx:models/resnet18.onnx@imagenet`, taken apart."""

    kind: str
    place: str
    scale: PixelScale | None


def parse_base_name(name: str) -> BaseName | None:
    """Takes apart a name that begins with `hub:`, `savedmodel:` or `onnx:`."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in SCALE_IS_NEEDED:
        return None
    place, at, scale = rest.rpartition("@")
    if not at or os.path.exists(rest):
        place, scale = rest, ""
    if not place:
        raise InvalidArgument(f"Expected a place behind {kind}:. Received: {name!r}.")
    if not scale and SCALE_IS_NEEDED[kind]:
        raise InvalidArgument(
            f"The file does not say what pixel values it wants. Received: {name!r}. "
            f"Add {_SCALE_FORMS}."
        )
    return BaseName(kind, place, parse_pixel_scale(scale) if scale else None)


def parse_pixel_scale(text: str) -> PixelScale:
    """Reads `LOW:HIGH`, `imagenet`, or `MEAN/STD` of three channels each."""
    if text == "imagenet":
        return _standardised(_IMAGENET_MEAN, _IMAGENET_STD)
    parts = [_numbers(part) for part in text.split("/")]
    lengths = [len(part) for part in parts]
    if lengths == [2] and parts[0][0] < parts[0][1]:
        low, high = parts[0]
        return PixelScale(((high - low) / 255.0,) * 3, (low,) * 3)
    if lengths == [3, 3] and min(parts[1]) > 0:
        return _standardised(*parts)
    raise InvalidArgument(
        f"The scale of the pixels must be {_SCALE_FORMS}. Received: @{text}"
    )


def takes_texts(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a text encoder."""
    return plain_name(os.fspath(name)) in TEXT_ENCODERS


def require_takes(name: str | os.PathLike[str], kind: str) -> None:
    """Refuses a base that does not take the samples of a data set."""
    if takes_texts(name) == (kind == "texts"):
        return
    if kind == "texts":
        raise InvalidArgument(
            f"The data are texts, and the base takes images. Received: {name}. Use "
            f"`--backbone {TEXT_ENCODERS[0]}`."
        )
    raise InvalidArgument(
        f"The data are images, and the base takes texts. Received: {name}. Use a base "
        "for images, such as efficientnet_lite0."
    )


def require_base_can_learn(name: str | os.PathLike[str]) -> None:
    """Refuses the training of a text encoder."""
    if takes_texts(name):
        raise InvalidArgument(
            f"A text encoder stays as it is, only its head learns. Received: {name}. "
            "Leave out `--unfreeze`, `--stage2` and `--trainable`."
        )


def plain_name(name: str) -> str:
    """Returns a name without what does not tell names apart."""
    return name.lower().replace("_", "").replace("-", "")


def is_fixed_network(name: str) -> bool:
    """Whether a name is that of a base without Keras layers."""
    parsed = parse_base_name(name)
    return parsed is not None and parsed.kind in ("savedmodel", "onnx")


def _standardised(mean: tuple[float, ...], std: tuple[float, ...]) -> PixelScale:
    factor = tuple(1.0 / (255.0 * one) for one in std)
    offset = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return PixelScale(factor, offset)


def _numbers(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(":"))
    except ValueError:
        return ()
    finite = all(abs(value) < float("inf") for value in values)
    return values if finite else ()
