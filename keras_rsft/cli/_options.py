"""Options from the fields of the configurations, and configurations from options.

A field with a help text becomes an option of its name; a `rare` one is given by `--set
FIELD=VALUE` only. The type is checked here, the range by the configuration.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import re
import shlex
import textwrap
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from keras_rsft.config import (
    FROZEN,
    IMAGES,
    LAST_BLOCK,
    RANGE_NAMES,
    TEXTS,
    ExportConfig,
    FeatureConfig,
    PolicyConfig,
    SearchConfig,
    SearchSpace,
    TrainConfig,
    Unfreeze,
    UnfreezeConfig,
    feature_config,
    nearest_name_hint,
    option,
    parse_unfreeze,
    rare,
    require_used,
    takes_texts,
)
from keras_rsft.errors import InvalidArgument

if TYPE_CHECKING:
    from keras_rsft.data._samples import SampleData

Config = TypeVar("Config")
DEFAULT_TEXT_COLUMN = "text"
FIRST = "main options"
# A file system takes 255 bytes; before and after the name of the data comes more.
_MAX_NAME_BYTES = 200


# === Data ===


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Columns and splits of a data set, noise and corrections of its labels."""

    label_column: str = option(
        "label", "column of the labels in a CSV file, or key of a tfds: set"
    )
    text_column: str | None = option(
        None,
        "the data are texts, in this column of a CSV file; default with --backbone "
        f"minilm: {DEFAULT_TEXT_COLUMN}",
    )
    clean_label_column: str | None = option(
        None, "column or key of the clean labels, where they are known"
    )
    noise: str | None = option(
        None,
        "make labels wrong on purpose: symmetric:RATE, asymmetric:RATE or "
        "instance:RATE",
        metavar="KIND:RATE",
    )
    corrections: tuple[str, ...] = option(
        (),
        "file of a review, with the columns id, given_label, decision (keep, relabel, "
        "drop), new_label; repeat it for a later review",
        metavar="CSV",
        action="append",
    )
    validation_fraction: float = option(
        0.15, "share cut off where there is no validation split"
    )
    test_fraction: float = option(0.15, "share cut off where there is no test split")
    path_column: str = rare("path", "column of the images' paths in a CSV file")
    split_column: str = rare("split", "column of each sample's split in a CSV file")
    id_column: str | None = rare(
        None, "column of the texts' ids; default: made of the texts"
    )
    data_dir: str | None = rare(None, "folder of tfds: data")
    split_seed: int = rare(0, "seed of the cut")

    def __post_init__(self) -> None:
        for name in ("validation_fraction", "test_fraction"):
            if not 0 < getattr(self, name) < 1:
                raise InvalidArgument(
                    f"`{name}` must be in (0, 1). Received: {getattr(self, name)}."
                )


def kind_of(arguments: argparse.Namespace) -> str:
    """Returns `"texts"` or `"images"`, by the data's column and the backbones."""
    names = getattr(arguments, "backbones", None) or (arguments.backbone,)
    kinds = {takes_texts(name) for name in names if name is not None}
    if len(kinds) > 1:
        raise InvalidArgument(
            "Backbones for images and for texts cannot be ranked on the same data. "
            f"Received: {', '.join(names)}."
        )
    return TEXTS if arguments.text_column is not None or True in kinds else IMAGES


def load_data(arguments: argparse.Namespace, noisy_splits: Sequence[str]) -> SampleData:
    """Returns the data, labels made wrong in some splits and then corrected."""
    from keras_rsft import add_label_noise, apply_corrections, load_images, load_texts
    from keras_rsft.data._labels import read_corrections

    config = config_of(arguments, DataConfig)
    for file in config.corrections:
        read_corrections(file)  # Refused before the samples are listed.
    names = ["label_column", "split_column", "clean_label_column", "split_seed"]
    names += ["validation_fraction", "test_fraction"]
    shared = {name: getattr(config, name) for name in names}
    if kind_of(arguments) == TEXTS:
        shared["text_column"] = config.text_column or DEFAULT_TEXT_COLUMN
        data = load_texts(arguments.data, id_column=config.id_column, **shared)
    else:
        data = load_images(
            arguments.data,
            path_column=config.path_column,
            label_key=config.label_column,
            clean_label_key=config.clean_label_column,
            data_dir=config.data_dir,
            **shared,
        )
    if noisy_splits and config.noise is not None:
        seed = arguments.seed
        data = add_label_noise(data, config.noise, seed=seed, splits=noisy_splits)
    return apply_corrections(data, config.corrections)


def data_name(source: str) -> str:
    """Returns what a folder for the results is named after."""
    name = os.fsencode(Path(source.removeprefix("tfds:")).stem)
    return name[:_MAX_NAME_BYTES].decode(errors="ignore") or "run"


# === From fields to options ===

_GROUPS = {
    DataConfig: "data",
    FeatureConfig: "backbone",
    PolicyConfig: "rejection",
    TrainConfig: "training",
    SearchConfig: "search",
    SearchSpace: "search",
    ExportConfig: "export",
}


# Of a field's metadata, what `argparse` takes.
_FOR_ARGPARSE = ("metavar", "choices", "nargs", "const", "required", "action", "type")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field that is an option; `dest` is its name in the arguments."""

    dest: str
    field: dataclasses.Field
    config: type

    @property
    def flag(self) -> str:
        return "--" + self.dest.replace("_", "-")

    @property
    def default(self) -> Any:
        # The layers to unfreeze have a default only where something is unfrozen.
        is_none = self.config is UnfreezeConfig and self.dest == "unfreeze"
        return None if is_none else self.field.default

    @property
    def is_rare(self) -> bool:
        return "rare" in self.field.metadata

    @property
    def repeats(self) -> bool:
        return self.field.metadata.get("action") == "append"

    @property
    def parse(self) -> Callable[[str], Any]:
        """Returns what turns the option's text into the field's type."""
        kinds = {"int": whole, "float": float, "bool": truth, "str": str}
        kinds |= {"Unfreeze": unfreeze_layers, "tuple[str,": name_list}
        known = kinds[str(self.field.type).split(" ")[0]]
        return self.field.metadata.get("type", str if self.repeats else known)

    @property
    def help(self) -> str:
        text, shown = self.field.metadata["help"], self.default
        if shown is None or isinstance(shown, tuple) or shown is False:
            return text
        return f"{text}; default: {str(shown).lower()}"


def settings_of(config: type, which: str = "") -> Iterator[Setting]:
    """Yields the fields that are options: all, those named, or without `-` those."""
    names = which.lstrip("-").split()
    for field in dataclasses.fields(config):
        dest = field.metadata.get("name", field.name)
        named = not names or (dest in names) != which.startswith("-")
        if "help" in field.metadata and named:
            yield Setting(dest, field, config)


class CommandParser(argparse.ArgumentParser):
    """Parses a command; names the nearest option where one is mistyped."""

    def __init__(self, **options: Any):
        options["formatter_class"] = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, **options)
        self._settable: dict[str, Setting] = {}

    def add_settings(self, settings: Sequence[Setting]) -> None:
        """Adds options for fields, in groups, and `--set` if some are rare."""
        self._settable = {one.dest: one for one in settings}
        self._optionals.title = "other options"
        groups = {"": self._optionals}
        shown = [one for one in settings if not one.is_rare]
        for one in sorted(shown, key=lambda one: one.field.metadata.get("first", 99)):
            is_first = "first" in one.field.metadata
            title = FIRST if is_first else _GROUPS.get(one.config, "")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            self._add(groups[title], one)
        rare = [one for one in settings if one.is_rare]
        self.set_defaults(**{one.dest: one.default for one in rare})
        if rare:
            text = "give a field that has no option, see below"
            groups[""].add_argument(
                "--set", dest="given", action="append", default=[], help=text,
                metavar="FIELD=VALUE",
            )  # fmt: skip
            lines = ["fields for --set:"]
            for one in rare:
                text = f"  {one.dest}: {one.help}"
                lines.append(textwrap.fill(text, 78, subsequent_indent=" " * 6))
            self.epilog = "\n".join(lines)
        # Where `--help` is already, it comes last.
        self._action_groups.append(self._action_groups.pop(1))

    def _add(self, group: argparse._ArgumentGroup, one: Setting) -> None:
        metadata = one.field.metadata
        how = {name: metadata[name] for name in _FOR_ARGPARSE if name in metadata}
        how["help"] = one.help.replace("%", "%%")
        if "positional" in metadata:
            self.add_argument(one.dest, **how)
            return
        how |= {"dest": one.dest, "default": [] if one.repeats else one.default}
        if str(one.field.type) == "bool":
            how["action"] = "store_true"
        else:
            how["type"] = one.parse
            how.setdefault("metavar", _METAVARS.get(one.parse))
        group.add_argument(one.flag, **how)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Ends the process where an argument is not known."""
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            name = next((text for text in unknown if text.startswith("-")), "")
            hint = self._hint(name.partition("=")[0])
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        if self._settable:
            for text in getattr(parsed, "given", ()):
                self._set(parsed, text)
        return parsed, unknown

    def _hint(self, flag: str) -> str:
        field = flag.lstrip("-").replace("-", "_")
        if field in self._settable:
            return f" Use `--set {field}=VALUE`."
        known = re.findall(r"--[a-z][a-z-]*", self.format_usage())
        return nearest_name_hint(flag, known, cutoff=0.7)

    def _set(self, parsed: argparse.Namespace, text: str) -> None:
        name, _, value = text.partition("=")
        name = name.strip().replace("-", "_")
        if name not in self._settable:
            names = [one.dest for one in self._settable.values() if one.is_rare]
            self.error(
                f"argument --set: the field must be one of {', '.join(names)}. "
                f"Received: {name!r}.{nearest_name_hint(name, list(self._settable))}"
            )
        one = self._settable[name]
        try:
            setattr(parsed, name, [value] if one.repeats else one.parse(value))
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.error(f"argument --set: {name}: {error}")

    def error(self, message: str) -> NoReturn:
        """Ends the process with one sentence, not with a page of options."""
        self.exit(2, f"{self.prog}: error: {message}\nOptions: {self.prog} --help\n")


# === Types ===


def parsed(text: str, kind: Callable, holds: Callable, expected: str) -> Any:
    """Returns what an option's text means, or raises what `argparse` shows."""
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or not holds(value):
        raise argparse.ArgumentTypeError(f"expected {expected}, received {text!r}")
    return value


def typed(kind: Callable, expected: str, holds: Callable = lambda value: True) -> Any:
    """Returns a parser of an option's text."""
    return lambda text: parsed(text, kind, holds, expected)


def split_at(mark: str, kind: Callable = str.strip) -> Callable[[str], tuple]:
    """Returns what splits a text and parses each part."""
    return lambda text: tuple(kind(part) for part in text.split(mark))


whole = typed(int, "a whole number")
positive = typed(int, "a whole number, at least 1", lambda value: value >= 1)
seconds = typed(float, "seconds, more than 0", lambda value: 0 < value < math.inf)
truth = typed({"true": True, "false": False}.get, "true or false")
name_list = typed(split_at(","), "names separated by commas", all)


def unfreeze_layers(text: str) -> Unfreeze | None:
    """Parses which layers to unfreeze; `frozen` means none."""
    if text in (FROZEN, LAST_BLOCK):
        return None if text == FROZEN else text
    try:
        return parse_unfreeze(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def named_range(text: str) -> tuple[str, tuple[float, float]]:
    """Parses `NAME=LOW:HIGH`."""
    name, _, bounds = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in RANGE_NAMES:
        hint = nearest_name_hint(name, list(RANGE_NAMES))
        raise argparse.ArgumentTypeError(
            f"expected NAME=LOW:HIGH with a name out of {', '.join(RANGE_NAMES)}, "
            f"received {text!r}.{hint}"
        )
    kind = int if RANGE_NAMES[name][3] else float
    return name, parsed(
        bounds,
        split_at(":", kind),
        lambda value: len(value) == 2 and value[0] <= value[1],
        f"two {'whole ' if kind is int else ''}numbers LOW:HIGH, the lower one first",
    )


_METAVARS = {
    whole: "N",
    positive: "N",
    float: "X",
    seconds: "SECONDS",
    name_list: "A,B,C",
    named_range: "NAME=LOW:HIGH",
    str: "NAME",
}


# === From options to configurations ===


def config_of(
    arguments: argparse.Namespace, config: type[Config], **others: Any
) -> Config:
    """Returns a configuration of the options that a command has, and other fields."""
    values = {
        one.field.name: getattr(arguments, one.dest)
        for one in settings_of(config)
        if hasattr(arguments, one.dest)
    }
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
    return config(**values | others)


def policy_of(arguments: argparse.Namespace) -> PolicyConfig:
    """Returns the policy that was asked for, or the default one with the numbers."""
    policy = config_of(arguments, PolicyConfig)
    if hasattr(arguments, "policy"):  # Else several are tried, with all numbers.
        require_used(policy.name or "", vars(arguments))
    return policy


def unfreezing(
    arguments: argparse.Namespace, layers: Unfreeze | None
) -> UnfreezeConfig | None:
    """Returns how these layers are unfrozen; refuses a how without layers."""
    how = list(settings_of(UnfreezeConfig, "-unfreeze"))
    if layers is not None:
        values = {one.field.name: getattr(arguments, one.dest) for one in how}
        return UnfreezeConfig(layers, **values)
    for one in how:
        if getattr(arguments, one.dest) != one.default:
            is_fit = hasattr(arguments, "unfreeze")
            raise InvalidArgument(
                f"`{one.dest}` says how unfrozen layers are trained. Say which ones "
                f"with `{'--unfreeze' if is_fit else '--unfreeze-choices'}`."
            )
    return None


def features_of(arguments: argparse.Namespace) -> FeatureConfig:
    """Returns the features that were asked for."""
    config_of(arguments, DataConfig)  # Refused before anything heavy is imported.
    return feature_config(config_of(arguments, FeatureConfig), kind_of(arguments))


# === From configurations to a command ===


def words_of(config: Any) -> list[str]:
    """Returns the options that give this configuration, without what is default."""
    words = []
    for one in settings_of(type(config)):
        value = getattr(config, one.field.name)
        if value is None or value == one.default:
            continue
        if one.repeats:
            words += [f"{one.flag}={part}" for part in value]
            continue
        text = ",".join(value) if isinstance(value, tuple) else str(value)
        given = ["--set", f"{one.dest}={text}"]
        words += given if one.is_rare else [f"{one.flag}={text}"]
    return words


def fit_command(
    arguments: argparse.Namespace, *words: str, backbone: str | None = None
) -> str:
    """Returns a whole `fit`, quoted for a shell, on the data of another command."""
    features = config_of(arguments, FeatureConfig)
    if backbone is not None:
        features = dataclasses.replace(features, backbone=backbone)
    configs = (config_of(arguments, DataConfig), features)
    given = [word for config in configs for word in words_of(config)]
    return shlex.join(["keras-rsft", "fit", arguments.data, *given, *words])
