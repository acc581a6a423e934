"""Ends a command in the same orderly way on SIGTERM as on Ctrl-C.

Apart from `cli.py` so that a cluster's or a shell's polite kill takes the path that
the keyboard's does: what runs gets an exception, keeps what it has, and says how to
go on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); raised where Ctrl-C would be."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM into `Terminated` while the context is open.

    Only the main thread may do so; in another one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def terminate(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
