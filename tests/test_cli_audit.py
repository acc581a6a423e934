"""`keras-rsft audit` and `--clean-splits` as a user meets them."""

from __future__ import annotations

import csv
import json
import re
import shutil

import numpy as np
import pytest
from made_golden import write_backbone
from PIL import Image

pytestmark = pytest.mark.usefixtures("eager")

COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (200, 200, 60), (60, 200, 200))


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """A network whose features tell the colours of photos apart."""
    return write_backbone(tmp_path_factory.mktemp("backbone") / "tiny.keras")


@pytest.fixture
def photos(tmp_path):
    """Writes photos of a colour into the folder of a class."""
    rng = np.random.default_rng(0)

    def write(label, colour, count=1, folder="photos"):
        target = tmp_path / folder / label
        target.mkdir(parents=True, exist_ok=True)
        for number in range(count):
            values = rng.normal(COLOURS[colour % 5], 40, (20, 16, 3))
            image = Image.fromarray(np.clip(values, 0, 255).astype("uint8"))
            image.save(target / f"{colour}-{number:02}.png")
        return tmp_path / folder

    return write


@pytest.fixture
def run(call, backbone, tmp_path):
    """Runs a command that takes data, and returns status, text and document."""

    def run(command, data, *arguments):
        status, out, err = call(
            command, data, "--backbone", backbone, "--cache-dir", tmp_path / "cache",
            "--set", "dtype=float32", "--json", *arguments,
        )  # fmt: skip
        return status, " ".join(err.split()), json.loads(out) if out else None

    return run


FIT = ("--epochs", 3, "--batch-size", 8, "--set", "with_plain=false")


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def made_wrong(photos):
    """Three colours of 40 photos; of each, 9 lie in the folder of the next one."""
    for number in range(3):
        photos("abc"[number], number, 31)
        folder = photos("abc"[(number + 1) % 3], number, 9)
    return folder


def assert_adds_up(found):
    """Checks that splits, classes and the whole say the same."""
    for parts in (found["splits"].values(), found["classes"]):
        for key in ("samples", "look_wrong"):
            assert sum(one[key] for one in parts) == found[key]
        known = [one["expected_wrong"] for one in parts]
        if found["expected_wrong"] is None:
            assert known == [None] * len(known)
        else:
            total = sum(number or 0.0 for number in known)
            assert total == pytest.approx(found["expected_wrong"], abs=1e-4)


class TestAudit:
    def test_tables_a_folder_and_a_page_that_agree(self, run, call, photos, tmp_path):
        status, shown, document = run("audit", made_wrong(photos))
        assert status == 0, shown
        found = document["label_quality"]
        assert_adds_up(found)
        assert found["samples"] == 120
        assert found["expected_wrong"] == pytest.approx(27, abs=3)
        assert found["finding"] in shown
        assert re.search(r"\ba c 40 \d+ 9\b", shown)  # Photos of c lie in a's folder.
        folder = tmp_path / "runs" / "audit-photos-1"
        assert document["folder"] == str(folder)
        assert not (folder / "model.keras").exists()
        labels = rows_of(folder / "labels.csv")
        assert list(labels[0]) == [
            "id", "split", "given_label", "proposed_label", "right_probability",
        ]  # fmt: skip
        assert len(labels) == 120
        right = np.array([float(row["right_probability"]) for row in labels])
        assert np.sum(1 - right) == pytest.approx(found["expected_wrong"], abs=0.01)
        assert (right < 0.6).sum() == found["look_wrong"]
        suspected = [row for row, p in zip(labels, right, strict=True) if p < 0.6]
        for row in suspected:
            colour = int(row["id"].split("/")[1][0])
            assert row["proposed_label"] == "abc"[colour] != row["given_label"]
        page = (folder / "report.html").read_text(encoding="utf-8")
        assert found["finding"] in page
        assert 'id="gallery"' in page
        assert 'id="training"' not in page
        assert call("review", folder, "--no-browser")[0] == 0

    def test_corrections_of_its_review(self, run, photos, tmp_path):
        data = made_wrong(photos)
        _, _, before = run("audit", data)
        (tmp_path / "corrections.csv").write_text(
            "id,given_label,decision,new_label\n"
            + "".join(f"a/2-{n:02}.png,a,relabel,c\n" for n in range(9))
        )
        corrected = ("--corrections", tmp_path / "corrections.csv")
        status, shown, after = run("audit", data, *corrected)
        assert status == 0, shown
        found = after["label_quality"]
        assert_adds_up(found)
        assert sum(one["known"] for one in found["splits"].values()) == 9
        assert "known to be right" in shown
        assert found["look_wrong"] == before["label_quality"]["look_wrong"] - 9
        assert run("fit", data, *FIT, *corrected)[0] == 0

    def test_an_existing_output_is_refused_before_the_work(self, run, photos, tmp_path):
        (tmp_path / "mine").mkdir()
        status, shown, _ = run(
            "audit", made_wrong(photos), "--output", tmp_path / "mine"
        )
        assert status == 2
        assert "must not exist" in shown
        assert not (tmp_path / "cache").exists()


class TestBadInput:
    """One clear sentence, the same on the terminal, in JSON and on the page."""

    def checked(self, run, data, sentence):
        for command, more in (("audit", ()), ("fit", FIT)):
            status, shown, document = run(command, data, *more)
            assert status == 0, shown
            assert sentence in shown
            results = document.get("results", document)
            found = results["label_quality"]
            assert_adds_up(found)
            rows = rows_of(data.parent / document["folder"] / "ledger.csv")
            looks_wrong = sum(row["looks_wrong"] == "1" for row in rows)
            assert looks_wrong == found["look_wrong"]
            page = (data.parent / document["folder"] / "report.html").read_text("utf-8")
            assert sentence in page
        return found, results

    def test_labels_that_are_independent_of_the_photos(self, run, photos):
        for number in range(60):
            data = photos("abc"[number % 3], number // 3)
        sentence = "right and wrong ones cannot be told apart"
        found, results = self.checked(run, data, sentence)
        assert found["expected_wrong"] is None
        assert found["look_wrong"] == 0
        assert "estimated_wrong_labels" not in results
        assert not [key for key in results if key.endswith("_estimated")]

    def test_all_labels_wrong_in_all_ways(self, run, photos):
        for number in range(60):
            data = photos("abcde"[(number + 1 + number // 5 % 4) % 5], number)
        self.checked(run, data, "right and wrong ones cannot be told apart")

    def test_all_labels_wrong_in_one_way(self, run, photos):
        for number, name in enumerate("bca"):
            data = photos(name, number, 15)
        _, shown, document = run("audit", data)
        assert document["label_quality"]["look_wrong"] == 0
        assert "A mistake that all samples of a class share cannot be seen" in shown

    @pytest.mark.parametrize("classes, count", [(5, 1), (40, 2)])
    def test_classes_too_small_to_judge(self, run, photos, classes, count):
        for number in range(classes):
            data = photos(f"k{number:02}", number, count)
        sentence = "Fewer than two classes have 5 training samples"
        found, _ = self.checked(run, data, sentence)
        assert found["expected_wrong"] is None
        _, shown, document = run("audit", data)
        assert f"{classes} not judged" in shown
        labels = rows_of(data.parent / document["folder"] / "labels.csv")
        assert {row["proposed_label"] for row in labels} == {""}
        assert {row["right_probability"] for row in labels} == {""}

    def test_some_classes_too_small_to_judge(self, run, photos):
        for number in range(2):
            photos("ab"[number], number, 20)
        for number in range(6):
            data = photos(f"single{number}", number)
        _, shown, document = run("audit", data)
        found = document["label_quality"]
        assert_adds_up(found)
        assert "6 not judged - 6 - -" in shown
        assert found["look_wrong"] == 0

    def test_few_wrong_labels(self, run, photos):
        """Wrong labels are shown even where `auto` keeps every sample."""
        for number, name in enumerate("abc"):
            photos(name, number, 60)
        data = photos("a", 1, 2)
        found = run("audit", data)[2]["label_quality"]
        assert found["look_wrong"] > 0
        _, shown, document = run("fit", data, *FIT)
        assert "Hardly any training label is wrong" in shown
        assert document["results"]["label_quality"] == found
        assert document["results"]["acceptance_rate"] == 1

    def test_a_split_without_a_class(self, run, photos, tmp_path):
        for number, name in enumerate("abc"):
            photos(name, number, 10, folder="photos/train")
        photos("a", 0, 8, folder="photos/test")
        photos("b", 1, 8, folder="photos/validation")
        status, _, document = run("audit", tmp_path / "photos")
        assert status == 0
        assert_adds_up(document["label_quality"])
        shutil.rmtree(tmp_path / "photos" / "train" / "a")
        status, shown, _ = run("audit", tmp_path / "photos")
        assert status == 1
        assert "Every class must have a sample in the training split" in shown

    def test_one_class(self, run, photos):
        status, shown, _ = run("audit", photos("a", 0, 10))
        assert status == 1
        assert "Training needs samples of two classes or more" in shown


class TestCleanSplits:
    def test_their_labels_are_taken_at_their_word(self, run, photos):
        data = made_wrong(photos)
        _, _, before = run("audit", data)
        status, shown, document = run("audit", data, "--clean-splits", "test")
        assert status == 0, shown
        assert "Taken as right: the labels of test." in shown
        assert "test, all known to be right" in shown
        found, first = document["label_quality"], before["label_quality"]
        assert_adds_up(found)
        test = found["splits"].pop("test")
        assert (test["expected_wrong"], test["look_wrong"]) == (0, 0)
        assert first["splits"].pop("test")["look_wrong"] > 0
        assert found["splits"] == first["splits"]

    def test_an_accuracy_on_them_is_one_by_right_labels(self, run, photos):
        for number, name in enumerate("abc"):
            for split in ("train", "validation", "test"):
                data = photos(name, number, 20, folder=f"photos/{split}").parent
            photos("abc"[(number + 1) % 3], number, 6, folder="photos/validation")
        status, shown, document = run("fit", data, *FIT, "--clean-splits", "train,test")
        assert status == 0, shown
        results = document["results"]
        assert results["test_accuracy_clean"] == results["test_accuracy"]
        assert "test_accuracy_estimated" not in results
        assert shown.count("by the given labels") == 1  # Of the validation split.
        assert results["acceptance_rate"] == 1
        assert "All training labels are known to be right" in shown
        # Clean training labels tell nothing about the noise of the validation split.
        assert results["label_quality"]["splits"]["validation"]["look_wrong"] == 18

    @pytest.mark.parametrize("command", ["compare", "search"])
    def test_other_commands_take_them(self, run, photos, command):
        more = {
            "compare": ("--seeds", 1, "--methods", "auto", "--epochs", 2),
            "search": ("--max-trials", 2, "--epochs", 2, "--policies", "auto"),
        }[command]
        data = made_wrong(photos)
        status, shown, document = run(command, data, *more, "--clean-splits", "train")
        assert status == 0, shown
        if command == "compare":
            assert document["methods"]["auto"]["acceptance_rate"] == 1
        else:
            assert document["results"]["chosen"]["acceptance_rate"] == 1
            assert "--clean-splits=train" in document["fit_command"]

    @pytest.mark.parametrize(
        "arguments, status, message",
        [
            (["fit", "--clean-splits", "tests"], 2, "Did you mean 'test'?"),
            (["audit", "--clean-splits", "test,"], 2, "expected names"),
            (["fit", "--clean-splits=train", "--noise=symmetric:0.3"], 1, "are known"),
            (
                ["compare", "--clean-splits=train", "--noise=symmetric:0.3"],
                2,
                "`--noise",
            ),
            (["features", "--clean-splits=train"], 2, "unrecognized arguments"),
        ],
    )
    def test_mistakes(self, run, photos, arguments, status, message):
        actual, shown, _ = run(arguments[0], made_wrong(photos), *arguments[1:])
        assert actual == status
        assert message in shown

    def test_an_empty_split(self, run, photos):
        for number in range(5):
            data = photos("abcde"[number], number)
        status, shown, _ = run("audit", data, "--clean-splits", "test")
        assert status == 1
        assert "test split" in shown
        assert "has no sample" in shown
