# SPDX-License-Identifier: Apache-2.0
"""Shared by the training scripts: the precision of products, and AdamW's steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from perceiver_export.runtimes.machine import cpu_features


def mixed_precision() -> torch.autocast:
    """bfloat16 products where the CPU has them; on an AVX2 CPU they would take 20 times as long as float32's."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=any("bf16" in one for one in cpu_features()))


class Training:
    """AdamW that decays matrices only, with clipped gradients.

    The learning rate rises for 100 steps, stays constant, and falls to zero over the last quarter.
    """

    def __init__(self, model: nn.Module, rate: float, steps: int) -> None:
        self.model, self.rate, self.steps = model, rate, steps
        decayed = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        groups = [{"params": decayed, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups)

    def step(self, number: int, loss: Tensor) -> None:
        """Step ``number``, from 0."""
        factor = min(1.0, (number + 1) / 100, (self.steps - number) / (self.steps / 4))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * factor
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
