"""The command line, `keras-rsft`. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status."""
    from keras_rsft.cli._main import run

    return run(argv)
