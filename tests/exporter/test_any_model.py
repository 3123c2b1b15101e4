# SPDX-License-Identifier: Apache-2.0
"""Any torch module, any ONNX file: exported with the names of its inputs and outputs, or refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from perceiver_export.calibration import Gates, QuantizeOptions, ValidateOptions, quantize, validate
from perceiver_export.exporter import ExportOptions, OwnModel, export, load_model, load_reference
from perceiver_export.runtimes import Bundle, load
from perceiver_export.runtimes.errors import (
    CheckpointError,
    ExportError,
    PerceiverExportError,
    UnsupportedModelError,
    UsageError,
)
from tests.exporter import any_modules

MODULES = "tests.exporter.any_modules"
RNG = np.random.default_rng(0)


def assert_bundle_is(bundle: Bundle, source: str, feeds: dict[str, np.ndarray]) -> None:
    expected = load_model(source).run(feeds)
    with load(bundle) as runtime:
        found = runtime.run(feeds)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(found[name], array, rtol=0, atol=2e-5 * np.abs(array).max())


def specs(bundle: Bundle) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    (part,) = bundle.manifest.parts.values()
    return {spec.name: (spec.dtype, spec.shape) for spec in (*part.inputs, *part.outputs)}


def test_a_module_keeps_its_names_and_is_folded(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:resampler", tmp_path / "b")

    assert specs(bundle) == {"tokens": ("float32", (1, 512, 64)), "output": ("float32", (1, 8, 64))}
    assert bundle.manifest.task == "arrays"
    assert [one.chosen for one in bundle.manifest.parts["model"].folds].count("folded") == 2
    assert_bundle_is(bundle, f"{MODULES}:resampler", {"tokens": RNG.standard_normal((1, 512, 64), dtype=np.float32)})


def test_a_range_of_samples(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:resampler", tmp_path / "b", ExportOptions(batch="1:2:5"))

    for samples in (1, 3, 5):
        feeds = {"tokens": RNG.standard_normal((samples, 512, 64), dtype=np.float32)}
        assert_bundle_is(bundle, f"{MODULES}:resampler", feeds)


def test_keywords_masks_and_outputs_by_name(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:words", tmp_path / "b", ExportOptions(batch="1:2:4"))

    assert specs(bundle) == {
        "ids": ("int64", ("batch", 20)),
        "mask": ("bool", ("batch", 20)),
        "scores": ("float32", ("batch", 3)),
        "rows": ("float32", ("batch", 4, 32)),
    }
    assert bundle.manifest.parts["model"].inputs[0].values == (0, 49)
    feeds = {"ids": RNG.integers(0, 50, (3, 20)), "mask": RNG.random((3, 20)) < 0.3}
    assert_bundle_is(bundle, f"{MODULES}:words", feeds)


def test_dataclasses_and_numbers_are_outputs(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:detector", tmp_path / "b")

    assert specs(bundle) == {"x": ("float32", (1, 5, 8)), "boxes": ("float32", (1, 5, 4)), "score": ("float32", (1,))}
    assert_bundle_is(bundle, f"{MODULES}:detector", {"x": RNG.standard_normal((1, 5, 8), dtype=np.float32)})


def test_state_that_is_no_tensor(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:vocabulary", tmp_path / "b")

    assert specs(bundle)["output"] == ("float32", (1, 3))
    assert load_reference(bundle.path, f"{MODULES}:vocabulary").described["graphs"]


@pytest.mark.parametrize("fold", [True, False])
def test_inputs_weights_and_one_tensor_twice_are_outputs(fold: bool, tmp_path: Path) -> None:
    given, feeds = any_modules.returned(), {"x": RNG.standard_normal((1, 8), dtype=np.float32)}
    with load(export(given, tmp_path / "b", ExportOptions(fold=fold))) as runtime:
        found = runtime.run(feeds)
    assert list(found) == ["a", "x_out", "b", "c", "fixed", "twice"]
    for name, array in given[0](torch.from_numpy(feeds["x"])).items():
        np.testing.assert_allclose(found[name], array.detach(), rtol=0, atol=1e-5)


def test_halves_of_a_batch(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:pairs", tmp_path / "b", ExportOptions(batch="1:2:4"))

    feeds = {name: RNG.standard_normal((3, 8), dtype=np.float32) for name in ("x", "z")}
    assert_bundle_is(bundle, f"{MODULES}:pairs", feeds)


def test_a_module_in_python(tmp_path: Path) -> None:
    model = OwnModel(nn.Linear(4, 3), {"input": torch.randn(2, 4)}, outputs=("logits",))
    bundle = export(model, tmp_path / "b")

    assert specs(bundle) == {"input": ("float32", (2, 4)), "logits": ("float32", (2, 3))}


@pytest.mark.usefixtures("untimed")
def test_quantized_and_certified(tmp_path: Path) -> None:
    """The whole road of one's own classifier, against itself in torch."""
    bundle = export(f"{MODULES}:classifier", tmp_path / "b", ExportOptions(batch="1:4:16"))
    data = tmp_path / "data.npz"
    inputs = RNG.standard_normal((64, 8, 8), dtype=np.float32)
    scores = load_model(f"{MODULES}:classifier").run({"input": inputs})["logits"]
    np.savez(data, input=inputs, labels=scores.argmax(1))
    int8 = quantize(bundle, data, tmp_path / "int8", QuantizeOptions(samples=16))

    assert int8.manifest.precision == "int8"
    reference = load_reference(int8.path, f"{MODULES}:classifier")
    options = ValidateOptions(against=reference, device="ort-cpu", gates=Gates(min_agreement=80))
    found = validate(int8, data, options)
    found.require()


@pytest.mark.parametrize(
    ("function", "error", "datum"),
    [
        ("sometimes", ExportError, "values of its inputs"),
        ("brain", ExportError, "MatMul"),
        ("dropped", UnsupportedModelError, "'output'"),
        ("half", UnsupportedModelError, "float16"),
        ("bare", UnsupportedModelError, "Linear"),
        ("misnamed", UnsupportedModelError, "'y'"),
        ("no_tensor", UsageError, "list"),
        ("twice", UsageError, "input"),
        ("one_number", UnsupportedModelError, "score"),
        ("empty", UnsupportedModelError, r"'input'.*0, 8"),
        ("strange_name", UnsupportedModelError, "the model has .*'a b'"),
    ],
)
def test_modules_that_are_refused(function: str, error: type[PerceiverExportError], datum: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=datum) as raised:
        export(f"{MODULES}:{function}", tmp_path / "b")
    assert raised.value.hint
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "datum"),
    [
        (ExportOptions(split=True), "latents"),
        (ExportOptions(dynamic_queries=True), "split"),
        (ExportOptions(like="b"), "like"),
    ],
)
def test_options_that_a_module_does_not_take(options: ExportOptions, datum: str, tmp_path: Path) -> None:
    with pytest.raises((UsageError, UnsupportedModelError), match=datum):
        export(f"{MODULES}:detector", tmp_path / "b", options)


def write(path: Path, nodes: Sequence[Any], opset: int = 20, kind: int = TensorProto.FLOAT, **more: Any) -> Path:
    """An ONNX file from x (N, 8) to y; `w` (8, 3) is a weight."""
    shape = more.pop("shape", (1, 8))
    given = [helper.make_tensor_value_info("x", kind, shape)]
    out = [helper.make_tensor_value_info("y", kind, None)]
    weight = onnx.numpy_helper.from_array(
        RNG.standard_normal((8, 3)).astype(helper.tensor_dtype_to_np_dtype(kind)), "w"
    )
    graph = helper.make_graph(list(nodes), "g", given, out, [weight])
    opsets = [helper.make_opsetid("", opset), *more.pop("opsets", ())]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10, **more), path)
    return path


MATMUL = [helper.make_node("MatMul", ["x", "w"], ["y"])]


@pytest.mark.parametrize("opset", [11, 13, 17, 20, 22, 25])
def test_an_onnx_file_of_any_opset(opset: int, tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Softmax", ["h"], ["y"], axis=-1)]
    path = write(tmp_path / "m.onnx", nodes, opset)
    bundle = export(path, tmp_path / "b")

    assert specs(bundle) == {"x": ("float32", (1, 8)), "y": ("float32", (1, 3))}
    assert_bundle_is(bundle, str(path), {"x": RNG.standard_normal((1, 8), dtype=np.float32)})


def test_tiny_numbers_beside_sequences_stay(tmp_path: Path) -> None:
    """0 / (0 + 1e-8): onnxscript's rules for sequences leave the addition out."""
    nodes = [
        helper.make_node("SplitToSequence", ["x"], ["parts"], axis=0),
        helper.make_node("Constant", [], ["zero"], value_int=0),
        helper.make_node("SequenceAt", ["parts", "zero"], ["h"]),
        helper.make_node("Sub", ["h", "h"], ["nothing"]),
        helper.make_node("Constant", [], ["tiny"], value_float=1e-8),
        helper.make_node("Add", ["nothing", "tiny"], ["least"]),
        helper.make_node("Div", ["nothing", "least"], ["share"]),
        helper.make_node("MatMul", ["share", "w"], ["y"]),
    ]
    path = write(tmp_path / "m.onnx", nodes)
    bundle = export(path, tmp_path / "b")

    assert_bundle_is(bundle, str(path), {"x": RNG.standard_normal((1, 8), dtype=np.float32)})


@pytest.mark.filterwarnings("ignore")  # torch's own about its older exporter
def test_an_exported_module_as_an_onnx_file(tmp_path: Path) -> None:
    """From TorchScript's exporter, with open dimensions and weights in a file beside."""
    path = tmp_path / "m.onnx"
    module, inputs = any_modules.resampler()
    axes = {"tokens": {0: "n", 1: "m"}}
    torch.onnx.export(
        module.eval(),
        tuple(inputs.values()),
        str(path),
        dynamo=False,
        opset_version=14,
        input_names=["tokens"],
        output_names=["found"],
        dynamic_axes=axes,
    )
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="weights.bin", size_threshold=0)
    options = ExportOptions(shape={"tokens": (512, 64)}, batch="1:2:3")
    bundle = export(path, tmp_path / "b", options)

    assert specs(bundle) == {"tokens": ("float32", ("batch", 512, 64)), "found": ("float32", ("batch", 8, 64))}
    assert [one.chosen for one in bundle.manifest.parts["model"].folds].count("folded") == 2
    reference = load_reference(bundle.path, str(path))
    feeds = {"tokens": RNG.standard_normal((1, 512, 64), dtype=np.float32)}
    with load(bundle) as runtime:
        np.testing.assert_allclose(runtime.run(feeds)["found"], reference(feeds)["found"], rtol=0, atol=1e-4)


def test_what_an_onnx_file_is_comes_from_a_file_or_a_bundle(tmp_path: Path) -> None:
    path, config = write(tmp_path / "m.onnx", MATMUL), tmp_path / "what.json"
    config.write_text(json.dumps({"labels": ["a", "b", "c"], "output_kinds": {"y": "single-label"}}))
    first = export(path, tmp_path / "a", ExportOptions(config=config))
    second = export(path, tmp_path / "b", ExportOptions(like=first.path))

    assert first.manifest.labels == second.manifest.labels == ("a", "b", "c")
    assert first.manifest.output_kinds == second.manifest.output_kinds == {"y": "single-label"}


@pytest.mark.parametrize(("inner", "factor"), [(TensorProto.FLOAT16, 0.3), (TensorProto.INT32, 3)])
def test_products_of_other_types_stay(inner: int, factor: float, tmp_path: Path) -> None:
    weights = factor * RNG.standard_normal((2, 64, 64)).astype(np.float32)
    kept = helper.tensor_dtype_to_np_dtype(inner)
    nodes = [
        *(
            helper.make_node("Constant", [], [name], value=onnx.numpy_helper.from_array(one.astype(kept)))
            for name, one in zip("ab", weights, strict=True)
        ),
        helper.make_node("Cast", ["x"], ["h"], to=inner),
        helper.make_node("MatMul", ["h", "a"], ["i"]),
        helper.make_node("MatMul", ["i", "b"], ["j"]),
        helper.make_node("Cast", ["j"], ["y"], to=TensorProto.FLOAT),
    ]
    path = write(tmp_path / "m.onnx", nodes, shape=(1, 900, 64))
    bundle = export(path, tmp_path / "b")

    assert bundle.manifest.parts["model"].folds == ()
    assert_bundle_is(bundle, str(path), {"x": RNG.standard_normal((1, 900, 64), dtype=np.float32)})


def not_onnx(path: Path) -> None:
    path.write_bytes(b"no model")


def other_domain(path: Path) -> None:
    write(path, [helper.make_node("Mine", ["x"], ["y"], domain="my")], opsets=[helper.make_opsetid("my", 1)])


def branch(path: Path) -> None:
    def part(name: str, operator: str) -> Any:
        out = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph([helper.make_node(operator, ["x"], [name])], name, [], [out])

    nodes = [
        helper.make_node("ReduceSum", ["x"], ["s"], keepdims=0),
        helper.make_node("Cast", ["s"], ["b"], to=TensorProto.BOOL),
        helper.make_node("If", ["b"], ["y"], then_branch=part("p", "Neg"), else_branch=part("q", "Abs")),
    ]
    write(path, nodes)


def random_numbers(path: Path) -> None:
    write(path, [helper.make_node("RandomNormalLike", ["x"], ["y"])])


def dropout_in_training(path: Path) -> None:
    training = helper.make_node("Constant", [], ["t"], value=onnx.numpy_helper.from_array(np.array(True)))
    write(path, [training, helper.make_node("Dropout", ["x", "", "t"], ["y"])])


def input_returned(path: Path) -> None:
    write(path, MATMUL)
    model = onnx.load(path)
    model.graph.output.append(model.graph.input[0])
    onnx.save(model, path)


def no_outputs(path: Path) -> None:
    write(path, MATMUL)
    model = onnx.load(path)
    model.graph.ClearField("output")
    onnx.save(model, path)


def one_name_twice(path: Path) -> None:
    write(path, [*MATMUL, helper.make_node("Relu", ["x"], ["y"])])


def unsafe_name(path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["../y"])]
    write(path, nodes)
    model = onnx.load(path)
    model.graph.output[0].name = "../y"
    onnx.save(model, path)


def number_first(path: Path) -> None:
    write(path, [helper.make_node("Mul", ["s", "x"], ["y"])])
    model = onnx.load(path)
    model.graph.input.insert(0, helper.make_tensor_value_info("s", TensorProto.FLOAT, []))
    onnx.save(model, path)


def double(path: Path) -> None:
    write(path, MATMUL, kind=TensorProto.DOUBLE)


def open_width(path: Path) -> None:
    write(path, MATMUL, shape=("n", "m"))


def old(path: Path) -> None:
    write(path, MATMUL, opset=9)


def lost_weights(path: Path) -> None:
    write(path, MATMUL)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="lost.bin", size_threshold=0)
    path.with_name("lost.bin").unlink()


def weights_elsewhere(path: Path) -> None:
    """A file that is there, and must not be read."""
    write(path, MATMUL)
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(model, location="../elsewhere.bin", size_threshold=0)
    for entry in model.graph.initializer[0].external_data:
        assert entry.key != "location" or entry.value == "../elsewhere.bin"
    model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize(
    ("make", "error", "datum"),
    [
        (not_onnx, CheckpointError, "ONNX"),
        (other_domain, UnsupportedModelError, "my"),
        (branch, UnsupportedModelError, "If"),
        (random_numbers, UnsupportedModelError, "RandomNormalLike"),
        (dropout_in_training, UnsupportedModelError, "Dropout"),
        (input_returned, UnsupportedModelError, "'x'"),
        (no_outputs, UnsupportedModelError, "no outputs"),
        (one_name_twice, UnsupportedModelError, "hint: export"),
        (unsafe_name, UnsupportedModelError, "the model has .*'../y'"),
        (number_first, UnsupportedModelError, "dimension of s\n"),
        (double, UnsupportedModelError, "double"),
        (open_width, UsageError, "'x'"),
        (old, UnsupportedModelError, "opset 9"),
        (lost_weights, CheckpointError, "lost"),
        (weights_elsewhere, CheckpointError, "elsewhere"),
    ],
)
def test_onnx_files_that_are_refused(
    make: Callable[[Path], None], error: type[PerceiverExportError], datum: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    make(path)
    with pytest.raises(error, match=datum) as raised:
        export(path, tmp_path / "b")
    assert raised.value.hint
    assert [one.name for one in tmp_path.iterdir()] == ["m.onnx"]
