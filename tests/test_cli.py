"""The command line as a user meets it: answers, tables, mistakes, interruptions."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.usefixtures("eager")

PROGRAM = [sys.executable, "-m", "keras_rsft.cli"]


@pytest.fixture
def fit(call, photo_folder, tiny_base_file, tmp_path):
    def run(*arguments, data=photo_folder):
        return call(
            "fit", data, "--backbone", tiny_base_file, "--cache-dir", tmp_path / "kept",
            "--epochs", 3, "--learning-rate", 0.05, *arguments,
        )  # fmt: skip

    return run


class TestFit:
    def test_prints_a_table_and_leaves_a_run(self, finished, call, tmp_path):
        answer = finished("fit")
        assert answer.status == 0, answer.err
        assert "3 classes" in answer.err  # With --json the table goes there.
        assert "Accuracy on the test split" in answer.err
        assert "Wrong labels rejected" in answer.err
        run = finished.root / "photos-1"
        assert (run / "report.html").is_file()
        image = finished.root / "photos" / "red" / "02.png"
        status, out, err = call("predict", run, image, tmp_path / "none.png")
        path, label, score = out.strip().split("\t")
        assert (status, path) == (1, str(image))  # One file is missing.
        assert label in ("blue", "green", "red")
        assert 0 < float(score) <= 1
        assert "none.png: No such file" in err

    def test_an_unreadable_image_is_a_warning(self, fit, photo_folder, tmp_path):
        photos = tmp_path / "photos"
        shutil.copytree(photo_folder, photos)
        (photos / "red" / "00.png").write_bytes(b"")
        status, out, _ = fit("--set", "with_plain=false", data=photos)
        assert status == 0
        assert [run.name for run in (tmp_path / "runs").iterdir()] == ["photos-1"]
        assert "1 images cannot be read" in out
        listed = (tmp_path / "runs" / "photos-1" / "unreadable.csv").read_text()
        assert "red/00.png" in listed

    def test_what_is_not_read_and_plain_images_are_told(
        self, fit, call, photo_folder, tmp_path
    ):
        photos = tmp_path / "photos"
        shutil.copytree(photo_folder, photos)
        for name in ("red/x.bak", "blue/y.bak", "blue/z.psd"):
            (photos / name).write_bytes(b"content")
        grey = Image.fromarray(np.arange(16, dtype=np.uint16).reshape(4, 4) * 250)
        for name in ("red/00.png", "green/05.png"):
            grey.save(photos / name)
        status, out, err = fit("--set", "with_plain=false", "--json", data=photos)
        assert status == 0
        result = json.loads(out)
        assert result["unread_files"] == {".bak": 2, ".psd": 1}
        assert result["results"]["images_of_one_colour"] == 2
        notes = result["results"]["data_notes"]
        assert notes[0] == "3 files were not read: 2 .bak, 1 .psd."
        assert notes[1].startswith("2 images are of (nearly) one colour, such as ")
        page = (Path(result["folder"]) / "report.html").read_text(encoding="utf-8")
        shown = " ".join(err.split())
        for note in notes:
            assert note in shown
            assert note in page
        status, out, err = call("predict", result["folder"], photos)
        assert status == 1
        assert len(out.splitlines()) == 36
        assert err.endswith(f"{notes[0]}\n")
        status, out, _ = call("predict", result["folder"], photos / "red" / "01.png")
        assert (status, len(out.splitlines())) == (0, 1)

    def test_an_existing_output_is_refused_before_the_work(self, fit, tmp_path):
        (tmp_path / "mine").mkdir()
        status, _, err = fit("--output", tmp_path / "mine")
        assert status == 2
        assert "must not exist" in err
        assert not (tmp_path / "kept").exists()


class TestMistakes:
    @pytest.mark.parametrize(
        "arguments, status, message",
        [
            (["--policy", "keepfraction"], 2, "Did you mean 'keep-fraction'?"),
            (["--threshold", "0"], 2, "positive"),
            (["--threshold", "-1"], 2, "positive"),
            (["--threshold", "much"], 2, "invalid float value"),
            (["--threshold", "1.5", "--policy", "auto"], 2, "in (0, 1]"),
            (["--keep-fraction", "2"], 2, "in (0, 1]"),
            (["--epochs", "0"], 2, "at least 1"),
            (["--batch-size", "x"], 2, "whole number"),
            (["--learning-rate", "0"], 2, "positive number"),
            (["--optimizer", "adaam"], 2, "adaam"),
            (["--backbone", "resnet5O"], 2, "resnet50"),
            (["--backbone", "missing.keras"], 2, "missing.keras"),
            (["--noise", "symmetric"], 2, "symmetric:"),
            (["--noise", "symmetric:2"], 2, "symmetric:2"),
            (["--validation-fraction", "1"], 2, "(0, 1)"),
            (["--set", "dtype=float8"], 2, "float8"),
            (["--image-size", "-5"], 2, "at least 1"),
            (["--thershold", "1"], 2, "Did you mean '--threshold'?"),
            (["--epohcs=3"], 2, "Did you mean '--epochs'?"),
            (["--threshold", "inf"], 2, "positive number"),
            (["--level", "batch", "--policy", "keep-fraction"], 2, "loss-threshold"),
            (["--threshold", "1", "--keep-fraction", "0.5"], 2, "keep-fraction"),
            (["--threshold", "1", "--policy", "accept-all"], 2, "self-paced"),
            (["--set", "class_floor=0.1"], 2, "`--set class_floor` is for the policy"),
            (["--backbone", "nosuch"], 2, "Received: 'nosuch'.\n"),
            (["-x"], 2, "arguments: -x.\nOptions: keras-rsft fit --help\n"),
            (["more"], 2, "arguments: more.\n"),
            (["--dtype", "float32"], 2, "Use `--set dtype=VALUE`"),
            (["--set", "dtpe=float32"], 2, "Did you mean 'dtype'?"),
            (["--set", "augmentations=x"], 2, "whole number"),
            (["--set", "unfreeze_epochs=3"], 2, "`--unfreeze`"),
            (["--unfreeze", "0"], 2, "at least 1"),
            (["--unfreeze=all", "--set", "unfreeze_learning_rate=0"], 2, "positive"),
        ],
    )
    def test_in_an_option(self, fit, arguments, status, message):
        actual, _, err = fit(*arguments)
        assert actual == status
        assert message in err

    def test_in_the_command(self, call):
        status, _, err = call("fitt")
        assert status == 2
        assert "Did you mean 'fit'?" in err

    def test_a_missing_folder(self, call, tmp_path):
        status, _, err = call("fit", tmp_path / "nothing", "--weights", "none")
        assert status == 2
        assert "nothing" in err

    @pytest.mark.parametrize("broken", ["one class", "empty class", "no image"])
    def test_in_the_data(self, fit, tmp_path, photo_folder, broken):
        photos = tmp_path / "photos"
        shutil.copytree(photo_folder, photos)
        if broken == "one class":
            shutil.rmtree(photos / "red")
            shutil.rmtree(photos / "green")
        for image in (photos / "red").rglob("*.png"):
            image.unlink()
        if broken == "no image":
            for image in photos.rglob("*.png"):
                image.write_bytes(b"")
        status, _, err = fit(data=photos)
        assert status == 1
        assert err.startswith("keras-rsft: ")

    def test_a_csv_without_the_column(self, fit, tmp_path):
        table = tmp_path / "labels.csv"
        table.write_text("file,label\na.png,x\n")
        status, _, err = fit(data=table)
        assert status in (1, 2)
        assert "'path'" in err or "path" in err
        assert "file" in err

    def test_a_csv_with_a_path_outside(self, fit, tmp_path):
        folder = tmp_path / "inner"
        folder.mkdir()
        (tmp_path / "secret.png").write_bytes(b"")
        (folder / "labels.csv").write_text("path,label\n../secret.png,x\n")
        status, _, err = fit(data=folder / "labels.csv")
        assert status in (1, 2)
        assert "secret.png" in err

    def test_a_threshold_that_accepts_nothing(self, fit):
        status, _, err = fit("--threshold", "0.000001", "--warmup-epochs", "0")
        assert status == 1
        assert "\nWarning: Epoch 1 accepted no sample" in f"\n{err}"
        assert "UserWarning" not in err
        assert "epochs accepted no sample" in err

    def test_weights_that_cannot_be_downloaded(self, call, photo_folder, monkeypatch):
        import keras

        def offline(*_, **__):
            raise Exception("URL fetch failure")

        monkeypatch.setattr(keras.utils, "get_file", offline)
        for module in list(sys.modules.values()):
            name = getattr(module, "__name__", "")
            if name.startswith("keras.src.applications.") and hasattr(
                module, "file_utils"
            ):
                monkeypatch.setattr(module.file_utils, "get_file", offline)
        status, _, err = call("fit", photo_folder, "--image-size", 32)
        assert status == 1
        assert "--weights" in err
        assert "efficientnet_lite0" in err
        assert len(err.strip().splitlines()) == 2

    def test_no_disk_space(self, fit, monkeypatch):
        import shutil

        usage = shutil.disk_usage("/")._replace(free=10)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
        status, _, err = fit()
        assert status == 1
        assert "--cache-dir" in err

    def test_a_bug_is_named_as_one(self, fit, monkeypatch):
        from keras_rsft.training import _run as run

        def broken(*_, **__):
            raise ZeroDivisionError("oh")

        monkeypatch.setattr(run, "train_head", broken)
        status, _, err = fit()
        assert status == 1
        assert "ZeroDivisionError: oh" in err
        assert "KERAS_RSFT_TRACEBACK" in err

    def test_no_model(self, call, tmp_path):
        status, _, err = call("predict", tmp_path / "no", "a.png")
        assert status == 2
        assert "does not exist" in err


def test_help_imports_nothing_heavy():
    program = textwrap.dedent("""
        import sys
        from keras_rsft import cli
        try:
            cli.main(["fit", "--help"])
        except SystemExit:
            pass
        heavy = {"tensorflow", "keras", "numpy", "rich", "sklearn"} & set(sys.modules)
        print("HEAVY", sorted(heavy))
    """)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert "HEAVY []" in result.stdout


@pytest.mark.slow
def test_keras_imports_no_package_that_it_only_wraps():
    program = textwrap.dedent("""
        import sys
        from keras_rsft._runtime import quick_imports
        with quick_imports():
            import keras
            import tensorflow as tf
            names = {"IPython", "jax", "matplotlib", "pandas", "scipy", "sklearn"}
            print("LEFT OUT", sorted(names - set(sys.modules)))
            import sklearn.mixture
            print("OURS", "scipy" in sys.modules)
    """)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    left_out = "['IPython', 'jax', 'matplotlib', 'pandas', 'scipy', 'sklearn']"
    assert result.stdout.splitlines() == [f"LEFT OUT {left_out}", "OURS True"]


def test_every_public_name_can_be_had():
    import keras_rsft

    for name in keras_rsft.__all__:
        assert getattr(keras_rsft, name) is not None
    assert callable(keras_rsft.finetune)
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = keras_rsft.no_such_name


@pytest.mark.slow
def test_nothing_but_our_own_words_reaches_the_terminal(
    photo_folder, tiny_base_file, tmp_path
):
    result = subprocess.run(
        [*PROGRAM, "fit", photo_folder, "--backbone", tiny_base_file, "--epochs", "2",
         "--cache-dir", tmp_path / "kept"],
        capture_output=True, text=True, cwd=tmp_path, env=_plain_environment(),
    )  # fmt: skip
    assert result.returncode == 0
    assert result.stderr == ""
    assert result.stdout.startswith("3 classes (blue, green, red); images: ")


@pytest.mark.slow
def test_interrupted_from_the_keyboard(photo_folder, tiny_base_file, tmp_path):
    process = subprocess.Popen(
        [*PROGRAM, "fit", photo_folder, "--backbone", tiny_base_file,
         "--epochs", "100000", "--cache-dir", tmp_path / "kept"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
        env=_plain_environment(),
        # A shell lets its background jobs ignore the signal; a terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        assert process.stdout.readline().startswith("3 classes")
        time.sleep(6)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("runs/*-1"))


def _plain_environment():
    return {k: v for k, v in os.environ.items() if not k.startswith(("TF_", "KERAS_"))}
