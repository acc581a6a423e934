"""What TF Serving relies on, proved without its binary.

The C program loads a version as the server does, `saved_model_cli` reads its
signatures, and stand-ins for the server's two ports are asked by the example client.
"""

from __future__ import annotations

import base64
import contextlib
import importlib.util
import json
import shutil
import subprocess
import sys
import textwrap
import threading
from concurrent import futures
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from made_bases import classifier_of

from keras_rsft.backbones._load import load_backbone
from keras_rsft.export import _saved_model as saved_model
from keras_rsft.export._saved_model import export_saved_model

NAMES = ("blue", "green", "réd")
CLIENT = Path(__file__).parents[1] / "examples" / "serving_client.py"
C_PROGRAM = Path(__file__).with_name("load_saved_model.c")
NEEDS_SERVING = pytest.mark.skipif(
    not saved_model.warmup_available(), reason="needs the extra serving"
)


@pytest.fixture(scope="module")
def version(tiny_base_file, tmp_path_factory):
    classifier = classifier_of(load_backbone(str(tiny_base_file)), 3)
    directory = tmp_path_factory.mktemp("served") / "photos"
    return export_saved_model(classifier, directory, class_names=NAMES)


@pytest.fixture(scope="module")
def loaded(version):
    return tf.saved_model.load(str(version))


@pytest.fixture(scope="module")
def serve(loaded):
    return loaded.signatures["serving_default"]


@pytest.fixture(scope="module")
def files(photo_folder, tmp_path_factory):
    """Two images with something broken between them."""
    broken = tmp_path_factory.mktemp("broken") / "broken.jpg"
    broken.write_bytes(b"no image")
    return [photo_folder / "red" / "01.png", broken, photo_folder / "blue" / "02.png"]


@pytest.fixture(scope="module")
def expected(serve, files):
    served = serve(image_bytes=tf.constant([file.read_bytes() for file in files]))
    return {name: value.numpy() for name, value in served.items()}


@NEEDS_SERVING
def test_warmup_requests_are_what_the_server_replays(version, serve):
    from tensorflow_serving.apis import prediction_log_pb2

    records = tf.data.TFRecordDataset(str(version / saved_model.WARMUP_FILE))
    sizes = []
    for record in records.as_numpy_iterator():
        log = prediction_log_pb2.PredictionLog.FromString(record)
        request = log.predict_log.request
        assert request.model_spec.name == "photos"
        assert request.model_spec.signature_name == "serving_default"
        assert set(request.inputs) == {"image_bytes"}
        images = tf.make_ndarray(request.inputs["image_bytes"])
        served = serve(image_bytes=tf.constant(images))
        assert served["valid"].numpy().all()
        sizes.append(len(images))
    assert sizes == list(saved_model.WARMUP_BATCHES)


def test_warmup_can_be_left_out(tiny_base_file, tmp_path, monkeypatch):
    classifier = classifier_of(load_backbone(str(tiny_base_file)), 3)
    options = {"class_names": NAMES}
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    monkeypatch.setattr(saved_model, "warmup_available", lambda: False)
    written = export_saved_model(classifier, tmp_path / "x", **options)
    assert not (written / "assets.extra").exists()
    with pytest.raises(ImportError, match=r"keras_rsft\[serving\]"):
        export_saved_model(classifier, tmp_path / "x", warmup=True, **options)


def test_signatures_are_what_rest_and_batching_need(version):
    """Names in `_bytes` are base64 in REST; a row needs one value of each output."""
    from tensorflow.core.protobuf import saved_model_pb2

    content = (version / "saved_model.pb").read_bytes()
    (meta_graph,) = saved_model_pb2.SavedModel.FromString(content).meta_graphs
    assert list(meta_graph.meta_info_def.tags) == ["serve"]
    signature = meta_graph.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    (name,) = signature.inputs
    assert name.endswith("_bytes")
    assert signature.inputs[name].dtype == tf.string.as_datatype_enum
    for tensor in (*signature.inputs.values(), *signature.outputs.values()):
        assert tensor.tensor_shape.dim[0].size == -1
    types = {name: one.dtype for name, one in signature.outputs.items()}
    assert types == {
        "label": tf.string.as_datatype_enum,
        "score": tf.float32.as_datatype_enum,
        "probabilities": tf.float32.as_datatype_enum,
        "valid": tf.bool.as_datatype_enum,
    }


def test_the_server_sees_versions_and_nothing_else(version):
    names = [p.name for p in version.parent.iterdir() if p.is_dir()]
    assert names == ["1"]


@pytest.mark.slow
def test_saved_model_cli_shows_and_runs(version, files, expected, tmp_path):
    images = np.random.default_rng(0).uniform(0, 255, (2, 16, 16, 3))
    np.save(tmp_path / "images.npy", images.astype("float32"))
    np.save(tmp_path / "encoded.npy", np.array([file.read_bytes() for file in files]))
    run = ["run", "--dir", version, "--tag_set", "serve", "--overwrite"]
    shown = _saved_model_cli(
        ["show", "--dir", version, "--all"],
        [*run, "--signature_def", "serving_images", "--outdir", tmp_path / "a",
         "--inputs", f"images={tmp_path / 'images.npy'}"],
        [*run, "--signature_def", "serving_default", "--outdir", tmp_path / "b",
         "--inputs", f"image_bytes={tmp_path / 'encoded.npy'}"],
    )  # fmt: skip
    assert "signature_def['serving_default']" in shown
    assert "inputs['image_bytes'] tensor_info" in shown
    probabilities = np.load(tmp_path / "a" / "probabilities.npy")
    np.testing.assert_allclose(probabilities.sum(axis=-1), 1, atol=1e-5)
    np.testing.assert_allclose(
        np.load(tmp_path / "b" / "score.npy"), expected["score"], atol=1e-6
    )


def _saved_model_cli(*commands) -> str:
    """Runs the tool's commands one after the other in one process."""
    program = textwrap.dedent("""
        import json, sys
        from tensorflow.python.tools import saved_model_cli
        for command in json.loads(sys.argv[1]):
            sys.argv = ["saved_model_cli", *command]
            try:
                saved_model_cli.main()
            except SystemExit as stop:
                if stop.code:
                    raise
    """)
    commands = json.dumps([[str(word) for word in command] for command in commands])
    result = subprocess.run(
        [sys.executable, "-c", program, commands],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout


@pytest.mark.slow
def test_the_c_library_loads_and_runs_it(version, files, expected, tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    libraries = Path(tf.sysconfig.get_lib())
    found = [libraries / f"libtensorflow_{part}.so.2" for part in ("cc", "framework")]
    if compiler is None:
        pytest.skip("no C compiler is installed")
    if not all(library.exists() for library in found):
        pytest.skip("this build of TensorFlow has no C library of that name")
    program = tmp_path / "load_saved_model"
    built = subprocess.run(
        [compiler, "-O1", "-o", program, C_PROGRAM, f"-I{tf.sysconfig.get_include()}",
         *found, f"-Wl,-rpath,{libraries}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr
    result = subprocess.run(
        [program, version, *files], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-2000:]
    lines = [line.split("\t") for line in result.stdout.splitlines()]
    assert [line[0] for line in lines] == [
        label.decode() for label in expected["label"]
    ]
    scores = [float(line[1]) for line in lines]
    np.testing.assert_allclose(scores, expected["score"], atol=1e-5)
    assert [line[2] for line in lines] == ["1", "0", "1"]


def _load_client():
    spec = importlib.util.spec_from_file_location("serving_client", CLIENT)
    client = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(client)
    return client


def _ask(monkeypatch, capsys, *arguments, status=None) -> tuple[list[list[str]], str]:
    monkeypatch.setattr(sys, "argv", ["serving_client.py", *map(str, arguments)])
    if status is None:
        _load_client().main()
    else:
        with pytest.raises(SystemExit) as stop:
            _load_client().main()
        assert stop.value.code == status
    captured = capsys.readouterr()
    return [line.split("\t") for line in captured.out.splitlines()], captured.err


def _check_answers(lines, errors, files, expected):
    assert [line[0] for line in lines] == [str(files[0]), str(files[2])]
    assert [line[1] for line in lines] == [
        expected["label"][at].decode() for at in (0, 2)
    ]
    assert [line[2] for line in lines] == [
        f"{expected['score'][at]:.4f}" for at in (0, 2)
    ]
    assert "broken.jpg: not an image" in errors


@pytest.fixture
def grpc_address(loaded):
    """Implements `PredictionService.Predict` over the loaded model."""
    grpc = pytest.importorskip("grpc")
    pytest.importorskip("tensorflow_serving.apis")
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    class Service(prediction_service_pb2_grpc.PredictionServiceServicer):
        def Predict(self, request, context):
            if request.model_spec.name != "photos":
                context.abort(grpc.StatusCode.NOT_FOUND, "Servable not found")
            signature = loaded.signatures[request.model_spec.signature_name]
            inputs = {
                name: tf.constant(tf.make_ndarray(value))
                for name, value in request.inputs.items()
            }
            response = predict_pb2.PredictResponse()
            for name, value in signature(**inputs).items():
                response.outputs[name].CopyFrom(tf.make_tensor_proto(value.numpy()))
            return response

    server = grpc.server(futures.ThreadPoolExecutor(max_workers=1))
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(
        Service(), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(grace=None).wait()


def test_the_example_client_by_grpc(grpc_address, files, expected, monkeypatch, capsys):
    lines, errors = _ask(
        monkeypatch, capsys, "photos", *files, "--grpc", "--address", grpc_address,
        status=1,
    )  # fmt: skip
    _check_answers(lines, errors, files, expected)
    with pytest.raises(SystemExit, match="Servable not found"):
        _ask(monkeypatch, capsys, "x", files[0], "--grpc", "--address", grpc_address)


@pytest.fixture
def rest_address(serve):
    """Answers `:predict` in the row format of the server's REST port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            assert self.path == "/v1/models/photos:predict"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            images = [
                base64.b64decode(one["image_bytes"]["b64"]) for one in body["instances"]
            ]
            served = serve(image_bytes=tf.constant(images, tf.string))
            columns = {name: value.numpy().tolist() for name, value in served.items()}
            columns["label"] = [label.decode() for label in columns["label"]]
            rows = zip(*columns.values(), strict=True)
            answer = [dict(zip(columns, row, strict=True)) for row in rows]
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"predictions": answer}).encode())

        def log_message(self, *arguments):
            pass

    with _serving(Handler) as address:
        yield address


@contextlib.contextmanager
def _serving(handler):
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def test_the_example_client_by_rest(rest_address, files, expected, monkeypatch, capsys):
    lines, errors = _ask(
        monkeypatch, capsys, "photos", *files, "--address", rest_address, status=1
    )
    _check_answers(lines, errors, files, expected)


def test_the_client_answers_what_it_can(rest_address, files, monkeypatch, capsys):
    missing = files[0].with_name("missing.png")
    with pytest.raises(SystemExit) as stop:
        _ask(monkeypatch, capsys, "photos", missing, *files, "--address", rest_address)
    assert stop.value.code == 1
    captured = capsys.readouterr()
    assert len(captured.out.splitlines()) == 2
    assert "missing.png: No such file" in captured.err


def test_one_request_stays_below_the_limit_of_grpc(tmp_path, monkeypatch):
    client = _load_client()
    monkeypatch.setattr(client, "MAX_REQUEST_BYTES", 100)
    monkeypatch.setattr(client, "MAX_REQUEST_IMAGES", 3)
    images = [(tmp_path / "x", bytes(size)) for size in (60, 40, 1, 120, 1, 1, 1, 1)]
    sizes = [[len(image) for _, image in group] for group in client.grouped(images)]
    assert sizes == [[60, 40], [1], [120], [1, 1, 1], [1]]


@pytest.mark.parametrize("body", [b"<html>", b"{}", b'{"predictions": [{"x": 1}]}'])
def test_a_server_of_another_kind(body, files, monkeypatch, capsys):
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    with _serving(Handler) as address, pytest.raises(SystemExit, match="not as TF"):
        _ask(monkeypatch, capsys, "photos", files[0], "--address", address)


def test_the_client_names_the_package_that_it_lacks(files, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(SystemExit, match="pip install tensorflow-serving-api"):
        _ask(monkeypatch, capsys, "photos", files[0], "--grpc")


def test_the_client_without_a_server(files, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="No server at"):
        _ask(monkeypatch, capsys, "photos", files[0], "--address", "127.0.0.1:1")
