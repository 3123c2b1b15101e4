# SPDX-License-Identifier: Apache-2.0
"""Folds of any graph, in float64: the same function within 1e-12, whatever is folded, and less work where it pays."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from perceiver_export.exporter.fold.engine import fold
from perceiver_export.exporter.fold.nodes import Sizes
from perceiver_export.exporter.fold.plan import in_pieces, peak
from perceiver_export.exporter.fold.sites import node_flops

ALWAYS = -(1 << 60)  # FLOPs that a fold must save: every site is rewritten
Array = np.ndarray
STEPS = ["linear", "norm", "rms_norm", "table", "row", "scale", "concat", "residual", "negate", "view"]


class Drawing:
    """A graph in float64 that is drawn node by node; values are their names."""

    def __init__(self, seed: int = 0) -> None:
        self.rng, self.nodes, self.constants = np.random.default_rng(seed), list[Any](), list[Any]()
        self.feeds: dict[str, Array] = {}
        self.inputs: list[Any] = []
        self.shapes: dict[str, tuple[int, ...]] = {}

    def input(self, *shape: int) -> str:
        name = f"x{len(self.inputs)}"
        self.inputs.append(helper.make_tensor_value_info(name, TensorProto.DOUBLE, shape))
        self.feeds[name] = self.rng.standard_normal(shape)
        self.shapes[name] = shape
        return name

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        array = np.asarray(array)
        self.constants.append(onnx.numpy_helper.from_array(array, name))
        self.shapes[name] = array.shape
        return name

    def random(self, *shape: int, scale: float = 0.5) -> str:
        return self.constant(self.rng.standard_normal(shape) * scale)

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(
            helper.make_node(operator, list(inputs), [name], name=f"{operator}{len(self.nodes)}", **attributes)
        )
        return name

    def linear(self, x: str, width: int, out: int, bias: bool = True) -> str:
        made = self("MatMul", x, self.random(width, out))
        return self("Add", made, self.random(out)) if bias else made

    def norm(self, x: str, width: int) -> str:
        return self("LayerNormalization", x, self.random(width, scale=1.0), self.random(width), axis=-1)

    def rms_norm(self, x: str, width: int) -> str:
        mean = self("ReduceMean", self("Mul", x, x), self.constant(np.array([-1])), keepdims=1)
        root = self("Sqrt", self("Add", mean, self.constant(np.array(1e-6))))
        return self("Mul", self("Mul", x, self("Reciprocal", root)), self.random(width, scale=1.0))

    def heads(self, x: str, batch: int, rows: int, heads: int, depth: int, order: Sequence[int] = (0, 2, 1, 3)) -> str:
        apart = self("Reshape", x, self.constant(np.array([batch, rows, heads, depth])))
        return self("Transpose", apart, perm=list(order))

    def attention(self, q: str, k: str, v: str, axis: int = -1, mask: str | None = None, scale: float = 0.3) -> str:
        """q (B, h, N, d), k (B, h, d, M), v (B, h, M, d) -> (B, h, N, d)."""
        scores = self("Mul", self("MatMul", q, k), self.constant(np.array(scale)))
        if mask is not None:
            scores = self("Add", scores, mask)
        return self("MatMul", self("Softmax", scores, axis=axis), v)

    def model(self, *outputs: str) -> onnx.ModelProto:
        infos = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in outputs]
        graph = helper.make_graph(self.nodes, "drawn", self.inputs, infos, self.constants)
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        return onnx.shape_inference.infer_shapes(made)


def flops(model: ir.Model) -> int:
    return sum(node_flops(node, Sizes()) for node in model.graph)


def assert_same(drawing: Drawing, *outputs: str, least_gain: int = ALWAYS, budget: int | None = None) -> ir.Model:
    """Fold what was drawn and compare; the folded graph."""
    proto = drawing.model(*outputs)
    expected = ReferenceEvaluator(proto).run(None, drawing.feeds)
    model = ir.from_proto(proto)
    fold(model, least_gain=least_gain)
    if budget is not None:
        in_pieces(model, budget, Sizes())
    found = ReferenceEvaluator(ir.to_proto(model)).run(None, drawing.feeds)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_allclose(other, one, rtol=0, atol=1e-12 * max(1.0, float(np.abs(one).max())))
    return model


@st.composite
def rows(draw: st.DrawFn, drawing: Drawing, batch: int, count: int) -> tuple[str, int]:
    """Rows (batch, count, width) by a random way from an input, and their width."""
    width = draw(st.sampled_from([2, 3, 5]))
    value = drawing.input(batch, count, width)
    for step in draw(st.lists(st.sampled_from(STEPS), max_size=5)):
        if step == "linear":
            out = draw(st.sampled_from([4, 6]))
            value, width = drawing.linear(value, width, out, draw(st.booleans())), out
        elif step == "norm":
            value = drawing.norm(value, width)
        elif step == "rms_norm":
            value = drawing.rms_norm(value, width)
        elif step == "table":
            value = drawing("Add", value, drawing.random(draw(st.sampled_from([1, batch])), count, width))
        elif step == "row":
            value = drawing("Sub", drawing.random(width), value)
        elif step == "scale":
            value = drawing("Mul", value, drawing.random(width))
        elif step == "negate":
            value = drawing("Mul", value, drawing.constant(np.array(-0.7)))
        elif step == "concat":
            grid = drawing.rng.standard_normal((2, 1, 3)) + drawing.rng.standard_normal((1, count // 2, 3))
            table = np.broadcast_to(grid.reshape(1, count, 3), (batch, count, 3))
            value, width = drawing("Concat", value, drawing.constant(table), axis=-1), width + 3
        elif step == "residual":
            value = drawing("Add", value, drawing.linear(value, width, width))
        else:
            flat = drawing("Reshape", value, drawing.constant(np.array([batch * count, width])))
            value = drawing("Reshape", flat, drawing.constant(np.array([batch, count, width])))
    return value, width


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_attention_is_the_same_function(data: st.DataObject) -> None:
    drawing = Drawing(data.draw(st.integers(0, 99)))
    batch, heads, depth = (data.draw(st.sampled_from(sizes)) for sizes in ([1, 2], [1, 2], [2, 3]))
    count, queries = data.draw(st.sampled_from([4, 6])), data.draw(st.sampled_from([1, 3]))
    keys, width = data.draw(rows(drawing, batch, count))
    values, value_width = (keys, width) if data.draw(st.booleans()) else data.draw(rows(drawing, batch, count))
    if data.draw(st.booleans()):
        asked, query_width = data.draw(rows(drawing, batch, 4))
        queries = 4
    else:
        asked, query_width = drawing.random(batch if data.draw(st.booleans()) else 1, queries, 5), 5
    own = batch if asked.startswith(("x", "v")) else drawing.shapes[asked][0]
    q = drawing.heads(drawing.linear(asked, query_width, heads * depth), own, queries, heads, depth)
    k = drawing.heads(drawing.linear(keys, width, heads * depth), batch, count, heads, depth, (0, 2, 3, 1))
    v = drawing.heads(drawing.linear(values, value_width, heads * depth), batch, count, heads, depth)
    mask = drawing.random(1, 1, 1, count) if data.draw(st.booleans()) else None
    axis = data.draw(st.sampled_from([-1, -1, -1, -2]))
    read = drawing(
        "Transpose", drawing.attention(q, k, v, axis, mask, data.draw(st.sampled_from([0.4, -0.4]))), perm=[0, 2, 1, 3]
    )
    flat = drawing("Reshape", read, drawing.constant(np.array([batch, queries, heads * depth])))
    hidden = drawing("Gelu", flat) if data.draw(st.booleans()) else flat
    outputs = [drawing.linear(drawing.linear(hidden, heads * depth, 6), 6, 4)]
    if data.draw(st.booleans()):
        outputs.append(keys if keys.startswith("v") else read)  # read elsewhere, too
    assert_same(drawing, *outputs, budget=data.draw(st.sampled_from([None, 128])))


def perceiver(drawing: Drawing, batch: int = 1, queries: int = 4, norm: str = "norm") -> str:
    """A Perceiver's encoder: features beside Fourier-like positions, a LayerNorm, constant queries."""
    grid = drawing.rng.standard_normal((8, 1, 6)) + drawing.rng.standard_normal((1, 16, 6))
    table = np.broadcast_to(grid.reshape(1, 128, 6), (batch, 128, 6))
    x = drawing("Concat", drawing.input(batch, 128, 3), drawing.constant(table), axis=-1)
    x = getattr(drawing, norm)(x, 9)
    k, v = (drawing.linear(x, 9, 64) for _ in range(2))
    q = drawing.linear(drawing.random(1, queries, 16), 16, 64)
    read = drawing.attention(q, drawing("Transpose", k, perm=[0, 2, 1]), v)
    return drawing.linear(read, 64, 16)


@pytest.mark.parametrize("norm", ["norm", "rms_norm"])
@pytest.mark.parametrize("batch", [1, 3])
def test_keys_and_values_of_an_encoder_vanish(batch: int, norm: str) -> None:
    drawing = Drawing()
    model = assert_same(drawing, perceiver(drawing, batch, norm=norm), least_gain=0)

    assert flops(model) * 5 < flops(ir.from_proto(drawing.model(drawing.nodes[-1].output[0])))


def test_a_single_key_needs_no_softmax() -> None:
    drawing = Drawing()
    x = drawing.norm(drawing.input(16, 1, 8), 8)
    q, k, v = (drawing.linear(x, 8, 8) for _ in range(3))
    keys = drawing.heads(k, 16, 1, 2, 4, (0, 2, 3, 1))
    read = drawing.attention(drawing.heads(q, 16, 1, 2, 4), keys, drawing.heads(v, 16, 1, 2, 4))
    model = assert_same(drawing, drawing("Neg", read))

    operators = [node.op_type for node in model.graph]
    assert (operators.count("MatMul"), operators.count("Softmax")) == (1, 0)


def input_queries(drawing: Drawing) -> list[str]:
    x = drawing.norm(drawing.input(1, 200, 6), 6)
    q, latents = drawing.linear(x, 6, 64), drawing.input(1, 3, 8)
    k, v = (drawing.linear(latents, 8, 64) for _ in range(2))
    return [drawing.linear(drawing.attention(q, drawing("Transpose", k, perm=[0, 2, 1]), v), 64, 5)]


def linear_tail(drawing: Drawing) -> list[str]:
    x = drawing.input(1, 300, 16)
    hidden = drawing("Gelu", drawing.linear(x, 16, 64))
    out = drawing("Add", x, drawing.linear(hidden, 64, 16))
    return [drawing.linear(drawing.linear(out, 16, 64), 64, 2)]


def packed_keys_and_values(drawing: Drawing) -> list[str]:
    both = drawing.linear(drawing.norm(drawing.input(2, 64, 8), 8), 8, 64, bias=False)
    k = drawing("Slice", both, *(drawing.constant(np.array([one])) for one in (0, 32, 2)))
    v = drawing("Slice", both, *(drawing.constant(np.array([one])) for one in (32, 64, 2)))
    q = drawing.heads(drawing.random(2, 3, 32), 2, 3, 4, 8)
    k, v = drawing.heads(k, 2, 64, 4, 8, (0, 2, 3, 1)), drawing.heads(v, 2, 64, 4, 8)
    return [drawing.attention(q, k, v)]


def grouped_queries(drawing: Drawing) -> list[str]:
    """One head of keys for four heads of queries, repeated by Expand."""
    x = drawing.input(1, 64, 4)
    k, v = (drawing("Unsqueeze", drawing.linear(x, 4, 32), drawing.constant(np.array([1]))) for _ in range(2))
    k = drawing("Expand", k, drawing.constant(np.array([1, 4, 64, 32])))
    v = drawing("Expand", v, drawing.constant(np.array([1, 4, 64, 32])))
    q = drawing.heads(drawing.random(1, 3, 128), 1, 3, 4, 32)
    return [drawing.attention(q, drawing("Transpose", k, perm=[0, 1, 3, 2]), v)]


def convolution(drawing: Drawing) -> list[str]:
    """A convolution of kernel 1 in front of keys."""
    image = drawing("Conv", drawing.input(1, 3, 8, 8), drawing.random(24, 3, 1, 1), drawing.random(24))
    x = drawing("Transpose", drawing("Reshape", image, drawing.constant(np.array([1, 24, 64]))), perm=[0, 2, 1])
    k, v = (drawing.linear(x, 24, 32) for _ in range(2))
    return [drawing.attention(drawing.random(1, 2, 32), drawing("Transpose", k, perm=[0, 2, 1]), v)]


def einsum(drawing: Drawing) -> list[str]:
    x = drawing.norm(drawing.input(2, 64, 4), 4)
    k, v = (drawing("Reshape", drawing.linear(x, 4, 64), drawing.constant(np.array([2, 64, 4, 16]))) for _ in range(2))
    scores = drawing("Einsum", drawing.random(2, 3, 4, 16), k, equation="bihd,bjhd->bhij")
    return [drawing("Einsum", drawing("Softmax", scores, axis=-1), v, equation="bhij,bjhd->bihd")]


def einsum_with_an_ellipsis(drawing: Drawing) -> list[str]:
    x = drawing.norm(drawing.input(2, 64, 4), 4)
    k, v = (drawing.heads(drawing.linear(x, 4, 64), 2, 64, 4, 16) for _ in range(2))
    scores = drawing("Einsum", drawing.random(2, 4, 3, 16), k, equation="...id,...jd->...ij")
    return [drawing("Einsum", drawing("Softmax", scores, axis=-1), v, equation="...ij,...jd->...id")]


def rows_before_samples(drawing: Drawing) -> list[str]:
    """nn.MultiheadAttention has rows in (L, B) order."""
    x = drawing.linear(drawing.input(32, 2, 4), 4, 16)
    k = drawing("Transpose", drawing("Reshape", x, drawing.constant(np.array([32, 4, 8]))), perm=[1, 2, 0])
    v = drawing(
        "Transpose",
        drawing("Reshape", drawing.linear("x0", 4, 16), drawing.constant(np.array([32, 4, 8]))),
        perm=[1, 0, 2],
    )
    return [drawing.attention(drawing.input(4, 3, 8), k, v)]


def vector(drawing: Drawing) -> list[str]:
    """Scores of one query without an axis of its own, on either side."""
    query, k = drawing.input(64), drawing.linear(drawing.input(2, 300, 8), 8, 64)
    return [drawing("MatMul", k, query), drawing("MatMul", query, drawing("Transpose", k, perm=[0, 2, 1]))]


def rotary(drawing: Drawing) -> list[str]:
    """Heads are rows there; one set of queries for both samples."""

    def turned(rows: str, count: int) -> str:
        even, odd = (
            drawing("Slice", rows, *(drawing.constant(np.array([one])) for one in (at, at + 4, 3))) for at in (0, 4)
        )
        cosine, sine = drawing.random(count, 4), drawing.random(count, 4)
        first = drawing("Sub", drawing("Mul", even, cosine), drawing("Mul", odd, sine))
        return drawing(
            "Concat", first, drawing("Add", drawing("Mul", even, sine), drawing("Mul", odd, cosine)), axis=-1
        )

    x = drawing.input(2, 64, 4)
    q = turned(drawing.heads(drawing.linear(drawing.random(1, 3, 16), 16, 32), 1, 3, 4, 8), 3)
    k, v = (drawing.heads(drawing.linear(x, 4, 32), 2, 64, 4, 8) for _ in range(2))
    return [drawing.attention(q, drawing("Transpose", turned(k, 64), perm=[0, 1, 3, 2]), v)]


def repeated_rows(drawing: Drawing) -> list[str]:
    """For heads that the other operand does not have, on either side."""
    x = drawing("Unsqueeze", drawing.linear(drawing.norm(drawing.input(2, 64, 4), 4), 4, 32), drawing.constant([1]))
    k, q = drawing("Expand", x, drawing.constant([2, 3, 64, 32])), drawing.input(2, 1, 5, 32)
    scores = drawing("MatMul", q, drawing("Transpose", k, perm=[0, 1, 3, 2]))
    return [scores, drawing("MatMul", k, drawing("Transpose", q, perm=[0, 1, 3, 2]))]


def plus_a_number(drawing: Drawing) -> list[str]:
    """Numbers have no axes."""
    x = drawing.input(2, 64, 4)
    k, v = (drawing("Add", drawing.linear(x, 4, 32), drawing.constant(0.5)) for _ in range(2))
    k = drawing.heads(drawing("Mul", k, drawing.constant(3.0)), 2, 64, 4, 8, (0, 2, 3, 1))
    return [drawing.attention(drawing.random(2, 4, 3, 8), k, drawing.heads(v, 2, 64, 4, 8))]


FOLDABLE: tuple[Callable[[Drawing], list[str]], ...] = (
    input_queries, linear_tail, packed_keys_and_values, grouped_queries, convolution, einsum, einsum_with_an_ellipsis,
    rows_before_samples, vector, rotary, repeated_rows, plus_a_number,
)  # fmt: skip


@pytest.mark.parametrize("make", FOLDABLE, ids=lambda make: make.__name__)
def test_every_spelling_folds(make: Callable[[Drawing], list[str]]) -> None:
    drawing = Drawing(1)
    outputs = make(drawing)
    before = ir.from_proto(drawing.model(*outputs))
    fold(before, least_gain=-ALWAYS)  # nothing: only normalized

    assert flops(assert_same(drawing, *outputs, least_gain=0)) < flops(before)


def test_a_norm_over_several_axes() -> None:
    drawing = Drawing()
    ones, zeros = (drawing.constant(np.full((6, 8), one)) for one in (1.0, 0.0))
    normed = drawing("LayerNormalization", drawing.input(2, 6, 8), ones, zeros, axis=1)
    assert_same(drawing, drawing("Mul", normed, drawing.random(6, 8)))


def test_a_projection_after_transposed_samples() -> None:
    drawing = Drawing()
    read = drawing("MatMul", drawing.input(2, 3, 4, 2), drawing.input(2, 3, 2, 5))
    assert_same(drawing, drawing.linear(drawing("Transpose", read, perm=[1, 0, 2, 3]), 5, 6))


def test_what_does_not_pay_stays() -> None:
    drawing = Drawing()
    x = drawing.input(1, 16, 64)
    q, k, v = (drawing.heads(drawing.linear(x, 64, 64), 1, 16, 8, 8) for _ in range(3))
    output = drawing.attention(q, drawing("Transpose", k, perm=[0, 1, 3, 2]), v)
    model = ir.from_proto(drawing.model(output))
    decisions = fold(model)

    assert {one.chosen for one in decisions} == {"plain"}
    assert flops(model) == flops(ir.from_proto(drawing.model(output)))


@pytest.mark.parametrize(("queries", "chosen"), [(32, "plain"), (8, "folded")])
@pytest.mark.parametrize("fixed", [False, True])
def test_a_fold_must_pay_in_int8_too(queries: int, chosen: str, fixed: bool) -> None:
    """Of 32 queries a head half the operations would remain, but in scores, which stay in floats."""
    drawing = Drawing()
    k = drawing.heads(drawing.linear(drawing.input(1, 256, 704), 704, 384), 1, 256, 6, 64, (0, 2, 3, 1))
    q = drawing.random(1, 6, queries, 64) if fixed else drawing.input(1, 6, queries, 64)
    (decision,) = fold(ir.from_proto(drawing.model(drawing("MatMul", q, k))), least_gain=0)

    assert decision.chosen == chosen
    assert decision.folded.flops < 0.7 * decision.plain.flops
    assert chosen == "folded" or "int8" in decision.why


def test_a_blocked_site_says_why() -> None:
    """Rotary positions: keys are no linear function of anything."""
    drawing = Drawing()
    k = drawing.linear(drawing.input(1, 64, 8), 8, 32)
    turned = drawing(
        "Add",
        drawing("Mul", k, drawing.random(1, 64, 32)),
        drawing("Mul", drawing("Neg", k), drawing.random(1, 64, 32)),
    )
    scores = drawing("MatMul", drawing.input(1, 3, 32), drawing("Transpose", turned, perm=[0, 2, 1]))
    decisions = fold(ir.from_proto(drawing.model(scores)))

    assert [one.why for one in decisions if one.why.startswith("blocked") and "rotary" in one.why]


@pytest.mark.parametrize("budget", [1 << 14, 1 << 16])
def test_pieces_need_less_memory_and_give_the_same(budget: int) -> None:
    drawing = Drawing()
    output = perceiver(drawing, 2, queries=64)
    whole, pieces = assert_same(drawing, output), assert_same(drawing, output, budget=budget)

    assert peak(pieces.graph, Sizes()) < peak(whole.graph, Sizes())
