"""`keras-rsft search` as a user meets it: the tables, going on, mistakes."""

from __future__ import annotations

import json
import re
import shlex

import keras
import numpy as np
import pytest

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture
def search(call, tmp_path, photo_folder, tiny_base_file):
    def run(*arguments):
        return call(
            "search", photo_folder, "--backbone", tiny_base_file, "--epochs", 2,
            "--batch-size", 8, "--cache-dir", tmp_path / "kept", "--max-trials", 4,
            *arguments,
        )  # fmt: skip

    return run


def test_tables_a_reason_and_a_command_that_trains_the_same(
    search, call, photo_folder, tiny_base_file, tmp_path
):
    status, out, err = search(
        "--policies", "loss-threshold", "--optimizers", "adamw",
        "--range", "relative_threshold=1.2:3", "--range", "warmup_epochs=1:1",
    )  # fmt: skip
    assert status == 0, err
    assert err == ""
    folder = tmp_path / "runs" / f"search-{photo_folder.name}-1"
    results = json.loads((folder / "results.json").read_text())
    assert results["reason"] in out.replace("\n", " ")
    assert "plain fine-tuning" in out
    command = re.search(r"^  keras-rsft (fit .*)$", out, re.MULTILINE)[1]
    status, out, err = call(*shlex.split(command), "--output", tmp_path / "again")
    assert status == 0, err
    again = json.loads((tmp_path / "again" / "results.json").read_text())
    for name in ("validation_accuracy", "test_accuracy", "acceptance_rate"):
        assert again[name] == pytest.approx(results["chosen"][name])


@pytest.mark.slow
def test_with_noise_the_same_head_is_judged_by_other_labels(search, call, tmp_path):
    """A search makes validation labels noisy too, `fit` training labels alone."""

    def result(folder):
        head = keras.saving.load_model(tmp_path / folder / "head.keras")
        results = json.loads((tmp_path / folder / "results.json").read_text())
        return results, head.model.get_layer("scores").get_weights()[0]

    for folder, more in (("noisy", []), ("clean", ["--clean-validation"])):
        status, out, err = search(
            "--noise", "symmetric:0.5", "--max-trials", 1, "--epochs", 1,
            "--policies", "keep-fraction", "--output", folder, *more,
        )  # fmt: skip
        assert status == 0, err
    command = re.search(r"^  keras-rsft (fit .*)$", out, re.MULTILINE)[1]
    assert call(*shlex.split(command), "--output", "again")[0] == 0
    (noisy, kernel), (clean, other) = result("noisy"), result("clean")
    again, trained = result("again")
    np.testing.assert_array_equal(kernel, other)
    np.testing.assert_allclose(trained, kernel, atol=1e-4)
    assert again["acceptance_rate"] == pytest.approx(noisy["chosen"]["acceptance_rate"])
    for one in (noisy, clean):
        assert again["test_accuracy"] == pytest.approx(one["chosen"]["test_accuracy"])
    accuracy = clean["chosen"]["validation_accuracy"]
    assert again["validation_accuracy"] == pytest.approx(accuracy)
    assert noisy["chosen"]["validation_accuracy"] != pytest.approx(accuracy)


@pytest.mark.slow
def test_a_search_that_was_stopped_goes_on(search, tmp_path, photo_folder, monkeypatch):
    from keras_rsft.tuning import _search as search_run

    def stop(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(search_run, "run_trials", stop)
    plain = ("--policies", "accept-all,keep-fraction", "--optimizers", "sgd")
    status, _, err = search(*plain)
    assert status == 130
    assert "Run the same command again" in err
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert search(*plain)[0] == 0
    assert len(list((tmp_path / "runs").iterdir())) == 1
    status, _, err = search(
        *plain, "--output", f"runs/search-{photo_folder.name}-1", "--seed", 1
    )
    assert status == 2
    assert "cannot be mixed" in err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tuner", "bayes"], "Did you mean 'bayesian'?"),
        (["--objective", "accuracy"], "Did you mean 'val_accuracy'?"),
        (["--max-trials", "0"], "at least 1"),
        (["--range", "learning_rate=0.1:0.01"], "two numbers LOW:HIGH"),
        (["--range", "warmup_epochs=0.5:1"], "two whole numbers"),
        (["--range", "keep_fraction=0.5:2"], "at most 1"),
        (["--range", "epochs=0:2"], "at least 1"),
        (["--range", "treshold=1:2"], "Did you mean 'threshold'?"),
        (["--unfreeze-choices", "last"], "Did you mean 'last-block'?"),
        (["--set", "unfreeze_epochs=3"], "Say which ones with `--unfreeze-choices`"),
        (["--policies", "auto,keep"], "Did you mean 'keep-fraction'?"),
        (["--policies", "self-paced"], "use the tuner random"),
        (["--clean-validation"], "--clean-label-column"),
    ],
)
def test_mistakes(search, arguments, message):
    status, _, err = search(*arguments)
    assert status == (1 if arguments == ["--clean-validation"] else 2)
    assert message in err
