# SPDX-License-Identifier: Apache-2.0
"""From statistics to integers: the range of each activation, the integers of each weight, and the Q/DQ graph.

**Canonical form**, which ONNX Runtime, OpenVINO and TensorRT's parser all read. Weights are int8 (K, N), with one
initializer and one DequantizeLinear per distinct weight, however many products read it. Activations are int8 with one
scale per tensor and zero point 0, with one Q/DQ pair however many products read them. Biases stay float and outputs are
not quantized, because TensorRT rejects int32 biases, and a Q on an output costs accuracy without any gain. int4 weights
have one scale per block of inputs, which needs opset 21.

This module finds ranges itself, because onnxruntime.quantization keeps histograms of every tensor of every sample, and
NNCF minimizes the error of the values instead of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import array_of, constant, dims, remove_unused, sqnr
from perceiver_export.calibration.quantization.linears import Linear
from perceiver_export.calibration.quantization.options import Method, QuantizeOptions, Scheme
from perceiver_export.calibration.quantization.statistics import Statistics
from perceiver_export.runtimes.runtime import Array

LEVELS = 127  # levels of a symmetric int8 on each side of zero
_PERCENTILE = 99.99
_ROWS = 128  # sampled rows on which a range is searched
_INT4_OPSET = 21
_INT4_LEVELS = 7
# int4 tries narrower ranges, because a wide range makes its few steps coarse for all other values.
_INT4_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


def fake_quantize(values: Array, clip: Array | float) -> Array:
    """``values`` clipped at ``clip`` and rounded as in int8: to the nearest level, ties to even."""
    scale = np.asarray(clip, np.float32) / np.float32(LEVELS)
    rounded: Array = np.asarray(values / scale)
    np.rint(rounded, out=rounded)  # in place, because searches do this for every candidate of every tensor
    np.clip(rounded, -LEVELS - 1, LEVELS, out=rounded)
    rounded *= scale
    return rounded


def find_range(method: Method, rows: Array, largest: float, gram: Array) -> float:
    """The largest value that int8 represents; values above it are clipped.

    ``rows`` (n, K) is a sample of a tensor whose exact largest absolute value is ``largest``. ``gram`` (K, K), the
    Σ W Wᵀ of the weights that read the tensor, weights the error of each channel. The result is never above ``largest``
    and never 0 (an all-zero tensor gets 1).
    """
    if largest <= 0.0:
        return 1.0
    found = _METHODS[method](rows, largest, gram) if rows.size else largest
    return float(min(found, largest)) or largest


def _mse(rows: Array, largest: float, gram: Array) -> float:
    """The range with the least squared error of the products, Σ e G eᵀ over rows; e is the rounding and clipping error.

    Minimizing the error of the values themselves would clip a few large channels in favor of many small ones, although
    the weights amplify the large ones. On the Fashion-MNIST model that costs 3 to 6 dB.
    """
    rows = rows[:: -(-len(rows) // _ROWS)]
    candidates = largest * np.geomspace(1.0, 0.2, 24)
    changes = [fake_quantize(rows, clip) - rows for clip in candidates]
    errors = [float(np.vdot(change @ gram, change)) for change in changes]
    return float(candidates[int(np.argmin(errors))])


_METHODS: dict[Method, Callable[[Array, float, Array], float]] = {
    "mse": _mse,
    "minmax": lambda rows, largest, gram: largest,
    "percentile": lambda rows, largest, gram: float(np.percentile(np.abs(rows), _PERCENTILE)),
}


@dataclass(frozen=True)
class IntegerWeight:
    """``values`` (…, K, N); ``scales`` (N), () for stacks, or in int4 (blocks, N) where ``block`` inputs share one."""

    values: Array
    scales: Array
    block: int | None = None

    def dequantized(self) -> Array:
        """The weight with which an engine computes, float32."""
        scales = self.scales if self.block is None else np.repeat(self.scales, self.block, axis=0)
        return np.asarray(self.values.astype(np.float32) * scales)


def quantize_weight(weight: Array, scheme: Scheme, bits: int) -> IntegerWeight:
    """``weight`` (…, K, N) in the integers of a scheme; ``bits`` applies to weights multiplied by int8 activations."""
    block = block_size(weight.shape)
    if scheme == "int4-weights" and block is not None:
        return quantize_blocks(weight, block)
    # With float activations products are computed in float, so nothing saturates.
    return quantize_channels(weight, bits if scheme == "int8" else 8)


def quantize_channels(weight: Array, bits: int = 8) -> IntegerWeight:
    """Symmetric, round to nearest, one scale per output channel. 7-bit weights are in -63 … 63.

    A stack of weights (h, K, N), one per head, has a single scale, because onnxruntime's kernel accepts only one. 7
    bits are for x86 CPUs without VNNI, which add two products of uint8 and int8 in 16 bits: 2 × 255 × 63 still fits.
    """
    levels = (1 << (bits - 1)) - 1
    largest = np.abs(weight).max(axis=0 if weight.ndim == 2 else None)
    scales = np.asarray(np.where(largest > 0, largest, 1.0) / levels, np.float32)
    values = np.clip(np.rint(weight / scales), -levels, levels).astype(np.int8)
    return IntegerWeight(values, scales)


def block_size(shape: tuple[int, ...]) -> int | None:
    """The number of inputs that share an int4 scale: the largest even divisor of K from 16 to 32. None without such a
    divisor, and for a stack of weights.

    OpenVINO 2026.4 rejects a shorter last block. It computes wrong values, or NaN, with odd blocks, and with blocks of
    more than 32 inputs for few rows.
    """
    return max((size for size in range(16, 33, 2) if shape[0] % size == 0), default=None) if len(shape) == 2 else None


def quantize_blocks(weight: Array, block: int) -> IntegerWeight:
    """Symmetric int4, one scale per ``block`` inputs of an output channel, with the clipping of least error.

    ``weight`` is (K, N); K is a multiple of ``block``.
    """
    depth, width = weight.shape
    grouped = weight.reshape(depth // block, block, width)
    largest = np.abs(grouped).max(axis=1)
    largest = np.where(largest > 0, largest, 1.0).astype(np.float32)
    tried = np.stack([largest * np.float32(clip / _INT4_LEVELS) for clip in _INT4_CLIPS])
    errors = [np.square(grouped - _round4(grouped, one) * one[:, None]).sum(axis=1) for one in tried]
    scales = np.take_along_axis(tried, np.argmin(errors, axis=0)[None], axis=0)[0]
    values = _round4(grouped, scales).reshape(depth, width).astype(np.int8)
    return IntegerWeight(values, scales, block)


def _round4(grouped: Array, scales: Array) -> Array:
    return np.asarray(np.clip(np.rint(grouped / scales[:, None]), -_INT4_LEVELS - 1, _INT4_LEVELS))


@dataclass(frozen=True)
class LinearPlan:
    """How to write one run of a linear layer. None leaves the weight, activation (``clip``) or bias unchanged."""

    linear: Linear
    scheme: Scheme
    weight: IntegerWeight | None = None
    clip: float | None = None
    bias: Array | None = None

    @property
    def scale(self) -> float | None:
        """The activation's step."""
        return None if self.clip is None else self.clip / LEVELS

    def product_sqnr(self, statistics: Statistics) -> float | None:
        """SQNR of the product in dB, on at most 256 of the sampled rows; None if it stays float."""
        if self.weight is None:
            return None
        rows = statistics.of(self.linear).sample[:256]
        return sqnr(rows @ array_of(self.linear.weight), self._read(rows) @ self.weight.dequantized())

    def corrected(self, statistics: Statistics) -> LinearPlan:
        """The plan with the product's mean error on the sampled rows corrected in the bias, if it has a bias.

        Nagel et al., "Data-Free Quantization" (arXiv 1906.04721), section 4.2, with measured instead of modelled means.
        """
        rows = statistics.of(self.linear).sample
        if self.weight is None or self.linear.bias is None or not len(rows) or self.weight.values.ndim != 2:
            return self
        exact = rows.mean(0) @ array_of(self.linear.weight)
        error = exact - self._read(rows).mean(0) @ self.weight.dequantized()
        return replace(self, bias=(array_of(self.linear.bias).reshape(-1) + error).astype(np.float32))

    def _read(self, rows: Array) -> Array:
        return rows if self.clip is None else fake_quantize(rows, self.clip)


def schemes_of(linears: Sequence[Linear], scheme: Scheme, precision: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The scheme of each group: that of the last pattern (`encoder.*.mlp.*`) that matches its name, else ``scheme``.

    A weight that cannot be divided into blocks gets int8 instead of int4.
    """
    chosen: dict[str, Scheme] = {}
    for linear in linears:
        matching = [asked for pattern, asked in precision.items() if fnmatchcase(linear.group, pattern)]
        chosen.setdefault(linear.group, matching[-1] if matching else scheme)
        if chosen[linear.group] == "int4-weights" and block_size(dims(linear.weight)) is None:
            chosen[linear.group] = "int8-weights"
    return chosen


def make_plans(
    linears: Sequence[Linear], schemes: Mapping[str, Scheme], statistics: Statistics, options: QuantizeOptions
) -> list[LinearPlan]:
    """A plan for each linear layer, in order; ``schemes`` is by group."""
    clips = _clips([linear for linear in linears if schemes[linear.group] == "int8"], statistics, options.method)
    weights: dict[ir.Value, IntegerWeight] = {}
    plans = []
    for linear in linears:
        plan = LinearPlan(linear, schemes[linear.group])
        if plan.scheme != "float":
            if linear.weight not in weights:
                weights[linear.weight] = quantize_weight(array_of(linear.weight), plan.scheme, options.bits)
            clip = clips[str(linear.activation.name)] if plan.scheme == "int8" else None
            plan = replace(plan, weight=weights[linear.weight], clip=clip)
        plans.append(plan.corrected(statistics) if options.correct_bias else plan)
    return plans


def _clips(linears: Sequence[Linear], statistics: Statistics, method: Method) -> dict[str, float]:
    """The range of each activation, from all linear layers that read it."""
    readers: dict[str, dict[ir.Value, None]] = {}
    for linear in linears:
        readers.setdefault(str(linear.activation.name), {})[linear.weight] = None
    names_by_weights: dict[tuple[ir.Value, ...], list[str]] = {}
    for name, weights in readers.items():
        names_by_weights.setdefault(tuple(weights), []).append(name)
    clips: dict[str, float] = {}
    for read, names in names_by_weights.items():  # one K × K matrix in memory at a time
        gram = _gram(read) if method == "mse" else np.empty((0, 0), np.float32)
        for name in names:
            activation = statistics.activations[name]
            clips[name] = find_range(method, activation.sample, float(activation.largest.max()), gram)
    return clips


def _gram(weights: tuple[ir.Value, ...]) -> Array:
    """Σ W Wᵀ (K, K)."""
    matrices = [array_of(weight) for weight in weights]
    wide = np.concatenate([np.moveaxis(one, -2, 0).reshape(one.shape[-2], -1) for one in matrices], axis=1)
    return np.asarray(wide @ wide.T)


def write_qdq(model: ir.Model, plans: Iterable[LinearPlan]) -> None:
    """Rewrite the graph in place. Runs of the same weight must have the same `LinearPlan.weight`.

    Given:  y = Add(MatMul(x, W), b)
    Result: y = Add(MatMul(DequantizeLinear(QuantizeLinear(x)), DequantizeLinear<axis = 1>(W8)), b)
    """
    graph = model.graph
    weights: dict[ir.Value, ir.Value] = {}
    activations: dict[tuple[ir.Value, float], ir.Value] = {}
    for plan in plans:
        linear = plan.linear
        if plan.weight is None:
            continue
        if linear.weight not in weights:
            weights[linear.weight] = _write_weight(model, linear, plan.weight)
        if plan.scale is not None:
            key = (linear.activation, plan.scale)
            if key not in activations:
                activations[key] = _write_activation(graph, linear, plan.scale)
            linear.node.replace_input_with(0, activations[key])
        linear.node.replace_input_with(1, weights[linear.weight])
        if plan.bias is not None and linear.bias_add is not None and linear.bias is not None:
            index = list(linear.bias_add.inputs).index(linear.bias)
            corrected = constant(graph, f"{linear.bias.name}.corrected", plan.bias)
            linear.bias_add.replace_input_with(index, corrected)
    remove_unused(graph)


def _write_activation(graph: ir.Graph, linear: Linear, scale: float) -> ir.Value:
    """x -> DQ(Q(x)), inserted before the first product that reads x."""
    x = linear.activation
    scalar = constant(graph, f"{x.name}.scale", np.full((), scale, np.float32))
    zero = constant(graph, f"{x.name}.zero_point", np.zeros((), np.int8))
    codes = ir.Value(name=f"{x.name}.int8", type=ir.TensorType(ir.DataType.INT8), shape=x.shape)
    restored = ir.Value(name=f"{x.name}.dequantized", type=x.type, shape=x.shape)
    for op, source, result in (("QuantizeLinear", x, codes), ("DequantizeLinear", codes, restored)):
        name = f"{_stage(linear)}/{op.removesuffix('Linear')} {x.name}"
        graph.insert_before(linear.node, ir.node(op, [source, scalar, zero], name=name, outputs=[result]))
    return restored


def _write_weight(model: ir.Model, linear: Linear, weight: IntegerWeight) -> ir.Value:
    """The only DQ of a weight, inserted before the first product that reads it."""
    graph, name = model.graph, linear.weight.name
    dtype, attributes = ir.DataType.INT8, {"axis": 1} if weight.scales.ndim else {}
    if weight.block is not None:
        dtype, attributes = ir.DataType.INT4, {"axis": 0, "block_size": weight.block}
        model.opset_imports[""] = max(_INT4_OPSET, model.opset_imports.get("", 0))
    inputs = [
        constant(graph, f"{name}.{dtype.name.lower()}", weight.values.astype(dtype.numpy())),
        constant(graph, f"{name}.scales", weight.scales),
        constant(graph, f"{name}.zero_points", np.zeros(weight.scales.shape, dtype.numpy())),
    ]
    restored = ir.Value(name=f"{name}.dequantized", type=linear.weight.type, shape=linear.weight.shape)
    label = f"{_stage(linear)}/Dequantize {name}"
    graph.insert_before(linear.node, ir.node("DequantizeLinear", inputs, attributes, name=label, outputs=[restored]))
    return restored


def _stage(linear: Linear) -> str:
    """The module in the node's name, by which costs are grouped."""
    return linear.name.split("/")[0]
