"""What a server loads: encoded images in, labels out, one bad image at a time."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_bases import classifier_of

from keras_rsft._predict import predict_files
from keras_rsft.backbones._load import load_backbone
from keras_rsft.data._sources import load_images
from keras_rsft.errors import InvalidArgument
from keras_rsft.export._places import check_name
from keras_rsft.export._saved_model import export_saved_model

NAMES = ("blue", "green", "réd")


@pytest.fixture(scope="module")
def classifier(tiny_base_file):
    return classifier_of(load_backbone(str(tiny_base_file)), 3)


@pytest.fixture(scope="module")
def exported(classifier, tmp_path_factory):
    directory = tmp_path_factory.mktemp("served") / "photos"
    return export_saved_model(classifier, directory, class_names=NAMES)


@pytest.fixture(scope="module")
def serve(exported):
    loaded = tf.saved_model.load(str(exported))
    return loaded.signatures


def test_bytes_give_what_training_sees(serve, classifier, photo_folder):
    test = load_images(str(photo_folder)).test
    images = np.stack([image for _, image in test.images((16, 16))])
    expected = classifier.predict(images, verbose=0)
    encoded = [test.encoded(i) for i in range(len(test))]
    served = serve["serving_default"](image_bytes=tf.constant(encoded))
    np.testing.assert_allclose(served["probabilities"], expected, atol=1e-5)
    np.testing.assert_allclose(served["score"], expected.max(axis=-1), atol=1e-5)
    labels = [label.decode() for label in served["label"].numpy()]
    assert labels == [NAMES[best] for best in expected.argmax(axis=-1)]
    assert served["valid"].numpy().all()
    direct = serve["serving_images"](images=tf.constant(images))
    np.testing.assert_allclose(direct["probabilities"], expected, atol=1e-5)


def test_a_corrupt_image_leaves_the_others_alone(serve, photo_folder):
    good = (photo_folder / "red" / "03.png").read_bytes()
    alone = serve["serving_default"](image_bytes=tf.constant([good]))
    mixed = serve["serving_default"](
        image_bytes=tf.constant([b"", good, good[:40], good, b"text"])
    )
    assert mixed["valid"].numpy().tolist() == [False, True, False, True, False]
    assert mixed["label"].numpy()[0] == b""
    assert mixed["probabilities"].numpy()[0].sum() == 0
    np.testing.assert_allclose(
        mixed["probabilities"][3], alone["probabilities"][0], atol=1e-6
    )


@pytest.mark.parametrize("images", [[], [b"none", b"of them"]])
def test_nothing_to_classify(serve, images):
    served = serve["serving_default"](image_bytes=tf.constant(images, tf.string))
    assert served["label"].shape == (len(images),)
    assert served["probabilities"].shape == (len(images), 3)
    assert not served["valid"].numpy().any()


def test_no_images(serve):
    served = serve["serving_images"](images=tf.zeros((0, 16, 16, 3)))
    assert served["label"].shape == (0,)


def test_versions_count_up_and_are_never_overwritten(classifier, tmp_path):
    directory = tmp_path / "photos"
    for number in (1, 2):
        written = export_saved_model(classifier, directory, class_names=NAMES)
        assert written == directory / str(number)
    with pytest.raises(InvalidArgument, match="does not exist yet"):
        export_saved_model(classifier, directory, class_names=NAMES, version=2)
    assert sorted(path.name for path in directory.iterdir()) == [
        "1", "2", "batching.config", "models.config",
    ]  # fmt: skip


def test_a_configuration_of_the_users_own_is_left_alone(classifier, tmp_path):
    directory = tmp_path / "photos"
    directory.mkdir()
    (directory / "models.config").write_text("mine")
    export_saved_model(classifier, directory, class_names=NAMES, warmup=False)
    assert (directory / "models.config").read_text() == "mine"


def test_top_k_is_the_probabilities_sorted(classifier, photo_folder, tmp_path):
    written = export_saved_model(
        classifier, tmp_path / "photos", class_names=NAMES, top_k=2
    )
    good = (photo_folder / "red" / "03.png").read_bytes()
    serve = tf.saved_model.load(str(written)).signatures["serving_default"]
    served = {k: v.numpy() for k, v in serve(tf.constant([good, b"no image"])).items()}
    order = np.argsort(-served["probabilities"][0])[:2]
    names = [label.decode() for label in served["top_labels"][0]]
    assert names == [NAMES[at] for at in order]
    np.testing.assert_array_equal(
        served["top_scores"][0], served["probabilities"][0][order]
    )
    assert served["label"][0] == served["top_labels"][0][0]
    assert served["top_labels"][1].tolist() == [b"", b""]
    assert served["top_scores"][1].tolist() == [0, 0]
    empty = serve(tf.constant([], tf.string))
    assert empty["top_labels"].shape == (0, 2)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"class_names": NAMES[:2]}, "3 classes"),
        ({"class_names": ("a", "b", "c\nd")}, "one line"),
        ({"top_k": 4}, "top_k"),
        ({"weight_dtype": "int8"}, "float32 or float16"),
        ({"version": 0}, "at least 1"),
    ],
)
def test_an_option_that_does_not_fit_leaves_nothing(
    classifier, tmp_path, options, match
):
    with pytest.raises(InvalidArgument, match=match):
        export_saved_model(
            classifier, tmp_path / "x", **({"class_names": NAMES} | options)
        )
    assert not (tmp_path / "x").exists()


def test_a_folder_with_something_else_in_it_is_refused(classifier, tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InvalidArgument, match=r"holiday\.jpg"):
        export_saved_model(classifier, tmp_path, class_names=NAMES)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]
    with pytest.raises(InvalidArgument, match="is a file"):
        export_saved_model(
            classifier, tmp_path / "holiday.jpg" / "x", class_names=NAMES
        )


def test_a_folder_that_cannot_be_written_is_refused(classifier, tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # As root all can be.
    with pytest.raises(InvalidArgument, match="cannot be written"):
        export_saved_model(classifier, tmp_path / "x", class_names=NAMES)


@pytest.mark.parametrize("name", ["a/b", "..", "", "a b", ".hidden", 'a"b', "a\n"])
def test_names_that_could_lead_elsewhere_are_refused(name):
    with pytest.raises(InvalidArgument, match="separator"):
        check_name(name)


def test_a_failed_export_leaves_no_version(classifier, tmp_path, monkeypatch):
    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export_saved_model(classifier, tmp_path / "photos", class_names=NAMES)
    assert list((tmp_path / "photos").iterdir()) == []


def test_labels_are_beside_the_graph(exported):
    labels = (exported / "assets" / "labels.txt").read_text(encoding="utf-8")
    assert labels.split() == list(NAMES)


def test_each_weight_is_stored_once(exported, classifier):
    prefix = str(exported / "variables" / "variables")
    shapes = [shape for _, shape in tf.train.list_variables(prefix) if shape]
    # All are small, so they lie end to end in one variable.
    assert shapes == [[sum(int(tf.size(v.value)) for v in classifier.variables)]]


def test_large_and_small_weights_of_any_type_and_rank(tmp_path):
    keras.utils.set_random_seed(0)
    images = keras.Input((12, 12, 3))
    values = keras.layers.Rescaling(1 / 255)(images)
    values = keras.layers.Conv2D(4, 3)(values)
    values = keras.layers.BatchNormalization()(values)
    values = keras.layers.Dropout(0.5)(values)  # Its seed is a variable of integers.
    values = keras.layers.Flatten()(values)
    values = keras.layers.Dense(64)(values)  # 100 kB: a variable of its own.
    model = keras.Model(images, keras.layers.Dense(3, activation="softmax")(values))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.1, 1, w.shape) for w in model.get_weights()])
    version = export_saved_model(model, tmp_path / "x", class_names=NAMES)
    prefix = str(version / "variables" / "variables")
    shapes = [shape for _, shape in tf.train.list_variables(prefix) if shape]
    assert [400, 64] in shapes
    assert len(shapes) == 3
    some = rng.uniform(0, 255, (2, 12, 12, 3)).astype("float32")
    serve = tf.saved_model.load(str(version)).signatures["serving_images"]
    np.testing.assert_allclose(
        serve(images=tf.constant(some))["probabilities"], model(some), atol=1e-6
    )


@pytest.mark.slow
def test_loads_where_keras_rsft_is_not_installed(exported, serve, photo_folder):
    image = photo_folder / "green" / "02.png"
    program = textwrap.dedent(f"""
        import sys
        sys.modules["keras_rsft"] = None  # Any import of it fails.
        import tensorflow as tf
        serve = tf.saved_model.load({str(exported)!r}).signatures["serving_default"]
        encoded = open({str(image)!r}, "rb").read()
        served = serve(image_bytes=tf.constant([encoded]))
        print(*served["label"].numpy(), *served["score"].numpy())
    """)
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    here = serve["serving_default"](image_bytes=tf.constant([image.read_bytes()]))
    label, score = result.stdout.split()
    assert label == repr(here["label"].numpy()[0])
    assert float(score) == pytest.approx(float(here["score"][0]), abs=1e-6)


def test_predict_reads_an_export(exported, photo_folder, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    files = [photo_folder / "red" / "01.png", broken, tmp_path / "missing.png"]
    for model in (exported, exported.parent):
        good, bad, missing = predict_files(model, files)
        assert good.label in NAMES
        assert 0 < good.score <= 1
        assert bad.label is None
        assert bad.error.startswith("Not an image of a known kind")
        assert "No such file" in missing.error


def test_predict_refuses_what_is_no_model(tmp_path):
    with pytest.raises(InvalidArgument, match="does not exist"):
        list(predict_files(tmp_path / "nothing", ["a.png"]))
    with pytest.raises(InvalidArgument, match="run folder"):
        list(predict_files(tmp_path, ["a.png"]))


@pytest.mark.slow
def test_an_export_is_at_most_a_tenth_larger_than_weights_over_10_mb(tmp_path):
    base = load_backbone("efficientnet_lite0", weights="none")
    model = classifier_of(base, 2)
    folder = export_saved_model(model, tmp_path / "whole", class_names=["cat", "dog"])
    weights = sum(weight.numpy().nbytes for weight in model.variables)
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert 10_000_000 < weights < written <= 1.1 * weights
