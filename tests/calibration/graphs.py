# SPDX-License-Identifier: Apache-2.0
"""Small graphs as text, and what it takes to quantize one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from perceiver_export.calibration.graphs import open_session, run_session, save_graphs
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.calibration.quantization.part import QuantizedPart, quantize_part
from perceiver_export.calibration.quantization.statistics import Observer, Statistics
from perceiver_export.runtimes.manifest import Part, TensorSpec
from perceiver_export.runtimes.runtime import Array

# What `build` puts before each of them.
_HEADER = '<ir_version: 10, opset_import: ["" : 20]>'
# A layer norm read by two linears of one input, attention, and an MLP whose two runs share both weights.
BLOCK = """
block (float[1, 6, 16] x, float[16] g, float[16] b, float[16, 16] wk, float[16] bk, float[16, 16] wv, float[16] bv,
  float[16, 16] wo, float[16] bo, float[16, 32] w1, float[32] b1, float[32, 16] w2, float[16] b2)
  => (float[1, 6, 16] y)
<int64[4] heads = {1, 6, 2, 8}, int64[3] merged = {1, 6, 16}>
{
  n = LayerNormalization <axis = -1> (x, g, b)
  k0 = MatMul (n, wk)  k1 = Add (k0, bk)  k2 = Reshape (k1, heads)  k = Transpose <perm = [0, 2, 1, 3]> (k2)
  v0 = MatMul (n, wv)  v1 = Add (v0, bv)  v2 = Reshape (v1, heads)  v = Transpose <perm = [0, 2, 1, 3]> (v2)
  kt = Transpose <perm = [0, 1, 3, 2]> (k)  scores = MatMul (k, kt)  p = Softmax <axis = -1> (scores)
  a = MatMul (p, v)  a1 = Transpose <perm = [0, 2, 1, 3]> (a)  a2 = Reshape (a1, merged)
  o0 = MatMul (a2, wo)  o = Add (o0, bo)  r = Add (o, x)
  n1 = LayerNormalization <axis = -1> (r, g, b)
  h0 = MatMul (n1, w1)  h1 = Add (h0, b1)  h = Gelu (h1)  m0 = MatMul (h, w2)  m = Add (m0, b2)  r1 = Add (r, m)
  n2 = LayerNormalization <axis = -1> (r1, g, b)
  h2 = MatMul (n2, w1)  h3 = Add (h2, b1)  h4 = Gelu (h3)  m1 = MatMul (h4, w2)  m2 = Add (m1, b2)
  y = Add (r1, m2)
}
"""

# A rank-2 head as torch.onnx writes it, with its weight the other way round.
GEMM = """
head (float[4, 16] x, float[16, 32] w1, float[10, 32] w2, float[10] c) => (float[4, 10] y)
{
  h0 = MatMul (x, w1)
  h = Gelu (h0)
  y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (h, w2, c)
}
"""

# As folds leave it: chunks of one input by one weight, a weight for each head, and products with tables of positions.
FOLDED = """
folded (float[1, 8, 16] x, float[16, 16] w, float[2, 8, 12] key, float[12, 20] positions_t, float[20, 12] positions,
  float[24, 16] wo) => (float[1, 8, 16] y)
<int64[1] zero = {0}, int64[1] four = {4}, int64[1] eight = {8}, int64[1] axis = {1},
 int64[4] heads = {1, 8, 2, 8}, int64[3] merged = {1, 8, 24}>
{
  x0 = Slice (x, zero, four, axis)  x1 = Slice (x, four, eight, axis)
  q0 = MatMul (x0, w)  q1 = MatMul (x1, w)  q = Concat <axis = 1> (q0, q1)
  q2 = Reshape (q, heads)  q3 = Transpose <perm = [0, 2, 1, 3]> (q2)
  a = MatMul (q3, key)  scores = MatMul (a, positions_t)  p = Softmax <axis = -1> (scores)
  z = MatMul (p, positions)  z1 = Transpose <perm = [0, 2, 1, 3]> (z)  z2 = Reshape (z1, merged)
  y = MatMul (z2, wo)
}
"""

# Without biases: a Relu, which onnxruntime takes for a part of the quantizer behind it, and a view, which a quantizer
# moves through.
RELU = """
relu (float[1, 6, 16] x, float[16, 32] w1, float[32, 16] w2, float[16, 16] w3) => (float[1, 6, 16] y)
<int64[4] heads = {1, 6, 2, 8}, int64[3] merged = {1, 6, 16}>
{
  h0 = MatMul (x, w1)  h = Relu (h0)  m = MatMul (h, w2)
  m1 = Reshape (m, heads)  m2 = Transpose <perm = [0, 2, 1, 3]> (m1)  m3 = Reshape (m2, merged)  y = MatMul (m3, w3)
}
"""


def build(text: str, seed: int = 0) -> ir.Model:
    """The graph, its float parameters drawn at random: of channels of different sizes, as trained ones are."""
    model = ir.from_onnx_text(_HEADER + text)
    generator = np.random.default_rng(seed)
    for value in model.graph.inputs[1:]:
        assert value.shape is not None
        shape = tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]
        spread = np.exp(generator.normal(size=shape[-1:]))
        array = (generator.normal(size=shape) * spread / np.sqrt(shape[0])).astype(np.float32)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.initializers[str(value.name)] = value
    del model.graph.inputs[1:]
    for index, node in enumerate(model.graph):
        node.name = f"block.{index}/{node.op_type}"
    common.ShapeInferencePass()(model)
    return model


def save(model: ir.Model, directory: Path) -> Path:
    """Write a graph as a bundle has it."""
    directory.mkdir(parents=True, exist_ok=True)
    save_graphs({"model.onnx": model}, directory)
    return directory / "model.onnx"


def inputs(model: ir.Model, count: int, seed: int = 1) -> list[dict[str, Array]]:
    """Random feeds for it, a channel of which is large."""
    (value,) = model.graph.inputs
    assert value.shape is not None
    shape = tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]
    generator = np.random.default_rng(seed)
    arrays = [generator.normal(size=shape).astype(np.float32) for _ in range(count)]
    for array in arrays:
        array[..., 3] *= 20
    return [{str(value.name): array} for array in arrays]


def observed(path: Path, feeds: list[dict[str, Array]]) -> Statistics:
    """Statistics of a graph over some feeds."""
    observer = Observer(path, len(feeds))
    for one in feeds:
        observer.run(one)
    return observer.statistics


def run(model: ir.Model, folder: Path, feeds: Mapping[str, Array], optimize: bool = True) -> dict[str, Array]:
    """Outputs by name, on ONNX Runtime."""
    import onnxruntime

    config = {} if optimize else {"graph_optimization_level": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL}
    return run_session(open_session(model, folder, config=config), feeds)


def quantized(text: str, directory: Path, options: QuantizeOptions = QuantizeOptions()) -> tuple[QuantizedPart, Path]:
    """A graph quantized on random feeds, its files in ``directory / "int8"``."""
    model = build(text)
    path = save(model, directory / "fp32")
    statistics = observed(path, inputs(model, 8))
    spec = TensorSpec("x", "float32", ())
    part = quantize_part(path, Part("model.onnx", (spec,), (spec,)), statistics, options)
    (directory / "int8").mkdir()
    save_graphs(part.models, directory / "int8")
    return part, path
