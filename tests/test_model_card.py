"""The card of a model says what its run says, and nothing else gets into it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from keras_rsft.export._export_run import FinishedRun, model_card

MODEL = SimpleNamespace(input_shape=(None, 96, 64, 3))


def make_run(folder: Path, class_names=("cat", "dog"), **config) -> FinishedRun:
    return FinishedRun(folder, MODEL, class_names, config)


def head_of(card: str) -> dict:
    lines = card.split("---\n")[1].splitlines()
    return {key: json.loads(value) for key, value in (x.split(": ", 1) for x in lines)}


@pytest.fixture
def full_run(tmp_path):
    samples = ["id,split,given_label,clean_label"]
    samples += [f"{n},test,cat," for n in range(100)] + ["x,train,dog,"]
    (tmp_path / "samples.csv").write_text("\n".join(samples))
    quality = {"finding": "About 2 of 3 labels are wrong; 2 look wrong."}
    results = {"test_accuracy": 0.5, "label_quality": quality}
    (tmp_path / "results.json").write_text(json.dumps(results))
    (tmp_path / "ledger.csv").write_text(
        "id,split,given_label,right_probability,looks_wrong\n"
        "a.png,test,cat,0.3,1\nb.png,train,dog,0.8,0\nc.png,train,dog,0.05,1\n"
    )
    return make_run(
        tmp_path, data="/home/me/photos", backbone="resnet50", weights="imagenet",
        policy={"name": None}, finding="About 20 % look wrong.",
        versions={"keras": "3.15"},
    )  # fmt: skip


def test_says_what_the_run_says(full_run):
    card = model_card(full_run, "pets")
    assert "| test | 50.0 % | 40.4 to 59.6 % | 50.0 % | 100 |" in card
    assert "by the labels as given, right or wrong." in card
    assert "About 2 of 3 labels are wrong; 2 look wrong." in card
    assert "| 0.30 | `a.png` | test | cat |" in card
    assert card.index("`c.png`") < card.index("`a.png`")
    assert "b.png" not in card
    assert "96 x 64 pixels" in card
    assert "About 20 % look wrong." in card
    assert "policy `auto`" in card
    assert "keras 3.15" in card
    assert "## Licence of the weights\n\nLicence of the backbone's weights: MIT" in card
    assert "/home/me" not in card  # Where the data lay is nobody's business.
    head = head_of(card)
    assert head["pipeline_tag"] == "image-classification"
    (entry,) = head["model-index"]
    assert entry["name"] == "pets"
    assert entry["results"][0]["metrics"] == [{"type": "accuracy", "value": 0.5}]


@pytest.mark.parametrize(
    "right, row, share, said",
    [
        (
            {"estimated": 0.75, "low": 0.65, "high": 0.84},
            "| test | 75.0 % | 65.0 to 84.0 % | 50.0 % | 100 |",
            0.75,
            "is estimated from the given ones",
        ),
        (
            {"clean": 0.9},
            "| test | 90.0 % | 82.6 to 94.5 % | 50.0 % | 100 |",
            0.9,
            "known to be right",
        ),
    ],
)
def test_the_accuracy_by_right_labels_comes_first(full_run, right, row, share, said):
    results = {f"test_accuracy_{key}": value for key, value in right.items()}
    results |= {"test_accuracy": 0.5}
    (full_run.folder / "results.json").write_text(json.dumps(results))
    card = model_card(full_run, "pets")
    assert row in card
    assert said in card
    metrics = head_of(card)["model-index"][0]["results"][0]["metrics"]
    assert [one["value"] for one in metrics] == [share, 0.5]
    assert metrics[1]["name"] == "Accuracy by the given labels"


def test_a_run_with_nothing_but_a_model(tmp_path):
    card = model_card(make_run(tmp_path), "x")
    assert "2 classes: cat, dog." in card
    assert "Accuracy" not in card
    assert "look wrong" not in card


def test_a_search_says_what_its_choice_reached(tmp_path):
    results = {
        "chosen_trial": "07",
        "trials": 64,
        "chosen": {"validation_accuracy": 0.75, "test_accuracy": 0.5},
    }
    counts = {"train": 300, "validation": 40, "test": 100}
    rows = [f"{n},{split},cat" for split in counts for n in range(counts[split])]
    (tmp_path / "samples.csv").write_text("\n".join(["id,split,given_label", *rows]))
    (tmp_path / "results.json").write_text(json.dumps(results))
    card = model_card(make_run(tmp_path), "x")
    assert "| test | 50.0 % | 40.4 to 59.6 % | 50.0 % | 100 |" in card
    assert "| validation | 75.0 % |" in card
    assert "300 train" in card
    assert "chose among 64 settings" in card


def test_names_cannot_break_out(tmp_path):
    (tmp_path / "ledger.csv").write_text(
        "id,split,given_label,right_probability,looks_wrong\n"
        "`|<b>`,train,<script>alert(1)</script>|x,0.1,1\n"
    )
    (tmp_path / "results.json").write_text('{"label_quality": {"finding": "<b>"}}')
    names = ("<script>alert(1)</script>", "a|b", "two\nlines\n---\n# head")
    card = model_card(make_run(tmp_path, names, data='x"\n---\nlicense: mit'), "x")
    assert "<script" not in card
    assert card.count("\n---\n") == 1
    assert head_of(card)["license"] == "other"
    (row,) = (line for line in card.splitlines() if line.startswith("| 0.10"))
    assert row.replace("\\|", "").count("|") == 5
