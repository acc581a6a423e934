"""Results in a notebook: a table, a figure, and nothing that runs."""

from __future__ import annotations

import shutil
from xml.etree import ElementTree

import pytest
from made_features import split_features

from keras_rsft.comparison._compare import compare_features
from keras_rsft.config import FeatureConfig, SearchConfig, TrainConfig
from keras_rsft.report._notebook import table_html
from keras_rsft.report._summary import Table
from keras_rsft.training._run import finetune
from keras_rsft.tuning._search import search_features

pytestmark = pytest.mark.usefixtures("eager")

SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=a>', "$\\frac{<b>")
SETTINGS = TrainConfig(epochs=2, batch_size=16, learning_rate=0.05)


def well_formed(text):
    """Parses the HTML, which is XML too; returns its root."""
    return ElementTree.fromstring(f"<div>{text}</div>")


def cells_of(root):
    return [[cell.text or "" for cell in row] for row in root.iter("tr")]


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return split_features(tmp_path_factory.mktemp("features"))


@pytest.fixture(scope="module")
def run(photo_folder, tiny_base_file, tmp_path_factory):
    root = tmp_path_factory.mktemp("hostile")
    names = ["<script>alert(1)<", '"><img src=x onerror=a>', "$\\frac{<b>"]
    for source, name in zip(("blue", "green", "red"), names, strict=True):
        shutil.copytree(photo_folder / source, root / "photos" / name)
    return finetune(
        root / "photos",
        features=FeatureConfig(str(tiny_base_file), cache_dir=root / "kept"),
        settings=SETTINGS,
        output=root / "<i>run</i>",
        progress=False,
    )


def test_a_run_with_hostile_names(run):
    text = run._repr_html_()
    root = well_formed(text)
    rows = dict(cells_of(root))
    assert set(rows["Classes"].split(", ")) == set(run.class_names)
    assert rows["Run folder"] == str(run.folder)
    accuracy = f"{100 * run.results['test_accuracy']:.1f} %"
    assert rows["  by the given labels"] == accuracy
    assert rows["Accuracy on the test split"].endswith(" %), estimated")
    for tag in ("script", "img", "b", "i"):
        assert not list(root.iter(tag))


def drawing_of(root):
    (drawing,) = root.iter(f"{SVG}svg")
    return drawing


def test_the_learning_curves_of_a_run(run):
    drawing = drawing_of(well_formed(run._repr_html_()))
    words = [one.text for one in drawing.iter(f"{SVG}text")]
    assert {"Loss", "Shares", "val accuracy", "val accuracy estimated"} <= set(words)
    assert len(list(drawing.iter(f"{SVG}polyline"))) == 7


@pytest.mark.slow
def test_a_comparison(features):
    found = compare_features(
        features, methods=["gce"], seeds=2, settings=SETTINGS, progress=False
    )
    root = well_formed(found._repr_html_())
    header, plain, gce = cells_of(root)
    assert header[0] == "Method"
    assert plain[0] == "plain"
    assert plain[2:5] == ["-", "100 %", "-"]
    assert " ± " in gce[2]
    assert found.verdict.sentence in [p.text for p in root.iter("p")]
    assert len(list(drawing_of(root).iter(f"{SVG}circle"))) == 2


@pytest.mark.slow
def test_a_search(features, tmp_path):
    found = search_features(
        features,
        output=tmp_path / "search",
        options=SearchConfig(max_trials=3),
        settings=SETTINGS,
        progress=False,
    )
    root = well_formed(found._repr_html_())
    rows = cells_of(root)
    header = next(at for at, row in enumerate(rows) if "chosen" in row)
    assert rows[header][1:] == ["chosen", "plain fine-tuning"]
    assert header == 1 + 3
    assert [row[0] for row in rows[header + 1 :]] == [
        "Test",
        "Validation, right labels",
        "Validation, given labels",
        "Accepted",
    ]
    # The trials, the choice among them once more, and its sign in the legend.
    assert len(list(drawing_of(root).iter(f"{SVG}circle"))) == 3 + 2
    assert found.choice.reason in [p.text for p in root.iter("p")]


def test_cells_are_escaped_and_the_header_too():
    root = well_formed(table_html(Table(HOSTILE, (HOSTILE,))))
    assert cells_of(root) == [list(HOSTILE), list(HOSTILE)]
