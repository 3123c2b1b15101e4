# SPDX-License-Identifier: Apache-2.0
"""Which products of a graph are linears, which weight each has, and which products stay float by policy.

A linear is a MatMul whose right operand is a weight, with the Add of its bias where there is one. Everything else stays
float: attention products and softmax (a probability of one in 50,000 keys is far below a step of 1/255), LayerNorm,
GELU and residuals (their few large channels would take all of the range), and positions (int8 phases of sines are
noise). Where folding left products of probabilities, or of scores, with a table of positions, those look like linears
and are told apart here by what they are made of, or made into.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

# What neither makes nor ends a path from a softmax to a product, or from a product to a softmax.
_CARRIES = frozenset(
    {"Mul", "Div", "Reshape", "Transpose", "Slice", "Split", "Concat", "Squeeze", "Unsqueeze", "Expand", "Cast"}
)
_FROM_SOFTMAX = _CARRIES | {"ReduceSum", "Identity"}
_TO_SOFTMAX = _CARRIES | {"Add", "Sub", "Where", "Identity", "Gather"}  # rows of a table of scores, by index
# What tracing calls a computed constant: after the operator that made it.
_ANONYMOUS = re.compile(
    r"(val|node|tensor|lifted_tensor|_tensor_constant|permute|transpose|t|unsqueeze|view|div|mul)_?\d*(_\d+)?"
)

PROBABILITIES = "attention probabilities × a table: one of many keys is far below a step of int8"
RESIDUAL = "the residual beside a folded MLP: residuals stay float"
SCORES = "attention scores against a table of positions: positions stay float"


@dataclass(frozen=True)
class Linear:
    """One run of a linear layer; blocks that share weights are several runs of one ``group``.

    ``macs`` are multiply-adds a sample, dynamic sizes counted as 1.
    """

    name: str
    group: str
    node: ir.Node
    bias_add: ir.Node | None
    macs: int

    @property
    def activation(self) -> ir.Value:
        """The left operand, (…, M, K)."""
        value = self.node.inputs[0]
        assert value is not None
        return value

    @property
    def weight(self) -> ir.Value:
        """The right operand, (…, K, N)."""
        value = self.node.inputs[1]
        assert value is not None
        return value

    @property
    def bias(self) -> ir.Value | None:
        """The bias (N), None where there is none."""
        return None if self.bias_add is None else _initializer_of(self.bias_add)

    @property
    def output(self) -> ir.Value:
        """What the layer gives, bias included."""
        return (self.bias_add or self.node).outputs[0]


@dataclass(frozen=True)
class Exclusion:
    """A product with a constant that stays float by policy, and why."""

    name: str
    macs: int
    reason: str


def find_linears(graph: ir.Graph) -> tuple[list[Linear], list[Exclusion]]:
    """All linears in order of running, and the products with constants that are none. Shapes must be known.

    Gemm is expected as MatMul and Add (`gemm.split_gemms`).
    """
    linears: list[Linear] = []
    exclusions: list[Exclusion] = []
    for node in graph:
        if node.op_type != "MatMul" or node.inputs[0] is None or not _is_weight(node.inputs[1]):
            continue
        if _is_constant(node.inputs[0]):
            continue
        macs, name = multiply_adds(node), node.name or node.outputs[0].name or ""
        reason = _reason_to_stay_float(node)
        if reason:
            exclusions.append(Exclusion(name, macs, reason))
        else:
            linears.append(Linear(name, group_of(node), node, _bias_add(node), macs))
    return linears, exclusions


def multiply_adds(node: ir.Node) -> int:
    """Multiply-adds of a MatMul, dynamic sizes counted as 1."""
    depth = _dims(node.inputs[0])[-1:]
    return math.prod(_dims(node.outputs[0])) * math.prod(depth)


def group_of(node: ir.Node) -> str:
    """The layer's name: its weight's, or the node's where the weight has none of its own."""
    weight = node.inputs[1]
    name = (weight.name or "") if weight is not None else ""
    if not name or _ANONYMOUS.fullmatch(name):
        return node.name or node.outputs[0].name or ""
    return name.removesuffix(".weight")


def _is_weight(value: ir.Value | None) -> bool:
    return (
        value is not None
        and _is_constant(value)
        and value.dtype == ir.DataType.FLOAT
        and value.shape is not None
        and len(value.shape) >= 2
    )


def _is_constant(value: ir.Value) -> bool:
    return value.is_initializer() and value.const_value is not None


def _bias_add(node: ir.Node) -> ir.Node | None:
    """The Add of a bias (N) that is this product's only reader."""
    output = node.outputs[0]
    if output.is_graph_output() or len(output.uses()) != 1:
        return None
    (user,) = output.consumers()
    if user.op_type != "Add":
        return None
    bias, width = _initializer_of(user), _dims(output)[-1]
    fits = bias is not None and _dims(bias)[-1:] == (width,) and math.prod(_dims(bias)) == width
    return user if fits else None


def _initializer_of(node: ir.Node) -> ir.Value | None:
    return next((value for value in node.inputs if value is not None and _is_constant(value)), None)


def _reason_to_stay_float(node: ir.Node) -> str:
    weight = node.inputs[1]
    if weight is not None and (weight.name or "").endswith(".direct"):
        return RESIDUAL
    if _reaches(node.inputs[:1], _FROM_SOFTMAX, lambda value: [value.producer()]):
        return PROBABILITIES
    if _reaches(node.outputs, _TO_SOFTMAX, lambda value: value.consumers()):
        return SCORES
    return ""


def _reaches(
    start: Iterable[ir.Value | None],
    through: frozenset[str],
    neighbours: Callable[[ir.Value], Iterable[ir.Node | None]],
) -> bool:
    """Whether a walk from ``start`` over nodes of ``through`` comes to a Softmax."""
    seen: set[ir.Value] = set()
    waiting = [value for value in start if value is not None]
    while waiting:
        value = waiting.pop()
        if value in seen:
            continue
        seen.add(value)
        for node in neighbours(value):
            if node is None:
                continue
            if node.op_type == "Softmax":
                return True
            if node.op_type in through:
                waiting.extend(_beyond(node, value))
    return False


def _beyond(node: ir.Node, value: ir.Value) -> Iterator[ir.Value]:
    """The other side of a node: its inputs if it made the value, else its outputs."""
    others = node.inputs if value.producer() is node else node.outputs
    return (other for other in others if other is not None)


def _dims(value: ir.Value | None) -> tuple[int, ...]:
    shape = value.shape if value is not None and value.shape is not None else ()
    return tuple(dim if isinstance(dim, int) else 1 for dim in shape)
