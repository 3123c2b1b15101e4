# SPDX-License-Identifier: Apache-2.0
"""The image processors of transformers: what each flag of preprocessor_config.json does, and each class's steps.

Steps, order and defaults are those of the Pillow backend of transformers 5.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import msgspec

from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError
from perceiver_export.runtimes.preprocessing import (
    MAX_SIDE,
    CenterCrop,
    CenterCropShare,
    Filter,
    ImageStep,
    Normalize,
    Rescale,
    Resize,
    ResizeEdge,
    ResizeInto,
    ReverseChannels,
)

FILE = "preprocessor_config.json"
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SQUARE = {"height": 224, "width": 224}
_EDGE = {"size": {"shortest_edge": 224}, "default_to_square": False}
_CROP = {"do_center_crop": True, "crop_size": _SQUARE}
_RESAMPLE: dict[int, Filter] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# What becomes of each flag of preprocessor_config.json. Flags that are not here and begin with `do_` are refused where
# they are true; transformers reads no others.
FLAGS = {
    "image_processor_type": "chooses the steps, their order and their defaults; without it, Perceiver's",
    "feature_extractor_type": "its older name",
    "do_convert_rgb": "has no effect: images are read as RGB, as transformers' pipelines read them",
    "do_resize": "honoured; where it is false, an image must have the model's size",
    "size": "honoured: a number, [height, width], height and width, shortest_edge with or without longest_edge,"
    " max_height and max_width; longest_edge alone and pixel counts are refused, as by transformers",
    "default_to_square": "honoured: whether a `size` that is a number is a square or the shorter edge",
    "use_square_size": "honoured, CLIP only",
    "resample": "honoured: Pillow's filters, 0 to 5",
    "crop_pct": "honoured, ConvNext and PoolFormer only",
    "do_center_crop": "honoured",
    "crop_size": "honoured: a number, [height, width], height and width; smaller images get a border of zeros",
    "do_rescale": "honoured",
    "rescale_factor": "honoured",
    "rescale_offset": "honoured, EfficientNet only",
    "do_normalize": "honoured; MobileViT ignores it, as in transformers",
    "image_mean": "honoured: a number, or one a channel",
    "image_std": "honoured: a number, or one a channel",
    "include_top": "honoured, EfficientNet only: a second division by image_std",
    "do_flip_channel_order": "honoured, MobileViT only",
    "do_reduce_labels": "has no effect: it is about segmentation maps",
    "do_pad": "refused where it is true and the class pads",
    "data_format": "has no effect: the model's input is channels first",
    "input_data_format": "has no effect: arrays are channels last",
    "return_tensors": "has no effect",
    "device": "has no effect",
    "disable_grouping": "has no effect",
}


# A number, [height, width], or sides by name.
_Size = int | list[int] | dict[str, int]


class Values(msgspec.Struct):
    """The flags that count; the defaults are those of transformers' base class, and of ViT."""

    do_resize: bool = True
    do_center_crop: bool = False
    do_rescale: bool = True
    do_normalize: bool = True
    do_flip_channel_order: bool = True
    do_pad: bool = False
    default_to_square: bool = True
    use_square_size: bool = False
    include_top: bool = True
    rescale_offset: bool = False
    size: _Size = msgspec.field(default_factory=lambda: dict(_SQUARE))
    crop_size: _Size | None = None
    resample: int = 3
    crop_pct: float | None = 224 / 256
    rescale_factor: float = 1 / 255
    image_mean: float | tuple[float, float, float] = _HALF["image_mean"]
    image_std: float | tuple[float, float, float] = _HALF["image_std"]

    @property
    def filter(self) -> Filter:
        if self.resample not in _RESAMPLE:
            known = ", ".join(f"{number} ({name})" for number, name in _RESAMPLE.items())
            raise UnsupportedModelError(f"{FILE}: resample is {self.resample}", f"Pillow's filters: {known}")
        return _RESAMPLE[self.resample]


# Null is false for these, and not the class's default.
SWITCHES = {field.name for field in msgspec.structs.fields(Values) if isinstance(field.default, bool)}
Steps = Iterable[ImageStep]


def _resize(values: Values) -> Steps:
    if values.do_resize:
        yield _sized(_sides(values.size, "size", values.default_to_square), values.filter)


def _resize_clip(values: Values) -> Steps:
    """An older flag for 224 × 224 goes before the size."""
    if values.use_square_size:
        values = msgspec.structs.replace(values, size=_SQUARE)
    return _resize(values)


def _resize_levit(values: Values) -> Steps:
    """A shorter edge of 256/224 of what is said."""
    if not values.do_resize:
        return
    size = _sides(values.size, "size", values.default_to_square)
    if "shortest_edge" in size:
        yield ResizeEdge(int((256 / 224) * size["shortest_edge"]), 0, values.filter)
    else:
        yield Resize(*_height_width(values.size, "size", values.default_to_square), values.filter)


def _resize_convnext(values: Values) -> Steps:
    """Below 384 the shorter edge / crop_pct and a crop, else a square."""
    if not values.do_resize:
        return
    edge = _sides(values.size, "size", values.default_to_square).get("shortest_edge")
    if edge is None:
        raise CheckpointError(f"{FILE}: size is {values.size}", "ConvNext's size has a shortest_edge")
    if edge >= 384:
        yield Resize(edge, edge, values.filter)
    else:
        yield ResizeEdge(int(edge / _crop_pct(values)), 0, values.filter)
        yield CenterCrop(edge, edge)


def _resize_poolformer(values: Values) -> Steps:
    """All sizes / crop_pct; a square becomes the shorter edge."""
    if not values.do_resize:
        return
    size = _sides(values.size, "size", values.default_to_square)
    if values.crop_pct is None:
        yield _sized(size, values.filter)
        return
    share = _crop_pct(values)
    if "shortest_edge" in size:
        yield ResizeEdge(int(size["shortest_edge"] / share), 0, values.filter)
    elif size.keys() != {"height", "width"}:
        raise CheckpointError(f"{FILE}: size is {values.size}", "PoolFormer's is shortest_edge, or height and width")
    elif size["height"] == size["width"]:
        yield ResizeEdge(int(size["height"] / share), 0, values.filter)
    else:
        yield Resize(int(size["height"] / share), int(size["width"] / share), values.filter)


def _center_crop(values: Values) -> Steps:
    if values.do_center_crop:
        yield CenterCrop(*_height_width(values.crop_size, "crop_size"))


def _center_crop_share(values: Values) -> Steps:
    """Perceiver's: size / crop_size of the shorter side."""
    if values.do_center_crop:
        size = _height_width(values.size, "size", values.default_to_square)
        crop = _height_width(values.crop_size, "crop_size")
        yield CenterCropShare(size[0] / crop[0], size[1] / crop[1])


def _rescale(values: Values) -> Steps:
    if values.do_rescale:
        yield Rescale(values.rescale_factor)


def _rescale_efficientnet(values: Values) -> Steps:
    if values.do_rescale:
        yield Rescale(values.rescale_factor, -1.0 if values.rescale_offset else 0.0)


def _normalize(values: Values) -> Steps:
    if values.do_normalize:
        yield Normalize(_three(values.image_mean), _three(values.image_std))


def _normalize_efficientnet(values: Values) -> Steps:
    yield from _normalize(values)
    if values.include_top:
        yield Normalize((0.0, 0.0, 0.0), _three(values.image_std))


def _flip(values: Values) -> Steps:
    if values.do_flip_channel_order:
        yield ReverseChannels()


def _refuse_pad(values: Values) -> Steps:
    if values.do_pad:
        raise UnsupportedModelError(
            f"{FILE}: do_pad is true", "images are not padded here: set do_pad to false where your images need none"
        )
    return ()


@dataclass(frozen=True)
class Processor:
    """What a class of transformers does: its defaults, and its steps in their order."""

    defaults: dict[str, Any]
    steps: tuple[Callable[[Values], Steps], ...] = (_resize, _center_crop, _rescale, _normalize, _refuse_pad)


_CLASSES = {
    "Perceiver": Processor(
        {**_IMAGENET, "do_center_crop": True, "crop_size": {"height": 256, "width": 256}},
        (_center_crop_share, _resize, _rescale, _normalize),
    ),
    "ViT": Processor({"resample": 2}),
    "DeiT": Processor({"size": {"height": 256, "width": 256}, **_CROP}),
    "CLIP": Processor({**_CLIP, **_EDGE, **_CROP}, (_resize_clip, _center_crop, _rescale, _normalize, _refuse_pad)),
    "ChineseCLIP": Processor({**_CLIP, **_EDGE, **_CROP}),
    "Bit": Processor({**_CLIP, **_EDGE, **_CROP}),
    "Blip": Processor({**_CLIP, "size": {"height": 384, "width": 384}}),
    "Siglip": Processor({"default_to_square": False}),
    "Pvt": Processor(_IMAGENET),
    "Beit": Processor({"crop_size": _SQUARE}, (_resize, _center_crop, _rescale, _normalize)),
    "MobileNetV1": Processor({"resample": 2, **_EDGE, "size": {"shortest_edge": 256}, **_CROP}),
    "MobileNetV2": Processor(
        {"resample": 2, **_EDGE, "size": {"shortest_edge": 256}, **_CROP},
        (_resize, _center_crop, _rescale, _normalize),
    ),
    "MobileViT": Processor(
        {**_EDGE, "do_center_crop": True, "crop_size": {"height": 256, "width": 256}},
        (_resize, _rescale, _center_crop, _flip),
    ),
    "Levit": Processor(
        {**_IMAGENET, **_EDGE, **_CROP}, (_resize_levit, _center_crop, _rescale, _normalize, _refuse_pad)
    ),
    "ConvNext": Processor(
        {"size": {"shortest_edge": 384}, "default_to_square": False},
        (_resize_convnext, _center_crop, _rescale, _normalize),
    ),
    "PoolFormer": Processor(
        {**_IMAGENET, **_EDGE, **_CROP, "crop_pct": 0.9},
        (_resize_poolformer, _center_crop, _rescale, _normalize, _refuse_pad),
    ),
    "EfficientNet": Processor(
        {"size": {"height": 346, "width": 346}, "crop_size": {"height": 289, "width": 289}},
        (_resize, _center_crop, _rescale_efficientnet, _normalize_efficientnet),
    ),
}
PROCESSORS = {f"{name}ImageProcessor": one for name, one in _CLASSES.items()}


def _sized(size: dict[str, int], resample: Filter) -> ImageStep:
    if "shortest_edge" in size:
        return ResizeEdge(size["shortest_edge"], size.get("longest_edge", 0), resample)
    if "max_height" in size:
        return ResizeInto(size["max_height"], size["max_width"], resample)
    return Resize(size["height"], size["width"], resample)


_SIZES = ({"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"max_height", "max_width"})


def _sides(size: _Size | None, name: str, square: bool) -> dict[str, int]:
    """A size as transformers reads it. Raises CheckpointError."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    sides = size if isinstance(size, dict) else {}
    if set(sides) not in _SIZES:
        raise CheckpointError(
            f"{FILE}: {name} is {size}",
            "it has height and width, shortest_edge, shortest_edge and longest_edge, or max_height and max_width",
        )
    if not all(1 <= value <= MAX_SIDE for value in sides.values()):
        raise CheckpointError(f"{FILE}: {name} is {size}", f"sizes are from 1 to {MAX_SIDE}")
    return sides


def _height_width(size: _Size | None, name: str, square: bool = True) -> tuple[int, int]:
    sides = _sides(size, name, square)
    if set(sides) != {"height", "width"}:
        raise CheckpointError(f"{FILE}: {name} is {size}", "here it has height and width")
    return sides["height"], sides["width"]


def _crop_pct(values: Values) -> float:
    if values.crop_pct is None or not 0.01 <= values.crop_pct <= 100:
        raise CheckpointError(f"{FILE}: crop_pct is {values.crop_pct}", "it is from 0.01 to 100, usually below 1")
    return values.crop_pct


def _three(value: float | tuple[float, float, float]) -> tuple[float, float, float]:
    return value if isinstance(value, tuple) else (value, value, value)
