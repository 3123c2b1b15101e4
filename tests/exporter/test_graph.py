# SPDX-License-Identifier: Apache-2.0
"""The exported graph: constants baked, weights stored once, nothing that engines or devices stumble over."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from perceiver_export.calibration.graphs import stage_costs
from perceiver_export.exporter import LoadedModel, OwnModel, export, load_model
from perceiver_export.exporter.graphs import Batch, whole_model
from perceiver_export.exporter.onnx_files import OPSET
from perceiver_export.exporter.simplify import DivideIntegersPass, FoldConstantsPass
from perceiver_export.exporter.trace import IR_VERSION
from perceiver_export.exporter.verification import TOLERANCE
from perceiver_export.runtimes import Bundle, load, open_bundle
from perceiver_export.runtimes.errors import UsageError
from tests.conftest import FASHION, MadeOnce, SmallBundle
from tests.preset_graphs import traced

from .conftest import PICTURES, SHALLOW, ExportKind, MakeCheckpoint, TracedOnce

SIZES = PICTURES | {"learned": (10, 14)}  # whose table is resized
# Whatever computes positions, draws numbers or works on shapes at run time.
FORBIDDEN = {"Sin", "Cos", "Range", "Shape", "ConstantOfShape", "Resize", "Constant", "Identity", "Cast", "CastLike"}
FORBIDDEN |= {"RandomNormal", "RandomUniform", "RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial"}
FORBIDDEN |= {"If", "Loop"}
TraceWhole = Callable[[str], ir.Model]


@pytest.fixture(params=SIZES)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(kind: str, make_checkpoint: MakeCheckpoint) -> LoadedModel:
    return load_model(make_checkpoint(kind, **SHALLOW), shape={"image": (3, *SIZES[kind])})


@pytest.fixture
def bundle(kind: str, loaded: LoadedModel, made_once: MadeOnce) -> Bundle:
    """Exported with the defaults; do not change it."""
    return open_bundle(made_once(f"graph-{kind}", lambda path: export(loaded, path)))


@pytest.fixture
def trace_whole(kind: str, loaded: LoadedModel, traced_once: TracedOnce) -> TraceWhole:
    """The model in one graph, without folds, by its batch."""

    def trace(batch: str) -> ir.Model:
        part = whole_model(loaded.model, Batch.parse(batch))
        return traced_once(f"{kind} {batch}", lambda: traced(part, loaded.config))

    return trace


@pytest.mark.parametrize("batch", ["1", "4", "1:2:4"])
def test_nothing_constant_is_left_to_do(trace_whole: TraceWhole, batch: str) -> None:
    graph = trace_whole(batch).graph
    operators = Counter(node.op_type for node in graph)

    if batch == "1:2:4":  # how often positions are repeated is known at run time only
        assert operators.pop("Shape") == 1
    assert not FORBIDDEN & set(operators)
    for node in graph:
        assert node.domain == ""
        constant = all(value is None or value.is_initializer() for value in node.inputs)
        # Positions repeated for each picture of a batch are not stored so often.
        assert not constant or (node.op_type == "Expand" and batch != "1"), f"{node.name} is constant"
    assert all(value.shape is not None and value.shape.rank() <= 6 for node in graph for value in node.outputs)


@pytest.mark.parametrize("system", ["flow", "video", "pictures", "first_sound"])
def test_folded_graphs_ask_at_run_time_for_no_type_and_no_shape(system: str, small_bundle: SmallBundle) -> None:
    graph = ir.load(small_bundle(system) / "model.onnx").graph

    assert not FORBIDDEN & {node.op_type for node in graph}
    for node in graph:
        constant = all(value is None or value.is_initializer() for value in node.inputs)
        # A large array of one number, or of one vector, is not stored.
        shape = node.outputs[0].shape
        large = shape is not None and shape.is_static() and np.prod(shape.numpy()) > 1 << 12
        assert not constant or (node.op_type == "Expand" and large), f"{node.name} is constant"


def test_shared_blocks_share_their_weights(loaded: LoadedModel, trace_whole: TraceWhole) -> None:
    graph = trace_whole("1").graph
    parameters = sum(parameter.numel() for parameter in loaded.model.encoder.self_attentions.parameters())
    stored = sum(
        value.const_value.size
        for name, value in graph.initializers.items()
        if name.startswith("encoder.self_attentions.") and value.const_value is not None
    )

    assert stored == parameters
    weight = graph.initializers["encoder.self_attentions.0.0.mlp.hidden.weight"]
    assert [user.op_type for user in weight.consumers()] == ["MatMul", "MatMul"]  # two blocks


def test_weights_are_stored_as_matmul_takes_them(loaded: LoadedModel, trace_whole: TraceWhole) -> None:
    graph = trace_whole("1").graph
    weight = graph.initializers["decoder.output.weight"].const_value
    assert weight is not None

    np.testing.assert_array_equal(loaded.model.state_dict()["decoder.output.weight"].numpy().T, weight.numpy())


def test_the_file_is_standard_onnx_of_the_promised_versions(bundle: Bundle) -> None:
    model = onnx.load(bundle.path / "model.onnx")

    onnx.checker.check_model(bundle.path / "model.onnx", full_check=True)
    assert model.ir_version == IR_VERSION
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", OPSET)]


def test_no_path_of_the_exporting_machine_is_in_the_files(bundle: Bundle) -> None:
    folder = re.escape(str(bundle.path.parent).encode())
    for name in ("model.onnx", "manifest.json"):
        content = (bundle.path / name).read_bytes()
        assert not re.search(rb"site-packages|\.py\b|/home/|/root/|" + folder, content), name


def test_the_same_checkpoint_gives_the_same_bytes(bundle: Bundle, loaded: LoadedModel, tmp_path: Path) -> None:
    assert export(loaded, tmp_path / bundle.path.name).manifest.files == bundle.manifest.files


@pytest.mark.parametrize("operator", ["RandomNormal", "RandomUniform"])
def test_random_numbers_are_not_taken_for_constants(operator: str) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        drawn (float[2] x) => (float[2] y) {{ r = {operator} <shape = [2]> ()
          y = Add(x, r) }}"""
    )
    FoldConstantsPass()(model)

    assert [node.op_type for node in model.graph] == [operator, "Add"]


class Divided(torch.nn.Module):
    """Indices divided and rounded in each way that torch knows."""

    def forward(self, i: torch.Tensor) -> dict[str, torch.Tensor]:
        down, zero = (torch.div(i, 48, rounding_mode=mode) for mode in ("floor", "trunc"))
        places = torch.div(i[..., None], torch.tensor([48, 7]), rounding_mode="floor")
        wide, up = (i.int() / 48).floor().long(), torch.ceil(i / 48).long()
        found = {"down": down, "zero": zero, "cast": (i / 7).long(), "places": places, "wide": wide, "up": up}
        return {name: value.float() for name, value in found.items()}


def test_indices_are_divided_as_integers(tmp_path: Path) -> None:
    """OpenVINO's bf16 gave other rows of a video, whose indices were divided in its float."""
    bundle = export(OwnModel(Divided(), {"i": torch.tensor([[0, 47, 48, 4799]])}), tmp_path / "b")
    given = np.array([[-49, -1, 48 * 100_001, 48 * 100_001 - 1]], np.int64)

    operators = {node.op_type for node in onnx.load(bundle.path / "model.onnx").graph.node}
    assert operators == {"Unsqueeze", "Add", "Mod", "Sub", "Div", "Cast"}
    down, zero, cast = given // 48, np.fix(given / 48), np.fix(given / 7)
    expected = {
        "down": down,
        "zero": zero,
        "cast": cast,
        "places": given[..., None] // [48, 7],
        "wide": down,
        "up": -(-given // 48),
    }
    for target in ("ort-cpu", "openvino-cpu"):
        with load(bundle, target) as runtime:
            found = runtime.run({"i": given})
        for name, values in expected.items():
            np.testing.assert_array_equal(found[name], values.astype(np.float32), f"{name} on {target}")


@pytest.mark.parametrize(("narrow", "number"), [("uint8", 2), ("int16", 5)])
def test_a_division_whose_dividend_wraps_stays(narrow: str, number: int) -> None:
    model = ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["" : 20]>
        divided (int64[2] i, int64[2] j) => (int64[2] y) <{narrow} d = {{16}}>
          {{ c = Cast<to = {number}>(i)  q = Div(c, d)  r = Cast<to = 7>(q)  y = Add(r, j) }}"""
    )
    DivideIntegersPass()(model)

    assert [node.op_type for node in model.graph] == ["Cast", "Div", "Cast", "Add"]


def test_costs_do_not_depend_on_the_batch(trace_whole: TraceWhole) -> None:
    one, four, range_ = (
        sum(stage.flops for stage in stage_costs(trace_whole(batch).graph)) for batch in ("1", "4", "1:2:4")
    )

    assert one == four == range_


@pytest.mark.parametrize("kind", ["fourier"])
def test_a_fixed_batch_does_not_store_positions_for_each_picture(bundle: Bundle, export_kind: ExportKind) -> None:
    one, two = (made.manifest.files["model.weights"].size for made in (bundle, export_kind("fourier", "whole")))

    assert two < 1.1 * one


def test_a_range_of_batches_runs_at_every_size_and_refuses_others(batched_bundle: Path) -> None:
    loaded = load_model(FASHION / "checkpoint")
    images = np.random.default_rng(0).normal(size=(17, 3, 28, 28)).astype(np.float32)

    with load(batched_bundle) as runtime:
        assert runtime.inputs[0].shape == ("batch", 3, 28, 28)
        assert runtime.inputs[0].ranges == {"batch": (1, 16)}
        for size in range(1, 17):
            expected = loaded.run({"image": images[:size]})["logits"]
            found = runtime.run({"image": images[:size]})["logits"]
            np.testing.assert_allclose(found, expected, atol=TOLERANCE * np.abs(expected).max())
            buffer = np.empty_like(expected)
            np.testing.assert_array_equal(
                runtime.run({"image": images[:size]}, out={"logits": buffer})["logits"], found
            )
        for size in (0, 17):
            with pytest.raises(Exception, match="batch from 1 to 16"):
                runtime.run({"image": images[:size]})


@pytest.mark.parametrize("text", ["0", "-1", "two", "1:2", "4:2:8", "1:2:3:4", ""])
def test_batches_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        Batch.parse(text)


def test_costs_count_every_product_once_and_for_one_sample() -> None:
    model = ir.from_onnx_text(
        """<ir_version: 10, opset_import: ["" : 20]>
        stage (float[2,3,4] x) => (float[2,3,6] y)
        <float[4,5] w = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20},
         float[5,6] v = {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16,17,18,19,20,21,22,23,24,25,26,27,28,29,30}>
        { h = MatMul(x, w)
          y = MatMul(h, v) }"""
    )
    ir.passes.common.ShapeInferencePass()(model)
    (stage,) = stage_costs(model.graph)

    assert stage.flops == 2 * (3 * 4 * 5) + 2 * (3 * 5 * 6)
    assert stage.parameters == 4 * 5 + 5 * 6
    assert stage.weight_bytes == 4 * stage.parameters
    assert stage.activation_bytes == 4 * (3 * 4 + 2 * (3 * 5) + 3 * 6)
