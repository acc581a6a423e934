"""Every choice of a user: its name, default, range and help text.

The command line makes its options from the fields: `metadata` has a field's help text
and, for a rare one, that it is given by `--set`. Imports no Keras.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras_rsft.errors import InvalidArgument


def option(default: Any, help: str, **metadata: Any) -> Any:
    """Returns a field that is an option; `metadata` as `cli/_options.py` reads it."""
    metadata["help"] = help
    return dataclasses.field(default=default, metadata=metadata)


def rare(default: Any, help: str, **metadata: Any) -> Any:
    """Returns a field that is given by `--set`."""
    return option(default, help, rare=True, **metadata)


# === Names and checks ===


def nearest_name_hint(name: str, known: Sequence[str], cutoff: float = 0.4) -> str:
    """Returns `" Did you mean 'x'?"` for the nearest known name, or `""`."""
    close = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=cutoff)
    return f" Did you mean {close[0]!r}?" if close else ""


def require_known(kind: str, name: str, known: Sequence[str]) -> None:
    """Refuses a name that is not known, and hints at the nearest one."""
    if name not in known:
        raise InvalidArgument(
            f"The {kind} must be one of {', '.join(known)}. "
            f"Received: {name!r}.{nearest_name_hint(name, known)}"
        )


_CHECKS: dict[str, Callable[[Any], bool]] = {
    "a positive number": lambda value: 0 < value < math.inf,
    "at least 0": lambda value: 0 <= value < math.inf,
    "at least 1": lambda value: 1 <= value < math.inf,
    "in [0, 1]": lambda value: 0 <= value <= 1,
    "in (0, 1]": lambda value: 0 < value <= 1,
    "in (0, 1)": lambda value: 0 < value < 1,
    "a whole number in [0, 2**31)": lambda value: 0 <= value < 2**31,
}


def check_numbers(config: object, expected: str, *names: str) -> None:
    """Checks fields against one of `_CHECKS`; None is allowed."""
    for name in names:
        value = getattr(config, name)
        # NaN fails every comparison.
        if value is not None and not _CHECKS[expected](value):
            raise InvalidArgument(
                f"`{name}` must be {expected}. Received: {name}={value}."
            )


# === Splits ===

SPLITS = ("train", "validation", "test")


# === Names of backbones ===

# Prefixes of names: without Keras layers, such a file does not say its pixel scale.
_PRESET, _FIXED_NETWORKS = "hub", ("savedmodel", "onnx")
# Backbones that take texts, as `plain_name` gives them.
TEXT_ENCODERS = ("minilm",)
IMAGES, TEXTS = "images", "texts"
# Behind the name of data that came as Python objects, in a run's record.
NOT_REPEATABLE = " (not repeatable from the command line)"
DEFAULT_BACKBONES = {IMAGES: "resnet50", TEXTS: TEXT_ENCODERS[0]}

_IMAGENET_SCALE = "0.485:0.456:0.406/0.229:0.224:0.225"
_SCALE_FORMS = (
    "@0:1 (image models of TensorFlow Hub), @-1:1, @0:255 (preprocessing is in the "
    "model), @imagenet (Torchvision, most of timm) or "
    "@MEAN/STD of three channels in [0, 1], such as @0.5:0.5:0.5/0.5:0.5:0.5"
)


@dataclasses.dataclass(frozen=True)
class PixelScale:
    """Which pixels a backbone wants: `factor * value + offset`, values in [0, 255]."""

    factor: tuple[float, float, float] = (1.0, 1.0, 1.0)
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class BackboneName:
    """A name such as `onnx:models/resnet18.onnx@imagenet`, taken apart."""

    kind: str
    location: str
    scale: PixelScale | None


def parse_backbone_name(name: str) -> BackboneName | None:
    """Takes apart `hub:NAME`, `savedmodel:PATH` or `onnx:PATH[@SCALE]`, else None."""
    kind, colon, rest = name.partition(":")
    if not colon or kind not in (_PRESET, *_FIXED_NETWORKS):
        return None
    location, at, scale = rest.rpartition("@")
    if not at or os.path.exists(rest):
        location, scale = rest, ""
    if not location:
        raise InvalidArgument(f"Expected a path behind {kind}:. Received: {name!r}.")
    if not scale and kind in _FIXED_NETWORKS:
        raise InvalidArgument(
            f"The file does not say what pixel values it wants. Received: {name!r}. "
            f"Add {_SCALE_FORMS}."
        )
    return BackboneName(kind, location, parse_pixel_scale(scale) if scale else None)


def parse_pixel_scale(text: str) -> PixelScale:
    """Reads `LOW:HIGH`, `imagenet`, or `MEAN/STD` of three channels each."""
    numbers = _IMAGENET_SCALE if text == "imagenet" else text
    try:
        parts = [[float(one) for one in p.split(":")] for p in numbers.split("/")]
    except ValueError:
        parts = []
    finite = all(math.isfinite(value) for part in parts for value in part)
    lengths = [len(part) for part in parts]
    if finite and lengths == [2] and parts[0][0] < parts[0][1]:
        low, high = parts[0]
        return PixelScale(((high - low) / 255,) * 3, (low,) * 3)
    if finite and lengths == [3, 3] and min(parts[1]) > 0:
        (r, g, b), (x, y, z) = parts  # Means and standard deviations.
        factor = (1 / (255 * x), 1 / (255 * y), 1 / (255 * z))
        return PixelScale(factor, (-r / x, -g / y, -b / z))
    raise InvalidArgument(
        f"The scale of the pixels must be {_SCALE_FORMS}. Received: @{text}"
    )


def plain_name(name: str) -> str:
    """Returns a name in lower case, without hyphens and underscores."""
    return name.lower().replace("_", "").replace("-", "")


def takes_texts(name: str | os.PathLike[str]) -> bool:
    """Whether a name is that of a text encoder."""
    return plain_name(os.fspath(name)) in TEXT_ENCODERS


def require_takes(name: str | os.PathLike[str], kind: str) -> None:
    """Refuses a backbone that does not take samples of this kind."""
    if takes_texts(name) == (kind == TEXTS):
        return
    texts = ("images", f"`--backbone {TEXT_ENCODERS[0]}`")
    images = ("texts", "a backbone for images, such as efficientnet_lite0")
    taken, instead = texts if kind == TEXTS else images
    raise InvalidArgument(
        f"The data are {kind}, and the backbone takes {taken}. Received: {name}. "
        f"Use {instead}."
    )


def require_unfreezable(name: str | os.PathLike[str]) -> None:
    """Refuses the training of a text encoder."""
    if takes_texts(name):
        raise InvalidArgument(
            f"A text encoder stays frozen; only the head is trained. Received: {name}. "
            "Leave out `--unfreeze`."
        )


def is_fixed_network(name: str) -> bool:
    """Whether a backbone has no Keras layers: it has one dtype and cannot learn."""
    parsed = parse_backbone_name(name)
    return parsed is not None and parsed.kind in _FIXED_NETWORKS


# === Features ===

DTYPES = ("auto", "float32", "bfloat16")
CACHE_DTYPES = ("float32", "float16")
ENGINES = ("auto", "tensorflow", "onnxruntime", "openvino")


@dataclasses.dataclass(frozen=True)
class FeatureConfig:
    """Which features are extracted, and how they are cached.

    Attributes:
        backbone: A model of `keras.applications`, `"efficientnet_lite0"`, a `.keras`
            file, `"hub:PRESET"`, `"savedmodel:FOLDER@SCALE"`, `"onnx:FILE@SCALE"` or,
            for texts, `"minilm"`. Default None: `DEFAULT_BACKBONES` of the data.
        weights: `"imagenet"`, `"none"` or a file. Default `"imagenet"`.
        image_size: Side of the square images in pixels, at least 1. Default None: the
            backbone's own.
        cache_dir: Where features are cached. Default None: the user's cache folder.
        augmentations: Augmented views cached per training image, at least 1: the image
            as it is, and others flipped and cropped at random. Default 1.
        dtype: Dtype of the backbone: `"float32"`, `"bfloat16"`, or `"auto"`, which
            takes bfloat16 where the hardware has it. Default `"auto"`.
        engine: What runs the backbone: `"tensorflow"`, `"onnxruntime"` or `"openvino"`
            (in float32), or `"auto"`, which takes the fastest that is installed, where
            the features take longer than a minute. Default `"auto"`.
        cache_dtype: Dtype of the features on disk: `"float32"` or `"float16"`. Default
            `"float32"`.

    Raises:
        InvalidArgument: If a value is unknown or out of its range, an engine is not
            installed, or not one for that dtype.

    Example:
        >>> import keras_rsft as rsft
        >>> rsft.FeatureConfig("efficientnet_lite0", image_size=160).dtype
        'auto'
    """

    backbone: str | None = option(
        None,
        "a model of keras.applications, efficientnet_lite0, a .keras file, "
        "hub:PRESET, savedmodel:FOLDER@SCALE or onnx:FILE@SCALE, with a SCALE such as "
        f"0:1 or imagenet; default: {DEFAULT_BACKBONES[IMAGES]}, for texts "
        f"{DEFAULT_BACKBONES[TEXTS]}",
        first=1,
    )
    weights: str = option("imagenet", "imagenet, none or a file; of minilm a folder")
    image_size: int | None = option(None, "pixels; default: the backbone's own")
    cache_dir: str | os.PathLike[str] | None = option(  # noqa: RUF009
        None,
        "where features are cached; default: the user's cache folder",
        metavar="FOLDER",
    )
    augmentations: int = rare(
        1,
        "augmented views cached per training image; the first is unchanged",
    )
    dtype: str = rare(
        "auto",
        f"dtype of the backbone: {', '.join(DTYPES)}; auto takes bfloat16 where the "
        "hardware has it",
    )
    engine: str = option(
        "auto",
        f"what runs the backbone: {', '.join(ENGINES)}; auto takes the fastest that is "
        "installed where the features take longer than a minute",
    )
    cache_dtype: str = rare(
        "float32",
        f"dtype of the cached features: {', '.join(CACHE_DTYPES)}; float16 takes half "
        "the space",
    )

    def __post_init__(self) -> None:
        if self.backbone is not None:
            if not isinstance(self.backbone, str | os.PathLike):
                raise InvalidArgument(
                    "The backbone must be a name or a path. Received: "
                    f"{self.backbone!r}."
                )
            object.__setattr__(self, "backbone", os.fspath(self.backbone))
            parse_backbone_name(self.backbone)
        check_numbers(self, "at least 1", "image_size", "augmentations")
        require_known("dtype", self.dtype, DTYPES)
        require_known("cache dtype", self.cache_dtype, CACHE_DTYPES)
        require_known("engine", self.engine, ENGINES)
        if missing := missing_packages(self.engine):
            extra = "onnx" if self.engine == "onnxruntime" else self.engine
            raise InvalidArgument(
                f"The engine {self.engine} needs {', '.join(missing)}. Install it "
                f'with: pip install "keras_rsft[{extra}]".'
            )
        if self.dtype == "bfloat16" and self.engine not in ENGINES[:2]:
            raise InvalidArgument(
                f"The engine {self.engine} computes in float32. Received: "
                "dtype='bfloat16'. Leave out the dtype, or the engine."
            )


def missing_packages(engine: str) -> list[str]:
    """Returns what is not installed of the packages that an engine needs."""
    needed = () if engine in ENGINES[:2] else (engine, "onnx", "tf2onnx")
    return [one for one in needed if importlib.util.find_spec(one) is None]


def feature_config(features: FeatureConfig | str | None, kind: str) -> FeatureConfig:
    """Returns `features`, or the backbone of that name, for images or texts."""
    if not isinstance(features, FeatureConfig):
        features = FeatureConfig(features)
    backbone = features.backbone or DEFAULT_BACKBONES[kind]
    require_takes(backbone, kind)
    if kind == TEXTS and features.augmentations > 1:
        raise InvalidArgument(
            "A text has no augmentations. Received: "
            f"augmentations={features.augmentations}."
        )
    return dataclasses.replace(features, backbone=backbone)


# === Policies ===

POLICY_NAMES = (
    "auto", "accept-all", "loss-threshold", "keep-fraction", "self-paced",
    "running-threshold", "loss-mixture",
)  # fmt: skip
LEVELS = ("sample", "batch")
DEFAULT_KEEP_FRACTION = 0.7
# Which policies look at what may be given.
USED_BY = {
    "threshold": ("auto", "loss-threshold", "self-paced"),
    "keep_fraction": ("keep-fraction",),
    "level": ("loss-threshold",),
    # `auto` has a floor of its own.
    "class_floor": (
        "loss-threshold", "keep-fraction", "self-paced", "running-threshold",
        "loss-mixture",
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
    """A policy by name, in units that do not depend on the data set's size.

    Attributes:
        name: One of `POLICY_NAMES`. Default: the policy whose parameter is given
            below (`loss-threshold` for `threshold` or batch level, `keep-fraction`),
            else `"auto"`, which none of them concerns.
        threshold: Loss below which `loss-threshold` accepts, and from which
            `self-paced` starts, positive. Default None: `relative_threshold` decides.
            For `auto` the least probability that a label is right, in (0, 1]. Default
            None: 0.6.
        relative_threshold: The same in multiples of ln(classes), the loss that
            a new head starts with; positive. Default 0.65.
        keep_fraction: Fraction that `keep-fraction` keeps, in (0, 1]. Default 0.7.
        level: `"sample"` or `"batch"`, for `loss-threshold`. Default `"sample"`.
        warmup_epochs: Epochs at the start in which the loss is not used yet: policies
            by loss accept every sample with a finite loss, `auto` already leaves out
            the labels that look noisy, `keep-fraction` ramps down. At least 0. Default
            2.
        class_floor: Minimum fraction of each class in a batch that a policy by loss
            accepts, in [0, 1]; `auto` has a floor of its own. Default 0.

    Raises:
        InvalidArgument: If a value is unknown or out of its range.

    Example:
        >>> PolicyConfig().name, PolicyConfig(threshold=1.5).name
        ('auto', 'loss-threshold')
        >>> PolicyConfig("keep-fractoin")
        Traceback (most recent call last):
        ...
        keras_rsft.errors.InvalidArgument: The policy must be one of auto, accept-all,
        loss-threshold, keep-fraction, self-paced, running-threshold, loss-mixture.
        Received: 'keep-fractoin'. Did you mean 'keep-fraction'?
    """

    name: str | None = option(
        None,
        f"{', '.join(POLICY_NAMES)}; default: the policy that --threshold, "
        "--keep-fraction or --level belongs to, else auto",
        first=2,
        name="policy",
    )
    threshold: float | None = option(
        None,
        "loss below which loss-threshold accepts, default 0.65 ln(classes); with "
        "--policy auto the least probability that a label is right, default 0.6",
    )
    relative_threshold: float = rare(0.65, "threshold in multiples of ln(classes)")
    keep_fraction: float | None = option(
        None, f"fraction that keep-fraction keeps; default: {DEFAULT_KEEP_FRACTION}"
    )
    level: str = option(LEVELS[0], f"judge each {' or each '.join(LEVELS)}")
    warmup_epochs: float = option(
        2.0, "epochs at the start in which the loss is not used yet"
    )
    class_floor: float = rare(
        0.0,
        "minimum fraction of each class in a batch to accept; not for auto and "
        "accept-all",
    )

    def __post_init__(self) -> None:
        name = self.name
        if name is None:
            name = "auto" if self.keep_fraction is None else "keep-fraction"
            if self.threshold is not None or self.level == "batch":
                name = "loss-threshold"
        if self.keep_fraction is None:
            object.__setattr__(self, "keep_fraction", DEFAULT_KEEP_FRACTION)
        object.__setattr__(self, "name", name)
        require_known("policy", name, POLICY_NAMES)
        require_known("level", self.level, LEVELS)
        check_numbers(self, "a positive number", "threshold", "relative_threshold")
        if name == "auto":  # A probability.
            check_numbers(self, "in (0, 1]", "threshold")
        check_numbers(self, "at least 0", "warmup_epochs")
        check_numbers(self, "in (0, 1]", "keep_fraction")
        check_numbers(self, "in [0, 1]", "class_floor")


def require_used(name: str, given: Mapping[str, object]) -> None:
    """Raises InvalidArgument if a policy would not look at a field that was given."""
    for field in dataclasses.fields(PolicyConfig):
        users = USED_BY.get(field.name, POLICY_NAMES)
        if given.get(field.name, field.default) != field.default and name not in users:
            flag = "--" + field.name.replace("_", "-")
            if "rare" in field.metadata:
                flag = f"--set {field.name}"
            raise InvalidArgument(
                f"`{flag}` is for the policy {' or '.join(users)}. Received it for "
                f"{name}. Leave it out, or choose that policy."
            )


# === Unfreezing ===

# From the cheapest on: the head alone, with the last block, with all layers.
FROZEN, LAST_BLOCK, ALL = "frozen", "last-block", "all"
UNFREEZE_NAMES = (FROZEN, LAST_BLOCK, ALL)
# A number of blocks, `ALL`, or names of layers.
Unfreeze = int | str | tuple[str, ...]


def parse_unfreeze(text: str) -> Unfreeze:
    """Returns what `N`, `all` or `LAYER[,LAYER...]` means."""
    text = text.strip()
    if text.lstrip("+-").isdigit():
        return checked_unfreeze(int(text))
    if text.lower() == ALL:
        return ALL
    return checked_unfreeze(tuple(name.strip() for name in text.split(",")))


def checked_unfreeze(value: Unfreeze | list[str]) -> Unfreeze:
    """Returns the same in its usual form: one name becomes a tuple of one."""
    if value == ALL:
        return ALL
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    names: tuple[Any, ...] = (value,)
    if isinstance(value, (tuple, list)):
        names = tuple(value)
    if names and all(isinstance(name, str) and name for name in names):
        return names
    raise InvalidArgument(
        "The layers to unfreeze must be a number of blocks, at least 1, all, or names "
        f"of layers. Received: {value!r}."
    )


@dataclasses.dataclass(frozen=True)
class UnfreezeConfig:
    """Which layers of a backbone are trained after the head, and how.

    Attributes:
        layers: `"last-block"`, the cautious preset: the last block, on the samples
            that the finished head accepts; a number of last blocks, at least 1, `"all"`
            or names of layers, under the policy of the head. Default `"last-block"`.
        epochs: At least 1. Default None: 3 for the preset, 5 otherwise.
        learning_rate: Of the unfrozen layers, positive. Default None: a tenth of the
            head's; the preset has its own, 0.0001.
        batch_size: At least 1. Default None: the head's.
        train_batch_norm: Whether their BatchNorm layers learn and normalise by the
            batch. Default False: they stay in inference mode.

    Raises:
        InvalidArgument: If a value is out of its range.
    """

    layers: Unfreeze = option(  # noqa: RUF009
        LAST_BLOCK,
        "after the head, train layers of the backbone too: last-block (on accepted "
        "samples only), the last N blocks, all, or layers by name; the result is used "
        "if validation is no worse; default: frozen",
        first=3,
        name="unfreeze",
        metavar="last-block|N|all|LAYER,...",
    )
    epochs: int | None = rare(
        None, "default: 3 for last-block, 5 otherwise", name="unfreeze_epochs"
    )
    learning_rate: float | None = rare(
        None,
        "default: a tenth of the head's; 0.0001 for last-block",
        name="unfreeze_learning_rate",
    )
    batch_size: int | None = None
    train_batch_norm: bool = rare(
        False, "have BatchNorm layers learn and normalise by the batch"
    )

    def __post_init__(self) -> None:
        if self.layers != LAST_BLOCK:
            object.__setattr__(self, "layers", checked_unfreeze(self.layers))
        if self.epochs is None:
            object.__setattr__(self, "epochs", 3 if self.accepted_only else 5)
        if self.learning_rate is None and self.accepted_only:
            object.__setattr__(self, "learning_rate", 1e-4)
        check_numbers(self, "at least 1", "epochs", "batch_size")
        check_numbers(self, "a positive number", "learning_rate")

    @property
    def accepted_only(self) -> bool:
        """Whether only samples that the finished head accepts are trained on."""
        return self.layers == LAST_BLOCK

    @property
    def cut(self) -> Unfreeze:
        """The layers as a number of blocks, `"all"` or names."""
        return 1 if self.accepted_only else self.layers


# === Training ===

STRATEGY_NAMES = ("none", "mirrored", "multiworker")
# As `keras.optimizers.get` takes them, without those that wrap others.
OPTIMIZER_NAMES = (
    "sgd", "adam", "adamw", "rmsprop", "nadam", "adamax", "adagrad", "adadelta",
    "adafactor", "ftrl", "lion", "muon", "schedulefreeadamw",
)  # fmt: skip
# Parts of the names of variables without weight decay.
NOT_DECAYED = ("bias", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """How a head is trained, and after it perhaps a part of the backbone.

    Attributes:
        policy: What may update the weights. Default: `PolicyConfig()`.
        epochs: Passes over the training features, at least 1. Default 20.
        learning_rate: Positive. Default 0.001.
        batch_size: Samples per step, at least 1. Default 32.
        optimizer: Name of a Keras optimizer. Default `"sgd"`.
        weight_decay: Of the kernels, at least 0, decoupled from the gradient
            (Loshchilov and Hutter, "Decoupled weight decay regularization", ICLR
            2019): an accepted step multiplies them by 1 - `weight_decay` times
            `learning_rate`, a rejected one leaves them. Default None: the
            optimizer's own.
        early_stopping: Epochs without a better validation accuracy, at least 1, after
            which the training of the head ends; the weights of the best epoch are
            kept. The accuracy is by right labels, known or estimated, or by the given
            ones where no label can be judged. Default None: all epochs, and the
            weights of the last.
        seed: Seed of the order of the samples. Default 0.
        momentum: Of `"sgd"`, in [0, 1]. Default 0.9.
        unfreeze: Which layers of the backbone to train with the head after its
            `epochs`, and how. Default None: none.

    Raises:
        InvalidArgument: If a value is out of its range or unknown.

    Example:
        >>> import keras_rsft as rsft
        >>> rsft.TrainConfig(epochs=5, optimizer="adamw").learning_rate
        0.001
    """

    policy: PolicyConfig = dataclasses.field(default_factory=PolicyConfig)
    epochs: int = option(20, "passes over the training features", first=4)
    learning_rate: float = option(1e-3, "learning rate of the head")
    batch_size: int = option(32, "samples per step")
    optimizer: str = option("sgd", "a Keras optimizer, such as sgd or adamw")
    weight_decay: float | None = option(
        None,
        "decoupled weight decay of the kernels, applied on accepted steps only; "
        "default: the optimizer's own",
    )
    early_stopping: int | None = option(
        None,
        "end the head's training after this many epochs without a better validation "
        "accuracy by right labels, known or estimated (5 if no number follows), and "
        "keep the best weights",
        metavar="EPOCHS",
        nargs="?",
        const=5,
    )
    seed: int = option(0, "seed of the order of the samples, and of `--noise`")
    momentum: float = rare(0.9, "momentum of sgd")
    unfreeze: UnfreezeConfig | None = None

    def __post_init__(self) -> None:
        check_numbers(self, "at least 1", "epochs", "batch_size", "early_stopping")
        check_numbers(self, "at least 0", "weight_decay")
        check_numbers(self, "a positive number", "learning_rate")
        check_numbers(self, "in [0, 1]", "momentum")
        check_numbers(self, "a whole number in [0, 2**31)", "seed")
        require_known("optimizer", self.optimizer.lower(), OPTIMIZER_NAMES)

    @property
    def unfreezes_under_policy(self) -> bool:
        """Whether unfrozen layers continue the head's training, under its policy."""
        return self.unfreeze is not None and not self.unfreeze.accepted_only

    @property
    def unfreezing(self) -> UnfreezeConfig:
        """How layers are unfrozen, by default where nothing was asked for."""
        return self.unfreeze or UnfreezeConfig(1)

    @property
    def all_epochs(self) -> int:
        """Epochs of the head, and of unfrozen layers after it."""
        if self.unfreeze is None or self.unfreeze.epochs is None:
            return self.epochs
        return self.epochs + self.unfreeze.epochs

    @property
    def unfreeze_rate(self) -> float:
        """The unfrozen layers' learning rate."""
        if self.unfreeze is None or self.unfreeze.learning_rate is None:
            return 0.1 * self.learning_rate
        return self.unfreeze.learning_rate


# === Search ===

BATCHED, HYPERBAND = "batched", "hyperband"
TUNER_NAMES = (BATCHED, "random", "bayesian", HYPERBAND, "grid")
ORACLE_NAMES = ("random", "bayesian", "grid")
# The batch-level rule: whole batches, an absolute threshold, no warm-up.
ARTICLE = "article"
SEARCHED_POLICIES = (*POLICY_NAMES, ARTICLE)
# Each with the direction in which it is better.
# The first is the validation accuracy by right labels, known or estimated.
OBJECTIVES = {"val_accuracy_estimated": "max", "val_accuracy": "max", "val_loss": "min"}


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """How a search is done, whatever its data and its space are.

    Attributes:
        tuner: Out of `TUNER_NAMES`. Default `"batched"`, which trains many heads
            together; the others are Keras Tuner's and train one at a time.
        max_trials: Trials in all, at least 1. Default 64.
        objective: `"val_accuracy_estimated"` (default), the validation accuracy by
            right labels, known or estimated; `"val_accuracy"`, by the given labels; or
            `"val_loss"`. Each at a trial's best epoch.
        oracle: What proposes the batched tuner's trials: `"random"` (default),
            `"bayesian"` or `"grid"`.
        parallel_trials: Heads that the batched tuner trains together, at least 1.
            Default 64.
        halvings: How often the batched tuner drops the worse half of its heads
            while they train, at least 0. Default 0.
        min_acceptance: Minimum acceptance rate of the chosen trial, in
            [0, 1]. Default 0.1.
        unfreeze: Out of `UNFREEZE_NAMES`. For `"last-block"` and `"all"`, training
            continues from the best heads with this part of the backbone; `"frozen"`,
            the heads, is always among them. Default `("frozen",)`.

    Raises:
        InvalidArgument: If a value is unknown or out of its range.
    """

    tuner: str = option(
        BATCHED, f"{', '.join(TUNER_NAMES)}; batched trains many heads together"
    )
    max_trials: int = option(64, "trials in all", first=4)
    objective: str = option("val_accuracy_estimated", ", ".join(OBJECTIVES))
    oracle: str = option(
        "random", f"what proposes the batched tuner's trials: {', '.join(ORACLE_NAMES)}"
    )
    parallel_trials: int = rare(64, "heads trained together")
    halvings: int = rare(0, "how often the worse half of the heads is dropped")
    min_acceptance: float = rare(0.1, "minimum acceptance rate of the chosen trial")
    unfreeze: tuple[str, ...] = option(
        (FROZEN,),
        f"out of {', '.join(UNFREEZE_NAMES)}: continue training with the last block, "
        "or all of the backbone, from the best plain head and the best one that "
        "rejects, and choose the cheapest that is as good as the best; default: frozen",
        first=3,
        name="unfreeze_choices",
        metavar="A,B,C",
    )

    def __post_init__(self) -> None:
        names = (self.unfreeze,) if isinstance(self.unfreeze, str) else self.unfreeze
        for name in names:
            require_known("unfrozen part", name, UNFREEZE_NAMES)
        names = tuple(one for one in UNFREEZE_NAMES if one == FROZEN or one in names)
        object.__setattr__(self, "unfreeze", names)
        require_known("tuner", self.tuner, TUNER_NAMES)
        require_known("oracle", self.oracle, ORACLE_NAMES)
        require_known("objective", self.objective, tuple(OBJECTIVES))
        check_numbers(self, "at least 1", "max_trials", "parallel_trials")
        check_numbers(self, "at least 0", "halvings")
        check_numbers(self, "in [0, 1]", "min_acceptance")
        for name in ("oracle", "halvings"):
            default = getattr(type(self), name)
            if self.tuner != BATCHED and getattr(self, name) != default:
                raise InvalidArgument(
                    f"`{name}` is an option of the batched tuner. Received: "
                    f"{name}={getattr(self, name)} with the tuner {self.tuner}."
                )

    @property
    def unfrozen(self) -> tuple[str, ...]:
        """Those of `unfreeze` in which the backbone learns, the cheapest first."""
        return self.unfreeze[1:]

    @property
    def direction(self) -> str:
        """`"max"` or `"min"`: where the objective is better."""
        return OBJECTIVES[self.objective]


@dataclasses.dataclass(frozen=True)
class SearchSpace:
    """Ranges of the hyperparameters; a range of one value fixes it.

    A function that declares Keras Tuner's hyperparameters and returns their values can
    take its place:

    ```python
    def space(hp):
        rate = hp.Float("learning_rate", 1e-4, 1e-1, sampling="log")
        return {"learning_rate": rate, "policy": "keep-fraction"}
    ```

    Attributes:
        learning_rate: Lowest and highest, sampled by their logarithm.
        policies: Names of policies, and `"article"`: the batch-level rule.
        relative_threshold: Lowest and highest threshold of `loss-threshold` and
            `self-paced`, in multiples of ln(classes).
        right_probability: Lowest and highest threshold of `auto`: the least probability
            that a label is right, in (0, 1].
        article_threshold: Lowest and highest of `"article"`, in the loss's units.
        keep_fraction: Lowest and highest fraction of `keep-fraction`, in (0, 1].
        warmup_epochs: Fewest and most, whole numbers.
        optimizers: Names of Keras optimizers.
        weight_decay: Lowest and highest of `adamw`, sampled by their logarithm.
        threshold: Lowest and highest of `loss-threshold` and `self-paced`, in the
            loss's units. Default None: `relative_threshold`.
        epochs: Fewest and most, whole numbers, at least 1. Default None: those of the
            `TrainConfig`.

    Raises:
        InvalidArgument: If a range is empty, reversed or outside of what its number
            may be, or a name is not known.

    Example:
        >>> import keras_rsft as rsft
        >>> space = rsft.SearchSpace(policies=("keep-fraction",), optimizers=("sgd",))
        >>> space.keep_fraction
        (0.4, 0.95)
    """

    learning_rate: tuple[float, float] = (1e-4, 1e-1)
    policies: tuple[str, ...] = option(
        ("accept-all", "auto", "loss-threshold", "keep-fraction"),
        f"out of {', '.join(SEARCHED_POLICIES)}; default: accept-all, auto, "
        "loss-threshold, keep-fraction",
        first=2,
        metavar="A,B,C",
    )
    relative_threshold: tuple[float, float] = (0.2, 1.5)
    right_probability: tuple[float, float] = (0.2, 0.9)
    article_threshold: tuple[float, float] = (0.5, 3.0)
    keep_fraction: tuple[float, float] = (0.4, 0.95)
    warmup_epochs: tuple[int, int] = (1, 5)
    optimizers: tuple[str, ...] = option(
        ("sgd", "adamw"), "default: sgd,adamw", metavar="A,B"
    )
    weight_decay: tuple[float, float] = (1e-5, 1e-2)
    threshold: tuple[float, float] | None = None
    epochs: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        for name in RANGE_NAMES:
            if getattr(self, name) is not None:
                self._check_range(name)
        for name in ("policies", "optimizers"):
            if isinstance(getattr(self, name), str) or not getattr(self, name):
                raise InvalidArgument(
                    f"`{name}` must be one or more names. "
                    f"Received: {name}={getattr(self, name)!r}."
                )
        for policy in self.policies:
            require_known("policy", policy, SEARCHED_POLICIES)
        for optimizer in self.optimizers:
            require_known("optimizer", optimizer.lower(), OPTIMIZER_NAMES)

    def _check_range(self, name: str) -> None:
        given, least = getattr(self, name), WHOLE_RANGES.get(name)
        most = 1 if name in ("keep_fraction", "right_probability") else math.inf
        is_pair = isinstance(given, (tuple, list)) and len(given) == 2
        low, high = given if is_pair else (math.nan, math.nan)
        holds = low <= high <= most and high < math.inf
        if least is None:
            holds = holds and low > 0
        else:
            holds = holds and low >= least and not (low % 1 or high % 1)
        if not holds:
            bound = "above 0" if least is None else f"whole numbers, at least {least}"
            bound += " and at most 1" if most == 1 else ""
            raise InvalidArgument(
                f"`{name}` must be the lowest and the highest value, {bound}. "
                f"Received: {name}={given!r}."
            )


# The ranges of a `SearchSpace`; those of whole numbers with their least value.
RANGE_NAMES = (
    "learning_rate", "right_probability", "relative_threshold", "threshold",
    "article_threshold", "keep_fraction", "warmup_epochs", "weight_decay", "epochs",
)  # fmt: skip
WHOLE_RANGES = {"warmup_epochs": 0, "epochs": 1}


# === Methods of a comparison ===

PLAIN = "plain"
CLEAN_SUBSET = "clean-subset"
EARLY_STOPPING = "early-stopping"
CLEANLAB = "cleanlab"
AUTO = "auto"
WEIGHT_DECAY = "weight-decay"
AUTO_WEIGHT_DECAY = f"{AUTO}+{WEIGHT_DECAY}"
METHOD_NAMES = (
    PLAIN, EARLY_STOPPING, WEIGHT_DECAY, ARTICLE, "loss-threshold", "keep-fraction",
    AUTO, AUTO_WEIGHT_DECAY, "gce", "co-teaching", CLEANLAB, CLEAN_SUBSET,
)  # fmt: skip


def check_methods(names: Sequence[str] | None) -> tuple[str, ...] | None:
    """Returns each method once, `plain` first; None means all that can run."""
    if names is None:
        return None
    if isinstance(names, str) or not names:
        raise InvalidArgument(
            "`methods` must be a list of one or more names out of "
            f"{', '.join(METHOD_NAMES)}. Received: {names!r}."
        )
    for name in names:
        require_known("method", name, METHOD_NAMES)
    if CLEANLAB in names:
        require_cleanlab()
    return tuple(dict.fromkeys((PLAIN, *names)))


def has_cleanlab() -> bool:
    """Whether the package `cleanlab` is installed, without importing it."""
    return importlib.util.find_spec("cleanlab") is not None


def require_cleanlab() -> None:
    """Raises ImportError, naming the extra, if `cleanlab` is not installed."""
    if not has_cleanlab():
        raise ImportError(
            "The method cleanlab needs the package of that name. "
            'Install it with: pip install "keras_rsft[compare]"'
        )


# === Export ===

WEIGHT_DTYPES_OF_FORMAT = {
    "saved-model": ("float32", "float16"),
    "litert": ("float32", "float16", "int8"),
    "onnx": ("float32",),
}
FORMATS = tuple(WEIGHT_DTYPES_OF_FORMAT)


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """The format of an export and its options.

    Attributes:
        file_format: `"saved-model"`, `"litert"` or `"onnx"`.
        weight_dtype: `"float32"`; `"float16"` for the first two; `"int8"`
            (dynamic-range quantisation) for LiteRT.
        version: Version of a SavedModel, at least 1. None: the next free one.
        top_k: How many classes a SavedModel names in `top_labels`, or None.
        max_pixels: Most pixels of an encoded image that a SavedModel decodes, at least
            1. None: 100,000,000.

    Raises:
        InvalidArgument: If the options do not fit the format.
    """

    file_format: str = option("saved-model", ", ".join(FORMATS), name="format")
    weight_dtype: str = option(
        "float32",
        "float32, float16, int8: how weights are stored; float16 for saved-model and "
        "litert, int8 for litert",
    )
    version: int | None = option(
        None,
        "version of a saved-model; default: the next free one",
        name="model_version",
    )
    top_k: int | None = option(
        None, "also return the K most probable classes of a saved-model", metavar="K"
    )
    max_pixels: int | None = option(
        None,
        "have a saved-model refuse encoded images of more pixels; default: 100,000,000",
        metavar="N",
    )

    def __post_init__(self) -> None:
        require_known("format", self.file_format, FORMATS)
        known = WEIGHT_DTYPES_OF_FORMAT[self.file_format]
        if self.weight_dtype not in known:
            raise InvalidArgument(
                f"The format {self.file_format} stores weights as {' or '.join(known)}."
                f" Received: {self.weight_dtype!r}."
            )
        only = (self.version, self.top_k, self.max_pixels)
        if self.file_format != "saved-model" and any(only):
            raise InvalidArgument(
                "A version, the most probable classes and the most pixels can be "
                "chosen for the format saved-model only. Received: the format "
                f"{self.file_format}."
            )
        check_numbers(self, "at least 1", "version", "top_k", "max_pixels")
