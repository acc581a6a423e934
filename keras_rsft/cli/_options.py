"""Options from the fields of the configurations, and configurations from options."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

from keras_rsft import config
from keras_rsft.config import nearest_name_hint, option, rare
from keras_rsft.errors import InvalidArgument

DEFAULT_TEXT_COLUMN = "text"
FIRST = "main options"


# === Data ===


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Columns and splits of a data set, noise and corrections of its labels."""

    label_column: str = option(
        "label", "column of the labels in a CSV file, or key of a tfds: set"
    )
    path_column: str = option("path", "column of the images' paths in a CSV file")
    image_dir: str | None = option(
        None,
        "folder of the images in a CSV file, also if their paths are absolute or of "
        "another machine; default: the folder of the CSV file",
        metavar="FOLDER",
    )
    image_suffix: str = option(
        "", "what to append to paths in a CSV file, such as .jpg", metavar="TEXT"
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
    clean_splits: tuple[str, ...] = option(
        (),
        f"out of {', '.join(config.SPLITS)}: take the labels of these splits as right",
        metavar="A,B",
    )
    validation_fraction: float = option(
        0.15, "fraction held out if there is no validation split"
    )
    test_fraction: float = option(0.15, "fraction held out if there is no test split")
    split_column: str = rare("split", "column of each sample's split in a CSV file")
    id_column: str | None = rare(
        None, "column of the texts' ids; default: made of the texts"
    )
    data_dir: str | None = rare(None, "folder of tfds: data")
    split_seed: int = rare(0, "seed of the random split")

    def __post_init__(self) -> None:
        config.check_numbers(self, "in (0, 1)", "validation_fraction", "test_fraction")
        for name in self.clean_splits:
            config.require_known("split", name, config.SPLITS)


# === From fields to options ===

_GROUPS = {
    DataConfig: "data",
    config.FeatureConfig: "backbone",
    config.PolicyConfig: "rejection",
    config.TrainConfig: "training",
    config.SearchConfig: "search",
    config.SearchSpace: "search",
    config.ExportConfig: "export",
}


# Of a field's metadata, what `argparse` takes.
_FOR_ARGPARSE = ("metavar", "choices", "nargs", "const", "required", "action", "type")


@dataclasses.dataclass(frozen=True)
class Setting:
    """A field that is an option; `dest` is its name in the arguments."""

    dest: str
    field: dataclasses.Field
    owner: type

    @property
    def flag(self) -> str:
        return "--" + self.dest.replace("_", "-")

    @property
    def default(self) -> Any:
        # The layers to unfreeze have a default only where something is unfrozen.
        is_none = self.owner is config.UnfreezeConfig and self.dest == "unfreeze"
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


def settings_of(owner: type, which: str = "") -> Iterator[Setting]:
    """Yields the fields that are options: all, those named, or without `-` those."""
    names = which.lstrip("-").split()
    for field in dataclasses.fields(owner):
        dest = field.metadata.get("name", field.name)
        named = not names or (dest in names) != which.startswith("-")
        if "help" in field.metadata and named:
            yield Setting(dest, field, owner)


class CommandParser(argparse.ArgumentParser):
    """Parses a command; names the nearest command or option where one is mistyped."""

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
            title = FIRST if is_first else _GROUPS.get(one.owner, "")
            if title not in groups:
                groups[title] = self.add_argument_group(title)
            self._add(groups[title], one)
        rare = [one for one in settings if one.is_rare]
        self.set_defaults(**{one.dest: one.default for one in rare})
        if rare:
            text = "set a field that has no option of its own, see below"
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

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            hint = nearest_name_hint(value, list(action.choices or ()), cutoff=0.7)
            raise argparse.ArgumentError(action, f"{error.message}.{hint}") from error

    def error(self, message: str) -> NoReturn:
        """Ends the process with one sentence, not with a page of options."""
        self.exit(2, f"{self.prog}: error: {message}\nOptions: {self.prog} --help\n")


# === Types ===


def typed(kind: Callable, expected: str, holds: Callable = lambda value: True) -> Any:
    """Returns a parser of an option's text, which raises what `argparse` shows."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, received {text!r}")
        return value

    return parse


def split_at(mark: str, kind: Callable = str.strip) -> Callable[[str], tuple]:
    """Returns what splits a text and parses each part."""
    return lambda text: tuple(kind(part) for part in text.split(mark))


whole = typed(int, "a whole number")
positive = typed(int, "a whole number, at least 1", lambda value: value >= 1)
seconds = typed(float, "seconds, more than 0", lambda value: 0 < value < math.inf)
truth = typed({"true": True, "false": False}.get, "true or false")
name_list = typed(split_at(","), "names separated by commas", all)


def unfreeze_layers(text: str) -> config.Unfreeze | None:
    """Parses which layers to unfreeze; `frozen` means none."""
    if text in (config.FROZEN, config.LAST_BLOCK):
        return None if text == config.FROZEN else text
    try:
        return config.parse_unfreeze(text)
    except InvalidArgument as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def named_range(text: str) -> tuple[str, tuple[float, float]]:
    """Parses `NAME=LOW:HIGH`."""
    name, _, bounds = text.partition("=")
    name = name.strip().replace("-", "_")
    if name not in config.RANGE_NAMES:
        hint = nearest_name_hint(name, config.RANGE_NAMES)
        raise argparse.ArgumentTypeError(
            "expected NAME=LOW:HIGH with a name out of "
            f"{', '.join(config.RANGE_NAMES)}, received {text!r}.{hint}"
        )
    kind = int if name in config.WHOLE_RANGES else float
    parse = typed(
        split_at(":", kind),
        f"two {'whole ' if kind is int else ''}numbers LOW:HIGH, the lower one first",
        lambda value: len(value) == 2 and value[0] <= value[1],
    )
    return name, parse(bounds)


_METAVARS = {
    whole: "N",
    positive: "N",
    float: "X",
    seconds: "SECONDS",
    name_list: "A,B,C",
    named_range: "NAME=LOW:HIGH",
    str: "NAME",
}
