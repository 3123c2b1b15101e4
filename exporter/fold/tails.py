# SPDX-License-Identifier: Apache-2.0
"""What follows a decoder's attention, with every linear step after the GELU folded into one.

y = x + W_2 gelu(W_1 LN(x) + b_1) + b_2 and out = F y + f become out = F x + (F W_2) gelu(…) + (F b_2 + f): of the
second C × C matrix of the MLP, the final layer and the head, C × E numbers are left.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.attention import CrossAttention


class LinearTail(nn.Module):
    """x (B, O, C) after the attention -> output rows (B, O, E): MLP, final layer, head and scale."""

    def __init__(self, reference: CrossAttention, layers: Sequence[nn.Linear], scale: float = 1.0) -> None:
        super().__init__()
        width = reference.mlp.hidden.in_features
        matrix, shift = torch.eye(width), torch.zeros(width)
        for layer in layers:
            matrix, shift = layer.weight @ matrix, layer.weight @ shift + layer.bias
        matrix, shift = matrix * scale, shift * scale
        output = reference.mlp.output
        self.norm, self.hidden, self.activation = reference.mlp_norm, reference.mlp.hidden, reference.mlp.activation
        self.register_buffer("direct", matrix.T.contiguous())
        self.register_buffer("through", (matrix @ output.weight).T.contiguous())
        self.register_buffer("shift", matrix @ output.bias + shift)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.hidden(self.norm(x)))
        rows: Tensor = x @ self.get_buffer("direct") + hidden @ self.get_buffer("through") + self.get_buffer("shift")
        return rows
