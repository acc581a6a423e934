"""Nothing that users see or measure changes unawares: `golden.json` has it all.

Where a change is meant: `python tests/made_golden.py tests/golden.json`.
"""

from __future__ import annotations

import json
from pathlib import Path

import made_golden
import pytest

GOLDEN = json.loads((Path(__file__).parent / "golden.json").read_text("utf-8"))


def assert_same(found, expected, place=""):
    """Compares documents; numbers up to rounding, as processors differ."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), place
        for key, value in expected.items():
            assert_same(found[key], value, f"{place}/{key}")
    elif isinstance(expected, list):
        if all(isinstance(one, str) for one in expected):
            missing = sorted(set(expected) - set(found))
            added = sorted(set(found) - set(expected))
            assert (missing, added) == ([], []), place
        assert len(found) == len(expected), place
        for number, value in enumerate(expected):
            assert_same(found[number], value, f"{place}/{number}")
    elif isinstance(expected, float):
        near = pytest.approx(expected, abs=made_golden.TOLERANCE, rel=1e-3)
        assert found == near, place
    else:
        assert found == expected, place


@pytest.fixture
def root(tmp_path):
    made_golden.prepare(tmp_path)
    return tmp_path


@pytest.mark.parametrize("command", made_golden.FINISHED)
def test_a_command(finished, command):
    answer = finished(command)
    summary = made_golden.summary_of(finished.root, command, answer)
    assert_same(summary, GOLDEN["finished"][command])


@pytest.mark.slow
@pytest.mark.parametrize("policy", made_golden.POLICIES)
def test_fit_under_a_policy(root, policy):
    summary = made_golden.fit_under(root, policy)
    assert_same(summary, GOLDEN["policies"][policy])


def test_exit_statuses(root):
    assert made_golden.exit_statuses(root) == GOLDEN["statuses"]


@pytest.mark.filterwarnings("ignore:Epoch")
def test_models_trained_under_each_policy():
    assert_same(made_golden.trained_models(), GOLDEN["models"])


def test_label_quality():
    assert_same(made_golden.label_quality(), GOLDEN["label quality"])


def test_a_difference_is_seen():
    with pytest.raises(AssertionError, match="a/1"):
        assert_same({"a": [1.0, 2.0]}, {"a": [1.0, 2.01]})
    with pytest.raises(AssertionError, match="added"):
        assert_same({"keys": ["a", "added"]}, {"keys": ["a"]})
