"""Bases that are no Keras models: ONNX files and SavedModels."""

from __future__ import annotations

import keras
import made_bases
import numpy as np
import pytest
import tensorflow as tf
from made_bases import DIM, SIDE, Reusable, classifier_of, save_onnx, save_signature

from keras_rsft.backbones._foreign import GraphNetwork, impure_operations, weights_bytes
from keras_rsft.backbones._load import load_backbone
from keras_rsft.errors import InvalidArgument, WeightsUnavailable
from keras_rsft.features._extract import FrozenBackbone

IMAGES = (
    np.random.default_rng(0).integers(0, 256, size=(5, SIDE, SIDE, 3)).astype("float32")
)


@pytest.fixture(scope="module")
def expected():
    """What the same network gives as a Keras model, of pixels in [0, 1]."""
    return np.asarray(made_bases.network()(IMAGES / 255))


@pytest.fixture(scope="module")
def onnx_path(tmp_path_factory):
    pytest.importorskip("onnxruntime")
    return save_onnx(tmp_path_factory.mktemp("onnx") / "tiny.onnx")


@pytest.fixture(scope="module")
def saved_path(tmp_path_factory):
    return save_signature(tmp_path_factory.mktemp("saved") / "tiny")


@pytest.fixture(scope="module", params=["onnx", "savedmodel"])
def name(request, onnx_path, saved_path):
    """Of each kind of base, with pixels in [0, 1]."""
    path = onnx_path if request.param == "onnx" else saved_path
    return f"{request.param}:{path}@0:1"


def test_a_base_gives_the_features_of_its_network(name, expected):
    base = load_backbone(name)
    assert base.input_shape == (None, SIDE, SIDE, 3)
    assert base.output_shape == (None, DIM)
    assert not base.trainable_variables
    for training in (False, True):
        features = np.asarray(base(IMAGES, training=training))
        np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5)
    forward = FrozenBackbone(base, num_images=5000).forward
    np.testing.assert_allclose(forward(IMAGES), expected, rtol=0, atol=1e-5)


def test_the_scale_is_part_of_the_key_of_kept_features(name):
    one, again = (FrozenBackbone(load_backbone(name)).fingerprint for _ in range(2))
    other = FrozenBackbone(load_backbone(name.replace("@0:1", "@imagenet"))).fingerprint
    assert one == again != other


def test_the_weights_are_part_of_the_key_of_kept_features(tmp_path, monkeypatch):
    one = load_backbone(f"savedmodel:{save_signature(tmp_path / 'one')}@0:1")
    twice = made_bases.network()
    twice.set_weights([2 * weight for weight in twice.get_weights()])
    monkeypatch.setattr(made_bases, "network", lambda: twice)
    two = load_backbone(f"savedmodel:{save_signature(tmp_path / 'two')}@0:1")
    assert FrozenBackbone(one).fingerprint != FrozenBackbone(two).fingerprint


def test_a_keras_file_holds_the_whole_base(name, tmp_path, expected):
    keras.utils.set_random_seed(0)
    model = classifier_of(load_backbone(name), 3)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_allclose(loaded(IMAGES), model(IMAGES), rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        loaded.predict_on_batch(IMAGES), model(IMAGES), rtol=0, atol=1e-6
    )
    assert weights_bytes(loaded) > 4 * (27 * DIM + DIM)


def test_precision_and_weights_are_the_files_own(name):
    with pytest.raises(InvalidArgument, match="computes as it was made"):
        load_backbone(name, dtype="bfloat16")
    with pytest.raises(InvalidArgument, match="cannot be given"):
        load_backbone(name, weights="none")
    with pytest.raises(InvalidArgument, match="must be 16x16"):
        load_backbone(name, image_size=32)


def test_a_file_that_is_not_there(tmp_path):
    for kind in ("onnx", "savedmodel"):
        with pytest.raises(InvalidArgument, match="missing"):
            load_backbone(f"{kind}:{tmp_path / 'missing'}@0:1")


def test_a_damaged_file(tmp_path, saved_path):
    pytest.importorskip("onnx")
    (tmp_path / "a.onnx").write_bytes(b"no model")
    with pytest.raises((WeightsUnavailable, InvalidArgument), match=r"a\.onnx"):
        load_backbone(f"onnx:{tmp_path / 'a.onnx'}@0:1")
    content = (saved_path / "saved_model.pb").read_bytes()
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved" / "saved_model.pb").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsUnavailable, match="saved is damaged"):
        load_backbone(f"savedmodel:{tmp_path / 'saved'}@0:1")


# ONNX


@pytest.mark.parametrize(
    "options",
    [
        {"channels_first": False},
        {"batch": 1},
        {"batch": 3},
        {"feature_map": True},
        {"channels_first": False, "feature_map": True},
        {"beside": True},
        {"half": True},
    ],
    ids=str,
)
def test_onnx_files_in_many_forms(options, tmp_path, expected):
    pytest.importorskip("onnxruntime")
    path = save_onnx(tmp_path / "a.onnx", **options)
    base = load_backbone(f"onnx:{path}@0:1")
    tolerance = 2e-3 if options.get("half") else 1e-5
    np.testing.assert_allclose(base(IMAGES), expected, rtol=0, atol=tolerance)


def test_weights_beside_an_onnx_file_that_are_missing(tmp_path):
    pytest.importorskip("onnxruntime")
    path = save_onnx(tmp_path / "a.onnx", beside=True)
    (tmp_path / "a.onnx.data").unlink()
    with pytest.raises(WeightsUnavailable, match="missing"):
        load_backbone(f"onnx:{path}@0:1")


def test_an_onnx_file_of_something_else(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["tokens"], ["out"])],
        "text",
        [value("tokens", onnx.TensorProto.FLOAT, (1, 8))],
        [value("out", onnx.TensorProto.FLOAT, (1, 8))],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    model = onnx.helper.make_model(graph, opset_imports=opsets)
    model.ir_version = 8
    onnx.save(model, tmp_path / "text.onnx")
    with pytest.raises(InvalidArgument, match="tokens"):
        load_backbone(f"onnx:{tmp_path / 'text.onnx'}@0:1")


# SavedModel


def test_a_reusable_saved_model(tmp_path, expected):
    tf.saved_model.save(Reusable(), str(tmp_path / "hub"))
    base = load_backbone(f"savedmodel:{tmp_path / 'hub'}@0:1", image_size=SIDE)
    np.testing.assert_allclose(base(IMAGES), expected, rtol=0, atol=1e-5)
    with pytest.raises(InvalidArgument, match="leaves the image size open"):
        load_backbone(f"savedmodel:{tmp_path / 'hub'}@0:1")


def test_the_only_vector_of_several_outputs_is_the_features(tmp_path, expected):
    def outputs(features):
        return {"maps": features[:, None, None], "vector": 2 * features}

    path = save_signature(tmp_path / "two", outputs=outputs)
    base = load_backbone(f"savedmodel:{path}@0:1")
    np.testing.assert_allclose(base(IMAGES), 2 * expected, rtol=0, atol=1e-5)


def test_outputs_that_leave_a_choice_are_refused(tmp_path):
    path = save_signature(tmp_path / "two", outputs=lambda f: {"a": f, "b": 2 * f})
    with pytest.raises(InvalidArgument, match="only output"):
        load_backbone(f"savedmodel:{path}@0:1")


def test_a_saved_model_that_does_more_than_compute_is_refused(tmp_path):
    def outputs(features):
        with tf.control_dependencies([tf.io.write_file("/dev/null", "x")]):
            return {"vector": tf.identity(features)}

    path = save_signature(tmp_path / "writes", outputs=outputs)
    with pytest.raises(InvalidArgument, match="WriteFile"):
        load_backbone(f"savedmodel:{path}@0:1")


def test_a_saved_model_of_encoded_images_is_refused(tmp_path):
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.string)])
    def serve(image_bytes):
        return {"n": tf.strings.length(image_bytes)}

    tf.saved_model.save(tf.Module(), str(tmp_path / "a"), {"serving_default": serve})
    with pytest.raises(InvalidArgument, match="image_bytes string"):
        load_backbone(f"savedmodel:{tmp_path / 'a'}@0:1")


@pytest.mark.parametrize(
    "make, found",
    [
        (lambda: tf.nn.relu(tf.ones(3)), []),
        (lambda: tf.random.uniform([3]), ["RandomUniform"]),
        (lambda: tf.io.write_file("a", "b"), ["WriteFile"]),
        (lambda: tf.numpy_function(lambda: 1.0, [], tf.float32), ["PyFunc"]),
        (
            lambda: tf.numpy_function(lambda: 1.0, [], tf.float32, stateful=False),
            ["PyFuncStateless"],
        ),
    ],
)
def test_which_operations_do_more_than_compute(make, found):
    with tf.Graph().as_default() as graph:
        make()
    assert impure_operations(graph.as_graph_def()) == found


def test_operations_inside_a_branch_are_looked_at():
    @tf.function
    def run(x):
        return tf.cond(x > 0, lambda: tf.random.uniform([]), lambda: 0.0)

    traced = run.get_concrete_function(tf.TensorSpec((), tf.float32))
    assert "RandomUniform" in impure_operations(traced.graph.as_graph_def())


def test_a_graph_in_a_keras_file_may_only_compute(tmp_path):
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(tf.float32, name="images")
        name = tf.strings.as_string(tf.reduce_sum(images))
        number = tf.strings.to_number(tf.io.read_file(name))
        tf.identity(number, name="keras_rsft_features")
    content = graph.as_graph_def().SerializeToString()
    assert impure_operations(graph.as_graph_def()) == [
        "AsString", "ReadFile", "StringToNumber"
    ]  # fmt: skip
    layer = GraphNetwork(dim=1, digest="0", content=content)
    images = keras.Input((SIDE, SIDE, 3))
    keras.Model(images, layer(images)).save(tmp_path / "hostile.keras")
    with pytest.raises(InvalidArgument, match="ReadFile"):
        load_backbone(tmp_path / "hostile.keras")
