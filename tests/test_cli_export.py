"""`keras-rsft export`: from a run folder to something that other programs load."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys

import keras
import pytest
import tensorflow as tf

from keras_rsft import cli
from keras_rsft.cli import _commands as commands
from keras_rsft.cli._main import build_parser
from keras_rsft.cli._render import Output
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError
from keras_rsft.export import _export_run as from_run
from keras_rsft.export import _verify as verification
from keras_rsft.export._export_run import FinishedRun, export_run, read_run
from keras_rsft.export._verify import (
    Verification,
    sample_of,
    validation_split,
    verify_export,
)


@pytest.fixture
def run_folder(finished):
    finished("fit")
    return finished.root / "photos-1"


@pytest.fixture
def photos(finished):
    return finished.root / "photos"


@pytest.fixture
def export(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        status = cli.main(["export", *(str(argument) for argument in arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.out + captured.err
        return status, captured.out, captured.err

    return run


def test_writes_the_next_version_and_says_how_to_serve_it(export, run_folder, tmp_path):
    for version in ("1", "2"):
        status, out, err = export(run_folder)
        assert status == 0, err
        written = tmp_path / "saved_models" / "photos-1" / version
        assert f"Exported model: {written}" in out
        assert "docker run" in out
        assert (written / "saved_model.pb").is_file()
        assert "# photos-1" in (written / "README.md").read_text(encoding="utf-8")


def test_options_reach_the_model(export, run_folder, tmp_path):
    status, _, err = export(
        run_folder, "--name", "birds", "--directory", tmp_path / "out",
        "--model-version", 7, "--top-k", 2,
    )  # fmt: skip
    assert status == 0, err
    loaded = tf.saved_model.load(str(tmp_path / "out" / "birds" / "7"))
    outputs = loaded.signatures["serving_default"].structured_outputs
    assert outputs["top_labels"].shape.as_list() == [None, 2]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--format", "tar"], "saved-model, litert, onnx"),
        (["--format", "onnx", "--weight-dtype", "int8"], "float32"),
        (["--format", "litert", "--top-k", "2"], "saved-model only"),
        (["--name", "../up"], "no path separator"),
        (["--top-k", "9"], "number of classes"),
    ],
)
def test_options_that_do_not_fit(export, run_folder, tmp_path, options, message):
    status, _, err = export(run_folder, *options)
    assert status == 2
    assert message in err
    assert len(err.splitlines()) <= 2
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_run(export, tmp_path):
    for folder in (tmp_path / "none", tmp_path):
        status, _, err = export(folder)
        assert status == 2
        assert "Expected a run folder" in err


@pytest.mark.parametrize(
    "command, message",
    [
        (["export", "nowhere"], "Expected a run folder"),
        (["predict", "nowhere", "x.png"], "which does not exist"),
        (["search", "digits", "--policies", "no"], "The policy must be one of"),
    ],
)
def test_is_refused_before_tensorflow_is_loaded(tmp_path, command, message):
    program = (
        "import sys; from keras_rsft.cli import main; status = main(sys.argv[1:]); "
        "print('tensorflow' in sys.modules); sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command],
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert message in done.stderr
    assert done.stdout.strip() == "False"
    assert done.returncode == 2


@pytest.mark.parametrize("damaged", ["model.keras", "classes.json", "config.json"])
def test_a_damaged_run(export, run_folder, tmp_path, damaged):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    (copy / damaged).write_bytes(b"PK damaged")
    status, _, err = export(copy)
    assert status == 1
    assert f"{copy / damaged} cannot be read" in err
    assert "please report" not in err
    assert not (tmp_path / "saved_models").exists()


def test_narrow_weights_are_judged_on_the_validation_split(
    export, run_folder, tmp_path
):
    pytest.importorskip("ai_edge_litert")
    for number in (1, 2):
        status, out, err = export(
            run_folder, "--format", "litert", "--weight-dtype", "int8"
        )
        assert status == 0, err
        folder = tmp_path / "saved_models" / "photos-1"
        assert f"Exported model: {folder / f'model-{number}.tflite'}" in out
        # 60 photos, 15 % for validation, stratified over three classes.
        assert "Accuracy on the validation split (9 images)" in out
        results = json.loads((run_folder / "results.json").read_text())
        accuracy = f"{100 * results['validation_accuracy']:.1f} %"
        assert f"in float32 {accuracy}" in out


def test_data_that_changed_is_not_judged_by(export, run_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    for source in ("nowhere", "digits"):
        config["command"] = f"keras-rsft fit {source}"
        (copy / "config.json").write_text(json.dumps(config))
        status, out, err = export(copy, "--weight-dtype", "float16")
        assert status == 0, err
        assert "was not measured" in out


@pytest.mark.slow
def test_verify_loads_it_in_a_fresh_process(export, run_folder):
    status, out, err = export(run_folder, "--verify", "--json")
    assert status == 0, err
    assert json.loads(out)["verification"]["passed"] is True
    assert json.loads(out)["verification"]["generated"] is False
    assert "9 of the validation split" in err
    assert "9 of 9 images" in err
    assert "refused" in err
    assert "Verdict" in err


@pytest.mark.slow
def test_verify_without_the_data_says_so(export, run_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run_folder, copy)
    config = json.loads((copy / "config.json").read_text())
    config["command"] = "keras-rsft fit nowhere"
    (copy / "config.json").write_text(json.dumps(config))
    status, out, err = export(copy, "--verify")
    assert status == 0, err
    assert "generated ones are used: `source` must be" in out
    assert "12 of 12 images" in out


@pytest.mark.parametrize(
    "command, message",
    [
        ('keras-rsft fit "photos', "No closing quotation"),
        ("keras-rsft fit --help", "command cannot be read"),
        ("keras-rsft fit photos --future 1", "command cannot be read"),
        (7, "does not say what data"),
        (["fit"], "does not say what data"),
    ],
)
def test_a_command_in_a_run_is_not_trusted(tmp_path, capsys, command, message):
    run = FinishedRun(tmp_path, None, ("a", "b"), {"command": command})
    with pytest.raises(DataError, match=message):
        commands._data_of(run, build_parser(), Output(command="export"))
    captured = capsys.readouterr()
    assert captured.out + captured.err == ""


def test_which_images_are_read_is_told(tmp_path, capsys, photos):
    run = FinishedRun(tmp_path, None, (), {"command": f"keras-rsft fit {photos}"})
    commands._data_of(run, build_parser(), Output(command="export"))
    said = " ".join(capsys.readouterr().out.split())
    assert f"says that its images are in {photos}." in said


def test_the_split_that_a_run_was_validated_on(run_folder, photos):
    run = read_run(run_folder)
    data = load_images(str(photos))
    images = sample_of(validation_split(run, data))
    assert images == [data.validation.encoded(at) for at in range(9)]
    other = load_images(str(photos), split_seed=1)
    with pytest.raises(DataError, match="other ids"):
        validation_split(run, other)


def test_a_sample_is_spread_over_the_split_and_has_a_limit(photo_folder, monkeypatch):
    monkeypatch.setattr(verification, "MOST_IMAGES", 3)
    train = load_images(str(photo_folder)).train
    last = len(train) - 1
    expected = [train.encoded(at) for at in (0, round(last / 2), last)]
    assert sample_of(train) == expected


@pytest.mark.parametrize(
    "options",
    [["--name", "../up"], ["--name", "used"], ["--directory", "file"]],
)
def test_a_bad_place_is_refused_before_the_run_is_read(
    export, tmp_path, options, monkeypatch
):
    monkeypatch.setattr(from_run, "read_run", None)  # A call of it would fail.
    (tmp_path / "file").touch()
    (tmp_path / "saved_models" / "used").mkdir(parents=True)
    (tmp_path / "saved_models" / "used" / "thesis.txt").touch()
    status, _, err = export("no-run", *options)
    assert status == 2
    assert len(err.splitlines()) == 1


@pytest.mark.slow
def test_verify_tells_a_damaged_export(run_folder, tmp_path):
    run = read_run(run_folder)
    good = export_run(run, directory=tmp_path)
    other = keras.models.clone_model(run.model)  # Other weights.
    wrong = dataclasses.replace(run, model=other)
    assert not verify_export(wrong, good).passed
    (good.path / "saved_model.pb").write_bytes(b"damaged")
    with pytest.raises(DataError, match="in a fresh process"):
        verify_export(run, good)


def test_only_exact_weights_are_judged_by_their_difference():
    found = Verification(
        images=2, generated=True, same_labels=2, largest_difference=1e-4,
        allowed_difference=1e-5, broken_refused=True, load_seconds=0.0,
    )  # fmt: skip
    assert not found.passed
    assert dataclasses.replace(found, allowed_difference=1e-3).passed
    narrow = dataclasses.replace(found, allowed_difference=None)
    assert narrow.passed
    assert not dataclasses.replace(narrow, broken_refused=False).passed


def test_an_export_can_refuse_smaller_images(export, run_folder, tmp_path):
    status, _, err = export(run_folder, "--max-pixels", 320, "--verify")
    assert status == 0, err
    (path,) = (tmp_path / "saved_models").glob("*/1")
    serve = tf.saved_model.load(str(path)).signatures["serving_default"]
    images = [tf.zeros((20, width, 3), tf.uint8) for width in (16, 17)]
    files = tf.stack([tf.io.encode_png(image) for image in images])
    assert serve(image_bytes=files)["valid"].numpy().tolist() == [True, False]
    status, _, err = export(run_folder, "--format", "litert", "--max-pixels", 320)
    assert status == 2
    assert "the most pixels" in err
