"""10,000 damaged files through `serving_default`: no crash, no hang, no growth."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parent / "benchmarks" / "serving_fuzz.py"
# From a quarter on, when all pools are full; 10 kB lost with each file would be 75 MB.
MOST_GROWTH_MB = 40


@pytest.mark.slow
def test_ten_thousand_damaged_files_leave_the_server_as_it_was():
    pytest.importorskip("psutil")
    result = subprocess.run(  # A process of its own, which a crash would end.
        [sys.executable, BENCHMARK, "--files", "10000", "--seed", "7"],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]

    def number(title: str) -> float:
        return float(re.search(rf"{re.escape(title)}\s+([\d.]+)", result.stdout)[1])

    assert number("damaged files") == 10_000
    assert number("wrong answers to the good image") == 0
    # Some damage leaves an image, most does not.
    assert 0 < number("still images") < 5_000
    growth = number("memory after 100%") - number("memory after  25%")
    assert growth < MOST_GROWTH_MB
