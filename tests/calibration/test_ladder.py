# SPDX-License-Identifier: Apache-2.0
"""A search's ladder and its fixed sequence by themselves."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from perceiver_export.calibration.ladder import Ladder, Step, mixtures, order_steps
from perceiver_export.calibration.lowering.tensorrt_bundle import lower_bundle
from perceiver_export.calibration.observe import observe
from perceiver_export.calibration.pipeline import part_options
from perceiver_export.calibration.sequence import climb, fixed_order, fixed_sequence
from perceiver_export.runtimes import open_bundle

HELD_OUT = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist" / "held_out.npz"


def test_steps_come_by_what_they_take_from_the_noise() -> None:
    steps = order_steps({"a": 1.0, "b": 0.5, "c": 0.3}, {"a": 0.1, "b": 0.01, "c": 0.2})

    # Most of c's noise is that of its weights, so int8 weights are not worth a rung.
    assert [(step.group, step.scheme) for step in steps] == [
        ("a", "int8-weights"),
        ("b", "int8-weights"),
        ("c", "float"),
        ("a", "float"),
        ("b", "float"),
    ]
    assert [step.effect for step in steps] == pytest.approx([0.9, 0.49, 0.3, 0.1, 0.01])
    assert [step.scheme for step in order_steps({"a": 0.1}, {})] == ["float"]


def test_each_rung_is_the_one_before_with_one_layer_back_and_none_is_all_float() -> None:
    steps = (Step("a", "int8-weights", 3.0), Step("b", "float", 2.0), Step("a", "float", 1.0))

    assert mixtures({"a": "int8", "b": "int8"}, steps) == [
        {"a": "int8", "b": "int8"},
        {"a": "int8-weights", "b": "int8"},
        {"a": "int8-weights", "b": "float"},
    ]


@pytest.mark.parametrize("lowest", [*range(8), 20, 44])
def test_climbing_finds_the_lowest_rung_that_holds_with_few_questions(lowest: int) -> None:
    asked: list[int] = []

    def holds(index: int) -> bool:
        asked.append(index)
        return index >= lowest

    climb(45, holds, lambda lower, upper: True)

    assert min(index for index in asked if index >= lowest) == lowest
    assert len(asked) == len(set(asked)) <= 2 * math.log2(45) + 3
    assert lowest == 44 or any(index > lowest for index in asked)  # a safer candidate
    assert lowest == 0 or lowest - 1 in asked


@pytest.mark.parametrize(
    ("count", "lowest", "questions"),
    [(5, 5, [0, 1, 2, 4]), (45, 20, [0, 1, 2, 4, 8, 16, 32, 44]), (1, 0, [0]), (1, 1, [0]), (2, 0, [0, 1])],
)
def test_climbing_ends_where_nothing_holds_or_nothing_is_to_gain(count: int, lowest: int, questions: list[int]) -> None:
    asked: list[int] = []

    def holds(index: int) -> bool:
        asked.append(index)
        return index >= lowest

    climb(count, holds, lambda lower, upper: False)
    assert asked == questions


def test_the_safest_is_tested_first_and_what_gains_too_little_never() -> None:
    def order(costs: list[float], held: list[bool], least_gain: float = 0.0) -> list[int]:
        return fixed_order(dict(enumerate(costs)), dict(enumerate(held)), least_gain)

    assert order([0.4, 0.5, 0.6], [True, True, True]) == [2, 1, 0]
    assert order([0.4, 0.5, 0.6], [False, True, True]) == [2, 1]
    assert order([0.4, 0.7, 0.6], [False, True, True]) == [2]
    assert order([0.4, 0.6, 0.6], [True, True, True]) == [2, 0]
    assert order([0.58, 0.595, 0.6], [True, True, True], 0.02) == [2, 0]
    assert order([0.4], [False]) == []


def test_a_fixed_sequence_stops_at_the_first_that_fails() -> None:
    asked: list[int] = []

    def holds(index: int) -> bool:
        asked.append(index)
        return index != 1

    assert fixed_sequence([2, 1, 0], holds) == 2
    assert asked == [2, 1]
    assert fixed_sequence([1, 2], holds) is None
    assert fixed_sequence([], holds) is None


def test_a_fixed_sequence_keeps_the_error_rate() -> None:
    """Every rung is on the margin, so certifying any is wrong: it happens in 5 %, however many rungs there are."""
    generator = np.random.default_rng(0)
    wrong = sum(fixed_sequence(range(6), lambda index: generator.uniform() < 0.05) is not None for _ in range(4000))

    assert wrong / 4000 < 0.06


def test_what_is_kept_float_is_no_part_of_the_ladder_and_float_in_every_rung(
    fashion_bundle: Path, tmp_path: Path
) -> None:
    source = open_bundle(fashion_bundle)
    wishes = {"encoder.*": "float", "decoder.plain.logits.tail.mlp.hidden": "int8-weights"}
    options = part_options(source, precision=wishes, weight_bits=7, smooth=False)  # type: ignore[arg-type]
    ladder = Ladder(source, observe(source, HELD_OUT, 8, None, _quiet), options, 100.0, None, _quiet)

    groups = set(ladder.rungs[0])
    assert groups
    assert not any(group.startswith("encoder.") for group in groups)
    assert ladder.rungs[0]["decoder.plain.logits.tail.mlp.hidden"] == "int8-weights"
    last = len(ladder.rungs) - 1
    ladder.build(last, tmp_path / "last")
    made = open_bundle(tmp_path / "last")
    assert made.manifest.quantization is not None
    assert made.manifest.quantization.weight_bits == 7
    floats = {group for group, scheme in ladder.rungs[last].items() if scheme == "float"}
    assert floats
    kept = made.manifest.quantization.kept_float
    assert {kept[name] for name in floats} == {"found by a search"}
    assert {reason for name, reason in kept.items() if name.startswith("encoder.self_attentions.")} == {"asked for"}


def test_layers_that_went_back_to_float_are_fp16_where_tensorrt_is_built_so(
    fashion_bundle: Path, tmp_path: Path
) -> None:
    """That is the ladder's fp16 rung: casts in the graph, but for what would overflow."""
    source = open_bundle(fashion_bundle)
    kept = {"encoder.self_attentions.0.[01].*": "float"}
    options = part_options(source, precision=kept)  # type: ignore[arg-type]
    ladder = Ladder(source, observe(source, HELD_OUT, 8, None, _quiet), options, 100.0, None, _quiet)
    index = len(ladder.rungs) - 1
    ladder.build(index, tmp_path / "mixed")
    strong, _ = lower_bundle(tmp_path / "mixed", "tensorrt", "fp16")

    graph = ir.load(tmp_path / "mixed" / "model.tensorrt-fp16.onnx").graph
    back = {group for group, scheme in ladder.raised(index).items() if scheme == "float"}
    products = [
        node for node in graph if node.op_type in ("MatMul", "Gemm") and (node.name or "").split("/")[0] in back
    ]
    assert len(products) >= len(back) - 1
    wide = {
        node.name for node in products if node.inputs[1] is not None and node.inputs[1].dtype != ir.DataType.FLOAT16
    }
    assert wide <= set(strong.kept["model"])
    assert len(wide) < len(products) / 4


def _quiet(what: str, done: int, total: int) -> None: ...
