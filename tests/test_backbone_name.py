"""Names of backbones, and which features are asked for."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import textwrap

import pytest

from keras_rsft.config import (
    IMAGES,
    TEXTS,
    FeatureConfig,
    PixelScale,
    feature_config,
    is_fixed_network,
    parse_backbone_name,
    parse_pixel_scale,
)
from keras_rsft.errors import InvalidArgument


def test_a_name_is_taken_apart():
    parsed = parse_backbone_name("onnx:models/a@b.onnx@-1:1")
    assert (parsed.kind, parsed.location) == ("onnx", "models/a@b.onnx")
    assert parsed.scale == PixelScale((2 / 255,) * 3, (-1.0,) * 3)
    assert parse_backbone_name("hub:resnet_50_imagenet").scale is None
    assert parse_backbone_name("hub:./preset@imagenet").location == "./preset"
    assert parse_backbone_name("resnet50") is None
    assert parse_backbone_name("C:/bases/own.keras") is None


def test_an_at_sign_in_a_path_that_exists_is_no_scale(tmp_path):
    (tmp_path / "a@0:1").mkdir()
    with pytest.raises(InvalidArgument, match="what pixel values"):
        parse_backbone_name(f"savedmodel:{tmp_path / 'a@0:1'}")
    parsed = parse_backbone_name(f"savedmodel:{tmp_path / 'a@0:1'}@0:255")
    assert parsed.location == str(tmp_path / "a@0:1")
    assert parsed.scale == PixelScale()


@pytest.mark.parametrize(
    "text, black, white",
    [
        ("0:255", (0, 0, 0), (255, 255, 255)),
        ("0:1", (0, 0, 0), (1, 1, 1)),
        ("-1:1", (-1, -1, -1), (1, 1, 1)),
        (
            "imagenet",
            (-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225),
            (0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225),
        ),
        ("0.5:0.4:0/0.5:0.2:1", (-1, -2, 0), (1, 3, 1)),
    ],
)
def test_what_a_scale_makes_of_black_and_white(text, black, white):
    scale = parse_pixel_scale(text)
    assert scale.offset == pytest.approx(black)
    ends = [255 * f + o for f, o in zip(scale.factor, scale.offset, strict=True)]
    assert ends == pytest.approx(white)


@pytest.mark.parametrize(
    "text",
    ["", "1:0", "0:0", "0", "0:1:2", "nan:1", "0:inf", "0:0:0/1:1:0", "torch", "a:b"],
)
def test_what_is_no_scale(text):
    with pytest.raises(InvalidArgument, match="@imagenet"):
        parse_pixel_scale(text)


@pytest.mark.parametrize("name", ["onnx:", "hub:@0:1", "savedmodel:m", "onnx:a.onnx@"])
def test_what_is_no_name(name):
    with pytest.raises(InvalidArgument, match="Received"):
        parse_backbone_name(name)


def test_which_bases_have_no_keras_layers():
    assert is_fixed_network("onnx:a.onnx@0:1")
    assert is_fixed_network("savedmodel:a@0:1")
    assert not is_fixed_network("hub:a")
    assert not is_fixed_network("resnet50")


def test_a_name_is_refused_before_anything_heavy_is_imported():
    program = textwrap.dedent("""
        import sys
        from keras_rsft import cli
        try:
            sys.exit(cli.main(["fit", "photos", "--backbone", "onnx:a.onnx@torch"]))
        finally:
            print(sorted({"keras", "tensorflow", "numpy"} & set(sys.modules)))
    """)
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "@imagenet" in done.stderr
    assert done.stdout.strip() == "[]"


class TestFeatures:
    def test_a_name_stands_for_its_configuration(self, tmp_path):
        given = FeatureConfig("resnet50")
        assert feature_config("resnet50", IMAGES) == given
        assert feature_config(given, IMAGES) == given
        assert feature_config(tmp_path / "a.keras", IMAGES).backbone == str(
            tmp_path / "a.keras"
        )

    def test_the_default_backbone_is_that_of_the_data(self):
        assert feature_config(None, IMAGES).backbone == "resnet50"
        config = FeatureConfig(cache_dtype="float16")
        assert feature_config(config, TEXTS) == dataclasses.replace(
            config, backbone="minilm"
        )

    @pytest.mark.parametrize(
        ("features", "kind", "said"),
        [
            ("minilm", IMAGES, "takes texts"),
            ("resnet50", TEXTS, "--backbone minilm"),
            (FeatureConfig(augmentations=2), TEXTS, "augmentations=2"),
            (5, IMAGES, "a name or a path"),
        ],
    )
    def test_what_does_not_fit(self, features, kind, said):
        with pytest.raises(InvalidArgument, match=said):
            feature_config(features, kind)
