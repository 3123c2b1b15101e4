# SPDX-License-Identifier: Apache-2.0
"""Blocks that share weights: the size of an engine of TensorRT for RTX, unrolled and as a loop over the blocks.

    python -m tests.benchmarks.tensorrt_shared_weights

The architecture is ImageNet's configuration A with one self-attention per block: 1024 channels, 512 latents, 8 heads.
In a loop, the body is compiled once; the table shows whether its attention is still one kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from perceiver_export.calibration.lowering.half import to_half
from perceiver_export.exporter.graphs import GraphPart
from perceiver_export.exporter.model.attention import SelfAttention
from perceiver_export.exporter.model.config import AttentionConfig
from perceiver_export.runtimes.manifest import TensorSpec
from tests.benchmarks.harness import Row, command
from tests.preset_graphs import preset_config, quantized, traced
from tests.runtimes.tensorrt_reports import compile_rtx

_SHAPE = (1, 512, 1024)


def measure(work: Path) -> Iterator[Row]:
    """A row per engine for SM86, which runs one layer ``blocks`` times."""
    for form in ("fp16", "int8"):
        for blocks, loop in ((1, False), (2, False), (8, False), (8, True)):
            model = _blocks(1 if loop else blocks)
            if form == "int8":
                quantized(model)
            to_half(model, "fp16")
            if loop:
                model = _looped(model, blocks)
            folder = work / f"{form}-{blocks}-{loop}"
            folder.mkdir()
            ir.save(model, folder / "model.onnx", external_data="model.weights")
            report = compile_rtx(folder / "model.onnx", folder / "engine")
            size, fused = report.engine_bytes / 2**20, report.fused_attentions
            yield {"form": form, "blocks": blocks, "loop": loop, "MiB": size, "fused": fused, "layers": report.layers}


class _Repeated(torch.nn.Module):
    def __init__(self, blocks: int) -> None:
        super().__init__()
        self.layer, self.blocks = SelfAttention(AttentionConfig(8, 1024, 1024), 1024, "gelu"), blocks

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        for _ in range(self.blocks):
            x = self.layer(x)
        return (x,)


def _blocks(blocks: int) -> ir.Model:
    torch.manual_seed(0)
    latents, out = (TensorSpec(name, "float32", _SHAPE) for name in ("latents", "out"))
    part = GraphPart("blocks", _Repeated(blocks).eval(), (latents,), (out,), {})
    return traced(part, preset_config("imagenet-fourier"))


def _looped(model: ir.Model, blocks: int) -> ir.Model:
    """The graph as the body of a Loop. The casts at its ends stay inside, so the loop carries fp32."""
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
    command(measure)
