"""The two configurations beside a model are what TF Serving parses."""

from __future__ import annotations

import pytest

from keras_rsft.export import _saved_model as saved_model


def test_the_models_config_parses():
    pytest.importorskip("tensorflow_serving.config")
    from google.protobuf import text_format
    from tensorflow_serving.config import model_server_config_pb2

    text = saved_model.models_config("photos")
    config = text_format.Parse(text, model_server_config_pb2.ModelServerConfig())
    (model,) = config.model_config_list.config
    assert (model.name, model.base_path) == ("photos", "/models/photos")


def _batching_parameters():
    """The message that the server reads, which its Python package leaves out.

    Fields as in `session_bundle_config.proto` of TensorFlow Serving.
    """
    from google.protobuf import (
        descriptor_pb2,
        descriptor_pool,
        message_factory,
        wrappers_pb2,
    )

    fields = {
        "max_batch_size": "Int64Value",
        "batch_timeout_micros": "Int64Value",
        "max_enqueued_batches": "Int64Value",
        "num_batch_threads": "Int64Value",
        "thread_pool_name": "StringValue",
        "enable_large_batch_splitting": "BoolValue",
        "max_execution_batch_size": "Int64Value",
    }
    wrappers = wrappers_pb2.DESCRIPTOR
    file = descriptor_pb2.FileDescriptorProto(
        name="batching.proto", syntax="proto3", dependency=[wrappers.name]
    )
    message = file.message_type.add(name="BatchingParameters")
    for number, (name, kind) in enumerate(fields.items(), start=1):
        message.field.add(
            name=name, number=number, type=11, label=1,
            type_name=f".google.protobuf.{kind}",
        )  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers.serialized_pb)
    pool.Add(file)
    return message_factory.GetMessageClass(
        pool.FindMessageTypeByName("BatchingParameters")
    )()


def test_the_batching_config_parses_and_fits_together():
    text_format = pytest.importorskip("google.protobuf.text_format")
    text = saved_model.batching_config()
    found = text_format.Parse(text, _batching_parameters())
    assert found.enable_large_batch_splitting.value
    # The server refuses batches that are run larger than they may be sent.
    assert 1 <= found.max_execution_batch_size.value <= found.max_batch_size.value
    assert found.max_batch_size.value >= max(saved_model.WARMUP_BATCHES)
    assert found.batch_timeout_micros.value < 10_000
    assert found.max_enqueued_batches.value > 0
    with pytest.raises(text_format.ParseError):
        text_format.Parse(text + "max_batch: 3", _batching_parameters())
