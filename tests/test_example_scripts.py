"""The examples run, small, as a user would run them."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Epoch")
@pytest.mark.parametrize(
    "name",
    ["multi_label", "regression", "segmentation", "detection", "text_classification"],
)
def test_an_example_prints_a_table_and_draws(
    name, tmp_path, monkeypatch, capsys, request
):
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    if name.startswith("text"):
        request.getfixturevalue("text_encoder")  # Skips where there are no weights.
    figure = tmp_path / "figure.png"
    small = ["--samples", "24", "--seeds", "1", "--epochs", "2", "--weights", "none"]
    monkeypatch.setattr(sys, "argv", [name, *small, "--figure", str(figure)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    header, *rows = capsys.readouterr().out.splitlines()
    assert "rejected" in header
    assert rows[0].startswith("plain")
    assert re.match(r"right \w+ only ", rows[-1])
    assert all("%" in row and "nan" not in row for row in rows)
    assert figure.read_bytes().startswith(b"\x89PNG")
