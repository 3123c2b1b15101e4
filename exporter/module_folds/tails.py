# SPDX-License-Identifier: Apache-2.0
"""What follows a decoder's attention, with every linear step after the GELU folded into one.

y = x + W_2 gelu(W_1 LN(x) + b_1) + b_2 and out = F y + f become out = F x + (F W_2) gelu(…) + (F b_2 + f): of the
second C × C matrix of the MLP, the final layer and the head, C × E numbers are left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceiver_export.exporter.model.attention import CrossAttention


@dataclass(frozen=True)
class Linear:
    """One of the linear layers behind a decoder's attention: weight (E, C) and bias (E,)."""

    weight: Tensor
    bias: Tensor


class LinearTail(nn.Module):
    """x (B, O, C) after the attention -> output rows (B, O, E): MLP, final layer, head and scale."""

    def __init__(self, reference: CrossAttention, layers: Sequence[Linear], scale: float = 1.0) -> None:
        super().__init__()
        width, dtype = reference.mlp.hidden.in_features, reference.mlp.hidden.weight.dtype
        matrix, shift = torch.eye(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
        for layer in layers:
            weight = layer.weight.detach().double()
            matrix, shift = weight @ matrix, weight @ shift + layer.bias.detach()
        matrix, shift = matrix * scale, shift * scale
        output = reference.mlp.output
        self.norm, self.hidden, self.activation = reference.mlp_norm, reference.mlp.hidden, reference.mlp.activation
        self.register_buffer("direct", matrix.T.contiguous().to(dtype))
        self.register_buffer("through", (matrix @ output.weight.detach().double()).T.contiguous().to(dtype))
        self.register_buffer("shift", (matrix @ output.bias.detach().double() + shift).to(dtype))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.hidden(self.norm(x)))
        rows: Tensor = x @ self.get_buffer("direct") + (hidden @ self.get_buffer("through") + self.get_buffer("shift"))
        return rows


class PlainTail(nn.Module):
    """The same with each layer as it is."""

    def __init__(self, reference: CrossAttention, layers: Sequence[Linear], scale: float = 1.0) -> None:
        super().__init__()
        self.scale, self.has_mlp = scale, reference.has_mlp
        if reference.has_mlp:
            self.norm, self.mlp = reference.mlp_norm, reference.mlp
        self.weights = nn.ParameterList(layer.weight for layer in layers)
        self.biases = nn.ParameterList(layer.bias for layer in layers)

    def forward(self, x: Tensor) -> Tensor:
        rows = x + self.mlp(self.norm(x)) if self.has_mlp else x
        for weight, bias in zip(self.weights, self.biases, strict=True):
            rows = nn.functional.linear(rows, weight, bias)
        return rows if self.scale == 1 else rows * self.scale
