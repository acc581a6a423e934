"""Where the last block of a base begins: by name, by strides, by weights."""

from __future__ import annotations

import keras
import pytest
from keras import layers
from made_bases import last_block

from keras_rsft.backbones._blocks import leaf_layers
from keras_rsft.backbones._load import load_backbone


def names(model):
    return [layer.name for layer in last_block(model)]


def chain(*parts):
    return keras.Sequential([keras.Input((16, 16, 3)), *parts])


def conv(name, strides=1):
    return layers.Conv2D(4, 3, strides=strides, padding="same", name=name)


@pytest.mark.parametrize(
    "backbone, first, earlier, weighted",
    [
        ("efficientnet_lite0", "block15_expand_conv", "block14_add", 4),
        ("mobilenetv2", "block_16_expand", "block_15_add", 4),
        pytest.param(
            "resnet50",
            "conv5_block3_1_conv",
            "conv5_block2_out",
            3,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_known_networks(backbone, first, earlier, weighted):
    base = load_backbone(backbone, weights="none", image_size=32)
    found = names(base)
    assert found[0] == first
    assert earlier not in found
    convolutions = (layers.Conv2D, layers.DepthwiseConv2D)
    assert sum(isinstance(one, convolutions) for one in last_block(base)) == weighted
    body = next(layer for layer in base.layers if isinstance(layer, keras.Model))
    assert found[: len(names(body))] == names(body)  # Then what `assemble` adds.


@pytest.mark.parametrize(
    "before, inside",
    [
        ("conv5_block2_1_conv", ["conv5_block3_1_conv", "conv5_block3_2_conv"]),
        ("block6a_project_conv", ["block7a_expand_conv", "block7a_project_conv"]),
        ("stage3_block1_conv", ["stage3_block2_conv1", "stage3_block2_conv2"]),
        (
            "net_stage_3_block_1_conv",
            ["net_stage_3_block_2_a", "net_stage_3_block_2_b"],
        ),
        ("block_15_project", ["block_16_expand", "block_16_project"]),
        ("block4_conv3", ["block5_conv1", "block5_conv2"]),
        ("block8_9_conv", ["block8_10_mixed", "block8_10_conv"]),
        ("expanded_conv_9_project", ["expanded_conv_10_expand", "expanded_conv_10_bn"]),
        ("conv_pw_12", ["conv_dw_13", "conv_pw_13"]),
    ],
)
def test_names_of_keras_applications(before, inside):
    model = chain(conv("stem_conv"), conv(before), *map(conv, inside), conv("top_conv"))
    assert names(model) == [*inside, "top_conv"]


def test_without_names_behind_the_last_stride():
    model = chain(
        conv("one", 2), conv("two", 2), conv("three"), conv("four"),
        layers.GlobalAveragePooling2D(name="pool"),
    )  # fmt: skip
    assert names(model) == ["three", "four", "pool"]


def test_a_stride_with_nothing_to_train_behind_it_does_not_count():
    model = chain(
        conv("one", 2), conv("two"), layers.BatchNormalization(name="norm"),
        layers.AveragePooling2D(8, name="pool"), layers.Flatten(name="flat"),
    )  # fmt: skip
    assert names(model) == ["two", "norm", "pool", "flat"]


def test_without_strides_from_the_last_weights():
    model = chain(
        conv("one"), conv("two"), layers.BatchNormalization(name="norm"),
        layers.GlobalAveragePooling2D(name="pool"),
    )  # fmt: skip
    assert names(model) == ["two", "norm", "pool"]


def test_the_only_convolution_is_the_last_block(tiny_base):
    found = last_block(tiny_base)
    assert isinstance(found[0], layers.Conv2D)
    assert found == leaf_layers(tiny_base)[-len(found) :]


def test_nothing_to_train():
    assert last_block(chain(layers.Rescaling(2.0), layers.BatchNormalization())) == []
