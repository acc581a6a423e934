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


@pytest.mark.slow
def test_a_model_of_ones_own_is_trained_under_three_policies(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["custom_training.py"])
    runpy.run_path(str(EXAMPLES / "custom_training.py"), run_name="__main__")
    rows = capsys.readouterr().out.splitlines()
    assert [row.split()[0] for row in rows] == [
        "AcceptAll",
        "LossThreshold",
        "KeepFraction",
    ]
    accepted = [int(re.search(r"(\d+)%", row)[1]) for row in rows]
    assert accepted[0] == 100
    assert max(accepted[1:]) < 100


def test_every_example_is_run_by_some_test():
    tests = "".join(
        path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("*.py")
    )
    for path in EXAMPLES.glob("*.py"):
        assert f'"{path.stem}"' in tests or f'"{path.name}"' in tests, path.name
