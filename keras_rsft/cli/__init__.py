"""The command line, `keras-rsft`. Imports nothing until it is called."""

from __future__ import annotations

from collections.abc import Sequence


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name. Default: the process's.

    Returns:
        The exit status: 0, 1 for a failed run, 2 for a usage error, 130 when
        interrupted, 143 when terminated, 141 where nobody reads the output any more.
    """
    from keras_rsft.cli._main import run

    return run(argv)
