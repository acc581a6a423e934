"""Where a command's words and its result go: to a person, a script or a program."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_rsft._storage import json_value
from keras_rsft.report._summary import Summary, Table, shown

if TYPE_CHECKING:
    from rich.console import Console


class Output:
    """The streams of one command; loads `rich` when it first prints."""

    def __init__(
        self, *, quiet: bool = False, as_json: bool = False, command: str = ""
    ):
        self.progress = not quiet
        self.answer = sys.stdout
        self._quiet, self._as_json, self._command = quiet, as_json, command
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Output:
        self._stack.enter_context(warnings.catch_warnings())
        if self._quiet:
            warnings.simplefilter("ignore")
        else:
            warnings.showwarning = _print_warning
        if self._as_json:  # Whatever a library prints must not get into the document.
            self._stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        elif self._quiet:
            nothing = self._stack.enter_context(open(os.devnull, "w"))
            self._stack.enter_context(contextlib.redirect_stdout(nothing))
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @functools.cached_property
    def _console(self) -> Console:
        from rich.console import Console

        return Console(
            highlight=False, emoji=False, quiet=self._quiet, stderr=self._as_json
        )

    def say(self, text: str, style: str | None = None) -> None:
        """Prints a sentence, or a line that can be pasted: nothing breaks it."""
        from rich.markup import escape

        self._console.print(escape(shown(text)), style=style, soft_wrap=True)

    def next_command(self, title: str, command: str) -> None:
        """Prints a whole command, ready to paste."""
        self.say(f"{title}:\n  {command}")

    def show(self, summary: Summary, *, plain: bool = False) -> None:
        """Prints a result: tables, warnings, notes; a plain table fits 80 columns."""
        for one in summary.tables:
            self.table(one, plain=plain)
        for text in summary.warnings:
            self.say(text, style="yellow")
        for text in summary.notes:
            self.say(text)

    def table(self, one: Table, *, plain: bool = False) -> None:
        """Prints a table; where no column has a name, all of them are text."""
        from rich import box, table
        from rich.markup import escape

        named = any(one.columns)
        drawn = table.Table(
            title=one.title or None,
            title_justify="left",
            show_header=named,
            box=box.SIMPLE_HEAD if plain else box.HEAVY_HEAD,
            pad_edge=not plain,
        )
        for index, name in enumerate(one.columns):
            is_number = named and index >= one.text_columns
            drawn.add_column(
                name,
                justify="right" if is_number else "left",
                no_wrap=is_number,
                overflow="fold",
            )
        for row in one.rows:
            drawn.add_row(*(escape(shown(cell)) for cell in row))
        self._console.print(drawn)
        if one.note:
            self.say(one.note)

    def rows(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """Prints a table of names and values."""
        self.table(Table(("", ""), tuple(rows), title))

    def finish(self, last_line: object, **document: Any) -> None:
        """Prints the document (`--json`) or its most important line (`--quiet`)."""
        if self._as_json:
            whole = json_value({"command": self._command} | document)
            print(json_text(whole, self.answer, indent=2), file=self.answer, flush=True)
        elif self._quiet:
            print(shown(str(last_line)), file=self.answer, flush=True)


def json_text(document: Any, stream: Any, indent: int | None = None) -> str:
    """Returns JSON in a form that a stream can hold: the same in every encoding."""
    is_unicode = str(stream.encoding or "").lower().startswith("utf")
    return json.dumps(document, ensure_ascii=not is_unicode, indent=indent)


def _print_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """Prints a warning without its line of code, which tells a user nothing."""
    print(f"Warning: {shown(str(message))}", file=sys.stderr, flush=True)
