"""Report and review of a model of one's own."""

from __future__ import annotations

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf

import keras_rsft as rsft
from keras_rsft.errors import InvalidArgument
from keras_rsft.report import _own

pytestmark = pytest.mark.usefixtures("eager")

NAMES = ("red", "green", "<b>blue")
COUNT, WRONG = 60, 6


@pytest.fixture(scope="module")
def photos():
    """60 pictures of three colours in [0, 1]; the first six are mislabelled."""
    right = np.arange(COUNT) % 3
    x = np.random.default_rng(0).uniform(0, 0.2, (COUNT, 8, 6, 3))
    x[np.arange(COUNT), ..., right] += 0.7
    given = right.copy()
    given[:WRONG] = (given[:WRONG] + 1) % 3
    return x.astype("float32"), given


def fitted(data, policy="auto"):
    keras.utils.set_random_seed(0)
    layers = [keras.layers.GlobalAveragePooling2D(), keras.layers.Dense(3)]
    model = rsft.RSFTModel(keras.Sequential([keras.Input((8, 6, 3)), *layers]), policy)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile("sgd", loss, metrics=["accuracy"])
    ledger = rsft.RejectionLedger()
    history = model.fit(*data, epochs=2, verbose=0, callbacks=[ledger])
    return model, history, ledger


@pytest.fixture(scope="module")
def own(photos):
    return fitted(photos)


def gallery_of(page):
    text = page.read_text(encoding="utf-8")
    found = re.search(r'id="gallery-data">(.*?)</script>', text, re.DOTALL)
    return text, json.loads(found[1])


def test_the_report_has_the_wrong_labels_first_and_their_pictures(own, tmp_path):
    path = rsft.write_report(*own, class_names=NAMES, path=tmp_path / "own.html")
    text, gallery = gallery_of(path)
    samples = gallery["samples"]
    assert "About 6 of 60 labels are wrong" in text
    assert "Expected wrong" in text
    assert set(samples["id"][:WRONG]) == {str(row) for row in range(WRONG)}
    assert sum(samples["wrong"]) == WRONG
    assert (gallery["classes"], gallery["total"]) == (list(NAMES), COUNT)
    assert all(len(one) > 100 for one in samples["picture"])
    assert "&lt;b&gt;blue" in text
    assert "<b>blue" not in text
    assert own[2].page == path
    assert rsft.write_report(*own, path=path) == path  # Its own report is replaced.


def test_a_report_from_tf_data_is_the_same(photos, own, tmp_path):
    dataset = tf.data.Dataset.from_tensor_slices(photos).batch(32)
    other = fitted((rsft.with_ids(dataset),))
    galleries = []
    for number, one in enumerate((own, other)):
        path = rsft.write_report(*one, path=tmp_path / f"{number}.html")
        galleries.append(gallery_of(path)[1]["samples"])
    for name in ("id", "given", "predicted", "picture", "wrong"):
        assert galleries[0][name] == galleries[1][name], name


def test_a_report_by_loss_has_no_proposals(photos, tmp_path):
    own = fitted(photos, rsft.LossThreshold(1.0))
    text, gallery = gallery_of(rsft.write_report(*own, path=tmp_path / "own.html"))
    assert set(gallery["samples"]["predicted"]) == {-1}
    assert "The last epoch learnt from" in text


def test_pictures_of_ones_own(photos, own, tmp_path):
    shown = np.zeros((COUNT, 4, 4), np.uint8)
    path = rsft.write_report(*own, images=shown, path=tmp_path / "own.html")
    assert len(set(gallery_of(path)[1]["samples"]["picture"])) == 1


@pytest.mark.parametrize("factor, offset", [(1, 0), (2, -1), (255, 0), (16, 0)])
def test_pictures_of_any_range_are_shown_alike(photos, own, factor, offset):
    x, _ = photos
    rows = np.arange(4)
    expected = _own.jpegs(own[2], rows, (255 * (x - x[rows].min())).astype("float32"))
    assert _own.jpegs(own[2], rows, factor * x + offset) == expected


def test_samples_that_are_no_pictures_have_none(own):
    rows = np.arange(4)
    assert _own.jpegs(own[2], rows, np.zeros((COUNT, 5))) == {}
    assert _own.jpegs(own[2], rows, ["a text"] * COUNT) == {}


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda own: (own[:2], {}), "made from its ledger"),
        (lambda own: (own[:1], {}), "made from its ledger"),
        (lambda own: (own, {"images": np.zeros((3, 4, 4))}), "in their order"),
        (lambda own: (own, {"class_names": ["a", "b"]}), "3 different names"),
        (lambda own: ((own[0], {}, own[2]), {}), "RSFTModel.fit"),
    ],
)
def test_what_a_report_cannot_be_made_of(own, spoil, said, tmp_path):
    given, options = spoil(own)
    with pytest.raises(InvalidArgument, match=said):
        rsft.write_report(*given, **options, path=tmp_path / "own.html")
    assert not list(tmp_path.iterdir())


def test_a_file_of_another_kind_stays(own, tmp_path):
    mine = tmp_path / "own.html"
    mine.write_text("mine")
    with pytest.raises(InvalidArgument, match="not a report"):
        rsft.write_report(*own, path=mine)
    assert mine.read_text() == "mine"


class TestReview:
    def test_ids_are_those_of_the_same_arrays(self, photos, own):
        x, y = (255 * photos[0]).astype("uint8"), photos[1]
        data = rsft.load_data(x, y, validation_fraction=0.0, test_fraction=0.2)
        assert set(data.train.ids) | set(data.test.ids) == set(own[2].ledger.ids)
        named = {"train": data.train, "test": data.test}
        for part in named.values():
            rows = part.ids.astype(int)
            np.testing.assert_array_equal(part.labels, y[rows])
            np.testing.assert_array_equal(own[2].ledger.ids[rows], part.ids)

    def test_decisions_are_rows_of_corrections(self, own):
        review = own[2].review(class_names=NAMES, count=10)
        review.decide("0", "relabel")
        review.decide("1", "keep")
        review.decide("2", "drop")
        review.decide("1", "")
        assert list(review) == [
            ("0", "green", "relabel", "red"), ("2", "red", "drop", ""),
        ]  # fmt: skip
        frame = review.to_frame()
        assert [*frame] == ["id", "given_label", "decision", "new_label"]
        assert frame.to_numpy().tolist() == [list(row) for row in review]

    @pytest.mark.parametrize("as_frame", [False, True])
    def test_decisions_are_applied_to_the_same_arrays(self, photos, own, as_frame):
        x, y = photos
        review = own[2].review()
        for row in range(WRONG):
            review.decide(str(row), "relabel")
        given = review.to_frame() if as_frame else review
        quality = rsft.audit_labels(
            x.mean(axis=(1, 2)), y, corrections=given, progress=False
        )
        data = rsft.load_data((255 * x).astype("uint8"), y, test_fraction=0.0)
        data = rsft.apply_corrections(data, given)
        right = np.arange(COUNT) % 3
        np.testing.assert_array_equal(quality.labels, right)
        assert np.flatnonzero(quality.reviewed).tolist() == list(range(WRONG))
        for part in (data.train, data.validation):
            np.testing.assert_array_equal(part.labels, right[part.ids.astype(int)])

    @pytest.mark.parametrize(
        "decided",
        [
            ("59", "keep"),
            ("0", "maybe"),
            ("0", "relabel", "green"),
            ("0", "relabel", "x"),
        ],
    )
    def test_refuses_other_decisions(self, own, decided):
        review = own[2].review(class_names=NAMES, count=6)
        with pytest.raises(InvalidArgument, match="keep, relabel or drop"):
            review.decide(*decided)
        assert len(review) == 0

    def test_is_a_table_where_there_are_no_buttons(self, own, monkeypatch, tmp_path):
        page = rsft.write_report(*own, path=tmp_path / "own.html")
        review = own[2].review(class_names=NAMES, count=6)
        monkeypatch.setattr(_own.importlib.util, "find_spec", lambda name: None)
        shown = review._repr_mimebundle_()["text/html"]
        assert shown.count("<img") == 6
        assert "&lt;b&gt;blue" in shown
        assert "<b>blue" not in shown
        assert f'href="{page}"' in shown
        assert "keras_rsft[notebook]" in shown

    def test_buttons_decide(self, own):
        pytest.importorskip("ipywidgets")
        review = own[2].review(class_names=NAMES, count=6)
        box = review.widget()
        assert len(box.children) == 6
        _, text, verbs, label = box.children[0].children
        assert "&lt;b&gt;blue" in "".join(one.children[1].value for one in box.children)
        verbs.value = "relabel"
        first = review[0]
        assert first.decision == "relabel"
        assert first.new_label in text.value
        label.value = next(name for name in label.options if name != first.new_label)
        assert review[0].new_label == label.value
        again = review.widget().children[0].children
        assert (again[2].value, again[3].value) == ("relabel", label.value)
        verbs.value = ""
        assert len(review) == 0
