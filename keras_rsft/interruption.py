"""Ends a command in the same orderly way on SIGTERM as on Ctrl-C.

Apart from `cli.py` so that a cluster's or a shell's polite kill takes the path that
the keyboard's does: what runs gets an exception, keeps what it has, and says how to
go on.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SECONDS_UNTIL_AGAIN = 0.05


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); raised where Ctrl-C would be."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM into `Terminated` while the context is open.

    Python drops an exception that is raised while it collects garbage, Ctrl-C's too: a
    signal that comes then is sent again, a moment later. Only the main thread may do
    so; in another one nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: FrameType | None) -> None:
        if _drops_exceptions(frame):
            again = (os.getpid(), number)
            threading.Timer(SECONDS_UNTIL_AGAIN, os.kill, again).start()
            return
        raise Terminated if number == signal.SIGTERM else KeyboardInterrupt

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _drops_exceptions(frame: FrameType | None) -> bool:
    """Whether Python would drop what is raised here: in a finaliser, or of `gc`."""
    callbacks = {getattr(callback, "__code__", None) for callback in gc.callbacks}
    while frame is not None:
        if frame.f_code in callbacks or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
