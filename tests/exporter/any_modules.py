# SPDX-License-Identifier: Apache-2.0
"""Modules that nobody wrote for this project, for `export module:function` and for ONNX files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

from perceiver_export.exporter import OwnModel


class Resampler(nn.Module):
    """Flamingo's: learned latents read the tokens beside themselves, several times."""

    def __init__(self, width: int = 64, depth: int = 2, latents: int = 8, heads: int = 2, head: int = 32) -> None:
        super().__init__()
        self.latents, self.heads = nn.Parameter(torch.randn(latents, width)), heads
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "tokens": nn.LayerNorm(width),
                    "own": nn.LayerNorm(width),
                    "query": nn.Linear(width, heads * head, bias=False),
                    "both": nn.Linear(width, 2 * heads * head, bias=False),
                    "out": nn.Linear(heads * head, width, bias=False),
                    "mlp": nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)),
                }
            )
            for _ in range(depth)
        )

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.latents.expand(tokens.shape[0], -1, -1)
        for layer in self.layers:
            assert isinstance(layer, nn.ModuleDict)
            own = layer["own"](x)
            keys, values = layer["both"](torch.cat([layer["tokens"](tokens), own], 1)).chunk(2, -1)
            q, k, v = (
                part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in (layer["query"](own), keys, values)
            )
            read = nn.functional.scaled_dot_product_attention(q, k, v)
            x = x + layer["out"](read.transpose(1, 2).flatten(2))
            x = x + layer["mlp"](x)
        return x


def resampler() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Resampler(), {"tokens": torch.randn(1, 512, 64)}


class Words(nn.Module):
    """Tokens and a mask that can be given by keyword only; a dict of outputs, one of them None."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.latents = nn.Embedding(50, 32), nn.Parameter(torch.randn(4, 32))
        self.attention = nn.MultiheadAttention(32, 4, batch_first=True)
        self.scores = nn.Linear(32, 3)

    def forward(
        self, ids: Tensor, *, mask: Tensor | None = None, scale: float | None = None
    ) -> dict[str, Tensor | None]:
        x = self.embedding(ids)
        q = self.latents.expand(x.shape[0], -1, -1)
        read = self.attention(q, x, x, need_weights=False, key_padding_mask=mask)[0]
        return {"scores": self.scores(read.mean(1)), "rows": read, "nothing": None}


def words() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    mask = torch.zeros(2, 20, dtype=torch.bool)
    mask[1, 12:] = True
    return Words(), {"ids": torch.randint(0, 50, (2, 20)), "mask": mask}


@dataclasses.dataclass
class Found:
    boxes: Tensor
    score: Tensor
    extra: None = None


class Detector(nn.Module):
    """A dataclass of outputs: boxes, and a number of each sample or one of all."""

    def __init__(self, of_each: bool = True) -> None:
        super().__init__()
        self.of_each, self.layer = of_each, nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Found:
        return Found(self.layer(x), self.layer(x).mean((1, 2)) if self.of_each else self.layer(x).mean())


def detector() -> tuple[nn.Module, tuple[Tensor]]:
    torch.manual_seed(0)
    return Detector(), (torch.randn(1, 5, 8),)


def classifier() -> OwnModel:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 3))
    kinds = {"logits": "single-label"}
    return OwnModel(model, (torch.randn(1, 8, 8),), outputs=("logits",), output_kinds=kinds)  # type: ignore[arg-type]


class Computes(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Brain(nn.Module):
    """A constant that ONNX Runtime has no kernel for."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight @ self.weight).float()


class Vocabulary(nn.Linear):
    """With state that is no tensor, as modules may have."""

    def get_extra_state(self) -> dict[str, int]:
        return {"left": 0, "right": 1}

    def set_extra_state(self, state: dict[str, int]) -> None: ...


def vocabulary() -> tuple[nn.Module, tuple[Tensor]]:
    return Vocabulary(4, 3), (torch.randn(1, 4),)


class Returned(nn.Module):
    """An input, a weight, and one tensor under several names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.weight = nn.Linear(8, 4), nn.Parameter(torch.randn(1, 4))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        made = self.layer(x)
        return {"a": made, "x_out": x, "b": made, "c": made + 0, "fixed": self.weight, "twice": 2 * self.weight}


def returned() -> tuple[nn.Module, dict[str, Tensor]]:
    return Returned(), {"x": torch.randn(1, 8)}


class Pairs(nn.Module):
    """Both halves of a batch that are told apart by its size."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        both: Tensor = self.layer(torch.cat([x, z]))
        return both[: len(x)] - 2 * both[len(x) :] * both[: -len(x)]


def pairs() -> tuple[nn.Module, dict[str, Tensor]]:
    torch.manual_seed(0)
    return Pairs(), {"x": torch.randn(1, 8), "z": torch.randn(1, 8)}
