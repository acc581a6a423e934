"""A parser that names the nearest option where one is mistyped."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from typing import Any, NoReturn

from keras_rsft.policy_choice import nearest_name_hint


class CommandParser(argparse.ArgumentParser):
    """Parses a command's arguments; its commands' parsers are of the same kind."""

    def parse_known_args(
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Returns the arguments; ends the process where one is not known.

        Here and not in `parse_args`, which would answer with the options of the
        program for what was asked of one of its commands.
        """
        parsed, unknown = super().parse_known_args(args, namespace)
        if unknown:
            option = next((text for text in unknown if text.startswith("-")), "")
            known = re.findall(r"--[a-z][a-z-]*", self.format_usage())
            hint = nearest_name_hint(option.partition("=")[0], known, cutoff=0.7)
            self.error(f"unrecognized arguments: {' '.join(unknown)}.{hint}")
        return parsed, unknown

    def error(self, message: str) -> NoReturn:
        """Ends the process with one sentence, not with a page of options."""
        self.exit(2, f"{self.prog}: error: {message}\nOptions: {self.prog} --help\n")
