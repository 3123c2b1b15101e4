# SPDX-License-Identifier: Apache-2.0
"""Encoders with decoders that nobody wrote for this project, for `export --split`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from perceiver_export.exporter import OwnModel

WIDTH, TOKENS, LATENTS, CELLS = 32, 60, 6, 24
Given = tuple[nn.Module, dict[str, Tensor]]


class Attention(nn.Module):
    """Queries read what is given, beside themselves; then a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.Linear(48, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)

    def forward(self, queries: Tensor, read: Tensor) -> Tensor:
        queries = queries + self.attention(self.norm(queries), read, read, need_weights=False)[0]
        values, gates = self.up(self.norm(queries)).chunk(2, -1)
        found: Tensor = queries + self.down(values * nn.functional.gelu(gates))
        return found


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.latents, self.embed = nn.Parameter(torch.randn(LATENTS, WIDTH)), nn.Linear(5, WIDTH)
        self.read, self.mix = Attention(), Attention()

    def forward(self, tokens: Tensor) -> Tensor:
        read = self.read(self.latents.expand(len(tokens), -1, -1), self.embed(tokens))
        found: Tensor = self.mix(read, read)
        return found


class Cells(nn.Module):
    """A grid of learned queries reads the latents; ``mixed``: and then the queries read each other."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.encoder, self.queries = Encoder(), nn.Parameter(torch.randn(1, CELLS, WIDTH))
        self.decoder, self.mixed, self.head = Attention(), mixed, nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        latents = self.encoder(tokens)
        rows = self.decoder(self.queries.expand(len(tokens), -1, -1), latents)
        if self.mixed:
            rows = self.decoder(rows, rows)
        found: Tensor = self.head(rows).unflatten(1, (4, 6))
        return found


class Shape(nn.Module):
    """A shape autoencoder: occupancy at points that are given, and a label of the latents."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.embed, self.decoder = Encoder(), nn.Linear(3, WIDTH), Attention()
        self.occupancy, self.label = nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 7)

    def forward(self, tokens: Tensor, points: Tensor) -> dict[str, Tensor]:
        latents = self.encoder(tokens)
        rows = self.decoder(self.embed(points), latents)
        return {"occupancy": self.occupancy(rows).squeeze(-1), "label": self.label(latents.mean(1)), "code": latents}


class Skipped(nn.Module):
    """The tokens reach the output past the encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Linear(WIDTH, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        found: Tensor = self.head(self.encoder(tokens).mean(1)) + tokens.mean((1, 2))[:, None]
        return found


class Queried(nn.Module):
    """Queries are an input of this name."""

    def __init__(self) -> None:
        super().__init__()
        self.shape = Shape()

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        found: Tensor = self.shape(tokens, queries)["occupancy"]
        return found


class Turned(Queried):
    """Queries are rows of a table plus blocks of its columns, of which there are twice as many."""

    def forward(self, tokens: Tensor, queries: Tensor) -> Tensor:
        turned = queries.transpose(1, 2).reshape(queries.shape)
        return super().forward(tokens, (queries + turned)[..., :3])


def _given(make: Callable[[], nn.Module], **more: tuple[int, ...]) -> Given:
    """A module with random parameters, tokens, and further inputs of these shapes."""
    torch.manual_seed(0)
    module = make()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module, {"tokens": torch.randn(1, TOKENS, 5), **{name: torch.rand(shape) for name, shape in more.items()}}


cells, mixed = partial(_given, Cells), partial(_given, partial(Cells, mixed=True))
shape, queried = partial(_given, Shape, points=(1, 50, 3)), partial(_given, Queried, queries=(1, 50, 3))
skipped, no_latents = partial(_given, Skipped), partial(_given, Encoder)
turned = partial(_given, Turned, queries=(1, 3, 6))


def named_like_ours() -> OwnModel:
    return OwnModel(*cells(), outputs=("latents",))
