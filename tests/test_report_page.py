"""The page in a real browser: review, keys, undo, storage, the file that comes out."""

from __future__ import annotations

import csv
import json
import threading

import numpy as np
import pytest
from made_run import HOSTILE_CLASSES, HOSTILE_IDS, made_run, write_features

from keras_rsft._storage import plain_cell
from keras_rsft.report import _page as gallery
from keras_rsft.report._page import write_report
from keras_rsft.report._record import read_run
from keras_rsft.report._server import ReviewServer

pytestmark = pytest.mark.usefixtures("eager")

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright")


@pytest.fixture
def open_page(browser):
    """Opens a file; fails if the page logs anything or asks for anything else."""
    contexts, complaints = [], []

    def go(place, context=None, **options):
        url = place if isinstance(place, str) else place.as_uri()
        if context is None:
            context = browser.new_context(accept_downloads=True, **options)
            contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: note(request.url, url))
        page.goto(url)
        page.wait_for_selector("#grid .card")
        return page

    def note(asked, url):
        if not asked.startswith(("data:", "blob:", url)):
            complaints.append(asked)

    yield go
    for context in contexts:
        context.close()
    assert complaints == []


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(made_run(tmp_path_factory.mktemp("page") / "run", count=130))


@pytest.fixture(scope="module")
def hostile_report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page") / "run"
    made_run(folder, classes=HOSTILE_CLASSES, ids=HOSTILE_IDS, count=10)
    return write_report(folder)


@pytest.fixture(scope="module")
def many_classes_report(tmp_path_factory):
    names = tuple(f"breed {number:03}" for number in range(40))
    folder = tmp_path_factory.mktemp("page") / "run"
    return write_report(made_run(folder, classes=names, count=80))


def download(page):
    with page.expect_download() as found:
        page.click("#download")
    assert found.value.suggested_filename == "corrections.csv"
    return found.value.path()


def downloaded(page) -> list[dict[str, str]]:
    with open(download(page), newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def text_of(page, name: str) -> str:
    return page.text_content(f"#review-{name}")


class TestReview:
    def test_by_keys_alone_as_far_as_the_file(self, open_page, report):
        page = open_page(report)
        page.focus("#start-review")
        page.keyboard.press("Enter")
        ids, given, decisions = [], [], ["k", "d", "1", "Enter"]
        for key in decisions:
            ids.append(text_of(page, "id"))
            given.append(text_of(page, "given"))
            page.keyboard.press(key)
        page.keyboard.press("Escape")
        assert page.locator("dialog[open]").count() == 0
        rows = downloaded(page)
        assert list(rows[0]) == ["id", "given_label", "decision", "new_label"]
        assert [row["id"] for row in rows] == ids
        assert [row["given_label"] for row in rows] == given
        assert [row["decision"] for row in rows[:2]] == ["keep", "drop"]
        for row, wanted in zip(rows[2:], ("cat", None), strict=True):
            if row["decision"] == "relabel":
                assert row["new_label"] not in ("", row["given_label"])
                assert wanted in (None, row["new_label"])
            else:  # The label that it has is no other label.
                assert (row["decision"], row["new_label"]) == ("keep", "")

    def test_enter_takes_the_prediction(self, open_page, report):
        page = open_page(report)
        page.select_option("[name=kind]", "differ")
        page.click("#start-review")
        predicted = text_of(page, "predicted").split(",")[0]
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        (row,) = downloaded(page)
        assert (row["decision"], row["new_label"]) == ("relabel", predicted)

    def test_undo_takes_back_one_after_the_other(self, open_page, report):
        page = open_page(report)
        page.click("#start-review")
        first = text_of(page, "id")
        page.keyboard.press("k")
        page.keyboard.press("d")
        assert "2 decided" in text_of(page, "place")
        page.keyboard.press("u")
        page.keyboard.press("u")
        assert text_of(page, "id") == first
        assert text_of(page, "decision") == "none yet"
        page.keyboard.press("u")
        assert "Nothing to undo" in page.text_content("#said")
        page.keyboard.press("d")  # And a changed mind goes back to what was before.
        page.keyboard.press("ArrowLeft")
        page.keyboard.press("k")
        page.keyboard.press("u")
        assert text_of(page, "decision") == "drop"

    def test_what_was_decided_is_still_there_later(self, open_page, report):
        page = open_page(report)
        page.click("#grid li:nth-child(2) .card")
        page.keyboard.press("d")
        page.reload()
        page.wait_for_selector("#grid .card")
        card = page.locator("#grid li:nth-child(2) .card")
        assert card.get_attribute("data-decision") == "drop"
        assert "1 of 130 decided" in page.text_content("#progress-text")
        page.click("#start-review")  # Begins with what is undecided.
        assert text_of(page, "place").startswith("1 of 130")

    def test_another_run_has_its_own_progress(self, open_page, report, hostile_report):
        page = open_page(report)
        page.click("#start-review")
        page.keyboard.press("k")
        other = open_page(hostile_report, page.context)
        assert "0 of 10 decided" in other.text_content("#progress-text")
        assert other.is_disabled("#download")

    def test_damaged_storage_is_left_aside(self, open_page, report):
        page = open_page(report)
        key = f"keras-rsft-review:{read_run(report.parent).identity}"
        for damaged in ("{", "null", '{"000001.png": {"decision": "relabel"}}', "[3]"):
            page.evaluate("pair => localStorage.setItem(...pair)", [key, damaged])
            page.reload()
            page.wait_for_selector("#grid .card")
            assert "0 of 130 decided" in page.text_content("#progress-text")

    def test_the_last_image_says_so(self, open_page, report):
        page = open_page(report)
        page.fill("[name=find]", "000007")
        page.click("#grid .card")
        page.keyboard.press("k")
        assert "last image" in page.text_content("#said")
        page.keyboard.press("ArrowRight")
        assert text_of(page, "place").startswith("1 of 1")

    def test_many_classes_are_found_by_typing(self, open_page, many_classes_report):
        page = open_page(many_classes_report)
        page.click("#start-review")
        page.keyboard.press("/")
        page.keyboard.type("ed 03")
        assert page.locator("#class-buttons button").count() == 10
        page.keyboard.type("7")
        page.keyboard.press("Enter")
        assert "breed 037" in page.text_content("#said")
        page.keyboard.press("k")  # Out of the field again: keys are keys.
        assert "2 decided" in text_of(page, "place")
        page.keyboard.press("Escape")
        assert downloaded(page)[0]["new_label"] == "breed 037"

    def test_every_decision_is_announced(self, open_page, report):
        page = open_page(report)
        page.click("#start-review")
        said = page.locator("#said")
        assert said.get_attribute("aria-live") == "polite"
        name = text_of(page, "id")
        page.click("#drop")
        assert said.text_content() == f"{name}: drop."


class TestWrongOnes:
    """The button of the page: the labels that look wrong, most suspicious first."""

    def test_the_button_reviews_them_and_says_how_many_are_left(
        self, open_page, report
    ):
        page = open_page(report)
        ledger = read_run(report.parent).ledger
        wrong = np.flatnonzero(ledger.looks_wrong)
        button = page.locator("#review-wrong")
        assert button.text_content() == (
            f"Review the {len(wrong)} labels that look wrong"
        )
        assert f"{len(wrong)} of 130 look wrong" in page.text_content("#labels-found")
        button.click()
        order = wrong[np.argsort(-ledger.suspicion[wrong], kind="stable")]
        for row in order[:3].tolist():
            assert text_of(page, "id") == ledger.ids[row]
            page.keyboard.press("d")
        left = f"{len(wrong) - 3} left, 3 decided"
        assert left in text_of(page, "place")
        page.keyboard.press("Escape")
        assert button.text_content() == (
            f"Review the {len(wrong) - 3} labels left that look wrong"
        )
        button.click()
        assert text_of(page, "id") == ledger.ids[order[3]]

    def test_examples_stand_beside_the_photo(self, open_page, report):
        page = open_page(report)
        ledger = read_run(report.parent).ledger
        page.click("#review-wrong")
        row = ledger.ids.index(text_of(page, "id"))
        figures = page.locator("#examples figure")
        assert figures.count() == (
            1 if ledger.given[row] == ledger.predicted[row] else 2
        )
        agreed = np.flatnonzero(
            (ledger.given == ledger.given[row])
            & (ledger.predicted == ledger.given[row])
        )
        least = agreed[np.argsort(ledger.suspicion[agreed], kind="stable")][:3]
        shown = figures.first.locator("img")
        names = [one.get_attribute("title") for one in shown.all()]
        assert names == [ledger.ids[at] for at in least]
        assert all(
            shown.nth(at).evaluate("i => i.naturalWidth") == 16 for at in range(3)
        )

    def test_the_next_command_comes_after_the_download(self, open_page, report):
        page = open_page(report)
        page.click("#review-wrong")
        assert page.is_disabled("#review-download")
        page.keyboard.press("k")
        with page.expect_download():
            page.click("#review-download")
        assert page.locator("dialog[open]").count() == 0
        assert page.is_visible("#next")
        assert page.evaluate("document.activeElement.id") == "next"
        assert page.text_content("#next-command") == (
            "keras-rsft fit '<b>photos</b>' --epochs 3 "
            "--corrections ~/Downloads/corrections.csv"
        )


class TestMany:
    """Many samples decided on in one step."""

    def test_a_range_and_all_shown(self, open_page, report):
        page = open_page(report)
        boxes = page.locator("#grid .select")
        boxes.nth(2).click()
        boxes.nth(6).click(modifiers=["Shift"])
        count = page.locator("#selected-count")
        assert count.text_content() == "5 selected"
        boxes.nth(4).click()
        assert count.text_content() == "4 selected"
        page.locator("#grid .card").nth(9).click(modifiers=["Control"])
        assert count.text_content() == "5 selected"
        assert page.locator("dialog[open]").count() == 0
        page.click("[data-many=drop]")
        assert count.text_content() == "5 decided."
        assert page.locator("#grid .selected").count() == 0
        dropped = page.locator("#grid .card[data-decision=drop]")
        assert dropped.count() == 5
        page.click("#select-shown")
        assert count.text_content() == "60 selected"
        page.select_option("#many-label", label="owl")
        assert page.input_value("#many-label") == ""
        rows = downloaded(page)
        assert len(rows) == 60
        assert all("owl" in (row["given_label"], row["new_label"]) for row in rows)
        page.click("#many-undo")  # All 60 in one step.
        assert dropped.count() == 5
        page.click("#many-undo")
        assert "0 of 130 decided" in page.text_content("#progress-text")
        page.click("#many-undo")
        assert count.text_content() == "Nothing to undo."

    def test_a_selection_lives_through_pages(self, open_page, report):
        page = open_page(report)
        assert page.is_disabled("[data-many=keep]")
        page.locator("#grid .select").first.focus()
        page.keyboard.press("Space")
        page.click("#next-page")
        page.locator("#grid .select").nth(1).click()
        page.click("[data-many=prediction]")
        ledger = read_run(report.parent).ledger
        for row in downloaded(page):
            at = ledger.ids.index(row["id"])
            label = ("cat", "dog", "owl")[ledger.predicted[at]]
            assert label == (row["new_label"] or row["given_label"])
        page.click("#select-shown")
        page.click("#select-none")
        assert page.is_disabled("[data-many=keep]")


class TestLive:
    """The rest is sorted anew after ten decisions, on a page that is served."""

    @pytest.fixture
    def served(self, tmp_path):
        folder = made_run(tmp_path / "run", count=90)
        right = write_features(folder, tmp_path / "cache")
        with ReviewServer(read_run(folder)) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.05,))
            thread.start()
            yield server, right
            server.shutdown()
            thread.join()

    def test_what_is_wrong_comes_first_after_ten_decisions(self, open_page, served):
        server, right = served
        ledger = server.record.ledger
        page = open_page(server.url)
        note = page.locator("dialog .live-note")
        page.click("#review-wrong")
        assert "of the labels that nobody has looked at" in note.text_content()
        seen = []
        for _ in range(10):
            seen.append(ledger.ids.index(text_of(page, "id")))
            page.keyboard.press("123"[right[seen[-1]]])
        current = text_of(page, "id")
        playwright.expect(note).to_contain_text("Sorted anew after 10", timeout=60_000)
        assert text_of(page, "id") == current  # What one looks at stays.
        wrong = set(np.flatnonzero(ledger.given != right).tolist())
        wrong -= {*seen, ledger.ids.index(current)}
        for _ in range(len(wrong)):
            page.keyboard.press("ArrowRight")
            row = ledger.ids.index(text_of(page, "id"))
            assert row in wrong
            proposed = text_of(page, "predicted").partition(",")[0]
            assert proposed == ("cat", "dog", "owl")[right[row]]
            wrong.remove(row)
        page.keyboard.press("ArrowRight")
        assert "last image" in page.text_content("#said")

    def test_cards_stay_until_others_are_shown(self, open_page, served):
        server, _ = served
        page = open_page(server.url)
        names = page.locator("#grid .name").all_text_contents()
        for at in range(10):
            page.locator("#grid .select").nth(at).click()
        page.click("[data-many=keep]")
        note = page.locator("#gallery .live-note")
        playwright.expect(note).to_contain_text("Sorted anew after 10", timeout=60_000)
        assert page.locator("#grid .name").all_text_contents() == names
        page.select_option("[name=kind]", "undecided")
        later = page.locator("#grid .name").all_text_contents()
        assert not set(later) & set(names[:10])
        assert later != [name for name in names if name in set(later)]


class TestGallery:
    def test_filters_and_pages(self, open_page, report):
        page = open_page(report)
        assert page.locator("#grid .card").count() == 60
        page.click("#next-page")
        page.click("#next-page")
        assert page.locator("#grid .card").count() == 10
        assert page.is_disabled("#next-page")
        page.select_option("[name=given]", label="dog")
        labels = page.locator("#grid .label bdi:not(.predicted)").all_text_contents()
        assert set(labels) == {"dog"}
        assert page.text_content("#page-text").startswith("Page 1")
        page.fill("[name=find]", "nothing like it")
        assert "No image matches" in page.text_content("#shown")
        page.click("[type=reset]")
        playwright.expect(page.locator("#grid .card")).to_have_count(60)

    def test_held_out_samples_are_shown_and_found_by_split(self, open_page, tmp_path):
        folder = made_run(tmp_path / "run", count=12)
        with (folder / "ledger.csv").open(newline="", encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        # Those that were not trained on have neither losses nor decisions.
        for row in rows[:5]:
            row[1], row[6:12] = "test", ["", "", "", "0", "0", "0"]
        with (folder / "ledger.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *rows])
        page = open_page(write_report(folder))
        assert page.locator("#grid .card").count() == 12
        page.select_option("[name=split]", "test")
        playwright.expect(page.locator("#grid .card")).to_have_count(5)
        assert set(page.locator("#grid .facts").all_text_contents()) == {"test split"}
        page.click("#grid li:first-child .card")
        assert page.text_content("#review-split") == "test"
        assert page.is_hidden("#review-rejected-row")
        page.keyboard.press("Escape")
        page.select_option("[name=split]", "train")
        page.click("#grid li:first-child .card")
        assert page.is_visible("#review-rejected-row")
        assert page.text_content("#review-rejected").endswith(" of 3 times")

    def test_order_by_id(self, open_page, report):
        page = open_page(report)
        page.select_option("[name=order]", "id")
        names = page.locator("#grid .name").all_text_contents()
        assert names == [f"{number:06}.png" for number in range(60)]

    def test_a_cell_of_the_table_shows_its_images(self, open_page, report):
        page = open_page(report)
        cell = page.locator(".confusion button[data-given='0'][data-predicted='2']")
        count = int(cell.text_content())
        cell.click()
        playwright.expect(page.locator("#grid .card")).to_have_count(count)
        predicted = page.locator("#grid .label .predicted").all_text_contents()
        assert predicted == ["owl"] * count

    def test_near_duplicates_stand_side_by_side(self, open_page, report):
        page = open_page(report)
        pair = page.locator("#duplicate-list li").first
        assert pair.locator(".card").count() == 2
        one, other = pair.locator(".label bdi:not(.predicted)").all_text_contents()
        assert one != other

    def test_closing_the_review_goes_back_to_the_image(self, open_page, report):
        page = open_page(report)
        page.focus("#grid li:nth-child(3) .card")
        page.keyboard.press("Enter")
        page.keyboard.press("Escape")
        row = page.evaluate("document.activeElement.dataset.row")
        assert row == page.locator("#grid .card").nth(2).get_attribute("data-row")


def test_the_server_shows_what_the_file_left_out(
    open_page, report, monkeypatch, tmp_path
):
    monkeypatch.setattr(gallery, "MAX_EMBEDDED", 20)
    few = write_report(report.parent, path=tmp_path / "few.html")
    page = open_page(few)
    left_out = page.text_content("#gallery .lead")
    shown = page.locator("#grid .card").count()
    assert 20 <= shown <= 22  # And the near duplicates.
    assert f"{130 - shown} are left out" in left_out
    with ReviewServer(read_run(report.parent)) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            page = open_page(server.url)
            assert "of 130 images" in page.text_content("#shown")
            page.click("#start-review")
            page.keyboard.press("k")
            size = "image => image.decode().then(() => image.naturalWidth)"
            assert page.locator("#review-picture").evaluate(size) == 16
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
def test_from_wrong_labels_to_a_better_model(
    open_page, photo_folder, tiny_base_file, tmp_path
):
    from keras_rsft.config import FeatureConfig, TrainConfig
    from keras_rsft.data._labels import add_label_noise, read_corrections
    from keras_rsft.data._sources import load_images
    from keras_rsft.training._run import finetune

    noisy = add_label_noise(load_images(str(photo_folder)), "symmetric:0.4", seed=2)

    def fit(name, **options):
        return finetune(
            noisy,
            features=FeatureConfig(str(tiny_base_file), cache_dir=tmp_path / "cache"),
            settings=TrainConfig(epochs=12, batch_size=8, learning_rate=0.02),
            output=tmp_path / name,
            progress=False,
            **options,
        )

    run = fit("run")
    page = open_page(write_report(run))
    names, splits = noisy.class_names, (noisy.train, noisy.validation, noisy.test)
    right = {
        sample_id: names.index(sample_id.partition("/")[0])
        for split in splits
        for sample_id in split.ids.tolist()
    }
    page.click("#start-review")
    for _ in right:  # A person who sees what is on each image.
        page.keyboard.press(str(1 + right[text_of(page, "id")]))
    page.keyboard.press("Escape")
    file = download(page)
    decided = {row.id: row for _, row in read_corrections(file)}
    assert decided.keys() == right.keys()
    for split in splits:
        for sample_id, label in zip(split.ids, split.labels, strict=True):
            row = decided[sample_id]
            assert row.given_label == names[label]
            assert (row.new_label or row.given_label) == names[right[sample_id]]

    again = fit("again", corrections=file)
    mended = again.features.train
    assert np.array_equal(mended.labels, mended.clean_labels)
    assert again.results["test_accuracy"] > run.results["test_accuracy"]


class TestHostileNames:
    def test_they_are_text(self, open_page, hostile_report):
        page = open_page(hostile_report)
        title = page.title()
        names = set(page.locator("#grid .name").all_text_contents())
        assert names == {one.replace("\u202e", r"\u202e") for one in HOSTILE_IDS}
        page.click("#start-review")
        for _ in HOSTILE_IDS:
            page.keyboard.press("ArrowRight")
        assert page.title() == title
        assert page.locator("#grid .name bdi[dir=ltr]").count() == len(HOSTILE_IDS)
        assert page.get_attribute("#review-id", "dir") == "ltr"
        assert page.locator("main script, dialog script, main iframe").count() == 3
        width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert width <= 0  # Long names do not push the page aside.

    def test_the_file_gives_them_back_and_no_cell_is_a_formula(
        self, open_page, hostile_report
    ):
        page = open_page(hostile_report)
        page.click("#start-review")
        for place in range(len(HOSTILE_IDS)):
            page.keyboard.press(str(1 + place % len(HOSTILE_CLASSES)))
        page.keyboard.press("Escape")
        rows = downloaded(page)
        assert {plain_cell(row["id"]) for row in rows} == set(HOSTILE_IDS)
        for row in rows:
            assert all(not cell.startswith(("=", "-")) for cell in row.values())
            assert plain_cell(row["given_label"]) in HOSTILE_CLASSES
            if row["decision"] == "relabel":
                assert plain_cell(row["new_label"]) in HOSTILE_CLASSES


class TestCharts:
    def test_values_are_read_by_keys_and_spoken(self, open_page, report):
        page = open_page(report)
        chart = page.locator("[data-chart]").first
        chart.locator("svg[role=img]").focus()
        page.keyboard.press("End")
        assert chart.locator("[data-epoch]").text_content() == "at epoch 3"
        assert "80.0 %" in chart.locator("[data-spoken]").text_content()
        page.keyboard.press("ArrowLeft")
        assert "Epoch 2" in chart.locator("[data-spoken]").text_content()

    def test_the_command_is_copied_as_it_is(self, browser, tmp_path):
        folder = made_run(tmp_path / "run")
        command = "keras-rsft fit 'my  photos' --epochs 3 --output <b>"
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"command": command}))
        allowed = ["clipboard-read", "clipboard-write"]
        page = browser.new_page(permissions=allowed)
        page.goto(write_report(folder).as_uri())
        page.click("[data-copy=command]")
        page.wait_for_selector("[data-copy]:text('Copied')")
        assert page.evaluate("navigator.clipboard.readText()") == command
        page.close()

    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_it_follows_light_and_dark(self, open_page, report, scheme):
        page = open_page(report, color_scheme=scheme)
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (colour == "rgb(255, 255, 255)") == (scheme == "light")

    def test_without_scripts_the_numbers_are_there(self, browser, report):
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        page.goto(report.as_uri())
        assert "10.0 points better" in page.text_content("h1")
        assert page.locator("polyline").count() > 0
        context.close()

    def test_it_prints_in_the_colours_of_paper(self, browser, report):
        page = browser.new_page(color_scheme="dark")
        page.goto(report.as_uri())
        page.emulate_media(media="print", color_scheme="dark")
        colour = "getComputedStyle(document.querySelector('.bin rect.accepted')).fill"
        assert page.evaluate(colour) == "rgb(63, 111, 216)"
        assert page.is_visible("h1")
        assert not page.is_visible("#filters")
        assert page.pdf().startswith(b"%PDF")
        page.close()
