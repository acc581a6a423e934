"""A run, a search and a cache from somebody else: no link is followed, no pipe read."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest
from made_run import made_run, write_features

from keras_rsft._storage import (
    CACHED_FEATURES_FILE,
    HEAD_STATE,
    make_folder,
    open_place,
    open_regular,
    read_json,
    replaced,
    require_no_links,
)
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, InvalidArgument
from keras_rsft.export._export_run import read_run as read_for_export
from keras_rsft.features._extract import FeaturePass, extract_features
from keras_rsft.report._live import LiveAudit
from keras_rsft.report._page import write_report
from keras_rsft.report._record import read_run
from keras_rsft.tuning._folder import open_search

SECRET = b"a secret of the user's " * 500


@pytest.fixture
def secret(tmp_path):
    path = tmp_path / "secret"
    path.write_bytes(SECRET)
    return path


@pytest.fixture
def run(tmp_path):
    folder = made_run(tmp_path / "run")
    write_features(folder, tmp_path / "features")
    return folder


def put(kind, path, target):
    path.unlink(missing_ok=True)
    if kind == "link":
        path.symlink_to(target)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()


class TestOpenRegular:
    @pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
    @pytest.mark.parametrize("mode", ["rb", "ab"])
    def test_all_but_files_are_refused_by_name(self, tmp_path, secret, kind, mode):
        put(kind, tmp_path / "odd", secret)
        with pytest.raises(DataError, match="odd is a link, a pipe or a folder"):
            open_regular(tmp_path / "odd", mode)
        assert read_json(tmp_path / "odd") is None

    def test_a_second_name_is_not_written_to(self, tmp_path, secret):
        os.link(secret, tmp_path / "other")
        with open_regular(tmp_path / "other") as file:
            assert file.read() == SECRET
        with pytest.raises(DataError, match="second name"):
            open_regular(tmp_path / "other", "ab")

    def test_a_limit(self, secret):
        with open_regular(secret, most=len(SECRET)) as file:
            assert file.read() == SECRET
        with pytest.raises(DataError, match="too large"):
            open_regular(secret, most=len(SECRET) - 1)

    def test_appends(self, tmp_path):
        for part in (b"one", b"two"):
            with open_regular(tmp_path / "new", "ab", buffering=0) as file:
                file.write(part)
        assert (tmp_path / "new").read_bytes() == b"onetwo"

    def test_folders(self, tmp_path):
        assert make_folder(tmp_path / "a" / "b").is_dir()
        (tmp_path / "link").symlink_to(tmp_path / "a")
        with pytest.raises(DataError, match="link is a link"):
            make_folder(tmp_path / "link")
        require_no_links(tmp_path / "a")
        with pytest.raises(DataError, match="link is a link or a pipe"):
            require_no_links(tmp_path)


class TestPage:
    @pytest.mark.parametrize("kind", ["link", "pipe"])
    @pytest.mark.parametrize(
        "name",
        [
            "acceptance_by_class.csv", "classes.json", "config.json", "ledger.csv",
            "loss_histograms.csv", "metrics.csv", "near_duplicates.csv",
            "results.json", "samples.csv", "thumbnails.bin", "thumbnails.csv",
        ],
    )  # fmt: skip
    def test_nothing_of_other_folders_gets_into_it(self, run, secret, kind, name):
        put(kind, run / name, secret)
        kinds = (InvalidArgument, DataError)  # The first: results.json is no file.
        with pytest.raises(kinds, match=name):
            write_report(run)
        assert not (run / "report.html").exists()

    def test_of_a_search(self, tmp_path, secret):
        folder = tmp_path / "search"
        folder.mkdir()
        (folder / "search.json").write_text('{"data": [{}, ["cat"]]}')
        (folder / "results.json").write_text("{}")
        (folder / "heatmap.svg").symlink_to(secret)
        with pytest.raises(DataError, match="heatmap"):
            write_report(folder)

    def test_the_report_itself(self, run, secret):
        (run / "report.html").symlink_to(secret)
        with pytest.raises(InvalidArgument, match="is not a report"):
            write_report(run)
        assert secret.read_bytes() == SECRET

    def test_a_picture_is_where_there_is_one(self, run):
        index = run / "thumbnails.csv"
        header, first, *rest = index.read_text().splitlines()
        name = first.split(",")[0]
        for place in ("-1,5", "0,-1", "0,99999999999", "x,5"):
            index.write_text("\n".join([header, f"{name},{place}", *rest]))
            with pytest.raises(DataError, match=r"thumbnails\.csv cannot be read"):
                read_run(run).thumbnail(name)

    def test_a_run_that_is_a_link_is_the_users_own(self, run, tmp_path):
        (tmp_path / "latest").symlink_to(run)
        write_report(tmp_path / "latest")
        assert (run / "report.html").is_file()

    def test_its_card_too(self, run, secret):
        put("pipe", run / "results.json", secret)
        with pytest.raises(InvalidArgument, match="no model"):
            read_for_export(run)


class TestLive:
    def test_a_run_knows_the_features_that_it_names(self, run, tmp_path):
        LiveAudit(read_run(run))
        other = tmp_path / "other"
        shutil.copytree(tmp_path / "features", other)
        places = json.loads((run / CACHED_FEATURES_FILE).read_text())
        places["train"] |= {"folder": str(other), "checksums": {"features.bin": "0"}}
        (run / CACHED_FEATURES_FILE).write_text(json.dumps(places))
        with pytest.raises(DataError, match="not those of this run"):
            LiveAudit(read_run(run))

    def test_damaged_features_are_not_shown(self, run, tmp_path):
        file = tmp_path / "features" / "features.bin"
        file.write_bytes(bytes(file.stat().st_size))
        with pytest.raises(DataError, match=r"features\.bin is not what was written"):
            LiveAudit(read_run(run))


@pytest.fixture
def train(photo_folder):
    return load_images(str(photo_folder)).train


class TestCache:
    @pytest.fixture
    def extract(self, tiny_base, train, tmp_path):
        def extract(called="cache"):
            return extract_features(
                tiny_base, train, cache_dir=tmp_path / called, progress=False
            )

        return extract

    @pytest.fixture
    def folder(self, tiny_base, train, tmp_path):
        return FeaturePass(tiny_base, train, tmp_path / "cache").folder

    @pytest.mark.parametrize("name", ["features.bin", "index.bin"])
    @pytest.mark.parametrize("kind", ["link", "pipe"])
    def test_nothing_is_written_through_what_waits_there(
        self, extract, folder, secret, kind, name
    ):
        partial = folder.with_name(f"{folder.name}.partial")
        partial.mkdir()
        put(kind, partial / name, secret)
        with pytest.raises(DataError, match=name):
            extract()
        assert secret.read_bytes() == SECRET

    def test_nor_into_a_folder_that_is_elsewhere(self, extract, folder, tmp_path):
        (tmp_path / "mine").mkdir()
        folder.with_name(f"{folder.name}.partial").symlink_to(tmp_path / "mine")
        with pytest.raises(DataError, match=r"\.partial is a link"):
            extract()
        assert not list((tmp_path / "mine").iterdir())

    @pytest.mark.parametrize("name", ["features.bin", "index.bin", "meta.json"])
    def test_what_it_holds_is_a_file_of_its_own(self, extract, folder, tmp_path, name):
        expected = extract("other").features
        extract()
        (folder / name).rename(tmp_path / "moved")
        (folder / name).symlink_to(tmp_path / "moved")
        with pytest.warns(UserWarning, match="They are computed anew"):
            np.testing.assert_array_equal(extract().features, expected)
        assert (tmp_path / "moved").exists()
        assert not (folder / name).is_symlink()

    def test_a_finished_folder_that_is_a_link(self, extract, folder, tmp_path):
        expected = np.array(extract().features)
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
        np.testing.assert_array_equal(extract().features, expected)
        (tmp_path / "moved" / "meta.json").unlink()
        with pytest.warns(UserWarning, match="They are computed anew"):
            extract()
        assert (tmp_path / "moved" / "features.bin").exists()
        assert not folder.is_symlink()

    def test_links_to_photos_are_the_users_own(self, tiny_base, photo_folder, tmp_path):
        for file in photo_folder.glob("*/*.png"):
            path = tmp_path / "linked" / file.relative_to(photo_folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.symlink_to(file)
        train = load_images(str(tmp_path / "linked")).train
        found = extract_features(
            tiny_base, train, cache_dir=tmp_path / "cache", progress=False
        )
        assert not found.unreadable


class TestUnfinished:
    def test_a_run_is_not_begun_in_a_folder_elsewhere(self, tmp_path):
        (tmp_path / "mine").mkdir()
        (tmp_path / "run.unfinished").symlink_to(tmp_path / "mine")
        with (
            pytest.raises(InvalidArgument, match="is no unfinished run"),
            open_place(tmp_path / "run", {"seed": 1}),
        ):
            pytest.fail("It was begun.")
        assert not list((tmp_path / "mine").iterdir())

    @pytest.mark.parametrize("name", ["identity.json", HEAD_STATE])
    def test_pipes_are_no_state(self, tmp_path, secret, name):
        (tmp_path / "run.unfinished").mkdir()
        put("pipe", tmp_path / "run.unfinished" / name, secret)
        with open_place(tmp_path / "run", {"seed": 1}) as place:
            assert not place.resumed
            replaced(place.unfinished / HEAD_STATE, lambda path: path.write_text("x"))

    def test_a_search_with_links_is_not_resumed(self, tmp_path, secret):
        identity = {"data": 1}
        with open_search(tmp_path / "search", identity) as folder:
            (folder / "trials").mkdir()
        (folder / "trials" / "oracle.json").symlink_to(secret)
        with (
            pytest.raises(DataError, match=r"oracle\.json is a link"),
            open_search(folder, identity),
        ):
            pytest.fail("It was resumed.")
