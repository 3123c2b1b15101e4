# SPDX-License-Identifier: Apache-2.0
"""Image processors: our steps give what the class of transformers gives, over drawn flags and images."""

from __future__ import annotations

import importlib
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers.image_utils import load_image

from perceiver_export.exporter.checkpoints.preprocessor import (
    PROCESSORS,
    image_preprocessing,
    image_shape,
    proportions_note,
    read_preprocessor,
)
from perceiver_export.runtimes.errors import CheckpointError, InputError, UnsupportedModelError
from perceiver_export.runtimes.preprocessing import ImagePreprocessing, Resize
from perceiver_export.runtimes.tasks.image_files import take_image, to_input

MODES = ("RGB", "L", "P", "1", "LA", "RGBA", "CMYK")
MODULES = {"ChineseCLIP": "chinese_clip", "MobileNetV1": "mobilenet_v1", "MobileNetV2": "mobilenet_v2"}


def processor_class(name: str) -> Any:
    """The class that transformers takes where torchvision is missing: of numpy and Pillow."""
    stem = name.removesuffix("ImageProcessor")
    module = MODULES.get(stem, stem.lower())
    return getattr(importlib.import_module(f"transformers.models.{module}.image_processing_pil_{module}"), f"{name}Pil")


def drawn_image(draw: random.Random) -> Image.Image:
    shape = (draw.randint(20, 90), draw.randint(20, 90), 3)
    pixels = np.random.default_rng(draw.randrange(1 << 30)).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).convert(draw.choice(MODES))


def drawn_sizes(draw: random.Random) -> dict[str, Any]:
    a, b = draw.randint(14, 60), draw.randint(14, 60)
    sizes: list[Any] = [
        a,
        [a, b],
        {"height": a, "width": b},
        {"height": a, "width": a},
        {"shortest_edge": a},
        {"shortest_edge": a, "longest_edge": a + b},
        {"max_height": a, "max_width": b},
    ]
    return {"size": draw.choice(sizes)}


def drawn_flags(draw: random.Random) -> dict[str, Any]:
    """Any of the flags, each set or left to its default."""
    flags: dict[str, Any] = {
        **{name: draw.random() < 0.8 for name in ("do_resize", "do_rescale", "do_normalize")},
        **{name: draw.random() < 0.5 for name in ("do_center_crop", "do_convert_rgb", "do_reduce_labels")},
        **{name: draw.random() < 0.5 for name in ("rescale_offset", "include_top", "do_flip_channel_order")},
        **drawn_sizes(draw),
        "default_to_square": draw.random() < 0.5,
        "use_square_size": draw.random() < 0.2,
        "crop_size": draw.choice([draw.randint(8, 80), {"height": draw.randint(8, 80), "width": draw.randint(8, 80)}]),
        "crop_pct": draw.choice([0.875, 0.9, 1.0]),
        "resample": draw.randrange(6),
        "rescale_factor": draw.choice([1 / 255, 1 / 127.5, 0.0078]),
        "image_mean": draw.choice([0.5, [0.1, 0.2, 0.3], [0.485, 0.456, 0.406]]),
        "image_std": draw.choice([0.25, [0.9, 0.8, 0.7], [0.229, 0.224, 0.225]]),
    }
    nulls = {name for name in flags if name.startswith("do_") or name in ("default_to_square", "crop_pct")}
    return {
        name: None if name in nulls and draw.random() < 0.1 else value
        for name, value in flags.items()
        if draw.random() < 0.6
    }


def ours(flags: dict[str, Any], picture: Image.Image, height: int, width: int) -> np.ndarray[Any, Any]:
    found = image_preprocessing(flags, *(image_shape(flags) or (height, width)))
    return to_input(take_image(picture), ImagePreprocessing(height, width, found.steps))


KEEPS = {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False}


@pytest.mark.parametrize("name", PROCESSORS)
def test_inputs_are_those_of_transformers_to_the_last_bit(name: str) -> None:
    draw, compared = random.Random(name), 0
    for _ in range(40):
        flags, picture = {**drawn_flags(draw), "image_processor_type": name}, drawn_image(draw)
        try:
            processor = processor_class(name).from_dict(flags)
            expected = processor(load_image(picture), return_tensors="np")["pixel_values"][0]
        except (ValueError, AttributeError, TypeError):  # flags that the class cannot use
            with pytest.raises((CheckpointError, UnsupportedModelError)):
                image_preprocessing(flags, 32, 32)
            continue
        compared += 1
        found = ours(flags, picture, *expected.shape[1:])
        np.testing.assert_array_equal(found, expected.astype(np.float32), err_msg=str(flags))
    assert compared >= 10


@pytest.mark.parametrize("name", PROCESSORS)
def test_the_defaults_of_a_class_are_those_of_transformers(name: str) -> None:
    picture = drawn_image(random.Random(0))
    expected = processor_class(name)()(load_image(picture), return_tensors="np")["pixel_values"][0]

    flags = {"image_processor_type": name}

    np.testing.assert_array_equal(ours(flags, picture, *expected.shape[1:]), expected.astype(np.float32))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ({"image_processor_type": "ViTImageProcessorFast"}, "ViTImageProcessor"),
        ({"feature_extractor_type": "ViTFeatureExtractor"}, "ViTImageProcessor"),
        ({"image_processor_type": "ViTImageProcessorPil"}, "ViTImageProcessor"),
        ({}, "PerceiverImageProcessor"),
    ],
)
def test_other_names_of_a_class_are_that_class(flags: dict[str, Any], name: str) -> None:
    assert image_preprocessing(flags, 224, 224) == image_preprocessing({"image_processor_type": name}, 224, 224)


def test_a_vit_has_no_crop() -> None:
    steps = image_preprocessing({"image_processor_type": "ViTImageProcessor"}, 224, 224).steps
    assert steps[0] == Resize(224, 224, "bilinear")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, ()),
        ({"image_processor_type": "DeiTImageProcessor"}, ()),
        ({"image_processor_type": "CLIPImageProcessor"}, ("the shorter side becomes 224", "224 × 224 is cut out")),
        ({**KEEPS, "size": {"shortest_edge": 224}}, ("the shorter side becomes 224", "refused")),
        ({**KEEPS, "size": {"shortest_edge": 224, "longest_edge": 300}}, ("at most 300", "refused")),
        ({**KEEPS, "size": {"max_height": 224, "max_width": 224}}, ("fit into 224 × 224", "refused")),
        ({**KEEPS, "do_resize": False}, ("not resized", "refused")),
    ],
)
def test_a_note_says_what_becomes_of_images_of_another_shape(flags: dict[str, Any], said: tuple[str, ...]) -> None:
    note = proportions_note(image_preprocessing(flags, 224, 224))

    assert bool(note) == bool(said)
    assert all(words in note for words in said)


@pytest.mark.parametrize(
    ("flags", "datum"),
    [
        ({"image_processor_type": "SamImageProcessor"}, "SamImageProcessor"),
        ({"image_processor_type": "ViTImageProcessor", "do_pad": True}, "do_pad"),
        ({"do_thumbnail": True}, "do_thumbnail"),
        ({"resample": 6}, "6"),
    ],
)
def test_steps_that_are_not_known_are_refused_by_name(flags: dict[str, Any], datum: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        image_preprocessing(flags, 224, 224)

    assert datum in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "flags",
    [
        {"size": {"longest_edge": 224}},
        {"size": {"height": 0, "width": 3}},
        {"size": {"height": 1 << 30, "width": 3}},
        {"image_mean": [0.5]},
        *({"image_std": std} for std in (0, [0.5, 0, 0.5], [0.5, -1, 0.5], [0.5], [0.5] * 4, "half")),
        {"image_std": [0.1, float("inf"), 0.1]},
        {"rescale_factor": 0},
        {"crop_size": {"shortest_edge": 3}},
        {"do_resize": "yes"},
        {"image_processor_type": "ViTImageProcessor", "do_center_crop": True},
        {"image_processor_type": "ConvNextImageProcessor", "crop_pct": 0, "size": {"shortest_edge": 224}},
    ],
)
def test_values_that_cannot_be_are_refused(flags: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError):
        image_preprocessing(flags, 224, 224)


def test_the_processor_of_processor_config_goes_first(tmp_path: Path) -> None:
    assert read_preprocessor(tmp_path) == {}

    (tmp_path / "preprocessor_config.json").write_text(json.dumps({"size": 20}))
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "CLIPProcessor"}))
    assert image_shape(read_preprocessor(tmp_path)) == (20, 20)

    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {"size": 30}}))
    assert image_shape(read_preprocessor(tmp_path)) == (30, 30)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000], ids=["empty", "cut", "list", "bytes", "deep"]
)
def test_a_file_that_is_not_one_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "preprocessor_config.json").write_bytes(content)

    with pytest.raises(CheckpointError):
        read_preprocessor(tmp_path)


@pytest.mark.parametrize(
    ("flags", "shape"),
    [
        ({"image_processor_type": "DeiTImageProcessor"}, (224, 224)),
        ({"image_processor_type": "CLIPImageProcessor", "crop_size": {"height": 20, "width": 30}}, (20, 30)),
        ({"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": 160}, (160, 160)),
        ({"size": {"height": 20, "width": 30}}, (20, 30)),
        ({"do_resize": False}, None),
        ({}, None),
    ],
)
def test_the_shape_of_the_input_is_what_the_steps_give(flags: dict[str, Any], shape: tuple[int, int] | None) -> None:
    assert image_shape(flags) == shape


def test_all_sizes_are_scaled_where_the_model_sees_another() -> None:
    deit = {"image_processor_type": "DeiTImageProcessor"}
    half = {**deit, "size": 128, "crop_size": 112}

    assert image_preprocessing(deit, 112, 112) == image_preprocessing(half, 112, 112)
    assert image_preprocessing({}, 96, 128).steps[1] == Resize(96, 128, "bicubic")


def test_an_image_of_another_shape_than_the_model_takes_is_refused() -> None:
    edge = image_preprocessing(
        {"image_processor_type": "CLIPImageProcessor", "do_center_crop": False, "size": 32}, 32, 32
    )
    same = image_preprocessing({"do_resize": False, "do_center_crop": False}, 32, 32)

    assert to_input(np.zeros((50, 50, 3), np.uint8), edge).shape == (3, 32, 32)
    for steps in (edge, same):
        with pytest.raises(InputError, match="32 × 40"):
            to_input(np.zeros((32, 40, 3), np.uint8), steps)
