# SPDX-License-Identifier: Apache-2.0
"""What is left of a LayerNorm over inputs whose constants are known: one number an input."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceiver_export.exporter.module_folds.constants import Constants


@dataclass(frozen=True)
class Modality:
    """One input, x_j = [f_j, p_j]: ``num_features`` channels that change with each call, and its constants.

    ``basis`` (R, C_f), where features are a linear layer of fewer values v_j, f_j = [v_j, 1] basis: then the values
    alone are multiplied, and the features never computed.
    """

    num_features: int
    constants: Constants
    basis: Tensor | None = None

    @property
    def num_channels(self) -> int:
        """C."""
        return self.num_features + self.constants.num_channels

    @property
    def num_values(self) -> int:
        """R, or C_f: how many numbers of an input change."""
        return self.num_features if self.basis is None else self.basis.shape[0]

    def over_values(self, weights: Tensor) -> Tensor:
        """What is multiplied with the channels of an input (…, C), to be multiplied with values, constants beside."""
        if self.basis is None:
            return weights
        own, rest = weights[..., : self.num_features], weights[..., self.num_features :]
        return torch.cat([own @ self.basis.detach().to(own.dtype).T, rest], dim=-1)

    def of_values(self) -> Modality:
        """The same input with its values as the features."""
        return Modality(self.num_values, self.constants)

    def to_features(self, read: Tensor) -> Tensor:
        """Sums of values (…, R) as sums of features (…, C_f)."""
        return read if self.basis is None else read @ self.basis


class Deviation(nn.Module):
    """σ_j of inputs from their features or values (B, C_f | R, M) alone -> (B, M); (1, M) where there are none.

    The variance is a sum of squares that are all centred: nothing cancels where features have a large offset. Of a
    basis, centred over its channels, only the triangle R of its decomposition (Q R)ᵀ counts: ‖Q R v‖ = ‖R v‖.
    """

    def __init__(self, modality: Modality, eps: float) -> None:
        super().__init__()
        self.eps, self.num_features = eps, modality.num_features
        self.num_constants = modality.constants.num_channels
        mean, square = modality.constants.moments()
        self.register_buffer("mean", mean.to(modality.constants.dtype))
        self.register_buffer("square", (square - self.num_constants * mean**2).to(modality.constants.dtype))
        self.linear = modality.basis is not None
        if modality.basis is not None:
            basis = modality.basis.detach().double()
            centred = basis - basis.mean(1, keepdim=True)
            triangle = torch.linalg.qr(centred.T, "r").R
            self.register_buffer("triangle", triangle.to(modality.basis.dtype))
            # No product: of a vector onnxruntime 1.32's fused one is wrong, and TensorRT for RTX has none for one row.
            self.register_buffer("average", basis.mean(1, keepdim=True).to(modality.basis.dtype))

    def forward(self, features: Tensor | None) -> Tensor:
        total = self.num_features + self.num_constants
        mean = self.get_buffer("mean").unsqueeze(0)
        variance = self.get_buffer("square").unsqueeze(0) / total
        if features is not None:
            if self.linear:
                own = (self.get_buffer("average") * features).sum(1)
                centred = self.get_buffer("triangle") @ features
            else:
                own = features.mean(1)
                centred = features - own.unsqueeze(1)
            changing = (centred**2).sum(1) / total
            if self.num_constants:
                share = self.num_features * self.num_constants / total**2
                changing = changing + share * (own - mean) ** 2
            # Last: OpenVINO 2026.4.1 adds a constant that follows a sum wrongly where there are several samples.
            variance = changing + variance
        return torch.sqrt(variance + self.eps)
