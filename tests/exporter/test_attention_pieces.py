# SPDX-License-Identifier: Apache-2.0
"""torch computes large attentions in pieces, and gets the same; exported graphs have none."""

from __future__ import annotations

import pytest
import torch

from perceiver_export.exporter.model import attention


@pytest.mark.parametrize("masked", [False, True])
def test_pieces_give_the_same(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, n, 8, dtype=torch.float64) for n in (7, 5, 5))
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]) if masked else None
    whole = attention.attend(queries, keys, values, 2, mask)

    monkeypatch.setattr(attention, "LARGEST_SCORES", 3 * 2 * 2 * 5)  # three queries at a time
    pieces = attention.attend(queries, keys, values, 2, mask)
    assert (whole - pieces).abs().max() <= 1e-14

    class Attend(torch.nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            return attention.attend(q, k, v, 2)

    graph = torch.export.export(Attend(), (queries, keys, values)).graph
    assert sum("softmax" in str(node.target) for node in graph.nodes) == 1
