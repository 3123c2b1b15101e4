# SPDX-License-Identifier: Apache-2.0
"""preprocessor_config.json, as the steps that our runtime takes. Needs no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError
from perceiver_export.runtimes.preprocessing import ImagePreprocessing

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MAX_SIDE = 16_384  # of a picture; more is a slip of the pen, and would ask torch for terabytes
_FIELDS = "image_mean and image_std are three numbers each, those of image_std above 0; rescale_factor is one above 0"


class _ImageProcessor(msgspec.Struct):
    """The part of preprocessor_config.json that counts; defaults are transformers' for a Perceiver."""

    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    do_normalize: bool = True
    size: int | dict[str, int] | None = None
    crop_size: int | dict[str, int] | None = None
    resample: int = 3
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, float, float] = IMAGENET_MEAN
    image_std: tuple[float, float, float] = IMAGENET_STD


_RESAMPLE: dict[int, Literal["bilinear", "bicubic", "lanczos"]] = {
    1: "lanczos",
    2: "bilinear",
    3: "bicubic",
}


def image_preprocessing(processor: dict[str, object], height: int, width: int) -> ImagePreprocessing:
    """preprocessor_config.json as the steps of our runtime, for a model that sees height × width."""
    try:
        values = msgspec.convert({key: value for key, value in processor.items() if value is not None}, _ImageProcessor)
    except msgspec.ValidationError as error:
        raise CheckpointError(f"preprocessor_config.json: {error}", _FIELDS) from error
    if values.resample not in _RESAMPLE:
        raise UnsupportedModelError(
            f"preprocessor_config.json: resample {values.resample}",
            "1 (lanczos), 2 (bilinear) and 3 (bicubic) are supported",
        )
    if not values.do_resize:
        raise UnsupportedModelError(
            "preprocessor_config.json: do_resize is false", "a model of fixed shape needs the resize"
        )
    crop = None
    if values.do_center_crop:
        size, cropped = picture_sides(values.size, 224), picture_sides(values.crop_size, 256)
        crop = (size[0] / cropped[0], size[1] / cropped[1])
        if max(crop) > 1:
            raise UnsupportedModelError(
                f"preprocessor_config.json: size {size} is larger than crop_size {cropped}",
                "pictures would be padded; set crop_size to the larger, or do_center_crop to false",
            )
    steps = ImagePreprocessing(
        height=height,
        width=width,
        crop_fraction=crop,
        resample=_RESAMPLE[values.resample],
        scale=values.rescale_factor if values.do_rescale else 1.0,
        mean=values.image_mean if values.do_normalize else (0.0, 0.0, 0.0),
        std=values.image_std if values.do_normalize else (1.0, 1.0, 1.0),
    )
    if not min(*steps.std, steps.scale) > 0:
        found = f"image_std {list(values.image_std)}, rescale_factor {values.rescale_factor}"
        raise CheckpointError(f"preprocessor_config.json: {found}: not above 0", _FIELDS)
    return steps


def picture_sides(size: int | dict[str, int] | None, default: int) -> tuple[int, int]:
    if size is None:
        return default, default
    if isinstance(size, int):
        size = {"height": size, "width": size}
    try:
        sides = size["height"], size["width"]
    except KeyError as error:
        raise CheckpointError(f"preprocessor_config.json: a size without {error}", "it has height and width") from error
    if not 1 <= min(sides) <= max(sides) <= MAX_SIDE:
        raise CheckpointError(f"preprocessor_config.json: a size of {sides}", f"sizes are from 1 to {MAX_SIDE}")
    return sides
