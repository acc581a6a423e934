"""Ends a command in the same orderly way on SIGTERM as on Ctrl-C.

Apart from `cli.py` so that a cluster's or a shell's polite kill takes the path that
the keyboard's does: what runs gets an exception, keeps what it has, and says how to
go on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

SECONDS_UNTIL_AGAIN = 0.05


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM); raised where Ctrl-C would be."""


@contextlib.contextmanager
def termination_raises() -> Iterator[None]:
    """Turns SIGTERM into `Terminated` while the context is open.

    Python drops an exception that is raised in the callback of a weak reference or of
    the garbage collector, Ctrl-C's too: what it reports as dropped is sent again, a
    moment later. So is a signal that comes in a finaliser, which may catch everything
    without a word, as TensorFlow's do. Only the main thread may do so; in another one
    nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    numbers = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        numbers.append(signal.SIGINT)
    hook = sys.unraisablehook

    def report(dropped: Any) -> None:
        number = _signal_of(dropped.exc_type)
        if number is None:
            hook(dropped)
        else:
            _send_again(number)

    sys.unraisablehook = report
    before = {number: signal.signal(number, _interrupt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _interrupt(number: int, frame: FrameType | None) -> None:
    if _in_finaliser(frame):
        _send_again(number)
        return
    raise Terminated if number == signal.SIGTERM else KeyboardInterrupt


def _in_finaliser(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


def _signal_of(exception: type[BaseException]) -> int | None:
    """Returns the signal that is answered with such an exception, None if none is."""
    if issubclass(exception, Terminated):
        return signal.SIGTERM
    return signal.SIGINT if issubclass(exception, KeyboardInterrupt) else None


def _send_again(number: int) -> None:
    threading.Timer(SECONDS_UNTIL_AGAIN, os.kill, (os.getpid(), number)).start()
