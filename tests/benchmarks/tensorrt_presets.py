# SPDX-License-Identifier: Apache-2.0
"""The README's table: every preset compiled by TensorRT for RTX for SM86 and SM89, in fp16 and int8, without a GPU.

Of each it counts fused attentions, of those whose heads allow it, and int8 products, of all linears, from the
compiler's own layer report; and times `lint`. `--layers` and `--blocks` cut depth, not widths; without them sizes are
the papers'. int8 has one scale for all activations: it is compiled, not run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tests`, when it is run as a command
from perceiver_export.calibration.linting import lint
from perceiver_export.calibration.lowering.tensorrt import lower_for_tensorrt
from perceiver_export.exporter.presets import PRESETS
from perceiver_export.runtimes.engines import tensorrt
from perceiver_export.runtimes.engines.backend import EngineOptions, Source
from tests.preset_graphs import preset_graphs, quantized
from tests.runtimes.tensorrt_reports import read_report

_FORMS = ("fp16", "int8")
_DEVICES = ("sm86", "sm89")
_ROW = (
    "{preset:28} {part:14} {form:5} {device:5} {fused:>3}/{fusable:<3} {int8:>4}/{linears:<4} {kept:>4}"
    " {mebibytes:>7.1f} {seconds:>6.1f} {lint_seconds:>5.2f}"
)


@dataclass(frozen=True)
class Compiled:
    """One engine. ``attentions``: all of the graph; ``fusable``: those that `lint` says become one kernel."""

    preset: str
    part: str
    form: str
    device: str
    attentions: int
    fusable: int
    fused: int
    linears: int
    int8: int
    kept: int
    mebibytes: float
    seconds: float
    lint_seconds: float


def main() -> None:
    """Print a row for each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--layers", type=int)
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--no-fold", dest="fold", action="store_false", help="every projection as the model has it")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = []
    if not arguments.json:
        print("preset, part, form, device, fused/fusable, int8/linears, fp32 nodes, MiB, s to compile, s to lint")
    for name in arguments.presets:
        for row in compiled(name, arguments.layers, arguments.blocks, arguments.fold):
            rows.append(row)
            if not arguments.json:
                print(_ROW.format(**asdict(row)), flush=True)
    whole = all(row.fused == row.fusable and row.int8 == (row.linears if row.form == "int8" else 0) for row in rows)
    print(json.dumps([asdict(row) for row in rows]) if arguments.json else f"all fused and int8 as intended: {whole}")
    sys.exit(not whole)


def compiled(
    name: str,
    layers: int | None,
    blocks: int | None,
    fold: bool = True,
    forms: Sequence[str] = _FORMS,
    devices: Sequence[str] = _DEVICES,
) -> Iterator[Compiled]:
    """Engines of one preset: its parts in fp16 and int8, for each architecture."""
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        graphs = preset_graphs(name, layers, blocks, fold)
        for part in list(graphs):
            ir.save(graphs.pop(part), place / f"{part}.onnx", external_data=f"{part}.weights")
        for canonical in sorted(place.glob("*.onnx")):
            for form in forms:
                work = place / form
                work.mkdir()
                yield from _forms(name, canonical, form, work, devices)
                shutil.rmtree(work)


def _forms(name: str, canonical: Path, form: str, work: Path, devices: Sequence[str]) -> Iterator[Compiled]:
    model = ir.load(canonical)
    linears = quantized(model) if form == "int8" else 0
    kept = lower_for_tensorrt(model, "tensorrt", "fp16")
    lowered = work / "lowered.onnx"
    ir.save(model, lowered, external_data="lowered.weights")
    del model
    start = time.perf_counter()
    (judged,) = lint(lowered, "tensorrt-rtx")
    lint_seconds = time.perf_counter() - start
    assert not judged.refused, judged.findings
    for device in devices:
        out = work / device
        out.mkdir()
        options = EngineOptions(precision="fp16", flags={"compute_capability": device})
        start = time.perf_counter()
        tensorrt.compile(Source("tensorrt-rtx", lowered, options), out, lambda what, done, total: None)
        seconds = time.perf_counter() - start
        report = read_report(out)
        yield Compiled(
            name,
            canonical.stem,
            form,
            device,
            judged.attentions,
            judged.fusable,
            report.fused_attentions,
            linears,
            report.int8_products,
            len(kept),
            report.engine_bytes / 2**20,
            seconds,
            lint_seconds,
        )


if __name__ == "__main__":
    main()
