# SPDX-License-Identifier: Apache-2.0
"""Blocks that share weights: what an engine of TensorRT for RTX weighs, written out and as a loop over the blocks.

The architecture is ImageNet's, configuration A at one self-attention a block: 1024 channels, 512 latents, 8 heads. As a
loop the body is compiled once; the table says whether attention is still one kernel in there.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

sys.path.insert(0, str(Path(__file__).parents[2]))  # `tests`, when it is run as a command
from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.exporter.parts import GraphPart
from perceiver_export.exporter.perceiver.attention import SelfAttention
from perceiver_export.exporter.perceiver.config import AttentionConfig
from perceiver_export.runtimes.engines import tensorrt
from perceiver_export.runtimes.engines.backend import EngineOptions, Source
from perceiver_export.runtimes.manifest import TensorSpec
from tests.preset_graphs import quantized
from tests.runtimes.tensorrt_reports import read_report

_SHAPE = (1, 512, 1024)


@dataclass(frozen=True)
class Engine:
    """One engine of ``blocks`` runs of one layer."""

    form: str
    blocks: int
    loop: bool
    mebibytes: float
    fused_attentions: int
    layers: int


def main() -> None:
    """Print a row for each engine."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = [
        engine(form, blocks, loop)
        for form in ("fp16", "int8")
        for blocks, loop in ((1, False), (2, False), (8, False), (8, True))
    ]
    for row in rows if not arguments.json else ():
        shape = "loop" if row.loop else "written out"
        print(f"{row.form} {row.blocks} blocks {shape:12} {row.mebibytes:7.1f} MiB, {row.fused_attentions} fused")
    if arguments.json:
        print(json.dumps([asdict(row) for row in rows]))


def engine(form: str, blocks: int, loop: bool) -> Engine:
    """Compile for SM86."""
    model = _blocks(1 if loop else blocks)
    if form == "int8":
        quantized(model)
    to_half(model, "fp16")
    if loop:
        model = _looped(model, blocks)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model.onnx"
        ir.save(model, path, external_data="model.weights")
        options = EngineOptions(precision="fp16", flags={"compute_capability": "sm86"})
        tensorrt.compile(Source("tensorrt-rtx", path, options), Path(directory), lambda what, done, total: None)
        report = read_report(Path(directory))
    return Engine(form, blocks, loop, report.engine_bytes / 2**20, report.fused_attentions, report.layers)


def _blocks(blocks: int) -> ir.Model:
    import torch

    from perceiver_export.exporter.perceiver.config import PerceiverConfig
    from perceiver_export.exporter.trace import trace
    from tests.preset_graphs import preset_config

    class Blocks(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = SelfAttention(AttentionConfig(8, 1024, 1024), 1024, "gelu")

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
            for _ in range(blocks):
                x = self.layer(x)
            return (x,)

    torch.manual_seed(0)
    spec = TensorSpec("latents", "float32", _SHAPE)
    out = TensorSpec("out", "float32", _SHAPE)
    config: PerceiverConfig = preset_config("imagenet-fourier")
    part = GraphPart("blocks", Blocks().eval(), (spec,), (out,), {})
    return trace(part, config)


def _looped(model: ir.Model, blocks: int) -> ir.Model:
    """The graph as the body of a Loop: the casts at its ends stay inside, so fp32 goes round."""
    body = model.graph
    count = ir.Value(name="iteration", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape([]))
    going = ir.Value(name="going", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    still = ir.Value(name="still", type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([]))
    body.inputs.insert(0, going)
    body.inputs.insert(0, count)
    body.append(ir.Node("", "Identity", [going], outputs=[still], name="still"))
    body.outputs.insert(0, still)
    body.inputs[2].name, body.outputs[1].name = "carried", "carried_out"
    weights = list(body.initializers.values())
    body.initializers.clear()
    first = ir.Value(name="latents", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(_SHAPE))
    last = ir.Value(name="out", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(_SHAPE))
    trips, on = (
        ir.Value(name=name, const_value=ir.tensor(array, name=name), type=ir.TensorType(dtype), shape=ir.Shape([]))
        for name, array, dtype in (
            ("trips", np.array(blocks, np.int64), ir.DataType.INT64),
            ("on", np.array(True), ir.DataType.BOOL),
        )
    )
    loop = ir.Node("", "Loop", [trips, on, first], [ir.AttrGraph("body", body)], outputs=[last], name="loop")
    graph = ir.Graph(
        [first], [last], nodes=[loop], initializers=[trips, on, *weights], opset_imports=model.opset_imports, name="g"
    )
    return ir.Model(graph, ir_version=model.ir_version)


if __name__ == "__main__":
    main()
