"""The graph of a SavedModel: smaller, and the same."""

import numpy as np
import pytest
import tensorflow as tf

import keras_rsft as rsft
from keras_rsft.export.compact_graph import compact_saved_model, shorten_names


def traced():
    @tf.function(input_signature=[tf.TensorSpec((None,), tf.float32, name="b")])
    def doubled_positive(b):
        with tf.control_dependencies([tf.debugging.assert_positive(b)]):
            return {"doubled": b * 2.0, "count": tf.size(b)}

    return doubled_positive.get_concrete_function()


def test_names_are_short_and_those_of_arguments_and_results_stay():
    function = traced().function_def
    before = [node.op for node in function.node_def]
    results = dict(function.ret)
    shorten_names(function)
    names = [node.name for node in function.node_def]
    assert [node.op for node in function.node_def] == before
    assert len(set(names)) == len(names)
    assert "b" not in names  # The argument's.
    assert max(map(len, names)) <= 2
    assert [argument.name for argument in function.signature.input_arg] == ["b"]
    assert set(function.ret) == set(results)
    for node in function.node_def:
        for reference in node.input:
            assert reference.lstrip("^").partition(":")[0] in {*names, "b"}
        assert "_output_shapes" not in node.attr
    for reference in (*function.ret.values(), *function.control_ret.values()):
        assert reference.partition(":")[0] in names


def test_a_compacted_model_answers_and_refuses_as_before(tmp_path):
    module = tf.Module()
    tf.saved_model.save(module, str(tmp_path), signatures=traced())
    size = (tmp_path / "saved_model.pb").stat().st_size
    fingerprint = (tmp_path / "fingerprint.pb").read_bytes()
    compact_saved_model(tmp_path)
    assert (tmp_path / "saved_model.pb").stat().st_size < size
    assert (tmp_path / "fingerprint.pb").read_bytes() != fingerprint
    serve = tf.saved_model.load(str(tmp_path)).signatures["serving_default"]
    answer = serve(b=tf.constant([1.0, 3.0]))
    np.testing.assert_array_equal(answer["doubled"], [2.0, 6.0])
    assert int(answer["count"]) == 2
    with pytest.raises(tf.errors.InvalidArgumentError):
        serve(b=tf.constant([1.0, -3.0]))


@pytest.mark.slow
def test_an_export_is_at_most_a_tenth_larger_than_its_weights(tmp_path):
    base = rsft.load_backbone("mobilenet_v3_small", weights="none", image_size=32)
    model = rsft.build_classifier(base, 2)
    folder = rsft.export_saved_model(
        model, tmp_path / "small", class_names=["cat", "dog"]
    )
    written = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    assert written <= 1.1 * sum(weight.numpy().nbytes for weight in model.variables)
