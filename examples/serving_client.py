"""Sends image files to TF Serving, by REST or by gRPC.

    python examples/serving_client.py photos photo.jpg another.png
    python examples/serving_client.py photos photo.jpg --grpc

Prints one line per file: path, label and score, separated by tabs. Lists files that
cannot be opened or decoded on standard error and then exits with 1. REST needs only
Python; gRPC needs `pip install tensorflow-serving-api`.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator
from pathlib import Path

SIGNATURE = "serving_default"
TIMEOUT_SECONDS = 60
# Requests are split to stay well below gRPC's limit of 4 MB per message and below the
# number of images in `batching.config`.
MAX_REQUEST_BYTES = 3_000_000
MAX_REQUEST_IMAGES = 32

Answer = tuple[str, float, bool]  # label, score, valid
Image = tuple[Path, bytes]


def ask_by_rest(address: str, model: str, images: list[bytes]) -> list[Answer]:
    """Posts `{"instances": [{"image_bytes": {"b64": ...}}, ...]}`."""
    encoded = [base64.b64encode(image).decode("ascii") for image in images]
    body = {
        "signature_name": SIGNATURE,
        "instances": [{"image_bytes": {"b64": text}} for text in encoded],
    }
    try:
        request = urllib.request.Request(
            f"http://{address}/v1/models/{model}:predict",
            data=json.dumps(body).encode(),
            headers={"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as response:
            predictions = json.load(response)["predictions"]
        return [(one["label"], one["score"], one["valid"]) for one in predictions]
    except urllib.error.HTTPError as error:
        answer = error.read().decode(errors="replace")
        raise SystemExit(f"The server answered: {answer}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise SystemExit(f"No server at {address}: {reason}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise SystemExit(
            f"{address} answers, but not as TF Serving does with a model that was "
            "exported by keras-rsft."
        ) from error


def ask_by_grpc(address: str, model: str, images: list[bytes]) -> list[Answer]:
    """Calls `PredictionService.Predict`."""
    try:
        import grpc
        import tensorflow as tf
        from tensorflow_serving.apis import predict_pb2, prediction_service_pb2_grpc
    except ImportError as error:
        raise SystemExit(
            "--grpc needs a package: pip install tensorflow-serving-api"
        ) from error

    request = predict_pb2.PredictRequest()
    request.model_spec.name = model
    request.model_spec.signature_name = SIGNATURE
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto(images, tf.string))
    with grpc.insecure_channel(address) as channel:
        service = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        try:
            outputs = service.Predict(request, timeout=TIMEOUT_SECONDS).outputs
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAVAILABLE:
                raise SystemExit(
                    f"No server at {address}: {error.details()}"
                ) from error
            raise SystemExit(f"The server answered: {error.details()}") from error
    labels, scores, valid = (
        tf.make_ndarray(outputs[name]).tolist() for name in ("label", "score", "valid")
    )
    return list(zip([label.decode() for label in labels], scores, valid, strict=True))


def grouped(images: Iterable[Image]) -> Iterator[list[Image]]:
    """Groups images so that each group fits one request."""
    group: list[Image] = []
    room = MAX_REQUEST_BYTES
    for file, image in images:
        if group and (len(image) > room or len(group) == MAX_REQUEST_IMAGES):
            yield group
            group, room = [], MAX_REQUEST_BYTES
        group.append((file, image))
        room -= len(image)
    if group:
        yield group


def readable(files: Iterable[Path], failed: list[Path]) -> Iterator[Image]:
    """Yields files with their content; reports those that cannot be opened."""
    for file in files:
        try:
            yield file, file.read_bytes()
        except OSError as error:
            failed.append(file)
            print(f"{file}: {error.strerror}", file=sys.stderr)


def main() -> None:
    """Parses the arguments, calls the server, prints the answers."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0],
        epilog="Exit status: 0 if every file was answered, 1 if not.",
    )
    parser.add_argument("model", metavar="MODEL", help="the model's name at the server")
    parser.add_argument(
        "files", metavar="FILE", nargs="+", type=Path, help="an image file"
    )
    parser.add_argument(
        "--grpc", action="store_true", help="ask by gRPC in place of REST"
    )
    parser.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="default: 127.0.0.1:8501, with --grpc 127.0.0.1:8500",
    )
    arguments = parser.parse_args()
    ask = ask_by_grpc if arguments.grpc else ask_by_rest
    address = arguments.address or f"127.0.0.1:{8500 if arguments.grpc else 8501}"
    failed: list[Path] = []
    for group in grouped(readable(arguments.files, failed)):
        answers = ask(address, arguments.model, [image for _, image in group])
        for (file, _), (label, score, valid) in zip(group, answers, strict=True):
            if valid:
                print(f"{file}\t{label}\t{score:.4f}")
            else:
                failed.append(file)
                print(f"{file}: not an image that can be decoded", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
