"""Asks TF Serving about image files, by REST or by gRPC.

    python examples/serving_client.py photos photo.jpg another.png
    python examples/serving_client.py photos photo.jpg --grpc

Prints one line a file: path, label and score, separated by tabs; a file that the
server cannot decode goes to standard error. REST needs nothing but Python; gRPC needs
`pip install tensorflow-serving-api`.
"""

from __future__ import annotations

import argparse
import base64
import json
import sys
import urllib.error
import urllib.request
from pathlib import Path

SIGNATURE = "serving_default"
TIMEOUT_SECONDS = 60
# Requests are split, so that none comes near gRPC's limit of 4 MB a message.
MAX_REQUEST_BYTES = 3_000_000

Answer = tuple[str, float, bool]  # label, score, valid


def ask_by_rest(address: str, model: str, images: list[bytes]) -> list[Answer]:
    """Posts `{"instances": [{"image_bytes": {"b64": ...}}, ...]}`."""
    encoded = [base64.b64encode(image).decode("ascii") for image in images]
    body = {
        "signature_name": SIGNATURE,
        "instances": [{"image_bytes": {"b64": text}} for text in encoded],
    }
    request = urllib.request.Request(
        f"http://{address}/v1/models/{model}:predict",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            predictions = json.load(response)["predictions"]
    except urllib.error.HTTPError as error:
        raise SystemExit(f"The server answered: {error.read().decode()}") from error
    except urllib.error.URLError as error:
        raise SystemExit(f"No server at {address}: {error.reason}") from error
    return [(one["label"], one["score"], one["valid"]) for one in predictions]


def ask_by_grpc(address: str, model: str, images: list[bytes]) -> list[Answer]:
    """Calls `PredictionService.Predict`."""
    import grpc
    import tensorflow as tf
    from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = SIGNATURE
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string))
    with grpc.insecure_channel(address) as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            outputs = service.Predict(request, timeout=TIMEOUT_SECONDS).outputs
        except grpc.RpcError as error:
            raise SystemExit(f"The server answered: {error.details()}") from error
    labels, scores, valid = (
        tf.make_ndarray(outputs[name]).tolist() for name in ("label", "score", "valid")
    )
    return list(zip([label.decode() for label in labels], scores, valid, strict=True))


def requests_of(files: list[Path]) -> list[list[tuple[Path, bytes]]]:
    """Groups the files so that each group fits one request."""
    groups: list[list[tuple[Path, bytes]]] = []
    room = 0
    for file in files:
        image = file.read_bytes()
        if len(image) > room:
            groups.append([])
            room = MAX_REQUEST_BYTES
        groups[-1].append((file, image))
        room -= len(image)
    return groups


def main() -> None:
    """Parses, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the model's name at the server")
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--grpc", action="store_true", help="in place of REST")
    parser.add_argument(
        "--address", help="default: 127.0.0.1:8501, with --grpc 127.0.0.1:8500"
    )
    arguments = parser.parse_args()
    ask = ask_by_grpc if arguments.grpc else ask_by_rest
    address = arguments.address or f"127.0.0.1:{8500 if arguments.grpc else 8501}"
    try:
        groups = requests_of(arguments.files)
    except OSError as error:
        raise SystemExit(f"{error.filename}: {error.strerror}") from error
    for group in groups:
        answers = ask(address, arguments.model, [image for _, image in group])
        for (file, _), (label, score, valid) in zip(group, answers, strict=True):
            if valid:
                print(f"{file}\t{label}\t{score:.4f}")
            else:
                print(f"{file}: not an image that can be decoded", file=sys.stderr)


if __name__ == "__main__":
    main()
