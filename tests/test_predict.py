"""From any model and any paths to answers, and what happens to files that are none."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys

import keras
import pytest
from made_bases import classifier_of

from keras_rsft import cli
from keras_rsft._predict import FEW, Prediction, find_files, predict_files
from keras_rsft.backbones._load import load_backbone
from keras_rsft.cli._commands import write_answer
from keras_rsft.config import IMAGES
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._formats import export_litert, export_onnx
from keras_rsft.export._saved_model import export_saved_model
from keras_rsft.model._rsft_model import RSFTModel
from keras_rsft.policies._threshold import LossThreshold

NAMES = ("blue", "green", "réd")


@pytest.fixture(scope="module")
def models(tiny_base_file, tmp_path_factory):
    """The same model in each form that is read."""
    pytest.importorskip("ai_edge_litert")
    pytest.importorskip("tf2onnx")
    keras.utils.set_random_seed(0)
    model = classifier_of(load_backbone(str(tiny_base_file)), 3)
    root = tmp_path_factory.mktemp("models")
    (root / "run").mkdir()
    model.save(root / "run" / "model.keras")
    (root / "run" / "classes.json").write_text(json.dumps(NAMES))
    export_saved_model(model, root / "photos", class_names=NAMES)
    return [
        root / "run",
        root / "run" / "model.keras",
        root / "photos",
        root / "photos" / "1",
        export_litert(model, root / "a.tflite", class_names=NAMES),
        export_onnx(model, root / "a.onnx", class_names=NAMES),
    ]


@pytest.mark.slow
def test_every_form_of_a_model_gives_the_same_answers(models, photo_folder, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    files = [
        photo_folder / "red" / "01.png",
        tmp_path / "broken.png",
        tmp_path / "missing.png",
        photo_folder / "blue" / "02.png",
    ]
    first, *others = (list(predict_files(model, files)) for model in models)
    assert [one.path for one in first] == [str(file) for file in files]
    assert [one.error is None for one in first] == [True, False, False, True]
    for other in others:
        assert [one.label for one in other] == [one.label for one in first]
        assert [one.error for one in other] == [one.error for one in first]
        for one, same in zip(other, first, strict=True):
            assert one.score == pytest.approx(same.score, abs=1e-3)


def test_another_engine_gives_the_same_answers(
    models, photo_folder, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    files = sorted(photo_folder.rglob("*.png"))
    assert len(files) > FEW
    expected = list(predict_files(models[0], files))
    answers = list(predict_files(models[0], files, engine="onnxruntime"))
    assert [one.label for one in answers] == [one.label for one in expected]
    assert [one.score for one in answers] == pytest.approx(
        [one.score for one in expected], abs=1e-5
    )
    (converted,) = tmp_path.rglob("*.onnx")
    converted.write_bytes(b"damaged")  # It is made anew.
    assert list(predict_files(models[0], files, engine="onnxruntime")) == answers
    few = list(predict_files(models[0], files[:FEW]))
    assert [one.score for one in few] == pytest.approx(
        [one.score for one in expected[:FEW]], abs=1e-5
    )


def test_where_an_engine_has_no_place_for_its_file(
    models, photo_folder, tmp_path, monkeypatch
):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    files = sorted(photo_folder.rglob("*.png"))
    answers = list(predict_files(models[0], files, engine="onnxruntime"))
    assert answers == list(predict_files(models[0], files))


@pytest.mark.parametrize(
    "at, engine", [(3, "onnxruntime"), (5, "tensorflow"), (0, "x")]
)
def test_an_engine_that_does_not_run_the_model_is_refused(models, at, engine):
    with pytest.raises(InvalidArgument, match=f"Received: '{engine}'"):
        list(predict_files(models[at], ["a.png"], engine=engine))


def found(paths, kind):
    return find_files(paths, kind)[0]


def test_folders_and_patterns_become_files(tmp_path):
    hidden = "a/._1.jpg", "a/.thumbnails/1.jpg"  # As where `fit` looks for images.
    for name in ("a/2.PNG", "a/1.jpg", "a/b/3.webp", "a/notes.txt", "4.gif", *hidden):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    def names(*paths):
        return [str(path) for path in (tmp_path / name for name in paths)]

    assert found([tmp_path / "a"], IMAGES) == names("a/1.jpg", "a/2.PNG", "a/b/3.webp")
    assert found([tmp_path / "**" / "*.jpg"], IMAGES) == names("a/1.jpg")
    assert found(names("4.gif", "a/1.jpg", "4.gif"), IMAGES) == names(
        "4.gif", "a/1.jpg"
    )
    assert found(names("missing.png"), IMAGES) == names("missing.png")
    for nothing in ("*.bmp", "a/notes.txt/*"):
        with pytest.raises(DataError, match="no image file"):
            found([tmp_path / nothing], IMAGES)


def test_files_that_are_skipped_are_counted_by_their_ending(tmp_path):
    for name in ("1.jpg", "b/2.PNG", "3.bak", "b/4.BAK", "b/5", ".6.jpg", "7.psd"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    files, skipped = find_files([tmp_path], IMAGES)
    assert len(files) == 2
    assert skipped == {".bak": 2, "without an ending": 1, ".psd": 1, "hidden": 1}
    assert find_files([tmp_path / "3.bak"], IMAGES)[1] == {}
    (tmp_path / "1.jpg").unlink()
    (tmp_path / "b" / "2.PNG").unlink()
    with pytest.raises(DataError, match=r"5 files were not read: 2 \.bak, "):
        find_files([tmp_path], IMAGES)


def test_links_in_a_folder_are_followed_or_counted(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "1.png").touch()
    new = tmp_path / "new"
    new.mkdir()
    (new / "linked").symlink_to(tmp_path / "other")
    (new / "up").symlink_to(tmp_path)
    (new / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(new / "pipe.jpg")
    assert find_files([new], IMAGES) == (
        [str(new / "linked" / "1.png")], {".png": 1, ".jpg": 1}
    )  # fmt: skip


def test_a_name_with_brackets_is_a_file_first(tmp_path):
    (tmp_path / "photo[1].png").touch()
    assert found([tmp_path / "photo[1].png"], IMAGES) == [
        str(tmp_path / "photo[1].png")
    ]


@pytest.mark.parametrize("name", ["a.keras", "a.onnx", "a.tflite"])
def test_a_damaged_model_is_told(tmp_path, name):
    for package in ("onnxruntime", "ai_edge_litert"):
        pytest.importorskip(package)
    (tmp_path / name).write_bytes(b"damaged")
    with pytest.raises(DataError, match=name):
        list(predict_files(tmp_path / name, ["a.png"]))


@pytest.mark.parametrize("wrapped", [True, False])
def test_a_head_takes_no_images(tmp_path, wrapped):
    head = keras.Sequential([keras.Input((8,)), keras.layers.Dense(3)])
    if wrapped:
        head = RSFTModel(head, LossThreshold(1.0))
    head.save(tmp_path / "head.keras")
    with pytest.raises(InvalidArgument, match="takes features"):
        list(predict_files(tmp_path / "head.keras", ["a.png"]))


def test_answers_can_be_read_back():
    answer = Prediction('a "b",\tc.png', "réd, light", 0.25)
    text = {name: io.StringIO() for name in ("csv", "jsonl", "tsv")}
    for name, file in text.items():
        write_answer(answer, name, file)
    (row,) = csv.reader(io.StringIO(text["csv"].getvalue()))
    assert row == [answer.path, answer.label, "0.250000"]
    assert json.loads(text["jsonl"].getvalue()) == {
        "path": answer.path, "label": answer.label, "score": 0.25,
    }  # fmt: skip
    assert text["tsv"].getvalue() == 'a "b",\\tc.png\tréd, light\t0.2500\n'


@pytest.mark.parametrize(
    "name, csv_cell, tsv_cell",
    [
        ("=HYPERLINK(1)", "'=HYPERLINK(1)", "=HYPERLINK(1)"),
        ("a\tb\nc\rd", "a\tb\nc\rd", r"a\tb\nc\rd"),
        (r"back\slash", r"back\slash", r"back\\slash"),
        ("-1", "-1", "-1"),
    ],
)
def test_a_name_stays_in_its_cell(name, csv_cell, tsv_cell):
    text = {form: io.StringIO(newline="") for form in ("csv", "tsv")}
    for form, file in text.items():
        write_answer(Prediction(name, name, 0.5), form, file)
    (row,) = csv.reader(io.StringIO(text["csv"].getvalue(), newline=""))
    assert row == [csv_cell, csv_cell, "0.500000"]
    assert text["tsv"].getvalue() == f"{tsv_cell}\t{tsv_cell}\t0.5000\n"


def test_the_command_lists_what_it_cannot_read(models, photo_folder, tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"no image")
    arguments = ["predict", str(models[0]), str(tmp_path), str(photo_folder / "red")]
    # The rest is answered, and a script is told that something was not.
    assert cli.main([*arguments, "--output-format", "csv"]) == 1
    captured = capsys.readouterr()
    rows = list(csv.DictReader(io.StringIO(captured.out)))
    assert len(rows) == 12
    assert "broken.png: Not an image of a known kind" in captured.err
    assert cli.main(arguments[:3]) == 1
    assert cli.main([*arguments[:2], arguments[3]]) == 0


@pytest.mark.slow
def test_a_pipe_that_is_closed_ends_it_without_a_word(models, photo_folder):
    paths = [str(models[0]), *30 * [str(photo_folder / "red" / "01.png")]]
    paths = [*paths, str(photo_folder)]
    command = [sys.executable, "-m", "keras_rsft.cli", "predict", *paths]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        errors = process.stderr.read()
    assert process.returncode == 141
    assert errors == ""
