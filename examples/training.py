# SPDX-License-Identifier: Apache-2.0
"""What the training of `flow` and of `video` share: steps of AdamW."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Training:
    """AdamW that decays matrices only, with clipped gradients.

    The learning rate goes up for 100 steps, then is constant, and goes down to zero over the last quarter.
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
