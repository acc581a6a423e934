"""What a comparison leaves on disk: whole, never over anything, every label."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest

from keras_rsft import _storage
from keras_rsft._storage import NumberedFolder, open_place
from keras_rsft.comparison import _methods as methods
from keras_rsft.comparison._compare import compare
from keras_rsft.comparison._methods import Outcome
from keras_rsft.config import FeatureConfig, TrainConfig
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def written(photo_folder, tiny_base_file, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def run(output, **options):
        return compare(
            load_images(str(photo_folder)),
            methods=["gce", "clean-subset"],
            seeds=2,
            noise="symmetric:0.25",
            features=FeatureConfig(str(tiny_base_file), cache_dir=cache),
            settings=TrainConfig(epochs=2, batch_size=8, seed=3),
            output=output,
            progress=False,
            **options,
        )

    return run


class TestCompare:
    def test_the_folder_has_it_all_and_nothing_is_overwritten(self, written, tmp_path):
        result = written(tmp_path / "deep" / "table", command="keras-rsft compare x")
        folder = result.folder
        assert {path.name for path in folder.iterdir()} == {
            "comparison.csv", "summary.json", "labels.csv", "config.json",
        }  # fmt: skip
        with (folder / "comparison.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [(row["method"], row["seed"]) for row in rows] == [
            (name, seed)
            for seed in ("3", "4")
            for name in ("plain", "gce", "clean-subset")
        ]
        assert float(rows[0]["test_accuracy"]) == result.outcomes[0].test_accuracy
        summary = json.loads((folder / "summary.json").read_text())
        assert summary["verdict"]["sentence"] == result.verdict.sentence
        plain = summary["methods"]["plain"]
        mean = np.mean(
            [o.test_accuracy for o in result.outcomes if o.method == "plain"]
        )
        assert plain["test_accuracy"]["mean"] == pytest.approx(mean)
        config = json.loads((folder / "config.json").read_text())
        assert (config["noise"], config["seeds"]) == ("symmetric:0.25", 2)
        with pytest.raises(InvalidArgument, match="Nothing is overwritten"):
            written(folder)

    def test_noisy_labels_of_both_splits_are_written_down(self, written, tmp_path):
        result = written(tmp_path / "table")
        with (result.folder / "labels.csv").open(encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        data = result.noisy_data[3]
        for split in (data.train, data.validation):
            mine = [r for r in rows if r["seed"] == "3" and r["split"] == split.name]
            wrong = sum(row["given_label"] != row["clean_label"] for row in mine)
            assert wrong == round(0.25 * len(split)) > 0
            assert [row["id"] for row in mine] == split.ids.tolist()
            given = [data.class_names[label] for label in split.labels]
            assert [row["given_label"] for row in mine] == given
        by_seed = [
            [r["given_label"] for r in rows if r["seed"] == seed] for seed in "34"
        ]
        assert by_seed[0] != by_seed[1]
        np.testing.assert_array_equal(data.test.clean_labels, data.test.labels)

    def test_a_failure_leaves_no_half_folder(self, written, tmp_path, monkeypatch):
        def fail(*_):
            raise KeyboardInterrupt

        monkeypatch.setattr(_storage, "json_value", fail)
        monkeypatch.setattr(methods, "run_method", fake_run)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path / "table")
        assert list(tmp_path.iterdir()) == []

    def test_two_at_once_get_a_number_each(self, written, tmp_path, monkeypatch):
        monkeypatch.setattr(methods, "run_method", fake_run)
        numbered = NumberedFolder("table", tmp_path)
        with open_place(numbered, {"kind": "comparison"}) as first:
            assert first.folder.name == "table-1"
            assert written(numbered).folder.name == "table-2"
            first.write(lambda folder: (folder / "comparison.csv").touch())
        assert {path.name for path in tmp_path.iterdir()} == {"table-1", "table-2"}


def fake_run(name, trial):
    return Outcome(name, trial.settings.seed, 1.0, np.array([True, False]))
