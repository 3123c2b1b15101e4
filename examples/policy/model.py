# SPDX-License-Identifier: Apache-2.0
"""A robot policy of ACT's shape (arXiv 2304.13705) in plain torch: states in, chunks of actions out.

    perceiver-export export examples.policy.model:policy -o policy

Like ACT, it has an encoder of tokens and one decoder layer with constant queries, one for each action of the chunk. It
has no camera, and no style variable, which is zero at run time in ACT.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver_export.exporter import OwnModel

WEIGHTS = Path(__file__).with_name("policy.pt")
STATE, CHUNK, ACTION = 39, 16, 4
TOKENS = (4, 7, 4, 7, 3, 3, 3)  # hand and puck, both one step ago, goal, hand to puck, puck to goal


class Policy(nn.Module):
    """States of Meta-World (B, 39) -> the next 16 actions (B, 16, 4)."""

    mean: Tensor
    scale: Tensor

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(sum(TOKENS)))
        self.register_buffer("scale", torch.ones(sum(TOKENS)))
        self.embeddings = nn.ModuleList(nn.Linear(size, width) for size in TOKENS)
        one = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(one, layers, enable_nested_tensor=False)
        self.queries = nn.Parameter(torch.randn(CHUNK, width))
        self.decoder = nn.TransformerDecoderLayer(width, 4, 4 * width, 0.0, batch_first=True)
        self.head = nn.Linear(width, ACTION)

    def features(self, state: Tensor) -> Tensor:
        """The parts of the state that this task uses, and two distances: (B, 31)."""
        hand, puck, goal = state[:, :3], state[:, 4:7], state[:, 36:]
        return torch.cat([state[:, :11], state[:, 18:29], goal, puck - hand, goal - puck], 1)

    def forward(self, state: Tensor) -> Tensor:
        features = (self.features(state) - self.mean) * self.scale
        parts = zip(self.embeddings, features.split(TOKENS, 1), strict=True)
        memory = self.encoder(torch.stack([embedding(part) for embedding, part in parts], 1))
        queries = self.queries.expand(state.shape[0], -1, -1)
        actions: Tensor = self.head(self.decoder(queries, memory))
        return actions


def policy() -> OwnModel:
    """The trained policy; `validate` compares its actions with the expert's."""
    model = Policy()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    return OwnModel(model, {"state": torch.zeros(1, STATE)}, ("actions",), output_kinds={"actions": "regression"})
