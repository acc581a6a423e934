"""The review in two tabs, and the port at which its decisions are found again."""

from __future__ import annotations

import json

import pytest
from made_run import made_run

from keras_rsft.cli import main
from keras_rsft.report._page import write_report
from keras_rsft.report._record import read_run
from keras_rsft.report._server import ReviewServer, own_port

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    return write_report(made_run(tmp_path_factory.mktemp("page") / "run"))


@pytest.fixture
def tabs(browser, report):
    """Two tabs of one browser, with one sample open in the second."""
    context = browser.new_context()
    complaints = []
    pages = [context.new_page() for _ in range(2)]
    for page in pages:
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(report.as_uri())
        page.wait_for_selector("#grid .card")
    yield pages
    context.close()
    assert complaints == []


def decide(page, place, key):
    """Opens a sample by its place in the grid, presses a key and closes it again."""
    page.click(f"#grid li:nth-child({place}) .card")
    page.keyboard.press(key)
    page.keyboard.press("Escape")


def wait_for(page, place, decision):
    page.wait_for_selector(
        f'#grid li:nth-child({place}) .card[data-decision="{decision}"]'
    )


class TestTwoTabs:
    def test_both_show_and_keep_what_either_decides(self, tabs):
        one, other = tabs
        decide(one, 1, "d")
        decide(one, 2, "d")
        wait_for(other, 2, "drop")
        decide(other, 3, "k")
        wait_for(one, 3, "keep")
        for page in tabs:
            assert "3 of 40 decided" in page.text_content("#progress-text")
            page.reload()
            page.wait_for_selector("#grid .card")
            assert "3 of 40 decided" in page.text_content("#progress-text")

    def test_what_is_stored_unseen_stays(self, tabs, report):
        """As where another tab's message comes after this tab's own decision."""
        page, _ = tabs
        key = f"keras-rsft-review:{read_run(report.parent).identity}"
        unseen = page.get_attribute("#grid li:nth-child(1) .card", "title")
        stored = json.dumps({unseen: {"decision": "drop", "given": 0}})
        page.evaluate("pair => localStorage.setItem(...pair)", [key, stored])
        decide(page, 2, "k")
        wait_for(page, 1, "drop")
        page.reload()
        wait_for(page, 1, "drop")
        wait_for(page, 2, "keep")

    def test_the_open_sample_is_shown_anew(self, tabs):
        one, other = tabs
        other.click("#grid li:nth-child(1) .card")
        decide(one, 1, "d")
        other.wait_for_selector("#review-decision:text-is('drop')")
        assert "1 decided" in other.text_content("#review-place")

    def test_each_takes_back_its_own(self, tabs):
        one, other = tabs
        decide(one, 1, "d")
        decide(other, 2, "k")
        wait_for(one, 2, "keep")
        decide(one, 5, "u")
        wait_for(other, 1, "")
        assert "1 of 40 decided" in one.text_content("#progress-text")

    @pytest.mark.slow
    def test_what_another_decided_since_is_not_taken_back(self, tabs):
        one, other = tabs
        decide(one, 1, "d")
        decide(one, 2, "d")
        wait_for(other, 2, "drop")
        decide(other, 2, "k")
        wait_for(one, 2, "keep")
        decide(one, 5, "u")
        wait_for(other, 1, "")
        decide(one, 5, "u")
        wait_for(one, 2, "keep")
        assert "1 of 40 decided" in other.text_content("#progress-text")

    def test_a_full_storage_loses_nothing_here(self, tabs):
        one, other = tabs
        one.evaluate(
            "() => { Storage.prototype.setItem = () => { throw Error('full'); }; }"
        )
        decide(one, 1, "d")
        decide(other, 2, "k")
        wait_for(one, 2, "keep")
        decide(one, 3, "d")
        assert "3 of 40 decided. This browser does not" in one.text_content(
            "#progress-text"
        )


class TestPort:
    @pytest.fixture
    def record(self, tmp_path):
        """Of a run like no other, whose port nobody else asks for."""
        folder = made_run(tmp_path / "run")
        config = json.loads((folder / "config.json").read_text())
        config["data"] = str(tmp_path)
        (folder / "config.json").write_text(json.dumps(config))
        return read_run(folder)

    def test_a_run_has_the_same_one_each_time(self, record):
        ports = []
        for _ in range(2):
            with ReviewServer(record) as server:
                ports.append(server.server_port)
        assert ports == [own_port(record)] * 2
        assert 49152 <= ports[0] <= 65535

    def test_a_moved_run_keeps_it(self, record, tmp_path):
        own = own_port(record)
        moved = record.folder.rename(tmp_path / "moved")
        assert own_port(read_run(moved)) == own

    def test_where_it_is_taken_a_free_one_is_told(self, record, capsys, monkeypatch):
        monkeypatch.setattr(ReviewServer, "serve_forever", lambda self: None)
        arguments = ["review", str(record.folder), "--serve", "--no-browser"]
        assert main(arguments) == 0
        own = own_port(record)
        first, unsorted = capsys.readouterr().out.splitlines()
        assert first == f"http://127.0.0.1:{own}/  (Ctrl-C stops the server)"
        assert "does not say where its features are" in unsorted
        with ReviewServer(record):
            assert main(arguments) == 0
            shown = capsys.readouterr().out
            assert f":{own}/" not in shown
            assert f"Port {own} is taken" in shown
            for option in ("--quiet", "--json", "--port=0"):
                assert main([*arguments, option]) == 0
                assert "Port" not in capsys.readouterr().out
            assert main([*arguments, f"--port={own}"]) == 2
