# SPDX-License-Identifier: Apache-2.0
"""preprocessor_config.json as the steps of our runtime. Needs no torch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.exporter.checkpoints.image_processors import (
    FILE,
    NO_EFFECT,
    PROCESSORS,
    SWITCHES,
    Processor,
    Steps,
)
from perceiver_export.exporter.checkpoints.weights import decode_json, read_bytes
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError
from perceiver_export.runtimes.preprocessing import (
    CenterCrop,
    CenterCropShare,
    ImagePreprocessing,
    ImageStep,
    Resize,
    ResizeEdge,
    ResizeInto,
    unusable,
)


def read_preprocessor(directory: Path) -> dict[str, Any]:
    """The settings of a directory's image processor; an empty dict where it has none.

    As in transformers, ``image_processor`` of processor_config.json goes before preprocessor_config.json. Raises
    CheckpointError.
    """
    for path in (directory / "processor_config.json", directory / FILE):
        if path.is_file():
            found = decode_json(read_bytes(path, "the image processor's settings"), dict[str, Any], str(path))
            nested = found.get("image_processor") if path.name != FILE else found
            if isinstance(nested, dict):
                return nested
    return {}


def image_preprocessing(processor: dict[str, Any], height: int, width: int) -> ImagePreprocessing:
    """preprocessor_config.json as the steps of our runtime, for a model that sees height × width.

    If the file has another size, all its sizes are scaled. Raises CheckpointError (an impossible value) and
    UnsupportedModelError (an unknown class or step).
    """
    steps = _steps(processor)
    found = ImagePreprocessing(height, width, tuple(_scaled(steps, height, width)))
    if wrong := unusable(found):
        raise CheckpointError(f"{FILE}: {wrong}", "correct the value, or leave it out for transformers' default")
    return found


def proportions_note(preprocessing: ImagePreprocessing) -> str:
    """A note about images of another shape than the model's, where the steps do not simply resize them."""
    size, steps = f"{preprocessing.height} × {preprocessing.width}", preprocessing.steps
    kept = next((step for step in steps if isinstance(step, (ResizeEdge, ResizeInto))), None)
    crops = any(isinstance(step, CenterCrop) for step in steps)
    if kept is None:
        fixed = crops or any(isinstance(step, Resize) for step in steps)
        return "" if fixed else f"{FILE}: images are not resized; those of another size than {size} are refused"
    if isinstance(kept, ResizeEdge):
        sized = f"the shorter side becomes {kept.shortest} pixels"
        sized += f", the longer at most {kept.longest}" if kept.longest else ""
    else:
        sized = f"they are resized to fit into {kept.height} × {kept.width}"
    then = f"the middle {size} is cut out" if crops else f"those that are not {size} then are refused"
    return f"{FILE}: images keep their proportions: {sized}, and {then}"


def image_shape(processor: dict[str, Any]) -> tuple[int, int] | None:
    """Height and width after the file's steps, of a square image where they keep proportions; None: any."""
    return _shape(_steps(processor)) if processor else None


def as_deepmind(preprocessing: ImagePreprocessing) -> ImagePreprocessing:
    """The same with DeepMind's numerics: OpenCV's filter, and the crop's odd pixel on the other side."""
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
    # Other values that are null are the defaults in transformers 4; transformers 5 refuses most of them.
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
            f"{FILE}: the steps of {given} are unknown",
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
    """The steps with all their sizes scaled, so that they give height × width."""
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
