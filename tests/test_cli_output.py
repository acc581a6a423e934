"""How commands answer: for a person, quietly, as JSON, on a real terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest

from keras_rsft._stats import Interval
from keras_rsft._storage import json_value
from keras_rsft.cli._render import Output

pytestmark = pytest.mark.usefixtures("eager")

PROGRAM = [sys.executable, "-m", "keras_rsft.cli"]


@pytest.fixture
def base(tiny_base_file, tmp_path):
    return ["--backbone", tiny_base_file, "--cache-dir", tmp_path / "kept"]


def refuse_constant(name):
    raise AssertionError(f"{name} is not JSON")


def parsed(text):
    return json.loads(text, parse_constant=refuse_constant)


class TestJson:
    def test_fit_with_corrections(self, finished):
        answer = parsed(finished("fit").out)
        assert answer["command"] == "fit"
        assert answer["classes"] == ["blue", "green", "red"]
        assert sum(answer["images"].values()) == 60
        assert answer["corrections"]["keep"] == 1
        assert "Corrections: 1 labels kept" in finished("fit").err
        results = json.loads((Path(answer["folder"]) / "results.json").read_text())
        assert answer["results"] == results

    def test_export(self, finished, call):
        answer = parsed(finished("export").out)
        path = finished.root / answer["path"]
        assert (path / "saved_model.pb").is_file()
        assert answer["serve_command"].startswith("docker run")
        assert answer["verification"] is None
        status, out, err = call("export", path / "none", "--json")
        assert (status, out) == (2, "")
        assert "Expected a run folder" in err

    def test_compare(self, finished):
        answer = parsed(finished("compare").out)
        assert list(answer["methods"]) == ["plain", "gce", "article", "clean-subset"]
        # Nothing was measured where each seed stalled; JSON cannot say NaN.
        assert answer["methods"]["article"]["test_accuracy"] is None
        words = " ".join(finished("compare").err.split())
        assert answer["verdict"]["sentence"] in words

    def test_search(self, finished):
        answer = parsed(finished("search").out)
        assert answer["results"]["trials"] == 4
        assert answer["fit_command"].startswith("keras-rsft fit ")

    def test_what_json_cannot_hold(self):
        value = {
            "a": float("nan"), 1: Interval(0.5, float("inf")), "p": Path("/x"),
            "n": np.float32(0.5), "r": np.array([1, 2]), "t": (True, None, "s"),
        }  # fmt: skip
        assert json_value(value) == {
            "a": None, "1": {"mean": 0.5, "half_width": None}, "p": "/x", "n": 0.5,
            "r": [1, 2], "t": [True, None, "s"],
        }  # fmt: skip

    def test_what_a_library_prints_stays_out(self, capsys):
        with Output(as_json=True, command="fit") as output:
            print("chatter")
            output.say("a table")
            output.finish("last", a=1)
        captured = capsys.readouterr()
        assert parsed(captured.out) == {"command": "fit", "a": 1}
        assert captured.err == "chatter\na table\n"


class TestCommandsToPaste:
    """What a command prints to continue with runs as it is printed."""

    @pytest.fixture
    def pasted(self, finished, call, tmp_path, monkeypatch):
        def run(text):
            lines = re.findall(r"^  (keras-rsft .+)$", text, re.MULTILINE)
            for line in lines:
                words = shlex.split(line)[1:]
                monkeypatch.chdir(finished.root)
                if words[0] == "review":
                    words.append("--no-browser")
                if words[0] == "fit":
                    words += ["--output", tmp_path / "run", "--set", "with_plain=false"]
                status, _, err = call(*words)
                assert status == 0, (line, err)
            return lines

        return run

    def test_after_fit(self, finished, pasted):
        review, predict = pasted(finished("fit").err)
        assert review.startswith("keras-rsft review ")
        assert predict.startswith("keras-rsft predict ")

    def test_after_search(self, finished, pasted):
        *_, fit = pasted(finished("search").err)
        assert f"--backbone={finished.root / 'tiny.keras'}" in fit
        assert f"fit {finished.root / 'photos'} " in fit

    @pytest.mark.slow
    def test_after_features_and_rank(self, finished, call, pasted):
        photos, base = finished.root / "photos", finished.root / "tiny.keras"
        cache = ["--cache-dir", finished.root / "cache", "--image-size", 16]
        _, out, _ = call("features", photos, "--backbone", base, *cache, "--seed", 7)
        (fit,) = pasted(out)
        assert f"--backbone={base}" in fit
        assert "--seed=7" in fit
        _, out, _ = call("rank", photos, "--backbones", base, *cache)
        assert f"--backbone={base}" in re.search("keras-rsft fit .*", out)[0]


class TestQuiet:
    @pytest.mark.parametrize(
        "command",
        [
            "fit",
            pytest.param("compare", marks=pytest.mark.slow),
            pytest.param("search", marks=pytest.mark.slow),
        ],
    )
    def test_the_folder_alone(self, call, base, photo_folder, command):
        numbers = {
            "fit": [],
            "compare": ["--methods", "plain", "--seeds", 1],
            "search": ["--max-trials", 1, "--policies", "accept-all"],
        }
        status, out, err = call(
            command, photo_folder, *base, "--epochs", 1, "--quiet", *numbers[command]
        )
        assert (status, err) == (0, "")
        assert len(out.splitlines()) == 1
        assert (Path(out.strip()) / "results.json").exists() or command == "compare"

    def test_warnings_are_held_back_and_errors_are_not(self, call, base, photo_folder):
        with warnings.catch_warnings(record=True) as caught:
            status, out, err = call(
                "fit", photo_folder, *base, "--quiet", "--epochs", 1,
                "--threshold", "0.000001", "--warmup-epochs", 0,
            )  # fmt: skip
        assert (status, out) == (1, "")
        assert caught == []
        assert "accepted no sample" in err

    def test_chatter(self, capsys):
        with Output(quiet=True) as output:
            print("chatter")
            output.say("a table")
            output.finish("last", a=1)
        assert capsys.readouterr() == ("last\n", "")


def on_a_terminal(command, *, cwd, **environment):
    """Runs a command whose output and errors are a terminal; returns what it shows."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "KERAS_"))}
    kept |= {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [str(part) for part in command], stdin=follower, stdout=follower,
        stderr=follower, cwd=cwd, env=kept,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 65536)
        except OSError:  # The other end is closed.
            break
        if not part:
            break
        shown += part
    os.close(leader)
    assert process.wait(timeout=60) == 0
    return shown.decode()


@pytest.mark.slow
def test_on_a_terminal(base, photo_folder, tmp_path):
    fit = [*PROGRAM, "fit", photo_folder, *base, "--epochs", "2"]
    plain = on_a_terminal(fit, cwd=tmp_path, NO_COLOR="1")
    assert "Training the head with auto" in plain
    assert "Accuracy on the test split" in plain
    assert not re.search(r"\x1b\[[0-9;]*3[0-9]", plain)
    quiet = on_a_terminal([*fit, "--quiet"], cwd=tmp_path)
    assert quiet == f"{tmp_path / 'runs' / photo_folder.name}-2\r\n"


HOSTILE = "red\x1b[31m\u202egnp"
SPELLED = r"red\x1b[31m\u202egnp"


class TestStreams:
    """Streams as a shell may hand them over, and names that steer a terminal."""

    @pytest.fixture
    def photos(self, finished, tmp_path):
        """Photos with such names, one of them no text, and one that is no image."""
        finished("fit")
        names = ["owl\N{OWL}.png", f"{HOSTILE}.png", os.fsdecode(b"not\xfftext.png")]
        for name in names:
            source = finished.root / "photos" / "red" / "00.png"
            (tmp_path / name).write_bytes(source.read_bytes())
        (tmp_path / f"{HOSTILE}.jpg").write_bytes(b"")
        return [tmp_path / name for name in [*names, f"{HOSTILE}.jpg"]]

    @pytest.fixture
    def start(self, finished, photos):
        def start(*options, shell="", encoding="utf-8"):
            words = [*PROGRAM, "predict", finished.root / "photos-1", *photos, *options]
            return subprocess.run(
                f"{shlex.join(map(str, words))} {shell}",
                shell=True, capture_output=True,
                env=os.environ | {"PYTHONIOENCODING": encoding},
            )  # fmt: skip

        return start

    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
    def test_every_name_can_be_printed(self, start, encoding):
        done = start(encoding=encoding)
        out, err = done.stdout.decode(encoding), done.stderr.decode(encoding)
        owl = "\N{OWL}" if encoding == "utf-8" else r"\U0001f989"
        names = [Path(line.split("\t")[0]).name for line in out.splitlines()]
        assert names == [f"owl{owl}.png", f"{SPELLED}.png", r"not\udcfftext.png"]
        assert err.splitlines()[-1].endswith(f"{SPELLED}.jpg: The file is empty.")
        assert done.returncode == 1

    @pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
    def test_json_is_the_same_in_every_encoding(self, start, photos, encoding):
        done = start("--output-format", "jsonl", encoding=encoding)
        answers = map(json.loads, done.stdout.decode(encoding).splitlines())
        assert [one["path"] for one in answers] == [*map(str, photos[:3])]

    @pytest.mark.parametrize("shell", ["2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
    def test_closed_streams_are_no_failure(self, start, shell):
        done = start(shell=shell)
        assert done.returncode == 1  # Of the image that is none.
        assert (done.stdout != b"") == (">&- 2" not in shell)


def test_tables_and_sentences_spell_out_what_steers(capsys):
    with Output() as output:
        output.say(HOSTILE)
        output.rows("Found", [(HOSTILE, HOSTILE)])
        warnings.warn(HOSTILE, stacklevel=1)
    captured = capsys.readouterr()
    assert captured.out.count(SPELLED) == 3
    assert f"Warning: {SPELLED}" in captured.err
    assert not {"\x1b", "\u202e"} & {*captured.out, *captured.err}


def test_an_error_spells_it_out_too(call, tmp_path):
    status, _, err = call("review", tmp_path / HOSTILE)
    assert status == 2
    assert SPELLED in err


def test_too_little_memory_is_told(call, monkeypatch):
    from keras_rsft.cli import _commands

    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(_commands, "features_of", fail)
    status, _, err = call("audit", "digits")
    assert status == 1
    assert "not enough memory" in err
    assert "should not happen" not in err
