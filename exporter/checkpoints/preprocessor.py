# SPDX-License-Identifier: Apache-2.0
"""preprocessor_config.json as the steps of our runtime, for each image processor of transformers. Needs no torch.

Steps, order and defaults are those of the Pillow backend of transformers 5. docs/guides/checkpoints.md says how
each flag is treated.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.exporter.checkpoints.weights import convert, read_object
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError
from perceiver_export.runtimes.preprocessing import (
    MAX_SIDE,
    CenterCrop,
    CenterCropShare,
    Filter,
    ImagePreprocessing,
    ImageStep,
    Normalize,
    Rescale,
    Resize,
    ResizeEdge,
    ResizeInto,
    ReverseChannels,
    unusable,
)

FILE = "preprocessor_config.json"
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_HALF = {"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)}
_CLIP = {"image_mean": (0.48145466, 0.4578275, 0.40821073), "image_std": (0.26862954, 0.26130258, 0.27577711)}
_SQUARE = {"height": 224, "width": 224}
_EDGE = {"size": {"shortest_edge": 224}, "default_to_square": False}
_CUT = {"do_center_crop": True, "crop_size": 224}
_RESAMPLE: dict[int, Filter] = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# A number, [height, width], or sides by name.
_Size = int | list[int] | dict[str, int]


class Values(msgspec.Struct):
    """The fields that have an effect; the defaults are those of transformers' base class, and of ViT."""

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
            raise UnsupportedModelError(
                f"{FILE}: resample is {self.resample}", f"give one of Pillow's filters: {known}"
            )
        return _RESAMPLE[self.resample]

    @property
    def sides(self) -> dict[str, int]:
        """`size` by the names of its sides."""
        return _sides(self.size, "size", self.default_to_square)

    @property
    def crop(self) -> tuple[int, int]:
        """Height and width of the crop."""
        return _height_width(_sides(self.crop_size, "crop_size"), "crop_size")

    @property
    def share(self) -> float:
        """`crop_pct`, checked."""
        if self.crop_pct is None or not 0.01 <= self.crop_pct <= 100:
            raise CheckpointError(f"{FILE}: crop_pct is {self.crop_pct}", "give 0.01 to 100, usually below 1")
        return self.crop_pct


# For these, null means false, not the class's default.
SWITCHES = {field.name for field in msgspec.structs.fields(Values) if isinstance(field.default, bool)}
NO_EFFECT = {"do_convert_rgb", "do_reduce_labels"}  # images are read as RGB; the second is about segmentation maps
Steps = Iterable[ImageStep]
Step = tuple[str, Callable[[Values], Steps]]  # a flag, and the steps where it is true


def _resize_clip(values: Values) -> Steps:
    """CLIP's older flag for 224 × 224 takes precedence over the size."""
    return [_sized(_SQUARE if values.use_square_size else values.sides, values.filter)]


def _resize_levit(values: Values) -> Steps:
    """The shorter edge becomes 256/224 of the size."""
    size = values.sides
    if "shortest_edge" in size:
        return [ResizeEdge(int((256 / 224) * size["shortest_edge"]), 0, values.filter)]
    return [Resize(*_height_width(size, "size"), values.filter)]


def _resize_convnext(values: Values) -> Steps:
    """Below 384, the shorter edge becomes size / crop_pct, then a crop; from 384 on, a square."""
    edge = values.sides.get("shortest_edge")
    if edge is None:
        raise CheckpointError(f"{FILE}: size is {values.size}", "give ConvNext's size a shortest_edge")
    if edge >= 384:
        return [Resize(edge, edge, values.filter)]
    return [ResizeEdge(int(edge / values.share), 0, values.filter), CenterCrop(edge, edge)]


def _resize_poolformer(values: Values) -> Steps:
    """All sizes are divided by crop_pct; a square gives the shorter edge."""
    size = values.sides
    if values.crop_pct is None:
        return [_sized(size, values.filter)]
    larger = {name: int(side / values.share) for name, side in size.items()}
    if "shortest_edge" in size:
        return [ResizeEdge(larger["shortest_edge"], 0, values.filter)]
    height, width = _height_width(size, "size")
    return [ResizeEdge(larger["height"], 0, values.filter) if height == width else _sized(larger, values.filter)]


def _crop_share(values: Values) -> Steps:
    """Perceiver crops size / crop_size of the shorter side."""
    (height, width), crop = _height_width(values.sides, "size"), values.crop
    return [CenterCropShare(height / crop[0], width / crop[1])]


def _refuse_pad(values: Values) -> Steps:
    raise UnsupportedModelError(f"{FILE}: do_pad is true", "set do_pad to false where your images need no padding")


_RESIZE: Step = ("do_resize", lambda values: [_sized(values.sides, values.filter)])
_CROP: Step = ("do_center_crop", lambda values: [CenterCrop(*values.crop)])
_RESCALE: Step = ("do_rescale", lambda values: [Rescale(values.rescale_factor)])
_OFFSET: Step = ("do_rescale", lambda values: [Rescale(values.rescale_factor, -1.0 if values.rescale_offset else 0.0)])
_NORMALIZE: Step = ("do_normalize", lambda values: [Normalize(_three(values.image_mean), _three(values.image_std))])
_DIVIDE: Step = ("include_top", lambda values: [Normalize((0.0, 0.0, 0.0), _three(values.image_std))])
_FLIP: Step = ("do_flip_channel_order", lambda values: [ReverseChannels()])
_PAD: Step = ("do_pad", _refuse_pad)
_USUAL = (_CROP, _RESCALE, _NORMALIZE)  # after resizing


@dataclass(frozen=True)
class Processor:
    """A class of transformers: its defaults, and its steps in order."""

    defaults: dict[str, Any]
    steps: tuple[Step, ...] = (_RESIZE, *_USUAL, _PAD)

    def apply(self, given: dict[str, Any]) -> tuple[ImageStep, ...]:
        """The steps with the values of a file. Raises CheckpointError, UnsupportedModelError."""
        values = convert({**self.defaults, **given}, Values, FILE)
        return tuple(step for flag, steps in self.steps if getattr(values, flag) for step in steps(values))


_CLASSES = {
    "Perceiver": Processor(
        {**_IMAGENET, "do_center_crop": True, "crop_size": 256},
        (("do_center_crop", _crop_share), _RESIZE, _RESCALE, _NORMALIZE),
    ),
    "ViT": Processor({"resample": 2}),
    "DeiT": Processor({"size": {"height": 256, "width": 256}, **_CUT}),
    "CLIP": Processor({**_CLIP, **_EDGE, **_CUT}, (("do_resize", _resize_clip), *_USUAL, _PAD)),
    "ChineseCLIP": Processor({**_CLIP, **_EDGE, **_CUT}),
    "Bit": Processor({**_CLIP, **_EDGE, **_CUT}),
    "Blip": Processor({**_CLIP, "size": {"height": 384, "width": 384}}),
    "Siglip": Processor({"default_to_square": False}),
    "Pvt": Processor(_IMAGENET),
    "Beit": Processor({"crop_size": 224}, (_RESIZE, *_USUAL)),
    "MobileNetV1": Processor({"resample": 2, **_EDGE, "size": {"shortest_edge": 256}, **_CUT}),
    "MobileNetV2": Processor({"resample": 2, **_EDGE, "size": {"shortest_edge": 256}, **_CUT}, (_RESIZE, *_USUAL)),
    "MobileViT": Processor({**_EDGE, "do_center_crop": True, "crop_size": 256}, (_RESIZE, _RESCALE, _CROP, _FLIP)),
    "Levit": Processor({**_IMAGENET, **_EDGE, **_CUT}, (("do_resize", _resize_levit), *_USUAL, _PAD)),
    "ConvNext": Processor(
        {"size": {"shortest_edge": 384}, "default_to_square": False}, (("do_resize", _resize_convnext), *_USUAL)
    ),
    "PoolFormer": Processor(
        {**_IMAGENET, **_EDGE, **_CUT, "crop_pct": 0.9}, (("do_resize", _resize_poolformer), *_USUAL, _PAD)
    ),
    "EfficientNet": Processor(
        {"size": {"height": 346, "width": 346}, "crop_size": 289}, (_RESIZE, _CROP, _OFFSET, _NORMALIZE, _DIVIDE)
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


def _sides(size: _Size | None, name: str, square: bool = True) -> dict[str, int]:
    """A size as transformers reads it. Raises CheckpointError."""
    if isinstance(size, int):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    sides = size if isinstance(size, dict) else {}
    if set(sides) not in _SIZES:
        raise CheckpointError(
            f"{FILE}: {name} is {size}",
            "give height and width, shortest_edge, shortest_edge and longest_edge, or max_height and max_width",
        )
    if not all(1 <= value <= MAX_SIDE for value in sides.values()):
        raise CheckpointError(f"{FILE}: {name} is {size}", f"give sizes from 1 to {MAX_SIDE}")
    return sides


def _height_width(sides: dict[str, int], name: str) -> tuple[int, int]:
    if set(sides) != {"height", "width"}:
        raise CheckpointError(f"{FILE}: {name} is {sides}", "give height and width")
    return sides["height"], sides["width"]


def _three(value: float | tuple[float, float, float]) -> tuple[float, float, float]:
    return value if isinstance(value, tuple) else (value, value, value)


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """The settings of a directory's image processor; an empty dict if it has none.

    As in transformers, ``image_processor`` of processor_config.json takes precedence over preprocessor_config.json.
    Raises CheckpointError.
    """
    for path in (directory / "processor_config.json", directory / FILE):
        if path.is_file():
            found = read_object(path, "the image processor's settings")
            nested = found.get("image_processor") if path.name != FILE else found
            if isinstance(nested, dict):
                return nested
    return {}


def image_preprocessing(processor: dict[str, Any], height: int, width: int) -> ImagePreprocessing:
    """preprocessor_config.json as the steps of our runtime, for a model that takes images of height × width.

    If the file has another size, all its sizes are scaled. Raises CheckpointError (an impossible value) and
    UnsupportedModelError (an unknown class or step).
    """
    steps = _steps(processor)
    found = ImagePreprocessing(height, width, tuple(_scaled(steps, height, width)))
    if wrong := unusable(found):
        raise CheckpointError(f"{FILE}: {wrong}", "correct the value, or leave it out for transformers' default")
    return found


def proportions_note(preprocessing: ImagePreprocessing) -> str:
    """A note about images whose shape is not the model's, unless the steps simply resize them."""
    size, steps = f"{preprocessing.height} × {preprocessing.width}", preprocessing.steps
    kept = next((step for step in steps if isinstance(step, (ResizeEdge, ResizeInto))), None)
    crops = any(isinstance(step, CenterCrop) for step in steps)
    if kept is None:
        fixed = crops or any(isinstance(step, Resize) for step in steps)
        return "" if fixed else f"{FILE}: images are not resized, and sizes other than {size} are refused"
    if isinstance(kept, ResizeEdge):
        sized = f"the shorter side becomes {kept.shortest} pixels"
        sized += f", the longer at most {kept.longest}" if kept.longest else ""
    else:
        sized = f"they are resized to fit into {kept.height} × {kept.width}"
    then = f"the middle {size} is cut out" if crops else f"any result that is not {size} is refused"
    return f"{FILE}: images keep their aspect ratio: {sized}, and {then}"


def image_shape(processor: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width after the file's steps, of a square image where they keep the aspect ratio; None: any."""
    return _shape(_steps(processor)) if processor else None


def as_deepmind(preprocessing: ImagePreprocessing) -> ImagePreprocessing:
    """The same steps with DeepMind's numerics: OpenCV's filter, and the crop's odd pixel on the other side."""
    steps: list[ImageStep] = []
    for step in preprocessing.steps:
        if isinstance(step, (Resize, ResizeEdge, ResizeInto)):
            step = msgspec.structs.replace(step, resample="opencv-bicubic")
        elif isinstance(step, CenterCropShare):
            step = msgspec.structs.replace(step, round_up=True)
        steps.append(step)
    return msgspec.structs.replace(preprocessing, steps=tuple(steps))


def _steps(processor: dict[str, Any]) -> tuple[ImageStep, ...]:
    kind = _processor(processor)
    given = {name: False if value is None and name in SWITCHES else value for name, value in processor.items()}
    # For other values, null means the default in transformers 4; transformers 5 refuses most of them.
    given = {name: value for name, value in given.items() if value is not None or name == "crop_pct"}
    for name, value in given.items():
        if name.startswith("do_") and value and name not in SWITCHES | NO_EFFECT:
            raise UnsupportedModelError(
                f"{FILE}: {name} is {value}, an unknown step",
                f"set {name} to false if the model does not need it, or give prepared arrays",
            )
    return kind.apply(given)


def _processor(processor: dict[str, Any]) -> Processor:
    given = (
        processor.get("image_processor_type") or processor.get("feature_extractor_type") or "PerceiverImageProcessor"
    )
    name = str(given).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if name not in PROCESSORS:
        near = difflib.get_close_matches(name, PROCESSORS, n=1, cutoff=0.9)
        raise UnsupportedModelError(
            f"{FILE}: the image processor {given} is unknown",
            f"did you mean {near[0]}?" if near else f"give prepared arrays, or one of {', '.join(PROCESSORS)}",
        )
    return PROCESSORS[name]


def _shape(steps: tuple[ImageStep, ...]) -> tuple[int, int] | None:
    shape = None
    for step in steps:
        if isinstance(step, (Resize, CenterCrop)):
            shape = (step.height, step.width)
        elif isinstance(step, ResizeEdge):
            shape = (step.shortest, step.shortest)
        elif isinstance(step, ResizeInto):
            shape = (min(step.height, step.width),) * 2
    return shape


def _scaled(steps: tuple[ImageStep, ...], height: int, width: int) -> Steps:
    """The steps with all their sizes scaled, so that the result is height × width."""
    shape = _shape(steps)
    if shape is None or shape == (height, width):
        return steps
    down, across = height / shape[0], width / shape[1]
    # A crop needs the larger factor; without a crop, an image of the model's proportions needs the smaller.
    edge = max(down, across) if any(isinstance(step, CenterCrop) for step in steps) else min(down, across)
    return tuple(_scaled_step(step, down, across, edge) for step in steps)


def _scaled_step(step: ImageStep, down: float, across: float, edge: float) -> ImageStep:
    if isinstance(step, (Resize, ResizeInto, CenterCrop)):
        height, width = max(1, round(step.height * down)), max(1, round(step.width * across))
        return msgspec.structs.replace(step, height=height, width=width)
    if isinstance(step, ResizeEdge):
        shortest, longest = max(1, round(step.shortest * edge)), round(step.longest * edge)
        return msgspec.structs.replace(step, shortest=shortest, longest=longest)
    return step
