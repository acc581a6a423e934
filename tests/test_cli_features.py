"""`keras-rsft features` as a user meets it: all at once, by shares, and mistakes."""

from __future__ import annotations

import json

import pytest


@pytest.fixture
def features(call, photo_folder, tiny_base_file, tmp_path, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    options = ["--backbone", tiny_base_file, "--cache-dir", tmp_path / "kept"]

    def run(*arguments):
        return call("features", photo_folder, *options, *arguments)

    return run


def test_features_are_kept_and_found_by_shares_of_several_tasks(features, tmp_path):
    status, out, err = features("--share", "1/2", "--json")
    assert status == 0, err
    answer = json.loads(out)
    assert answer["share"] == {"index": 1, "count": 2}
    assert answer["splits"] is None
    assert "Shard 1 of 2 is cached" in err
    assert "--cache-dir" in err.splitlines()[-1]
    assert not list(tmp_path.glob("kept/*/meta.json"))
    status, out, err = features("--share", "0/2", "--quiet")
    assert (status, out.strip()) == (0, str(tmp_path / "kept"))
    status, out, err = features()  # Puts them together.
    assert status == 0, err
    assert "train: 24 images, 6 features each, 0.0 MB in" in out
    assert not list(tmp_path.glob("kept/*.shares/*-*"))
    status, out, err = features("--json")
    assert status == 0, err
    splits = json.loads(out)["splits"]
    assert [splits[name]["images"] for name in ("train", "validation", "test")] == [
        24, 6, 6
    ]  # fmt: skip
    assert splits["train"]["bytes"] == 24 * 6 * 4
    train = splits["train"]
    assert (train["augmentations"], train["dtype"]) == (1, "float32")


def test_a_worker_that_does_not_come_is_told_in_a_line(features, monkeypatch):
    cluster = {"worker": ["a:1", "b:1"]}
    task = {"type": "worker", "index": 1}
    config = json.dumps({"cluster": cluster, "task": task})
    monkeypatch.setenv("TF_CONFIG", config)
    status, _, err = features("--worker-timeout", "0.3")
    assert status == 1
    (line,) = err.strip().splitlines()
    assert line.startswith("keras-rsft: Features of train are missing")
    assert "worker 0 (a:1) has 0 of the images 0 to 23" in line


@pytest.mark.parametrize("share", ["2/2", "-1/2", "1", "a/b", "1/2/3", "0/0"])
def test_shares_that_do_not_exist(features, share):
    status, _, err = features(f"--share={share}")
    assert status == 2
    assert "I/N" in err


def test_a_broken_cluster_is_told_before_anything_is_loaded(features, monkeypatch):
    monkeypatch.setenv("TF_CONFIG", '{"cluster": {"worker": ["a:1"]}}')
    status, _, err = features()
    assert status == 2
    assert "TF_CONFIG cannot be used" in err
