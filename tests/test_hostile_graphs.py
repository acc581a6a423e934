"""Models from somebody else: what they are made of computes, and does nothing else."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_bases import SIDE, Reusable, network, save_signature

from keras_rsft._predict import predict_files
from keras_rsft.backbones import _build, _foreign
from keras_rsft.backbones._build import build_classifier, load_keras_file
from keras_rsft.backbones._load import load_backbone
from keras_rsft.errors import DataError, InvalidArgument, WeightsUnavailable
from keras_rsft.export._export_run import read_run
from keras_rsft.export._saved_model import export_saved_model

IMAGES = np.zeros((1, SIDE, SIDE, 3), "float32")


@pytest.fixture
def dump(tmp_path):
    """Where hostile operations would write."""
    return tmp_path / "dump"


def debugging(dump):
    """Operations that a graph passes its values through, and that write them."""
    options = {"debug_urls": [f"file://{dump}"], "tensor_name": "a:0"}
    counts = tf.raw_ops.DebugNanCount
    return {
        "DebugIdentity": lambda x: tf.raw_ops.DebugIdentity(input=x, **options),
        "DebugNanCount": lambda x: x + tf.cast(counts(input=x, **options), x.dtype),
        "DebugIdentityV2": lambda x: tf.raw_ops.DebugIdentityV2(
            input=x, tensor_debug_mode=2, debug_urls=[f"file://{dump}"]
        ),
        "WriteFile": lambda x: writing(x, dump),
        "Abort": aborting,
        "PrintV2": printing,
    }


def writing(x, dump):
    with tf.control_dependencies([tf.io.write_file(str(dump / "file"), "x")]):
        return tf.identity(x)


def aborting(x):
    from tensorflow.python.ops.gen_control_flow_ops import abort

    with tf.control_dependencies([abort(exit_without_error=True)]):
        return tf.identity(x)


def printing(x):
    with tf.control_dependencies([tf.raw_ops.PrintV2(input="x")]):
        return tf.identity(x)


HOSTILE = ("DebugIdentity", "DebugNanCount", "DebugIdentityV2", "WriteFile", "Abort",
           "PrintV2")  # fmt: skip


class TestSavedModel:
    @pytest.mark.parametrize("name", HOSTILE)
    @pytest.mark.parametrize("nested", [False, True])
    def test_a_backbone_is_not_run(self, tmp_path, dump, name, nested):
        operation = debugging(dump)[name]
        inner = tf.function(operation) if nested else operation
        path = save_signature(tmp_path / "a", outputs=lambda f: {"v": inner(f)})
        shutil.rmtree(dump, ignore_errors=True)
        with pytest.raises(InvalidArgument, match=f"may only compute.*{name}"):
            load_backbone(f"savedmodel:{path}@0:1")
        assert not dump.exists()

    def test_nor_is_an_export(self, tmp_path, dump):
        labels = tmp_path / "labels.txt"
        labels.write_text("cat\ndog\n")
        module = tf.Module()
        module.labels = tf.saved_model.Asset(str(labels))

        @tf.function(
            input_signature=[
                tf.TensorSpec((None, SIDE, SIDE, 3), tf.float32, name="images")
            ]
        )
        def serve(images):
            shares = tf.ones([tf.shape(images)[0], 2]) / 2
            return {"probabilities": debugging(dump)["DebugIdentity"](shares)}

        tf.saved_model.save(module, str(tmp_path / "1"), {"serving_images": serve})
        with pytest.raises(InvalidArgument, match="DebugIdentity"):
            list(predict_files(tmp_path / "1", ["x.png"]))

    def test_what_runs_while_it_is_loaded(self, tmp_path, dump):
        class Table(tf.saved_model.experimental.TrackableResource):
            def _create_resource(self):
                return tf.raw_ops.MutableHashTableV2(
                    key_dtype=tf.int64, value_dtype=tf.int64
                )

            def _initialize(self):
                return writing(tf.constant(1), dump)

        path = save_signature(tmp_path / "good")
        load_backbone(f"savedmodel:{path}@0:1")
        module = Reusable()
        module.table = Table()
        tf.saved_model.save(module, str(tmp_path / "a"))
        shutil.rmtree(dump, ignore_errors=True)
        with pytest.raises(InvalidArgument, match="WriteFile"):
            load_backbone(f"savedmodel:{tmp_path / 'a'}@0:1", image_size=SIDE)
        assert not dump.exists()

    def test_tables_of_constants_are_no_harm(self, tmp_path):
        module = Reusable()
        constants = tf.lookup.KeyValueTensorInitializer([1, 2], [3, 4])
        module.table = tf.lookup.StaticHashTable(constants, -1)
        tf.saved_model.save(module, str(tmp_path / "a"))
        base = load_backbone(f"savedmodel:{tmp_path / 'a'}@0:1", image_size=SIDE)
        assert base(IMAGES).shape == (1, 6)

    def test_loops_and_branches_are_no_harm(self, tmp_path):
        def outputs(features):
            doubled = tf.map_fn(lambda row: 2 * row, features)
            return {
                "v": tf.cond(tf.size(features) > 0, lambda: doubled, lambda: features)
            }

        path = save_signature(tmp_path / "a", outputs=outputs)
        found = load_backbone(f"savedmodel:{path}@0:1")(IMAGES + 100)
        plain = load_backbone(f"savedmodel:{save_signature(tmp_path / 'b')}@0:1")
        np.testing.assert_allclose(found, 2 * plain(IMAGES + 100), rtol=1e-5)

    def test_one_of_tensorflow_1_and_one_with_a_pipe(self, tmp_path):
        builder = tf.compat.v1.saved_model.Builder(str(tmp_path / "old"))
        with tf.Graph().as_default(), tf.compat.v1.Session() as session:
            builder.add_meta_graph_and_variables(session, ["serve"])
        builder.save()
        with pytest.raises(WeightsUnavailable, match=r"tf\.saved_model\.save"):
            load_backbone(f"savedmodel:{tmp_path / 'old'}@0:1")
        path = save_signature(tmp_path / "a")
        (path / "variables" / "variables.index").unlink()
        os.mkfifo(path / "variables" / "variables.index")
        with pytest.raises(WeightsUnavailable, match="neither a file nor a folder"):
            load_backbone(f"savedmodel:{path}@0:1")

    def test_our_own_exports(self, tmp_path, photo_folder, tiny_base):
        model = build_classifier(tiny_base, 3)
        path = export_saved_model(model, tmp_path / "m", class_names=("a", "b", "c"))
        photos = sorted(photo_folder.glob("*/0*.png"))[:2]
        assert all(one.error is None for one in predict_files(path, photos))


def graph_file(path, operation):
    """A `.keras` file of a layer that keeps a graph."""
    with tf.Graph().as_default() as graph:
        images = tf.compat.v1.placeholder(
            tf.float32, (None, SIDE, SIDE, 3), name="images"
        )
        features = operation(tf.reduce_mean(images, (1, 2)))
        tf.identity(features, name="keras_rsft_features")
    content = graph.as_graph_def().SerializeToString()
    layer = _foreign.GraphNetwork(dim=3, digest="0", content=content)
    images = keras.Input((SIDE, SIDE, 3))
    keras.Model(images, layer(images)).save(path)
    return path


# What a layer of a config may be changed into: its entries.
FORGED = {
    "Lambda": {"module": "keras.layers", "class_name": "Lambda"},
    "TFSMLayer": {"module": "keras.layers", "class_name": "TFSMLayer"},
    "StringLookup": {
        "module": "keras.src.layers.preprocessing.string_lookup",
        "class_name": "StringLookup",
        "config": {"name": "here", "vocabulary": "/etc/hostname"},
    },
    "Wrapper": {"module": "keras.layers", "class_name": "TorchModuleWrapper"},
    "WhileLoop": {
        "module": "keras.src.ops.core",
        "class_name": "WhileLoop",
        "config": {"name": "here", "cond": "relu", "body": "relu"},
    },
    "os.system": {"module": "os", "class_name": "system", "config": {}},
    "None.Lambda": {"module": None, "class_name": "Lambda"},
    "__lambda__": {
        "config": {"name": "here", "units": {"class_name": "__lambda__", "config": {}}}
    },
    "keras.layers.Lambda": {
        "config": {
            "name": "here",
            "units": 1,
            "kernel_initializer": {
                "module": "keras.layers", "class_name": "Lambda", "config": {},
                "registered_name": None,
            },
        }
    },
}  # fmt: skip


def forged(path, entries):
    """A `.keras` file with a layer that is changed afterwards."""
    images = keras.Input((SIDE, SIDE, 3))
    pooled = keras.layers.GlobalAveragePooling2D()(images)
    keras.Model(images, keras.layers.Dense(2, name="here")(pooled)).save(path)
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    config = json.loads(members["config.json"])
    (layer,) = (one for one in config["config"]["layers"] if one["name"] == "here")
    layer |= entries
    members["config.json"] = json.dumps(config).encode()
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


class TestKerasFile:
    @pytest.mark.parametrize("name", HOSTILE)
    def test_a_kept_graph_is_not_run(self, tmp_path, dump, name):
        path = graph_file(tmp_path / "model.keras", debugging(dump)[name])
        message = f"may only compute.*{name}"
        with pytest.raises(InvalidArgument, match=message):
            load_backbone(path)
        with pytest.raises(InvalidArgument, match=message):  # Of a run, as `predict`,
            list(predict_files(path, ["x.png"]))
        with pytest.raises(InvalidArgument, match=message):  # and as `export`.
            read_run(tmp_path)
        assert not dump.exists()

    def test_a_kept_graph_that_computes(self, tmp_path):
        base = load_backbone(graph_file(tmp_path / "a.keras", tf.identity))
        np.testing.assert_allclose(base(IMAGES + 3), [[3, 3, 3]])

    def test_a_damaged_graph(self, tmp_path):
        layer = _foreign.GraphNetwork(dim=3, digest="0", content=b"\xff" * 9)
        images = keras.Input((SIDE, SIDE, 3))
        keras.Model(images, layer(images)).save(tmp_path / "a.keras")
        with pytest.raises(DataError, match=r"graph_network.* is damaged"):
            load_keras_file(tmp_path / "a.keras")

    @pytest.mark.parametrize("name", FORGED)
    def test_layers_that_load_code_or_files(self, tmp_path, name):
        path = forged(tmp_path / "model.keras", FORGED[name])
        with pytest.raises(InvalidArgument, match=f"is made of .*{name}"):
            load_backbone(path)
        with pytest.raises(InvalidArgument, match="is made of"):
            list(predict_files(path, ["x.png"]))

    def test_tokenizers_of_keras_hub_read_files(self, tmp_path):
        pytest.importorskip("keras_hub")
        for module in (
            "tokenizers.byte_pair_tokenizer",
            "layers.modeling.f_net_encoder",
        ):
            entries = {
                "module": f"keras_hub.src.{module}",
                "class_name": "BytePairTokenizer",
                "registered_name": "keras_hub>BytePairTokenizer",
            }
            with pytest.raises(InvalidArgument, match="BytePairTokenizer"):
                load_backbone(forged(tmp_path / "model.keras", entries))

    def test_stock_layers_operations_and_own_classes(self, tmp_path):
        @keras.saving.register_keras_serializable(package="own")
        class Doubled(keras.layers.Layer):
            def call(self, x):
                return 2 * x

        images = keras.Input((SIDE, SIDE, 3))
        x = keras.layers.Normalization(mean=1.0, variance=4.0)(images)
        x = keras.layers.RandomFlip()(keras.layers.Rescaling(0.5)(x))
        x = keras.layers.Conv2D(4, 3, activation=keras.activations.gelu)(x)
        x = keras.ops.maximum(x, 0) * 2 - keras.ops.mean(x, keepdims=True)
        x = keras.layers.TimeDistributed(keras.layers.Dense(4))(x)
        x = keras.layers.LSTM(5)(keras.ops.reshape(x, (-1, 14 * 14, 4)))
        keras.Model(images, Doubled()(x)).save(tmp_path / "a.keras")
        assert load_backbone(tmp_path / "a.keras")(IMAGES).shape == (1, 5)

    def test_an_own_file_of_the_old_format_is_none(self, tmp_path):
        path = tmp_path / "model.keras"
        network().save(tmp_path / "old.h5")
        (tmp_path / "old.h5").rename(path)
        with pytest.raises(WeightsUnavailable, match=r"not a `\.keras` file"):
            load_backbone(path)
        with pytest.raises(DataError, match="cannot be read"):
            list(predict_files(path, ["x.png"]))


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(_build.applications()))
def test_networks_of_keras_only_compute(name):
    application = _build.applications()[name]
    body = _build.build_application(application, weights="none", image_size=None)
    model = _build.assemble(body, dtype="float32")
    _build.require_computing(json.loads(model.to_json()), name)
    run = tf.function(lambda images: model(images, training=False))
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)
    graph = run.get_concrete_function(spec).graph.as_graph_def()
    assert _foreign.impure_operations(graph) == []
    keras.backend.clear_session()


ENDLESS = textwrap.dedent("""
    from keras_rsft import _runtime

    _runtime.SECONDS_TO_END = 1.0
    import tensorflow as tf

    with _runtime.termination_raises():
        on, step = (lambda a: a > 0), (lambda a: (a,))
        loop = tf.function(lambda x: tf.while_loop(on, step, (x,)))
        loop = loop.get_concrete_function(tf.constant(1.0))
        print("begun", flush=True)
        loop(tf.constant(1.0))
""")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_graph_without_end_does_not_outlive_a_request_to_end(number):
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS], stdout=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    try:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.5)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
