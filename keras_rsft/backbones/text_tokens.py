"""Texts to numbers of word pieces, as a Keras layer."""

from __future__ import annotations

import functools
import json
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from keras_rsft.backbones.assembly import first_line
from keras_rsft.backbones.foreign import KeptFile
from keras_rsft.errors import WeightsUnavailable

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
        """Returns the numbers of the pieces, int32 `(batch, longest)`, 0 behind them.

        Args:
            texts: Shape `(batch,)`, in UTF-8; what is not UTF-8 is replaced. Of a text
                the first 32,768 characters are read.
        """
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
