# SPDX-License-Identifier: Apache-2.0
"""Find the linear layers in a graph, their weights, and the products that stay float by policy.

A linear layer is a MatMul whose right operand is a weight, with the Add of its bias if it has one. Everything else
stays float: attention products and softmax (the probability of one of 50,000 keys is far below a step of 1/255),
LayerNorm, GELU and residuals (a few large channels would take the whole range), and positions (the phases of sines are
noise in int8). Folding leaves products of probabilities or scores with a table of positions. They look like linear
layers, but they follow or precede a softmax.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import onnx_ir as ir

from perceiver_export.calibration.graphs import MOVES, dims, is_constant, leads_to, node_flops

# Operators that may be on the path from a softmax to a product, or from a product to a softmax.
_FROM_SOFTMAX = MOVES | {"Mul", "Div", "Cast", "ReduceSum"}
_TO_SOFTMAX = MOVES | {"Mul", "Div", "Cast", "Add", "Sub", "Where"}  # Gather selects rows from a table of scores
_SOFTMAX = frozenset({"Softmax"})
# Names that tracing gives to computed constants, after the operator that computed them.
_ANONYMOUS = re.compile(
    r"(val|node|tensor|lifted_tensor|_tensor_constant|permute|transpose|t|unsqueeze|view|div|mul|fold\.)_?\d*(_\d+)?"
)

PROBABILITIES = "attention probabilities are too small for int8 steps"
RESIDUAL = "it is the residual of a folded MLP, and residuals stay float"
SCORES = "it multiplies a table of positions for attention scores, and positions stay float"


@dataclass(frozen=True)
class Linear:
    """One run of a linear layer. Blocks that share weights are several runs of one ``group``.

    ``activation`` is the left operand (…, M, K) as found; ``macs`` is the number of multiply-adds, where dynamic sizes
    count as 1.
    """

    name: str
    group: str
    node: ir.Node
    activation: ir.Value
    bias_add: ir.Node | None
    macs: int

    @property
    def weight(self) -> ir.Value:
        """The right operand (…, K, N), which smoothing replaces."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The bias (N); None without one."""
        return None if self.bias_add is None else _initializer_of(self.bias_add)

    @property
    def output(self) -> ir.Value:
        """The layer's output, including the bias."""
        return (self.bias_add or self.node).outputs[0]


@dataclass(frozen=True)
class Exclusion:
    """A product with a constant that stays float by policy, and the reason."""

    name: str
    macs: int
    reason: str


def find_linears(graph: ir.Graph) -> tuple[list[Linear], list[Exclusion]]:
    """All linear layers in execution order, and the products with constants that are not linear layers.

    Shapes must be known, and every Gemm rewritten as MatMul and Add (`graphs.split_gemms`).
    """
    linears: list[Linear] = []
    exclusions: list[Exclusion] = []
    for node in graph:
        activation = node.inputs[0] if node.op_type == "MatMul" and _is_weight(node.inputs[1]) else None
        if activation is None or is_constant(activation):
            continue
        macs, name = node_flops(node) // 2, node.name or node.outputs[0].name or ""
        if reason := _reason_to_stay_float(node):
            exclusions.append(Exclusion(name, macs, reason))
        else:
            linears.append(Linear(name, _group_of(node), node, activation, _bias_add(node), macs))
    return linears, exclusions


def _group_of(node: ir.Node) -> str:
    """The layer's name: the weight's name, or for an unnamed weight that of the first node that reads it."""
    weight = node.inputs[1]
    assert weight is not None
    name = weight.name or ""
    if not name or _ANONYMOUS.fullmatch(name):
        first = next(iter(weight.consumers()))
        return first.name or first.outputs[0].name or ""
    return name.removesuffix(".weight")


def _is_weight(value: ir.Value | None) -> bool:
    return is_constant(value) and value.dtype == ir.DataType.FLOAT and len(dims(value)) >= 2


def _bias_add(node: ir.Node) -> ir.Node | None:
    """The Add of a bias (N) if it is the product's only reader."""
    output = node.outputs[0]
    if output.is_graph_output() or len(output.uses()) != 1:
        return None
    (user,) = output.consumers()
    bias, width = dims(_initializer_of(user)), dims(output)[-1]
    return user if user.op_type == "Add" and bias[-1:] == (width,) and math.prod(bias) == width else None


def _initializer_of(node: ir.Node) -> ir.Value | None:
    return next((value for value in node.inputs if is_constant(value)), None)


def _reason_to_stay_float(node: ir.Node) -> str:
    weight = node.inputs[1]
    if weight is not None and (weight.name or "").endswith(".direct"):
        return RESIDUAL
    if leads_to(node.inputs[:1], _FROM_SOFTMAX, _SOFTMAX):
        return PROBABILITIES
    if leads_to(node.outputs, _TO_SOFTMAX, _SOFTMAX, forward=True):
        return SCORES
    return ""
