# SPDX-License-Identifier: Apache-2.0
"""Input adapters: from what a sensor gives to the M × C inputs that the encoder reads."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.config import ImageInput
from perceiver_export.exporter.perceiver.positions import position_encoding


class ImageAdapter(nn.Module):
    """Pictures (B, channels, height, width) -> inputs (B, M, C): features, then position."""

    def __init__(self, config: ImageInput) -> None:
        super().__init__()
        self.shape = (config.num_channels, config.height, config.width)
        self.features = _features(config)
        with torch.no_grad():
            grid = self.features.eval()(torch.zeros(1, *self.shape)).shape[2:]
        self.positions = position_encoding(config.positions, tuple(grid))

    def forward(self, image: Tensor) -> Tensor:
        features = self.features(image).flatten(2).transpose(1, 2)
        positions: Tensor = self.positions()
        return torch.cat([features, positions.expand(features.shape[0], -1, -1)], dim=-1)


def _features(config: ImageInput) -> nn.Module:
    if config.features == "pixels":
        return nn.Identity()
    if config.features == "conv1x1":
        return nn.Conv2d(config.num_channels, config.num_feature_channels, kernel_size=1)
    return ConvDownsample(config.num_channels, config.num_feature_channels, config.padding)


class ConvDownsample(nn.Module):
    """7×7 stride 2 convolution, batch norm, ReLU, 3×3 stride 2 max-pool: (B, 3, H, W) -> (B, C, ~H/4, ~W/4).

    ``same`` pads as TensorFlow and Haiku do (more at the end); ``huggingface`` as transformers' port does.
    """

    def __init__(self, num_channels: int, num_feature_channels: int, padding: str) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(num_channels, num_feature_channels, kernel_size=7, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(num_feature_channels)

    def forward(self, image: Tensor) -> Tensor:
        if self.padding == "huggingface":
            x = nn.functional.pad(image, (3, 3, 3, 3))
        else:
            x = nn.functional.pad(image, _same_padding(image, kernel=7))
        x = torch.relu(self.norm(self.conv(x)))
        if self.padding == "same":
            x = nn.functional.pad(x, _same_padding(x, kernel=3), value=-torch.inf)
        return nn.functional.max_pool2d(x, kernel_size=3, stride=2)


def _same_padding(x: Tensor, kernel: int, stride: int = 2) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) so that the output has ceil(size / stride) points; the odd one goes to the end."""
    height, width = x.shape[-2:]
    vertical, horizontal = (max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in (height, width))
    return horizontal // 2, horizontal - horizontal // 2, vertical // 2, vertical - vertical // 2
