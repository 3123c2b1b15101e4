# SPDX-License-Identifier: Apache-2.0
"""Does an input make sense? Its sizes, and positions that fit them."""

from __future__ import annotations

import math

from perceiver_export.exporter.perceiver.config import (
    ArrayInput,
    FourierPositions,
    FramePairInput,
    ImageInput,
    Input,
    LearnedPositions,
    MaskedInput,
    Positions,
    TokenInput,
)
from perceiver_export.runtimes.errors import UsageError

_MOST = 1 << 31  # numbers of one table: 8 GiB, and several times as many while it is computed


def check_input(name: str, one: Input, num_input_channels: int) -> None:
    """Raise UsageError where the sizes of ``one`` contradict each other, or it is wider than all inputs are."""
    where = f"input {name!r}"
    if isinstance(one, ImageInput):
        check_image(name, one)
    elif isinstance(one, FramePairInput):
        check_sizes(where, height=one.height, width=one.width, num_feature_channels=one.num_feature_channels)
        check_positions(where, one.positions, 2)
    elif isinstance(one, TokenInput):
        check_sizes(where, vocabulary_size=one.vocabulary_size, length=one.length, channels=one.num_input_channels)
    elif isinstance(one, ArrayInput):
        _check_array(where, one)
    else:
        assert isinstance(one, MaskedInput)
        check_sizes(where, num_inputs=one.num_inputs, num_input_channels=one.num_input_channels)
    require(
        one.num_input_channels <= num_input_channels,
        f"{where} has {one.num_input_channels} channels, num_input_channels is {num_input_channels}",
        "it is that of the widest input, or more",
    )
    check_table(where, one.num_inputs, num_input_channels)


def check_image(name: str, image: ImageInput) -> None:
    """Raise UsageError where the sizes of ``image`` contradict each other, or nothing is left behind a convolution."""
    where, features = f"input {name!r}", image.num_feature_channels
    check_sizes(where, num_channels=image.num_channels, height=image.height, width=image.width)
    check_sizes(where, num_feature_channels=features)
    require(
        image.features != "pixels" or features == image.num_channels,
        f"{where} takes pixels of {image.num_channels} channels as they are, num_feature_channels is {features}",
        "make them one, or let conv1x1 map pixels to features",
    )
    require(min(image.grid) > 0, f"{image.height} × {image.width} pictures are too small to convolve", _AT_LEAST_5)
    check_positions(where, image.positions, 2)
    check_table(where, image.num_inputs, image.num_input_channels)


_AT_LEAST_5 = "give sides of 5 or more"  # of what transformers' padding leaves; DeepMind's leaves something of any


def _check_array(where: str, one: ArrayInput) -> None:
    check_shape(where, one.shape)
    check_sizes(where, num_channels=one.num_channels)
    check_sizes(where, least=0, num_projected_channels=one.num_projected_channels)
    patch = one.patch or (1,) * len(one.shape)
    fits = len(patch) == len(one.shape) and min(patch) > 0
    require(
        fits and not any(size % step for size, step in zip(one.shape, patch, strict=True)),
        f"{where}: patches of {one.patch} do not divide {one.shape}",
        "give one size an axis",
    )
    if one.positions is not None:
        check_positions(where, one.positions, len(one.shape))
        require(
            not isinstance(one.positions, LearnedPositions) or one.positions.shape == one.grid,
            f"{where} has {one.grid} patches, its positions are of {getattr(one.positions, 'shape', ())}",
            "learned positions have the shape of the grid of patches",
        )
    if one.value_positions is not None:
        check_positions(where, one.value_positions, len(one.value_positions.max_resolution))
        require(
            len(one.value_positions.max_resolution) == one.num_channels
            and one.positions is None
            and not one.patch
            and not one.num_projected_channels,
            f"{where}: coordinates of {one.num_channels} channels do not fit its value_positions",
            "give max_resolution one entry a channel, and neither patch, projection nor positions",
        )


def check_positions(where: str, positions: Positions, num_axes: int) -> None:
    """Raise UsageError unless ``positions`` are of a grid of so many axes."""
    axes = positions.max_resolution if isinstance(positions, FourierPositions) else positions.shape
    require(
        len(axes) == num_axes,
        f"{where} has {num_axes} axes, its positions {len(axes)}",
        "give positions as many entries as there are axes",
    )
    if isinstance(positions, LearnedPositions):
        check_shape(f"{where}: a table of positions", positions.shape)
        check_sizes(where, num_table_channels=positions.num_table_channels)
        check_sizes(where, least=0, num_projected_channels=positions.num_projected_channels)
        check_table(where, math.prod(positions.shape), positions.num_table_channels)
        return
    check_sizes(where, least=0, num_bands=positions.num_bands)
    require(
        all(0 < size < math.inf for size in positions.max_resolution),
        f"{where} has positions of max_resolution {positions.max_resolution}",
        "give the sizes of the grid",
    )


def check_shape(where: str, shape: tuple[int, ...]) -> None:
    """Raise UsageError unless there are axes, and something along each."""
    require(bool(shape) and min(shape) > 0, f"{where} is of shape {shape}", "give one size an axis, 1 or more each")


def check_sizes(where: str, least: int = 1, **sizes: int) -> None:
    """Raise UsageError where one of ``sizes``, by the name of its field, is less than ``least``."""
    for name, size in sizes.items():
        require(size >= least, f"{where}: {name} is {size}", f"give {least} or more")


def check_table(where: str, rows: int, channels: int) -> None:
    """Raise UsageError where an array of rows × channels has no place in memory."""
    require(rows * channels <= _MOST, f"{where} takes {rows} × {channels} numbers", f"no more than {_MOST} can be held")


def require(holds: bool, message: str, hint: str) -> None:
    """Raise UsageError unless it ``holds``."""
    if not holds:
        raise UsageError(message, hint)
