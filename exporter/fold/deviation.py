# SPDX-License-Identifier: Apache-2.0
"""What is left of a LayerNorm over inputs whose constants are known: one number an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceiver_export.exporter.fold.constants import Constants


@dataclass(frozen=True)
class Modality:
    """One input, x_j = [f_j, p_j]: ``num_features`` channels that change with each call, and its constants."""

    num_features: int
    constants: Constants

    @property
    def num_channels(self) -> int:
        """C."""
        return self.num_features + self.constants.num_channels


class Deviation(nn.Module):
    """σ_j of inputs from their features (B, M, C_f) alone -> (B, M); (1, M) where there are none.

    The variance is a sum of squares that are all centred: nothing cancels where features have a large offset.
    """

    def __init__(self, modality: Modality, eps: float) -> None:
        super().__init__()
        self.eps, self.num_features = eps, modality.num_features
        self.num_constants = modality.constants.num_channels
        mean, square = modality.constants.moments()
        self.register_buffer("mean", mean.to(modality.constants.dtype))
        self.register_buffer("square", (square - self.num_constants * mean**2).to(modality.constants.dtype))

    def forward(self, features: Tensor | None) -> Tensor:
        total = self.num_features + self.num_constants
        mean = self.get_buffer("mean").unsqueeze(0)
        variance = self.get_buffer("square").unsqueeze(0) / total
        if features is not None:
            own = features.mean(-1)
            variance = variance + ((features - own.unsqueeze(-1)) ** 2).sum(-1) / total
            if self.num_constants:
                share = self.num_features * self.num_constants / total**2
                variance = variance + share * (own - mean) ** 2
        return torch.sqrt(variance + self.eps)
