# SPDX-License-Identifier: Apache-2.0
"""Any torch module, any ONNX file: exported with the names of its inputs and outputs, or refused in one line."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto
from torch import nn
from torch.nn import functional

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
from tests.calibration.onnx_text import write
from tests.exporter import any_modules
from tests.exporter.outputs import assert_bundle_gives

MODULES = "tests.exporter.any_modules"
RNG = np.random.default_rng(0)


def assert_bundle_is(bundle: Bundle, source: str, feeds: dict[str, np.ndarray]) -> None:
    assert_bundle_gives(bundle, feeds, load_model(source).run(feeds), 2e-5)


def specs(bundle: Bundle) -> dict[str, tuple[str, tuple[int | str, ...]]]:
    (part,) = bundle.manifest.parts.values()
    return {spec.name: (spec.dtype, spec.shape) for spec in (*part.inputs, *part.outputs)}


def test_a_module_keeps_its_names_and_is_folded(tmp_path: Path) -> None:
    bundle = export(f"{MODULES}:resampler", tmp_path / "b", ExportOptions(batch="1:2:5"))

    assert specs(bundle) == {"tokens": ("float32", ("batch", 512, 64)), "output": ("float32", ("batch", 8, 64))}
    assert bundle.manifest.task == "arrays"
    assert [one.chosen for one in bundle.manifest.parts["model"].folds].count("folded") == 2
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


X = (torch.randn(1, 4),)
REFUSED: list[tuple[object, type[PerceiverExportError], str]] = [
    ((any_modules.Computes(lambda x: x + 1 if x.sum() > 0 else x - 1), X), ExportError, "values of its inputs"),
    ((any_modules.Brain(), X), ExportError, "MatMul"),
    ((any_modules.Computes(functional.dropout), (torch.randn(1, 99),)), UnsupportedModelError, "'output'"),
    ((nn.Linear(4, 4).half(), (torch.randn(1, 4).half(),)), UnsupportedModelError, "float16"),
    (nn.Linear(4, 4), UnsupportedModelError, "Linear"),
    ((nn.Linear(4, 4), {"y": torch.randn(1, 4)}), UnsupportedModelError, "'y'"),
    ((nn.Linear(4, 4), {"input": [1.0, 2.0]}), UsageError, "list"),
    (OwnModel(nn.Linear(4, 4), X, outputs=("input",)), UsageError, "input"),
    ((any_modules.Detector(of_each=False), (torch.randn(1, 5, 8),)), UnsupportedModelError, "score"),
    (OwnModel(nn.Linear(8, 4), (torch.randn(1, 0, 8),)), UnsupportedModelError, r"'input'.*0, 8"),
    (OwnModel(nn.Linear(4, 4), X, outputs=("a b",)), UnsupportedModelError, "the model has .*'a b'"),
]


@pytest.mark.parametrize(("made", "error", "datum"), REFUSED, ids=[datum for *_, datum in REFUSED])
def test_modules_that_are_refused(
    made: object, error: type[PerceiverExportError], datum: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(any_modules, "refused", lambda: made, raising=False)
    with pytest.raises(error, match=datum) as raised:
        export(f"{MODULES}:refused", tmp_path / "b")
    assert raised.value.hint
    assert not list(tmp_path.iterdir())


def test_a_module_is_like_no_bundle(tmp_path: Path) -> None:
    with pytest.raises((UsageError, UnsupportedModelError), match="like"):
        export(f"{MODULES}:detector", tmp_path / "b", ExportOptions(like="b"))


WEIGHTS = RNG.standard_normal((8, 3), dtype=np.float32)
PRODUCT = "y = MatMul(x, w)"


@pytest.mark.parametrize("opset", [11, 13, 17, 20, 22, 25])
def test_an_onnx_file_of_any_opset(opset: int, tmp_path: Path) -> None:
    body = "(float[1,8] x) => (float[] y) { h = MatMul(x, w)  y = Softmax<axis = -1>(h) }"
    path = write(tmp_path / "m.onnx", body, opset, w=WEIGHTS)
    bundle = export(path, tmp_path / "b")

    assert specs(bundle) == {"x": ("float32", (1, 8)), "y": ("float32", (1, 3))}
    assert_bundle_is(bundle, str(path), {"x": RNG.standard_normal((1, 8), dtype=np.float32)})


def test_tiny_numbers_beside_sequences_stay(tmp_path: Path) -> None:
    """0 / (0 + 1e-8): onnxscript's rules for sequences leave the addition out."""
    body = """(float[1,8] x) => (float[] y) {
        parts = SplitToSequence<axis = 0>(x)  zero = Constant<value_int = 0>()  h = SequenceAt(parts, zero)
        nothing = Sub(h, h)  tiny = Constant<value_float = 1e-8>()  least = Add(nothing, tiny)
        share = Div(nothing, least)  y = MatMul(share, w)
    }"""
    path = write(tmp_path / "m.onnx", body, w=WEIGHTS)
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
    path, config = tmp_path / "m.onnx", tmp_path / "what.json"
    write(path, f"(float[1,8] x) => (float[] y) {{ {PRODUCT} }}", w=WEIGHTS)
    config.write_text(json.dumps({"labels": ["a", "b", "c"], "output_kinds": {"y": "single-label"}}))
    first = export(path, tmp_path / "a", ExportOptions(config=config))
    second = export(path, tmp_path / "b", ExportOptions(like=first.path))

    assert first.manifest.labels == second.manifest.labels == ("a", "b", "c")
    assert first.manifest.output_kinds == second.manifest.output_kinds == {"y": "single-label"}


@pytest.mark.parametrize(("inner", "factor"), [(TensorProto.FLOAT16, 0.3), (TensorProto.INT32, 3)])
def test_products_of_other_types_stay(inner: int, factor: float, tmp_path: Path) -> None:
    kept = onnx.helper.tensor_dtype_to_np_dtype(inner)
    a, b = (factor * RNG.standard_normal((2, 64, 64))).astype(kept)
    nodes = f"h = Cast<to = {inner}>(x)  i = MatMul(h, a)  j = MatMul(i, b)  y = Cast<to = 1>(j)"
    path = write(tmp_path / "m.onnx", f"(float[1,900,64] x) => (float[] y) {{ {nodes} }}", a=a, b=b)
    bundle = export(path, tmp_path / "b")

    assert bundle.manifest.parts["model"].folds == ()
    assert_bundle_is(bundle, str(path), {"x": RNG.standard_normal((1, 900, 64), dtype=np.float32)})


BRANCH = """s = ReduceSum<keepdims = 0>(x)  b = Cast<to = 9>(s)  y = If(b) <
    then_branch = one () => (float[] p) { p = Neg(x) }, else_branch = other () => (float[] q) { q = Abs(x) }>"""
# What stands between the braces, what the error names, the inputs and the outputs.
FILES: list[tuple[str, str, str, str]] = [
    ("y = my.Mine(x)", "my", "float[1,8] x", "float[] y"),
    (BRANCH, "If", "float[1,8] x", "float[] y"),
    ("y = RandomNormalLike(x)", "RandomNormalLike", "float[1,8] x", "float[] y"),
    ("t = Constant<value = bool {1}>()  y = Dropout(x, , t)", "Dropout", "float[1,8] x", "float[] y"),
    (PRODUCT, "'x'", "float[1,8] x", "float[] y, float[1,8] x"),
    (PRODUCT, "no outputs", "float[1,8] x", ""),
    (f"{PRODUCT}  y = Relu(x)", "hint: export", "float[1,8] x", "float[] y"),
    ('"../y" = MatMul(x, w)', "the model has .*'../y'", "float[1,8] x", 'float[] "../y"'),
    ("y = Mul(s, x)", "dimension of s\n", "float s, float[1,8] x", "float[] y"),
    (PRODUCT, "double", "double[1,8] x", "double[] y"),
    ("y = SequenceConstruct(x, x)", "'y' is not a tensor", "float[1,8] x", "seq(float[1,8]) y"),
    ("y = SequenceAt(x, i)", "'x' is not a tensor", "seq(float) x, int64 i", "float[] y"),
    ("t = Constant<value = float[0] {}>()  y = Gather(t, i)", "out of", "int64[1] i", "float y"),
    ("y = Relu(x)", r"outputs listed twice: y", "float[n,8] x", "float[n,8] y, float[n,8] y"),
]


@pytest.mark.parametrize(("nodes", "datum", "given", "outputs"), FILES, ids=[datum for _, datum, *_ in FILES])
def test_onnx_files_that_are_refused(nodes: str, datum: str, given: str, outputs: str, tmp_path: Path) -> None:
    weights = WEIGHTS.astype("float64" if "double" in given else "float32")
    path = write(tmp_path / "m.onnx", f"({given}) => ({outputs}) {{ {nodes} }}", w=weights)
    assert_refused(path, UnsupportedModelError, datum)


def test_open_sizes_beside_the_batch_are_asked_for(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", f"(float[n,m] x) => (float[] y) {{ {PRODUCT} }}", w=WEIGHTS)
    assert_refused(path, UsageError, "'x'")


def assert_refused(path: Path, error: type[PerceiverExportError], datum: str) -> None:
    with pytest.raises(error, match=datum) as raised:
        export(path, path.with_name("b"))
    assert raised.value.hint
    assert [one.name for one in path.parent.iterdir()] == ["m.onnx"]


@pytest.mark.parametrize("stored", [True, False])
def test_sparse_weights_are_refused(stored: bool, tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", f"(float[1,8] x) => (float[] y) {{ {PRODUCT} }}")
    model = onnx.load(path)
    values, indices = (onnx.numpy_helper.from_array(np.array([1], kind), "w") for kind in ("float32", "int64"))
    sparse = onnx.helper.make_sparse_tensor(values, indices, [8, 3])
    if stored:
        model.graph.sparse_initializer.append(sparse)
    else:
        model.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["w"], sparse_value=sparse))
    onnx.save(model, path)
    assert_refused(path, UnsupportedModelError, "sparse")


def test_a_negative_size_is_an_open_one(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", f"(float[1,8] x) => (float[] y) {{ {PRODUCT} }}", 13, w=WEIGHTS)
    model = onnx.load(path)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    onnx.save(model, path)
    bundle = export(path, tmp_path / "b", ExportOptions(batch="1:2:4"))

    assert_bundle_is(bundle, str(path), {"x": RNG.standard_normal((3, 8), dtype=np.float32)})


def test_a_file_of_a_fixed_batch_takes_no_other(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", f"(float[2,8] x) => (float[] y) {{ {PRODUCT} }}", w=WEIGHTS)
    with pytest.raises(UsageError, match="takes 2 samples per call"):
        export(path, tmp_path / "b", ExportOptions(batch="1:2:4"))
    with pytest.raises(UnsupportedModelError, match="Got: 9 Expected: 8"):
        load_model(path).run({"x": np.ones((2, 9), np.float32)})


def test_other_files_and_old_opsets_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    assert_refused(path, CheckpointError, "ONNX")
    write(path, f"(float[1,8] x) => (float[] y) {{ {PRODUCT} }}", 9, w=WEIGHTS)
    assert_refused(path, UnsupportedModelError, "opset 9")


@pytest.mark.parametrize("place", ["lost.bin", "../elsewhere.bin"])
def test_weights_that_are_lost_or_elsewhere(place: str, tmp_path: Path) -> None:
    """The second is there, and must not be read."""
    folder = tmp_path / "given"
    folder.mkdir()
    (tmp_path / "elsewhere.bin").write_bytes(WEIGHTS.tobytes())
    path = write(folder / "m.onnx", f"(float[1,8] x) => (float[] y) {{ {PRODUCT} }}", w=WEIGHTS)
    model = onnx.load(path)
    onnx.external_data_helper.convert_model_to_external_data(model, location=place, size_threshold=0)
    model.graph.initializer[0].ClearField("raw_data")
    path.write_bytes(model.SerializeToString())

    assert_refused(path, CheckpointError, place.strip("./"))


def test_an_onnx_file_is_known_by_its_hash(tmp_path: Path) -> None:
    path = write(tmp_path / "m.onnx", f"(float[1,8] x) => (float[] y) {{ {PRODUCT} }}", w=WEIGHTS)
    assert load_model(path).hashes() == {"m.onnx": hashlib.sha256(path.read_bytes()).hexdigest()}
