# SPDX-License-Identifier: Apache-2.0
"""One image in, three answers out: a Perceiver IO in plain torch whose queries belong to three tasks.

perceiver-export export examples.multitask.model:multitask -o multitask
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver_export.exporter import OwnModel
from perceiver_export.runtimes.manifest import OutputKind

WEIGHTS = Path(__file__).with_name("multitask.pt")
LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
TURNS = 4  # quarters
SIDE, TILES, TILE = 28, 7, 4  # a picture is 7 × 7 tiles of 4 × 4 pixels


class Multitask(nn.Module):
    """Pixels (B, 28, 28) of a turned image -> its label, its turn in quarters, and the upright image.

    24 latents read the picture's tiles and each other. One query asks for the label, one for the turn, and one for
    each tile of the picture.
    """

    def __init__(self, width: int = 64, latents: int = 24, layers: int = 3) -> None:
        super().__init__()
        self.embedding, self.positions = (
            nn.Conv2d(1, width, TILE, TILE),
            nn.Parameter(0.1 * torch.randn(TILES**2, width)),
        )
        self.latents, self.norm = nn.Parameter(torch.randn(latents, width)), nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, 2, batch_first=True)
        one = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(one, layers, nn.LayerNorm(width), enable_nested_tensor=False)
        self.queries = nn.Parameter(torch.randn(2 + TILES**2, width))
        self.ask = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.label, self.turn = nn.Linear(width, len(LABELS)), nn.Linear(width, TURNS)
        self.tile = nn.Linear(width, TILE**2)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pixels = image.float().unsqueeze(1) / 127.5 - 1
        seen = self.norm(self.embedding(pixels).flatten(2).transpose(1, 2) + self.positions)
        latents = self.latents.expand(image.shape[0], -1, -1)
        latents = self.blocks(latents + self.read(latents, seen, seen, need_weights=False)[0])
        queries = self.queries.expand(image.shape[0], -1, -1)
        rows = queries + self.ask(queries, latents, latents, need_weights=False)[0]
        rows = rows + self.mlp(rows)
        tiles = self.tile(rows[:, 2:]).reshape(-1, TILES, TILES, TILE, TILE)
        upright = tiles.transpose(2, 3).reshape(-1, SIDE, SIDE)
        return self.label(rows[:, 0]), self.turn(rows[:, 1]), upright


def multitask() -> OwnModel:
    """The trained model. `validate` judges its labels; data.py has metrics for the other two outputs."""
    model = Multitask()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    image = torch.arange(SIDE**2, dtype=torch.int32).reshape(1, SIDE, SIDE) % 256
    kinds: dict[str, OutputKind] = {"label": "single-label", "turn": "none", "upright": "none"}
    return OwnModel(model, {"image": image}, tuple(kinds), labels=LABELS, output_kinds=kinds)
