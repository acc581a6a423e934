"""The notebook among the examples runs from its first cell to its last."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

NOTEBOOK = Path(__file__).parent.parent / "examples" / "label_errors.ipynb"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`shuffle=True` was passed")
def test_label_errors(tmp_path, monkeypatch):
    pytest.importorskip("sklearn")
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    names: dict = {}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    wrong = names["y_train"] != names["right"][:1200]
    looks_wrong = names["quality"].looks_wrong
    assert np.mean(looks_wrong == wrong) > 0.95
    assert names["quality"].noise_rate == pytest.approx(wrong.mean(), abs=0.03)
    assert names["run"].results["test_accuracy"] > 0.85
    assert names["search"].results["chosen"]["test_accuracy"] > 0.85
    assert np.mean(names["ledger"].ledger.looks_wrong == wrong) > 0.9
    assert (tmp_path / "runs" / "own.html").stat().st_size > 100_000
    assert set(names["served"].signatures) >= {"serving_default", "serving_images"}


def test_its_outputs_are_those_of_anybodys_machine():
    text = NOTEBOOK.read_text(encoding="utf-8")
    cells = [one for one in json.loads(text)["cells"] if one["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in cells)
    assert "stderr" not in text
    assert not any(folder in text for folder in ("/tmp", "/root", "/home"))
