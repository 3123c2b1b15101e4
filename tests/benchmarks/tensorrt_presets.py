# SPDX-License-Identifier: Apache-2.0
"""docs/results/tensorrt.md: every preset compiled by TensorRT for RTX for SM86, SM89, fp16 and int8, without a GPU.

    python -m tests.benchmarks.tensorrt_presets [PRESET…] [--layers N] [--blocks N] [--no-fold]

From the compiler's own layer report, it counts the fused attentions (of those whose heads allow it) and the int8
products (of all linear layers). It also times `lint`. `--layers` and `--blocks` cut depth, not widths; 0 keeps the
papers' depth. int8 uses one scale for all activations, because the engine is only compiled, not run.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import onnx_ir as ir

from perceiver_export.calibration.lowering.lint import Lint, lint
from perceiver_export.calibration.lowering.tensorrt import lower_for_tensorrt
from perceiver_export.exporter.presets import PRESETS
from tests.benchmarks.harness import Row, command, seconds
from tests.preset_graphs import preset_graphs, quantized
from tests.runtimes.tensorrt_reports import compile_rtx, read_report

_FORMS = ("fp16", "int8")
_DEVICES = ("sm86", "sm89")


def measure(
    work: Path, presets: tuple[str, ...] = tuple(PRESETS), layers: int = 0, blocks: int = 0, fold: bool = True
) -> Iterator[Row]:
    """A row per part; ``seconds`` are those of the engine that took longest."""
    for name in presets:
        for part, engines in groupby(compiled(work, name, layers or None, blocks or None, fold), itemgetter("part")):
            yield _row(name, part, list(engines))


def _row(name: str, part: str, engines: list[Row]) -> Row:
    return {
        "preset": name if part == "model" else f"{name}, {part}",
        "fused": f"{min(one['fused'] for one in engines)} of {engines[0]['fusable']}",
        "int8": f"{min(one['int8'] for one in engines if one['linears'])} of {engines[-1]['linears']}",
        **{f"MiB {one['form']} {one['device']}": one["MiB"] for one in engines},
        "seconds": max(one["seconds"] for one in engines),
        "seconds of lint": max(one["seconds of lint"] for one in engines),
        "held": all(one["held"] for one in engines),
    }


def compiled(
    work: Path,
    name: str,
    layers: int | None,
    blocks: int | None,
    fold: bool = True,
    forms: Sequence[str] = _FORMS,
    devices: Sequence[str] = _DEVICES,
) -> Iterator[Row]:
    """Engines of one preset: its parts in fp16 and int8, for each architecture."""
    graphs = preset_graphs(name, layers, blocks, fold)
    for part in list(graphs):
        canonical = work / f"{part}.onnx"
        ir.save(graphs.pop(part), canonical, external_data=f"{part}.weights")
        for form in forms:
            (folder := work / form).mkdir()
            yield from _engines({"preset": name, "part": part, "form": form}, ir.load(canonical), folder, devices)
            shutil.rmtree(folder)


def _engines(row: Row, model: ir.Model, folder: Path, devices: Sequence[str]) -> Iterator[Row]:
    linears = quantized(model) if row["form"] == "int8" else 0
    kept = lower_for_tensorrt(model, "fp16")
    lowered = folder / "lowered.onnx"
    ir.save(model, lowered, external_data="lowered.weights")
    del model
    judgements: list[Lint] = []
    lint_seconds = seconds(lambda: judgements.extend(lint(lowered, "tensorrt-rtx")))
    (judged,) = judgements
    assert not judged.refused, judged.findings
    for device in devices:
        out = folder / device
        took = seconds(lambda: compile_rtx(lowered, out, device))  # noqa: B023  called at once
        report = read_report(out)
        yield row | {
            "device": device,
            "attentions": judged.attentions,
            "fusable": judged.fusable,
            "fused": report.fused_attentions,
            "linears": linears,
            "int8": report.int8_products,
            "fp32 nodes": len(kept),
            "MiB": report.engine_bytes / 2**20,
            "seconds": took,
            "seconds of lint": lint_seconds,
            "held": report.fused_attentions == judged.fusable and report.int8_products == linears,
        }


if __name__ == "__main__":
    command(measure)
