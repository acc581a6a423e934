"""Shares of a pass: disjoint, finished in any order, and one set in the end."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_images import png, write

from keras_rsft._runtime import Cluster
from keras_rsft.backbones._load import load_backbone
from keras_rsft.data._sources import load_images
from keras_rsft.errors import DataError, WorkerLost
from keras_rsft.features import _extract as extraction
from keras_rsft.features._extract import (
    FeaturePass,
    FrozenBackbone,
    extract_features,
    keep_shares,
    open_cached,
    run_together,
)
from keras_rsft.features._shares import (
    chain_of,
    held,
    index_fault,
    parts_of,
    share_of,
    watched,
)
from keras_rsft.features._store import FEATURES_FILE, INDEX_FILE, META_FILE

sizes = {
    "count": st.integers(0, 500),
    "batch_size": st.integers(1, 40),
    "shares": st.integers(1, 20),
}


def workers(count, index):
    return Cluster(("",) * count, index)


class TestShares:
    @given(**sizes)
    def test_each_sample_is_in_one_share(self, count, batch_size, shares):
        all_shares = [
            share_of(count, batch_size=batch_size, shares=shares, index=index)
            for index in range(shares)
        ]
        assert [one for share in all_shares for one in share] == list(range(count))
        assert all(share.start % batch_size == 0 for share in all_shares if share)
        batches = [-(-len(share) // batch_size) for share in all_shares]
        assert max(batches) - min(batches) <= 1
        assert batches == sorted(batches, reverse=True)  # The empty ones are last.
        assert chain_of(reversed(all_shares), count) == [s for s in all_shares if s]

    def test_by_hand(self):
        found = [share_of(100, batch_size=32, shares=3, index=i) for i in range(3)]
        assert found == [range(64), range(64, 96), range(96, 100)]

    @pytest.mark.parametrize(
        "stretches, chain",
        [
            ([range(4), range(4, 6)], [range(4), range(4, 6)]),
            ([range(2), range(4), range(4, 6)], [range(4), range(4, 6)]),
            ([range(4, 6)], None),
            ([range(4)], None),
            ([range(4), range(3, 6)], None),
            ([range(8)], None),
            ([range(4), range(4, 4)], None),
        ],
    )
    def test_a_chain_has_no_gap(self, stretches, chain):
        assert chain_of(stretches, 6) == chain

    def test_the_parts_of_a_set_are_beside_it(self, tmp_path):
        parts = parts_of(tmp_path / "key", 5, 4, 3)
        assert [part.stretch for part in parts] == [range(4), range(4, 5)]
        assert parts[1].path == tmp_path / "key.shares" / "4-5"


def test_who_does_not_move_is_lost(tmp_path, monkeypatch):
    files = {0: tmp_path / "0", 1: tmp_path / "1"}
    looks = watched(lambda: files, 10.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)

    def lost(now, *sizes):
        for file, size in zip(files.values(), sizes, strict=True):
            file.write_bytes(bytes(size))
        monkeypatch.setattr(time, "monotonic", lambda: now)
        reached, found = next(looks)
        assert reached == dict(enumerate(sizes))
        return found

    assert lost(100.0, 5, 5) == []
    assert lost(110.0, 5, 6) == []
    assert lost(110.5, 5, 6) == [0]
    assert lost(111.0, 6, 6) == []
    assert lost(121.5, 6, 6) == [0, 1]


@pytest.mark.parametrize(
    "index, rows, said",
    [
        ([4, 5, 7], 3, None),
        ([], 0, None),
        ([4, 5], 3, "2 rows and should have 3"),
        ([4, 4], 2, "twice"),
        ([5, 4], 2, "out of order"),
        ([3, 4], 2, "another share"),
        ([7, 8], 2, "another share"),
    ],
)
def test_samples_that_do_not_belong_to_a_share(index, rows, said):
    fault = index_fault(np.array(index, np.int64), range(4, 8), rows)
    assert fault is None if said is None else said in fault


@pytest.fixture(scope="module")
def split(photo_folder):
    return load_images(str(photo_folder)).train  # 24 images.


@pytest.fixture(scope="module")
def base(tiny_base_file):
    return FrozenBackbone(load_backbone(str(tiny_base_file)))  # Traced once.


@pytest.fixture(scope="module")
def alone(base, split, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    return extract_features(base, split, cache_dir=folder, batch_size=4)


@pytest.fixture
def work(base, split, tmp_path):
    return FeaturePass(
        base, split, cache_dir=tmp_path / "cached", batch_size=4, progress=False
    )


def assert_equal(cached, alone):
    assert cached.path.read_bytes() == alone.path.read_bytes()
    for name in (INDEX_FILE, META_FILE):
        files = (cached.path.with_name(name), alone.path.with_name(name))
        assert files[0].read_bytes() == files[1].read_bytes()
    np.testing.assert_array_equal(cached.labels, alone.labels)
    np.testing.assert_array_equal(cached.ids, alone.ids)
    assert cached.path.parent.name == alone.path.parent.name  # The key.


class TestTogether:
    @pytest.mark.parametrize("count", [2, 3, 9])
    def test_shares_make_the_set_of_one_process(self, work, split, alone, count):
        for index in range(1, count):
            keep_shares([work], workers(count, index))
        run_together([work], workers(count, 0))
        assert_equal(open_cached(work.folder, split), alone)
        assert {path.name for path in work.folder.parent.iterdir()} == {
            work.folder.name
        }
        run_together([work], workers(count, 1))  # Finds it.

    def test_an_image_is_computed_once(self, work, monkeypatch):
        asked, images = [], type(work.split).images

        def spy(split, size, *, start, stop, **options):
            asked.append((start, stop))
            return images(split, size, start=start, stop=stop, **options)

        monkeypatch.setattr(type(work.split), "images", spy)
        for index in (2, 1, 0):
            keep_shares([work], workers(3, index))
            keep_shares([work], workers(3, index))  # Has it already.
        assert asked == [(16, 24), (8, 16), (0, 8)]

    def test_all_wait_for_the_chief(self, work, split, alone):
        keep_shares([work], workers(2, 0))
        other = threading.Thread(
            target=run_together, args=([work], workers(2, 1)), kwargs={"timeout": 30}
        )
        other.start()
        time.sleep(0.5)
        assert other.is_alive()
        run_together([work], workers(2, 0), timeout=30)
        other.join(30)
        assert not other.is_alive()
        assert_equal(open_cached(work.folder, split), alone)

    def test_shares_without_waiting_are_put_together_by_whoever_needs_them(
        self, work, split, alone, base, monkeypatch
    ):
        for index in (1, 0):
            keep_shares([work], workers(2, index))

        def never(*_):
            raise AssertionError("the base ran again")

        monkeypatch.setattr(extraction, "append_rows", never)
        root = work.folder.parent
        cached = extract_features(base, split, cache_dir=root, batch_size=4)
        assert_equal(cached, alone)
        assert not list(root.glob("*.shares"))

    def test_a_share_resumes_after_whole_batches(self, work, split, alone, monkeypatch):
        append, calls = extraction._append, []

        def fail_at_the_fourth(file, values):
            calls.append(1)
            if len(calls) == 4:
                file.write(values.tobytes()[:20])
                raise KeyboardInterrupt
            append(file, values)

        monkeypatch.setattr(extraction, "_append", fail_at_the_fourth)
        with pytest.raises(KeyboardInterrupt):
            keep_shares([work], workers(2, 1))
        keep_shares([work], workers(2, 1))
        assert len(calls) == 4 + 2 * 2  # Two of three batches were missing.
        run_together([work], workers(2, 0))
        assert_equal(open_cached(work.folder, split), alone)

    def test_unreadable_images_are_left_out(self, photo_folder, base, tmp_path):
        folder = tmp_path / "photos"
        shutil.copytree(photo_folder, folder)
        for broken in ("blue/03.png", "red/07.png"):
            (folder / broken).write_bytes(b"no image")
        split = load_images(str(folder)).train
        alone = extract_features(base, split, cache_dir=tmp_path / "alone")
        work = FeaturePass(base, split, cache_dir=tmp_path / "cached", batch_size=4)
        keep_shares([work], workers(2, 1))
        run_together([work], workers(2, 0))
        cached = open_cached(work.folder, split)
        assert len(cached) == len(alone) < len(split)
        np.testing.assert_allclose(cached.features, alone.features, atol=1e-6)
        assert cached.unreadable == alone.unreadable

    def test_where_none_can_be_read_all_say_so(self, base, tmp_path):
        for number in range(12):
            write(tmp_path / "photos" / f"{number % 2}" / f"{number}.png", b"no image")
        split = load_images(str(tmp_path / "photos")).train
        work = FeaturePass(base, split, cache_dir=tmp_path / "cached", batch_size=2)
        keep_shares([work], workers(2, 1))
        for index in (0, 1):
            with pytest.raises(DataError, match="can be read"):
                run_together([work], workers(2, index))

    def test_an_empty_split(self, base, split, tmp_path):
        empty = split.take(np.array([], np.int64))
        work = FeaturePass(base, empty, cache_dir=tmp_path)
        run_together([work], workers(2, 0))
        assert len(open_cached(work.folder, empty)) == 0


class TestLost:
    def test_the_others_say_which_share_is_missing(self, work, tmp_path):
        cluster = Cluster(("a:1", "b:1", "c:1"), 0)
        keep_shares([work], workers(3, 1))
        started = time.monotonic()
        with pytest.raises(WorkerLost) as caught:
            run_together([work], cluster, timeout=0.5)
        assert time.monotonic() - started < 30
        said = str(caught.value)
        assert "worker 2 (c:1) has 0 of the images 16 to 23" in said
        assert "worker 1" not in said
        assert "Start the same command there again" in said
        assert "computing other features" in said
        parts_of(work.folder, len(work.split), 4, 3)[2].path.mkdir()  # It has begun.
        with pytest.raises(WorkerLost) as caught:
            run_together([work], cluster, timeout=0.5)
        assert "other features" not in str(caught.value)
        keep_shares([work], workers(3, 2))  # It is started again, and so are we.
        run_together([work], cluster, timeout=0.5)

    @pytest.mark.slow
    def test_the_chief_may_be_the_one(self, work):
        keep_shares([work], workers(2, 0))
        with pytest.raises(WorkerLost, match="worker 0 has not joined them"):
            run_together([work], workers(2, 1), timeout=0.5)

    def test_two_with_the_same_index(self, work):
        part = parts_of(work.folder, len(work.split), 4, 2)[1]
        with (
            held(part.path, 1.0),
            pytest.raises(WorkerLost, match="an index of its own"),
        ):
            keep_shares([work], workers(2, 1), timeout=0.3)

    @pytest.mark.parametrize(
        "name, said", [(FEATURES_FILE, "not what was written"), (INDEX_FILE, "twice")]
    )
    def test_a_damaged_share_is_computed_again(self, work, split, alone, name, said):
        keep_shares([work], workers(2, 1))
        part = parts_of(work.folder, len(split), 4, 2)[1]
        with (part.path / name).open("r+b") as file:
            file.seek(8)
            file.write(b"\xff" * 8)
        with pytest.raises(DataError, match=said):
            run_together([work], workers(2, 0))
        keep_shares([work], workers(2, 1))
        run_together([work], workers(2, 0))
        assert_equal(open_cached(work.folder, split), alone)


# Runs the command line, and kills itself at the n-th piece that is written.
DRIVER = textwrap.dedent("""
    import os, signal, sys
    from keras_rsft import cli
    from keras_rsft.features import _extract as extraction

    append, left = extraction._append, int(sys.argv[1])

    def killing(file, values):
        global left
        left -= 1
        if left == 0:
            file.write(values.tobytes()[:5])
            os.kill(os.getpid(), signal.SIGKILL)
        append(file, values)

    extraction._append = killing
    sys.exit(cli.main(sys.argv[2:]))
""")


@pytest.fixture(scope="module")
def many_photos(tmp_path_factory):
    """150 images of two grey values with noise."""
    root = tmp_path_factory.mktemp("many")
    for label, name in enumerate(("cat", "dog")):
        for number in range(75):
            write(root / name / f"{number:02}.png", png(90 * label + number))
    return root


@pytest.mark.slow
def test_two_processes_one_of_them_killed(many_photos, tiny_base_file, tmp_path):
    addresses = ["127.0.0.1:20001", "127.0.0.1:20002"]

    def start(index, kill_at=0):
        task = {"type": "worker", "index": index}
        config = {"cluster": {"worker": addresses}, "task": task}
        command = [
            sys.executable, "-c", DRIVER, kill_at, "features", many_photos,
            "--backbone", tiny_base_file, "--cache-dir", tmp_path / "cached", "--json",
            "--set", "dtype=float32",
        ]  # fmt: skip
        return subprocess.Popen(
            [str(part) for part in command], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=os.environ | {"TF_CONFIG": json.dumps(config)},
        )  # fmt: skip

    chief, other = start(0), start(1, kill_at=4)
    try:
        other.communicate(timeout=100)
        assert other.returncode == -signal.SIGKILL
        assert chief.poll() is None  # It waits for the other.
        assert not list(tmp_path.glob("cached/*/meta.json"))
        again = start(1)
        found = []
        for process in (chief, again):
            out, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
            found.append(json.loads(out))
    finally:
        for process in (chief, other):
            process.kill()
    assert found[0]["splits"] == found[1]["splits"]
    assert [one["share"]["index"] for one in found] == [0, 1]
    split = load_images(str(many_photos)).train
    base = load_backbone(str(tiny_base_file))
    alone = extract_features(base, split, cache_dir=tmp_path / "alone")
    cached = extract_features(base, split, cache_dir=tmp_path / "cached")
    assert str(cached.path) == found[0]["splits"]["train"]["path"]
    assert_equal(cached, alone)
