"""From a file of texts to a run, its page and its answers, by the command line."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
import tensorflow as tf
from made_texts import HOSTILE_TEXTS, sentences, write_table

import keras_rsft as rsft
from keras_rsft import cli
from keras_rsft._predict import predict_files
from keras_rsft.errors import InvalidArgument
from keras_rsft.report._page import gallery_data, render_page
from keras_rsft.report._record import read_run

pytestmark = pytest.mark.usefixtures("eager")

FEW = ("--epochs", "3", "--batch-size", "8", "--quiet")


@pytest.fixture(scope="module")
def root(text_encoder, tmp_path_factory):
    """A folder with a file of texts, hostile ones among them, and a run on it."""
    root = tmp_path_factory.mktemp("texts")
    rows = [*sentences(), *((text, "animals") for text in HOSTILE_TEXTS), ("", "money")]
    write_table(root / "texts.csv", rows)
    status = cli.main(
        ["fit", str(root / "texts.csv"), "--text-column", "text", "--output",
         str(root / "run"), "--cache-dir", str(root / "kept"), *FEW]
    )  # fmt: skip
    assert status == 0
    return root


@pytest.fixture
def call(root, capsys, monkeypatch):
    """Runs a command in the folder; returns its status and what it printed."""

    def run(*arguments):
        monkeypatch.chdir(root)
        status = cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


class TestRun:
    def test_what_is_recorded(self, root):
        config = json.loads((root / "run" / "config.json").read_text())
        assert config["backbone"] == "minilm"
        assert config["image_size"] is None
        left_out = (root / "run" / "unreadable.csv").read_text().splitlines()
        assert len(left_out) == 2
        assert left_out[1].endswith("The text is empty.")

    def test_texts_are_kept_by_the_ids_of_the_ledger(self, root):
        lines = (root / "run" / "texts.jsonl").read_text(encoding="utf-8").splitlines()
        texts = {one["id"]: one["text"] for one in map(json.loads, lines)}
        with (root / "run" / "ledger.csv").open(encoding="utf-8") as file:
            ids = [row["id"] for row in csv.DictReader(file)]
        assert set(ids) == set(texts)
        known = {" ".join(text.split()) for text, _ in sentences()}
        assert len(known & set(texts.values())) > 30

    def test_the_page_shows_texts_and_runs_none_of_them(self, root):
        record = read_run(root / "run")
        data = gallery_data(record, served=False)
        assert data["kind"] == "texts"
        assert "picture" not in data["samples"]
        assert all(data["samples"]["text"])
        served = gallery_data(record, served=True)["samples"]
        assert sorted(served["text"]) == sorted(data["samples"]["text"])
        page = render_page(record)
        assert "document.title='text'" in page
        assert "<script>document" not in page
        assert "<img src=x" not in page
        shown = re.search('id="gallery-data">(.*?)</script>', page, re.DOTALL)[1]
        assert len(json.loads(shown)["samples"]["text"]) == len(served["text"])
        assert " texts right" in page

    def test_little_room_leaves_texts_out(self, root):
        record = read_run(root / "run")
        few = gallery_data(record, served=False, max_bytes=400)["samples"]["text"]
        assert 0 < sum(len(text.encode()) for text in few) <= 400

    @pytest.mark.slow
    def test_in_python_the_same_weights(self, root):
        data = rsft.load_texts(root / "texts.csv")
        run = rsft.finetune(
            data,
            features=rsft.FeatureConfig(cache_dir=root / "kept"),
            settings=rsft.TrainConfig(epochs=3, batch_size=8),
            progress=False,
        )
        assert run.class_names == ("animals", "cooking", "money")
        scores = run.model.predict_on_batch(tf.constant(["The soup needs more salt."]))
        (root / "soup.txt").write_text("The soup needs more salt.")
        (answer,) = predict_files(root / "run", [root / "soup.txt"])
        assert answer.label == "cooking"
        assert answer.score == pytest.approx(scores.max(), abs=1e-4)

    @pytest.mark.slow
    def test_its_corrections_are_applied(self, root, call):
        with (root / "run" / "ledger.csv").open(encoding="utf-8") as file:
            first = next(csv.DictReader(file))
        decided = (first["id"], first["given_label"], "drop", "")
        header = ("id", "given_label", "decision", "new_label")
        write_table(root / "corrections.csv", [decided], header)
        status, out, err = call(
            "fit", "texts.csv", "--text-column", "text", "--corrections",
            "corrections.csv", "--output", "mended", "--cache-dir", "kept", "--json",
            *FEW[:4],
        )  # fmt: skip
        assert status == 0, err
        assert json.loads(out)["corrections"]["drop"] == 1
        assert first["id"] not in (root / "mended" / "ledger.csv").read_text()


class TestPredict:
    def test_rows_and_files(self, root, call):
        (root / "new").mkdir(exist_ok=True)
        (root / "new" / "one.txt").write_text("A horse drinks water in the forest.")
        (root / "new" / "bad.txt").write_bytes(b"\xff\xfe")
        rows = [
            ("The bank lost a million dollars.",),
            ("",),
            ("This cake\nbakes for an hour.",),
        ]
        write_table(root / "new.csv", rows, ("words",))
        status, out, err = call(
            "predict", "run", "new.csv", "new", "--text-column", "words", "--quiet"
        )
        answers = [line.split("\t") for line in out.splitlines()]
        assert [one[0] for one in answers] == ["new.csv:2", "new.csv:4", "new/one.txt"]
        assert [one[1] for one in answers] == ["money", "cooking", "animals"]
        assert status == 1
        assert "new.csv:3: The text is empty." in err
        assert "new/bad.txt: The text is not UTF-8" in err

    @pytest.mark.slow
    def test_the_answers_do_not_depend_on_the_others(self, root, tmp_path):
        (tmp_path / "one.txt").write_text("The cat sleeps in the barn.")
        (tmp_path / "long.txt").write_text("The cat sleeps in the barn. " * 100)
        alone = next(iter(predict_files(root / "run", [tmp_path / "one.txt"])))
        both = [tmp_path / "long.txt", tmp_path / "one.txt"]
        together = list(predict_files(root / "run" / "model.keras", both))[1]
        assert (together.path, together.label) == (alone.path, alone.label)
        assert together.score == pytest.approx(alone.score, abs=1e-5)

    @pytest.mark.slow
    def test_no_such_column(self, call):
        status, _, err = call("predict", "run", "texts.csv", "--text-column", "words")
        assert status == 1
        assert "no column 'words'" in err

    @pytest.mark.slow
    def test_a_folder_without_texts(self, call, tmp_path):
        status, _, err = call("predict", "run", tmp_path)
        assert status == 1
        assert "no text file" in err


class TestRefusals:
    @pytest.mark.parametrize(
        "options, said",
        [
            (("--set", "augmentations=2"), "no augmentations"),
            (("--image-size", "32"), "no image size"),
            (("--unfreeze", "1"), "only the head is trained"),
            (("--unfreeze", "last-block"), "only the head is trained"),
            (("--backbone", "resnet50"), "the backbone takes images"),
            (("--noise", "instance:0.3"), "made of images"),
        ],
    )
    def test_what_makes_no_sense_for_texts(self, options, said, call):
        status, _, err = call(
            "fit", "texts.csv", "--text-column", "text", *options, "--output", "refused"
        )
        assert (status, said in err) == (2, True), err
        assert err.count("\n") == 1

    def test_texts_in_python_with_a_base_for_images(self, root):
        texts = rsft.load_texts(root / "texts.csv")
        with pytest.raises(InvalidArgument, match="--backbone minilm"):
            rsft.finetune(texts, features="resnet50", progress=False)

    @pytest.mark.parametrize(
        "kind",
        [
            "saved-model",
            pytest.param("litert", marks=pytest.mark.slow),
            pytest.param("onnx", marks=pytest.mark.slow),
        ],
    )
    def test_an_export_that_cannot_be(self, kind, call):
        status, _, err = call("export", "run", "--format", kind)
        assert status == 2
        assert "tokenizer" in err

    def test_images_and_texts_are_not_ranked_together(self, call):
        status, _, err = call("rank", "texts.csv", "--backbones", "minilm,resnet50")
        assert status == 2
        assert "same data" in err


@pytest.mark.slow
class TestOtherCommands:
    def test_compare(self, call):
        status, out, err = call(
            "compare", "texts.csv", "--text-column", "text", "--methods",
            "auto", "--seeds", "1", "--noise", "symmetric:0.2", "--output", "compared",
            "--cache-dir", "kept", "--json", *FEW[:4],
        )  # fmt: skip
        assert status == 0, err
        assert {"plain", "auto"} <= set(json.loads(out)["methods"])

    def test_search_with_its_model_and_page(self, root, call):
        status, out, err = call(
            "search", "texts.csv", "--text-column", "text", "--max-trials", "3",
            "--output", "searched", "--cache-dir", "kept", *FEW,
        )  # fmt: skip
        assert status == 0, err
        assert "test texts right" in (root / "searched" / "report.html").read_text()
        (root / "one.txt").write_text("The bank raises its interest rates.")
        status, out, err = call("predict", "searched", "one.txt", "--quiet")
        assert (status, out.split("\t")[0]) == (0, "one.txt"), err

    def test_rank(self, call):
        status, out, err = call(
            "rank", "texts.csv", "--backbones", "minilm", "--cache-dir", "kept",
            "--json",
        )  # fmt: skip
        assert status == 0, err
        (ranked,) = json.loads(out)["ranked"]
        assert (ranked["name"], ranked["dim"]) == ("minilm", 384)

    def test_features_in_shares_are_those_of_one_pass(self, root, call):
        data = rsft.load_texts(root / "texts.csv")
        for share in ("0/2", "1/2"):
            status, _, err = call(
                "features", "texts.csv", "--text-column", "text", "--share", share,
                "--cache-dir", "shared", "--quiet",
            )  # fmt: skip
            assert status == 0, err
        base = rsft.load_backbone("minilm")
        options = {"progress": False, "cache_dtype": "float32"}
        one, joined = (
            rsft.extract_features(base, data.train, cache_dir=root / name, **options)
            for name in ("alone", "shared")
        )
        np.testing.assert_allclose(one.features, joined.features, atol=0.02)

    def test_explain(self, call):
        status, out, err = call(
            "fit", "texts.csv", "--text-column", "text", "--dry-run", "--json",
            "--cache-dir", "kept", *FEW[:4],
        )  # fmt: skip
        assert status == 0, err
        assert "verdict" in json.loads(out)
