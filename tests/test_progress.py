"""The progress bar: drawn on a terminal, silent anywhere else."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from keras_rsft._progress import rate_text

PROGRAM = """
import time
from keras_rsft._progress import progress_bar
with progress_bar("Counting", total=4, unit="images") as advance:
    for _ in range(4):
        time.sleep(0.05)
        advance(1)
"""


def test_nothing_is_written_where_there_is_no_terminal():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, check=True
    )
    assert done.stdout == done.stderr == b""


@pytest.fixture
def shown_in():
    """Returns what a program shows on a terminal of so many columns."""

    def show(program: str, *, columns: int) -> str:
        master, slave = pty.openpty()
        environment = os.environ | {"TERM": "xterm", "COLUMNS": str(columns)}
        process = subprocess.Popen(
            [sys.executable, "-c", program], stderr=slave, env=environment
        )
        os.close(slave)
        shown = b""
        while process.poll() is None or not shown.endswith(b"\n"):
            try:
                shown += os.read(master, 4096)
            except OSError:  # The other end is closed: all has been read.
                break
        os.close(master)
        assert process.wait() == 0
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode())

    return show


@pytest.mark.parametrize("in_one_go", [False, True])
def test_a_terminal_shows_what_is_done_and_how_fast(shown_in, in_one_go):
    at_once = PROGRAM.replace("range(4)", "[0]").replace("(1)", "(4)")
    shown = shown_in(at_once if in_one_go else PROGRAM, columns=120)
    assert "Counting" in shown
    assert "4/4" in shown
    assert "images/s" in shown
    assert " 0 images/s" not in shown


def test_a_narrow_terminal_shows_the_time_left_on_one_line(shown_in):
    state = "12 of 64 trials, best val_accuracy 0.9123"
    program = PROGRAM.replace("Counting", state).replace("total=4", "total=1280")
    lines = [
        line for line in re.split(r"[\r\n]+", shown_in(program, columns=80)) if line
    ]
    for line in lines:
        assert line.startswith(state)
        assert re.search(r"/1280 +[0-9.,]* *(images/s)? +([0-9]|-)[0-9:-]+ *$", line), (
            line
        )
        assert len(line) <= 80


@pytest.mark.parametrize(
    "speed, text",
    [(0.0, "0"), (0.034, "0.034"), (9.94, "9.9"), (9.96, "10"), (1234.5, "1,234")],
)
def test_a_slow_rate_is_not_called_zero(speed, text):
    assert rate_text(speed) == text
