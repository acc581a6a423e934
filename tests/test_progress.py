"""The progress bar: drawn on a terminal, silent anywhere else."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest

from keras_rsft.progress import rate_text

PROGRAM = """
import time
from keras_rsft.progress import progress_bar
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


@pytest.mark.parametrize(
    "speed, text",
    [(0.0, "0"), (0.034, "0.034"), (9.94, "9.9"), (9.96, "10"), (1234.5, "1,234")],
)
def test_a_slow_rate_is_not_called_zero(speed, text):
    assert rate_text(speed) == text


@pytest.mark.parametrize("in_one_go", [False, True])
def test_a_terminal_shows_what_is_done_and_how_fast(in_one_go):
    program = PROGRAM.replace("range(4)", "[0]").replace("(1)", "(4)")
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    process = subprocess.Popen(
        [sys.executable, "-c", program if in_one_go else PROGRAM],
        stderr=slave,
        env=environment,
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
    assert b"Counting" in shown
    assert b"4/4" in shown
    assert b"images/s" in shown
    assert b" 0 images/s" not in shown
