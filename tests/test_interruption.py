"""SIGTERM and Ctrl-C end what runs, wherever they come."""

import gc
import signal
import threading
import time

import pytest

from keras_rsft.interruption import Terminated, termination_raises

RAISED = {signal.SIGTERM: Terminated, signal.SIGINT: KeyboardInterrupt}


class Dropped:
    def __init__(self, number):
        self.number = number

    def __del__(self):
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


@pytest.mark.parametrize("number", RAISED)
def test_raises_after_the_collection_of_garbage(number):
    def callback(phase, info):
        if phase == "start" and not came:
            came.append(True)
            signal.raise_signal(number)

    came = []
    gc.callbacks.append(callback)
    try:
        with pytest.raises(RAISED[number]), termination_raises():
            waits_after(gc.collect)
    finally:
        gc.callbacks.remove(callback)


def test_raises_after_a_finaliser():
    with pytest.raises(Terminated), termination_raises():
        waits_after(lambda: Dropped(signal.SIGTERM))


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
