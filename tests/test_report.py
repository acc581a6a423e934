"""The report: what it says, draws and shows, made from a run's folder alone."""

from __future__ import annotations

import base64
import dataclasses
import json
import math
import re
import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from made_run import HOSTILE_CLASSES, HOSTILE_IDS, made_run

import keras_rsft
from keras_rsft._stats import paired_share_interval, proportion_interval
from keras_rsft._storage import guarded_cell, plain_cell, write_csv
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.report import _charts as charts
from keras_rsft.report._page import (
    confusion_of,
    gallery_data,
    next_command,
    outcome_of,
    render_page,
    script_json,
    write_report,
)
from keras_rsft.report._record import EpochLosses, read_run


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    return made_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def record(run_folder):
    return read_run(run_folder)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report") / "<b>run</b>"
    return read_run(made_run(folder, classes=HOSTILE_CLASSES, ids=HOSTILE_IDS))


class TestIntervals:
    def test_a_share_by_hand(self):
        # Wilson for 8 of 10: (0.8 + 0.19207 +- 1.96 sqrt(0.016 + 0.0096)) / 1.38415.
        assert proportion_interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)

    @pytest.mark.parametrize("right", [0, 5])
    def test_a_share_stays_within_its_range(self, right):
        low, high = proportion_interval(right, 5)
        assert 0 <= low <= right / 5 <= high <= 1

    def test_a_difference_by_hand(self):
        # (30.5 - 10.5) / 202 +- 1.96 sqrt((41 / 202 - (20 / 202)**2) / 202).
        low, high = paired_share_interval(30, 10, 200)
        error = 1.959964 * math.sqrt((41 / 202 - (20 / 202) ** 2) / 202)
        assert (low, high) == pytest.approx((20 / 202 - error, 20 / 202 + error))

    def test_a_difference_is_the_opposite_the_other_way_round(self):
        low, high = paired_share_interval(3, 8, 50)
        assert paired_share_interval(8, 3, 50) == pytest.approx((-high, -low))

    def test_equal_methods_leave_room_for_chance(self):
        low, high = paired_share_interval(0, 0, 100)
        assert low < 0 < high


class TestOutcome:
    def test_one_sentence_says_it(self, record):
        sentence = outcome_of(record).sentence
        assert "90.0 % of 200 test images right, without it 80.0 %" in sentence
        assert "10.0 points better" in sentence

    @pytest.mark.parametrize(
        "rejection, plain, said",
        [(10, 30, "10.0 points worse"), (11, 10, "may be chance")],
    )
    def test_the_verdict_follows_the_interval(self, record, rejection, plain, said):
        paired = record.results["against_plain"] | {
            "only_rejection_right": rejection,
            "only_plain_right": plain,
        }
        changed = dataclasses.replace(record, results={"against_plain": paired})
        assert said in outcome_of(changed).sentence

    @pytest.mark.parametrize(
        "wrong, said",
        [(None, "right or wrong"), (0, "known to be right"), (7, "7 are")],
    )
    def test_says_by_which_labels(self, record, wrong, said):
        paired = record.results["against_plain"] | {"wrong_labels": wrong}
        changed = dataclasses.replace(record, results={"against_plain": paired})
        assert said in outcome_of(changed).method

    def test_without_a_plain_head(self, record):
        changed = dataclasses.replace(record, results={"test_accuracy": 0.9})
        assert "90.0 % of 200 test images" in outcome_of(changed).sentence

    @pytest.mark.parametrize(
        "right, said, share, interval, method",
        [
            (
                {"estimated": 0.95, "low": 0.91, "high": 0.98},
                "gets about 95.0 % of 200 test images",
                "95.0 %",
                "91.0 to 98.0 %",
                "which nobody knows",
            ),
            (
                {"clean": 0.96},
                "gets 96.0 % of 200 test images",
                "96.0 %",
                "92.3 to 98.0 %",
                "known to be right",
            ),
        ],
    )
    def test_alone_by_right_labels(self, record, right, said, share, interval, method):
        results = {f"test_accuracy_{key}": value for key, value in right.items()}
        results |= {"test_accuracy": 0.9}
        found = outcome_of(dataclasses.replace(record, results=results))
        assert said in found.sentence
        note = f"95 %: {interval}; by the given labels 90.0 %"
        assert found.figures == [("Accuracy", share, note)]
        assert method in found.method

    @pytest.mark.parametrize("wrong", [None, 20, 0])
    def test_given_labels_stand_below_the_right_ones(self, record, wrong):
        by_right = {"rejection": [0.95, 0.9, 1.0], "plain": [0.85, 0.8, 0.9]}
        by_right |= {"difference": [0.1, 0.05, 0.15]}
        paired = record.results["against_plain"] | {"by_right_labels": by_right}
        paired |= {"wrong_labels": wrong}
        results = record.results | {"against_plain": paired}
        found = outcome_of(dataclasses.replace(record, results=results))
        name, share, note = found.figures[0]
        assert (name, share) == ("With rejection", "95.0 %")
        assert ("by the given labels 90.0 %" in note) == (wrong != 0)
        assert ("about" in found.sentence) == (wrong is None)

    def test_the_model_that_was_kept_is_judged_by_right_labels(self, record):
        results = {"unfrozen_kept": 1.0, "unfrozen_test_accuracy": 0.7}
        results |= {"unfrozen_test_accuracy_clean": 0.9, "test_accuracy": 0.7}
        found = outcome_of(dataclasses.replace(record, results=results))
        assert ("90.0 %", "the model that was kept") in [f[1:] for f in found.figures]

    def test_of_a_search_by_hand(self, record):
        results = {
            "chosen": {"test_accuracy": 0.9, "validation_accuracy": 0.7},
            "plain": {"test_accuracy": 0.8, "trial": "3"},
            "test_images": 200,
        }
        found = outcome_of(dataclasses.replace(record, samples=None, results=results))
        assert "90.0 % of 200 test images right, plain fine-tuning 80.0 %" in (
            found.sentence
        )
        notes = {name: note for name, _, note in found.figures}
        assert notes == {
            "Test, chosen": "95 %: 85.1 to 93.4",
            "Validation, chosen": "",
            "Test, plain": "95 %: 73.9 to 85.0",
        }
        assert "the best trial that accepts everything" in found.method

    def test_of_a_search_that_chose_nothing(self, record):
        results = {"chosen": None, "reason": "All 2 trials failed."}
        found = outcome_of(dataclasses.replace(record, samples=None, results=results))
        assert (found.sentence, found.figures) == ("All 2 trials failed.", [])

    def test_without_anything_to_judge_by(self, record):
        changed = dataclasses.replace(record, results={})
        assert "no test or validation split" in outcome_of(changed).sentence


class TestCharts:
    def test_places_by_hand(self):
        chart = charts.line_chart("Accuracy", [("one", "first", [0.0, 0.5, 1.0])])
        middle = (charts.LEFT + charts.WIDTH - charts.RIGHT) / 2
        assert chart.data["x"] == [charts.LEFT, middle, charts.WIDTH - charts.RIGHT]
        bottom = charts.HEIGHT - charts.BOTTOM
        heights = [bottom, (bottom + charts.TOP) / 2, charts.TOP]
        assert chart.data["y"] == [heights]
        assert chart.data["texts"] == [["0.0 %", "50.0 %", "100.0 %"]]
        assert "one from 0.0 % to 100.0 %" in chart.summary

    def test_a_gap_breaks_the_line(self):
        values = [1.0, math.nan, 2.0, math.inf, 3.0, 4.0]
        chart = charts.line_chart("A", [("one", "", values)], as_percent=False)
        assert chart.svg.count("<polyline") == 3
        assert chart.data["texts"][0][1] == "-"

    def test_nothing_to_draw(self):
        series = [("one", "", [math.nan]), ("other", "", [])]
        assert charts.line_chart("A", series, as_percent=False) is None

    @pytest.mark.parametrize(
        "values", [[0.5], [0.0] * 3, [1e-9, 2e-9], [-1.0, 1e6], [1.0] * 500]
    )
    def test_everything_is_inside_the_picture(self, values):
        chart = charts.line_chart("A", [("one", "", values)], as_percent=False)
        for height in chart.data["y"][0]:
            assert charts.TOP <= height <= charts.HEIGHT - charts.BOTTOM
        root = ElementTree.fromstring(chart.svg)
        ticks = [one.get("text-anchor") for one in root.iter("text")]
        assert 2 <= ticks.count("end") <= 9
        assert 1 <= ticks.count("middle") <= 9

    @pytest.mark.parametrize(
        "low, high, ticks",
        [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (3, 3, [3, 3.1, 3.2, 3.3])],
    )
    def test_round_ticks(self, low, high, ticks):
        assert charts.nice_ticks(low, high)[: len(ticks)] == pytest.approx(ticks)

    def test_a_histogram_by_hand(self):
        bins = ((0.1, 1.0, 30, 10), (1.0, 10.0, 0, 20))
        (one,) = charts.histograms([EpochLosses(4, 1.0, bins)])
        root = ElementTree.fromstring(one["svg"])
        heights = {
            name: [float(bar.get("height")) for bar in root.iter("rect")
                   if bar.get("class") == name]
            for name in ("accepted", "rejected")
        }  # fmt: skip
        room = charts.SMALL_HEIGHT - 22 - 14
        assert heights["accepted"] == pytest.approx([room * 0.75, 0], abs=0.01)
        assert heights["rejected"] == pytest.approx([room * 0.25, room * 0.5], abs=0.01)
        (threshold,) = (
            line for line in root.iter("line") if line.get("class") == "line threshold"
        )
        assert float(threshold.get("x1")) == charts.SMALL_WIDTH / 2
        words = [text.text for text in root.iter("text")]
        assert words == ["1.00", "0.1", "1", "10"]
        assert "30 accepted, 30 rejected; threshold 1" in root.get("aria-label")

    def test_few_epochs_are_shown_with_the_first_and_the_last(self):
        losses = [EpochLosses(e, None, ((0.1, 1.0, 1, 0),)) for e in range(1, 41)]
        shown = [one["of"].epoch for one in charts.histograms(losses)]
        assert (len(shown), shown[0], shown[-1]) == (6, 1, 40)
        assert charts.histograms([]) == []


class TestRecord:
    def test_names_come_back_as_they_were(self, hostile):
        assert hostile.samples.ids[: len(HOSTILE_IDS)] == list(HOSTILE_IDS)
        assert all(hostile.thumbnail(name) for name in HOSTILE_IDS)
        assert hostile.class_names == HOSTILE_CLASSES

    def test_no_cell_of_the_ledger_begins_like_a_formula(self, hostile):
        text = (hostile.folder / "ledger.csv").read_text(encoding="utf-8")
        assert "'=HYPERLINK" in text
        assert not re.search(r'(^|[,\n"])[=+@]', text)

    @pytest.mark.parametrize("text", ["=1", "+a", "-a", "@a", "\ta", "\ra", "'a", "''"])
    def test_a_guard_is_taken_away_again(self, text):
        assert guarded_cell(text) == f"'{text}"
        assert plain_cell(guarded_cell(text)) == text

    @pytest.mark.parametrize("text", ["", "a", "a=b", "'", "1"])
    def test_what_needs_no_guard_has_none(self, text):
        assert plain_cell(guarded_cell(text)) == text

    def test_a_folder_of_something_else(self, tmp_path):
        with pytest.raises(InvalidArgument, match="Expected a run folder"):
            read_run(tmp_path)

    def test_a_damaged_file(self, tmp_path):
        folder = made_run(tmp_path / "run")
        (folder / "classes.json").write_text('["other"]')
        with pytest.raises(DataError, match=r"ledger\.csv cannot be read.*again"):
            read_run(folder)

    def test_a_folder_of_before_has_fewer_sections(self, tmp_path):
        folder = made_run(tmp_path / "run")
        for name in ("loss_histograms.csv", "near_duplicates.csv", "thumbnails.csv"):
            (folder / name).unlink()
        page = render_page(read_run(folder))
        assert 'id="losses"' not in page
        assert 'id="gallery"' in page


class TestGallery:
    def test_most_suspicious_first(self, record):
        suspicion = gallery_data(record, served=False)["samples"]["suspicion"]
        assert suspicion == sorted(suspicion, reverse=True)
        assert len(suspicion) == 40

    def test_the_room_for_pictures_is_kept(self, record):
        one = len(gallery_data(record, served=False)["samples"]["picture"][0])
        data = gallery_data(record, served=False, max_bytes=6 * one)
        pictures = data["samples"]["picture"]
        assert 0 < len(pictures) < 40
        assert sum(map(len, pictures)) <= 6 * one
        assert data["total"] == 40
        assert all(row < len(pictures) for pair in data["pairs"] for row in pair[:2])

    def test_served_lists_all_and_embeds_nothing(self, record):
        data = gallery_data(record, served=True)
        assert len(data["samples"]["id"]) == 40
        for name, row in zip(
            data["samples"]["id"], data["samples"]["picture"], strict=True
        ):
            assert record.samples.ids[int(row)] == name

    def test_confusion_by_hand(self, record):
        samples = dataclasses.replace(
            record.samples,
            given=np.array([0, 0, 0, 1, 2]),
            predicted=np.array([0, 1, 1, 1, -1]),
        )
        confusion = confusion_of(samples, 3)
        assert confusion["counts"] == [[1, 2, 0], [0, 1, 0], [0, 0, 0]]
        assert confusion["pairs"] == [(0, 1, 2)]
        assert confusion["strengths"][1] == [0, 9, 0]
        assert confusion_of(samples, 3, max_classes=2)["counts"] == []


class TestPictures:
    """Larger pictures of the most suspicious, within the room of the page."""

    @pytest.fixture
    def with_previews(self, tmp_path):
        folder = made_run(tmp_path / "run")
        ids = read_run(folder).ledger.ids
        suspects = gallery_data(read_run(folder), served=False)["samples"]["id"][:10]
        content = {name: f"large {name} ".encode() * 200 for name in suspects}
        (folder / "previews.bin").write_bytes(b"".join(content.values()))
        starts = np.cumsum([0, *map(len, content.values())])
        rows = [(n, s, len(content[n])) for n, s in zip(content, starts, strict=False)]
        write_csv(folder / "previews.csv", ("id", "offset", "bytes"), rows)
        return read_run(folder), ids, content

    def test_those_that_have_one_show_it(self, with_previews):
        record, _, content = with_previews
        samples = gallery_data(record, served=False)["samples"]
        for name, picture in zip(samples["id"], samples["picture"], strict=True):
            expected = content.get(name) or record.thumbnail(name)
            assert base64.b64decode(picture) == expected

    def test_they_take_half_of_the_room(self, with_previews):
        record, _, content = with_previews
        one = len(base64.b64encode(next(iter(content.values()))))
        data = gallery_data(record, served=False, max_bytes=8 * one)
        pictures = map(base64.b64decode, data["samples"]["picture"])
        large = sum(picture.startswith(b"large") for picture in pictures)
        assert 4 <= large <= 5
        assert len(data["samples"]["id"]) > 10

    def test_examples_are_the_least_suspicious_of_their_class(self, record):
        ledger, found = record.ledger, gallery_data(record, served=False)["examples"]
        for label, examples in found.items():
            rows = [ledger.ids.index(name) for name, _ in examples]
            assert {int(ledger.given[row]) for row in rows} == {label}
            assert {int(ledger.predicted[row]) for row in rows} == {label}
            others = np.flatnonzero(
                (ledger.given == label) & (ledger.predicted == label)
            )
            assert len(rows) == min(3, len(others))
            largest = max(ledger.suspicion[rows])
            left = set(others.tolist()) - set(rows)
            assert all(ledger.suspicion[row] >= largest for row in left)
            for (name, content), row in zip(examples, rows, strict=True):
                assert base64.b64decode(content) == record.thumbnail(ledger.ids[row])
                assert name == ledger.ids[row]
        served = gallery_data(record, served=True)["examples"]
        assert [ledger.ids[int(c)] for _, c in served[0]] == [n for n, _ in served[0]]

    def test_without_room_there_are_none(self, record):
        assert gallery_data(record, served=False, max_bytes=2000)["examples"] == {}


class TestNextCommand:
    """What trains on the corrections: whole, quoted, nothing of its own output."""

    def command_of(self, record, **config):
        return next_command(dataclasses.replace(record, config=config))

    @pytest.mark.parametrize(
        "command, expected",
        [
            ("keras-rsft fit photos/ --epochs 3", "photos/ --epochs 3"),
            ("keras-rsft fit 'my photos' --json --quiet", "'my photos'"),
            ("keras-rsft fit p --output=x --seed 3 --set before=y", "p --seed 3"),
            ("keras-rsft fit p --set=before=y --set=a=b", "p --set a=b"),
            (
                "keras-rsft fit p --output x --corrections a.csv",
                "p --corrections a.csv",
            ),
            ("keras-rsft audit p --text-column t --output x", "p --text-column t"),
            ("keras-rsft fit 'a; rm -rf b' '$(c)'", "'a; rm -rf b' '$(c)'"),
            ("keras-rsft fit p --output", "p"),
        ],
    )
    def test_of_a_command(self, record, command, expected):
        found = self.command_of(record, command=command)
        end = "--corrections ~/Downloads/corrections.csv"
        assert found == f"keras-rsft fit {expected} {end}"

    def test_a_run_with_a_place_of_its_own_is_named(self, tmp_path):
        folder = made_run(tmp_path / "a run")
        record = read_run(folder)
        (folder / "predictions.csv").touch()
        found = self.command_of(record, command="keras-rsft fit p --output x")
        assert f"fit p --set 'before={folder}' --corrections" in found
        assert "before" not in self.command_of(record, command="keras-rsft fit p")

    def test_of_a_run_from_python(self, record):
        found = self.command_of(
            record, command=None, data="my photos", backbone="resnet50", epochs=30,
            policy={"name": "auto"}, seed=0, batch_size=None,
        )  # fmt: skip
        assert found.startswith(
            "keras-rsft fit 'my photos' --backbone=resnet50 --epochs=30 --policy=auto "
        )

    @pytest.mark.parametrize("command", [None, "keras-rsft fit 'open", 7])
    def test_nothing_to_go_by(self, record, command):
        assert self.command_of(record, command=command) is None


class TestPage:
    def test_the_comparison_with_the_run_before(self, record):
        sentence = "Before the review 83.1 %, after it 86.0 % <+2.9>."
        results = record.results | {"against_before": {"sentence": sentence}}
        page = render_page(dataclasses.replace(record, results=results))
        assert "after it 86.0 % &lt;+2.9&gt;." in page
        assert 'id="against-before"' not in render_page(record)

    def test_labels_of_which_nothing_is_known(self, record):
        results = {k: v for k, v in record.results.items() if k != "label_quality"}
        samples = dataclasses.replace(
            record.ledger, looks_wrong=np.zeros(40, bool),
            right_probability=np.full(40, np.nan),
        )  # fmt: skip
        page = render_page(
            dataclasses.replace(record, results=results, samples=samples)
        )
        assert ">Review the labels</button>" in page
        assert "that look wrong</button>" not in page
        assert 'id="labels-found"' not in page

    def test_it_is_written_beside_and_replaced(self, run_folder, tmp_path):
        path = write_report(run_folder, path=tmp_path / "page.html")
        first = path.read_bytes()
        assert write_report(str(run_folder), path=path).read_bytes() == first
        assert [one.name for one in tmp_path.iterdir()] == ["page.html"]

    def test_the_default_place_is_the_runs_folder(self, tmp_path):
        folder = made_run(tmp_path / "run")
        assert keras_rsft.write_report(folder) == folder / "report.html"

    def test_a_file_of_the_users_is_left_alone(self, run_folder, tmp_path):
        mine = tmp_path / "mine.html"
        mine.write_text("<!doctype html>mine")
        with pytest.raises(InvalidArgument, match="not a report"):
            write_report(run_folder, path=mine)
        assert mine.read_text() == "<!doctype html>mine"
        with pytest.raises(InvalidArgument, match="not a report"):
            write_report(run_folder, path=tmp_path)

    def test_a_run_that_was_not_written(self):
        class Unwritten:
            folder = None

        with pytest.raises(InvalidArgument, match="not written"):
            write_report(Unwritten())

    def test_hostile_text_is_escaped(self, hostile):
        page = render_page(hostile)
        for text in ("<script>document", "<img src=x", "<b>photos", "<b>run"):
            assert text not in page
        assert page.count("</script>") == page.count("<script")
        assert "{{ 7 * 7 }}" in page

    def test_json_cannot_end_its_script(self):
        text = "</script><!--&"
        written = script_json([text])
        assert not set("<>&") & set(written)
        assert json.loads(written) == [text]

    def test_the_page_may_load_nothing(self, record):
        policy = re.search(r'Policy" content="([^"]*)"', render_page(record))[1]
        assert "default-src &#39;none&#39;" in policy
        assert "unsafe" not in policy
        assert "connect-src" not in policy

    def test_the_page_of_a_search(self, tmp_path):
        (tmp_path / "search.json").write_text('{"settings": {"epochs": 2}}')
        (tmp_path / "classes.json").write_text('["a", "b"]')
        for name in ("heatmap.svg", "parallel_coordinates.svg"):
            (tmp_path / name).write_text("<svg></svg>")
        (tmp_path / "trials.csv").write_text("trial,status\n<b>0</b>,COMPLETED\n")
        results = {
            "reason": "Trial 0 is best.",
            "chosen": {"test_accuracy": 0.9},
            "plain": {"test_accuracy": 0.8},
            "trials": 1,
            "test_images": 10,
            "versions": {"keras": "3.x"},
            "settings": {"policy": {"name": "keep-fraction"}, "learning_rate": 0.01},
        }
        (tmp_path / "results.json").write_text(json.dumps(results))
        page = write_report(tmp_path).read_text(encoding="utf-8")
        assert "Trial 0 is best. Its policy is keep-fraction" in page
        assert "3.x" in page
        assert page.count("data:image/svg+xml;base64,") == 2
        assert "<b>0</b>" not in page
        assert 'id="gallery"' not in page

    def test_the_page_of_a_search_that_failed(self, tmp_path):
        """It has no model, and the table says what became of each trial."""
        (tmp_path / "search.json").write_text('{"data": [{}, ["a", "b"], ""]}')
        (tmp_path / "trials.csv").write_text("trial,status,message\n0,FAILED,NaN\n")
        results = {"chosen": None, "reason": "All 1 trials failed."}
        (tmp_path / "results.json").write_text(json.dumps(results))
        page = write_report(tmp_path).read_text(encoding="utf-8")
        assert page.count("All 1 trials failed.") == 1
        assert "<td>FAILED</td>" in page

    def test_tensorflow_is_not_needed(self, run_folder, tmp_path):
        program = (
            "import sys; from keras_rsft import write_report; "
            f"write_report({str(run_folder)!r}, path={str(tmp_path / 'r.html')!r}); "
            "assert not {'tensorflow', 'keras'} & set(sys.modules)"
        )
        subprocess.run([sys.executable, "-c", program], check=True)
