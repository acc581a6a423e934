"""SIGTERM and Ctrl-C end what runs, wherever they come."""

import contextlib
import gc
import signal
import sys
import threading
import time
import weakref

import pytest

from keras_rsft._runtime import Terminated, termination_raises

RAISED = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}


class Dropped:
    def __init__(self, number):
        self.number = number

    def __del__(self):
        signal.raise_signal(self.number)


class Caught(Dropped):
    def __del__(self):
        with contextlib.suppress(BaseException):
            signal.raise_signal(self.number)


def waits_after(act):
    act()
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def handlers_as_before():
    before = {number: signal.getsignal(number) for number in RAISED}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is before[signal.SIGTERM]
    signal.signal(signal.SIGINT, before[signal.SIGINT])


@pytest.mark.parametrize("number", RAISED)
def test_raises_at_once(number):
    with pytest.raises(RAISED[number]) as raised, termination_raises():
        signal.raise_signal(number)
    assert raised.type is RAISED[number]


def collected_with(callback):
    """Collects garbage a few times, `callback` called at each start and stop."""
    gc.callbacks.append(callback)
    try:
        for _ in range(4):
            gc.collect()
    finally:
        gc.callbacks.remove(callback)


@pytest.mark.parametrize("number", RAISED)
@pytest.mark.slow
def test_raises_after_the_collection_of_garbage(number):
    def callback(phase, info):
        if phase == "start" and not came:
            came.append(True)
            signal.raise_signal(number)

    came = []
    with pytest.raises(RAISED[number]), termination_raises():
        waits_after(lambda: collected_with(callback))
    assert came


@pytest.mark.parametrize("number", RAISED)
@pytest.mark.parametrize("kind", [Dropped, Caught])
def test_raises_after_a_finaliser(number, kind):
    with pytest.raises(RAISED[number]), termination_raises():
        waits_after(lambda: kind(number))


@pytest.mark.parametrize("number", RAISED)
def test_raises_after_the_callback_of_a_weak_reference(number):
    class Referenced:
        pass

    kept = [Referenced()]
    reference = weakref.ref(kept[0], lambda _: signal.raise_signal(number))
    with pytest.raises(RAISED[number]), termination_raises():
        waits_after(kept.clear)
    assert reference() is None


def test_a_signal_is_sent_until_one_arrives():
    """Here the collector's callbacks are still at it when it comes again."""

    def callback(phase, info):
        came.append(phase)
        signal.raise_signal(signal.SIGTERM) if len(came) == 1 else time.sleep(0.1)

    came = []
    with pytest.raises(Terminated), termination_raises():
        waits_after(lambda: collected_with(callback))
    assert len(came) > 2


def test_another_dropped_exception_is_reported_as_before(monkeypatch):
    class Fails:
        def __del__(self):
            raise ValueError("in a finaliser")

    reported = []
    hook = lambda dropped: reported.append(dropped.exc_type)  # noqa: E731
    monkeypatch.setattr(sys, "unraisablehook", hook)
    with termination_raises():
        Fails()
    assert reported == [ValueError]
    assert sys.unraisablehook is hook


def test_an_interrupt_that_is_ignored_stays_so():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with termination_raises():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_another_thread_changes_nothing():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with termination_raises():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]
