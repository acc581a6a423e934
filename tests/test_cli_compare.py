"""`keras-rsft compare` as a user meets it: the table, the folder, mistakes."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap

import numpy as np
import pytest

from keras_rsft import cli, config

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def compare(capsys, tmp_path, monkeypatch, photo_folder, tiny_base_file):
    """Runs the command in this process, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, data=photo_folder):
        command = [
            "compare", data, "--backbone", tiny_base_file, "--epochs", 2,
            "--cache-dir", tmp_path / "kept", *arguments,
        ]  # fmt: skip
        try:
            status = cli.main([str(argument) for argument in command])
        except SystemExit as stop:  # argparse's own errors.
            status = stop.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


def test_a_table_a_verdict_and_a_folder(finished):
    answer = finished("compare")
    assert answer.status == 0, answer.err
    out = answer.err  # With --json the table goes there.
    lines = [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()]
    rows = {cells[0]: cells[1:] for cells in lines if len(cells) == 6}
    header, *methods = rows
    assert header == "Method"
    assert methods == ["plain", "gce", "article", "clean-subset"]
    assert rows["plain"][1:3] == ["-", "100 %"]
    assert " ± " in rows["gce"][1]
    assert rows["gce"][2] == "-"
    assert rows["article"][:3] == ["2 stalled", "-", "0 %"]
    folder = finished.root / "compare"
    assert {path.name for path in folder.iterdir()} == {
        "comparison.csv", "summary.json", "labels.csv", "config.json",
    }  # fmt: skip
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["verdict"]["sentence"] in " ".join(out.split())
    written = json.loads((folder / "config.json").read_text())
    assert written["command"].startswith("keras-rsft compare ")
    assert written["policy"]["threshold"] == 0.000001


def test_without_noise_what_cannot_run_is_noted(compare, monkeypatch, tmp_path):
    from keras_rsft.comparison import _methods as methods
    from keras_rsft.comparison._methods import Outcome

    monkeypatch.setattr(
        methods,
        "run_method",
        lambda name, trial: Outcome(
            name, trial.settings.seed, 1.0, np.array([True, False]), 1.0
        ),
    )
    status, out, err = compare("--seeds", 1, "--output", tmp_path / "mine")
    assert status == 0, err
    assert "clean-subset was left out: the right labels are not known." in out
    assert "One seed cannot tell a lead from chance" in out
    assert not (tmp_path / "mine" / "labels.csv").exists()
    status, _, err = compare("--output", tmp_path / "mine")
    assert status == 2
    assert "must not exist" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "co-teeching"], "Did you mean 'co-teaching'?"),
        (["--methods", ""], "names separated by commas"),
        (["--seeds", "0"], "at least 1"),
        (["--noise", "instance"], '"instance:RATE"'),
        (["--keep-fraction", "2"], "in (0, 1]"),
        (["--epochs", "0"], "at least 1"),
        (["--policy", "accept-all"], "unrecognized arguments"),
    ],
)
def test_mistakes(compare, arguments, message):
    status, _, err = compare(*arguments)
    assert status == 2
    assert message in err


def test_what_a_method_asked_for_by_name_lacks(compare, monkeypatch):
    status, _, err = compare("--methods", "clean-subset", "--seeds", 1)
    assert status == 1
    assert "the right labels are not known" in err
    monkeypatch.setattr(config, "has_cleanlab", lambda: False)
    status, _, err = compare("--methods", "cleanlab")
    assert status == 1
    assert 'pip install "keras_rsft[compare]"' in err


def test_a_wrong_name_is_refused_before_anything_heavy_is_imported():
    program = textwrap.dedent("""
        import sys
        from keras_rsft import cli
        status = cli.main(["compare", "photos", "--methods", "plain,gec"])
        heavy = {"tensorflow", "keras", "numpy", "rich", "cleanlab"}
        print("STATUS", status, "HEAVY", sorted(heavy & set(sys.modules)))
    """)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "STATUS 2 HEAVY []" in result.stdout
    assert "Did you mean 'gce'?" in result.stderr
