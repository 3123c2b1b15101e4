# SPDX-License-Identifier: Apache-2.0
"""What export compares with the source, and that the manifest says it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
import torch

from perceiver_export.exporter import ExportOptions, LoadedModel, OwnModel, export, verification
from perceiver_export.exporter.graphs import Batch, whole_model
from perceiver_export.exporter.trace import FoldedGraph
from perceiver_export.runtimes.errors import VerificationError
from perceiver_export.runtimes.manifest import Check
from perceiver_export.runtimes.runtime import Array, Runtime
from tests.cli import small_models
from tests.conftest import SmallBundle

from .conftest import SHALLOW, MakeCheckpoint

DRAWN_TWICE, DRAWN_ONCE = ["seed 0", "seed 1", "seed 2"], ["seed 0", "seed 2"]


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every model counts as a large one."""
    monkeypatch.setattr(verification, "LARGE_MODEL", 0)


def seeds(checks: tuple[Check, ...]) -> list[str]:
    return [check.inputs.partition(",")[0] for check in checks]


@pytest.mark.usefixtures("large")
def test_a_large_model_is_compared_on_two_inputs(one_layer: LoadedModel, tmp_path: Path) -> None:
    """On three where the second has another number of samples."""
    fixed = export(one_layer, tmp_path / "fixed").manifest.verification
    assert seeds(fixed) == DRAWN_ONCE
    assert fixed[-1].inputs == "seed 2, normal values × 100"  # all of it: the model has one query

    dynamic = export(one_layer, tmp_path / "dynamic", ExportOptions(batch="1:2:3")).manifest.verification
    assert seeds(dynamic) == DRAWN_TWICE
    assert [check.inputs.rpartition(" ")[2] for check in dynamic] == ["2", "1", "3"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize("own", [False, True], ids=["tokens and masks", "examples"])
def test_a_large_model_whose_second_input_is_of_another_kind_is_compared_on_three(
    own: bool, make_checkpoint: MakeCheckpoint, tmp_path: Path
) -> None:
    model = OwnModel(torch.nn.Linear(3, 2), (torch.ones(1, 3),)) if own else make_checkpoint("language", **SHALLOW)
    assert seeds(export(model, tmp_path / "bundle").manifest.verification) == DRAWN_TWICE


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("call", "query", "refused"), [(0, 144, True), (1, 153, True), (1, 144, False)])
def test_of_many_queries_the_second_input_compares_one_in_17(
    call: int, query: int, refused: bool, small_bundle: SmallBundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A graph that gives a wrong number for a query of 16 × 24."""
    loaded, bundle = small_models.flow(), small_bundle("flow")
    part = whole_model(loaded.model, Batch.parse(1))
    made = FoldedGraph(part, ir.load(bundle / "model.onnx"))
    original, calls = Runtime.run, iter(range(2))

    def run(self: Runtime, *arguments: Any) -> dict[str, Array]:
        found = original(self, *arguments)
        if next(calls) == call:
            found["flow"].reshape(-1, 2)[query] += 1.0
        return found

    monkeypatch.setattr(Runtime, "run", run)
    verify = functools.partial(verification.verify, part, [made], loaded.config, bundle, lambda *_: None)
    if refused:
        with pytest.raises(VerificationError):
            verify()
    else:
        (first, second), _ = verify()
        assert "query" not in first.inputs
        assert second.inputs == "seed 2, normal values × 100, one query in 17"


class Sensitive(torch.nn.Module):
    """Exact to rounding for usual values; of large ones, the sines have hardly a right digit in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.Linear(64, 64, bias=False)
        torch.nn.init.normal_(self.mix.weight, std=1 / 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sin(self.mix(x) * x.square().mean(-1, keepdim=True))


@pytest.mark.parametrize("broken", [False, True])
def test_values_at_which_torch_has_no_exact_outputs_are_not_compared(
    broken: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Smaller ones are: of 10 times the usual values instead of 100, after the two other cases."""
    original, calls = Runtime.run, iter(range(6))

    def run(self: Runtime, *arguments: Any) -> dict[str, Array]:
        found = original(self, *arguments)
        return {name: array + 0.1 * (broken and next(calls) == 5) for name, array in found.items()}

    monkeypatch.setattr(Runtime, "run", run)
    torch.manual_seed(0)
    model = OwnModel(Sensitive(), {"x": torch.randn(1, 8, 64)})
    if broken:
        with pytest.raises(VerificationError):
            export(model, tmp_path / "bundle")
        assert next(calls, None) is None
    else:
        last = export(model, tmp_path / "bundle").manifest.verification[-1]
        assert last.inputs == "seed 2, normal values × 10"
        assert last.tolerance <= 1e-2
