# SPDX-License-Identifier: Apache-2.0
"""torch computes attention in one kernel, or in pieces, and gets what the operators of exported graphs give."""

from __future__ import annotations

from typing import Literal

import pytest
import torch

from perceiver_export.exporter.model import architectures as systems
from perceiver_export.exporter.model import attention
from perceiver_export.exporter.model.architectures import EncoderSizes
from perceiver_export.exporter.model.perceiver import PerceiverIO


class Attend(torch.nn.Module):
    def __init__(self, masked_rows: Literal["zero", "mean"] = "mean") -> None:
        super().__init__()
        self.masked_rows = masked_rows

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        return attention.attend(q, k, v, 2, mask, self.masked_rows)


@pytest.mark.parametrize(("samples", "seen"), [(1, 2), (2, 2), (2, 1)])
@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("masked_rows", [None, "zero", "mean"])
def test_torch_gives_what_is_exported(
    masked_rows: Literal["zero", "mean"] | None, width: int, samples: int, seen: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With values as wide as the keys and wider, one sample of queries or keys for all, and a sample without keys."""
    torch.manual_seed(0)
    queries, keys = torch.randn(samples, 7, 8, dtype=torch.float64), torch.randn(seen, 5, 8, dtype=torch.float64)
    given = [queries, keys, torch.randn(seen, 5, width, dtype=torch.float64)]
    if masked_rows is not None:
        given.append(torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0]]))
    module = Attend(masked_rows or "mean")
    program = torch.export.export(module, tuple(given))
    assert sum("softmax" in str(node.target) for node in program.graph.nodes) == 1
    assert not any("attention" in str(node.target) for node in program.graph.nodes)
    exported = program.module()(*given)

    monkeypatch.setattr(attention, "LARGEST_SCORES", 3 * 2 * 2 * 5)  # three queries at a time
    assert (module(*given) - exported).abs().max() <= 1e-14  # as in training
    with torch.no_grad():
        assert (module(*given) - exported).abs().max() <= 1e-14  # fused


def test_rows_in_pieces_are_the_rows_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the inputs, and of all queries and of some."""
    torch.manual_seed(0)
    config = systems.optical_flow(4, 6, EncoderSizes(5, 8, 1), "huggingface")
    model, feeds = PerceiverIO(config).double().eval(), {"frames": torch.randn(2, 2, 3, 4, 6, dtype=torch.float64)}
    indices = torch.tensor([[3, 23], [0, 7]])

    def answers() -> list[torch.Tensor]:
        with torch.no_grad():
            return [model(feeds)["flow"], model.decode("flow", model.encode(feeds), indices, feeds)]

    whole = answers()
    monkeypatch.setattr(attention, "LARGEST_ROWS", 2 * config.num_input_channels * 5)  # five of 24 rows at a time
    for one, other in zip(whole, answers(), strict=True):
        assert (one - other).abs().max() <= 1e-12
