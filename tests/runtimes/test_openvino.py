# SPDX-License-Identifier: Apache-2.0
"""What only the OpenVINO backend does: arithmetic as asked for, precisions, hints, requests that fail."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from perceiver_export.runtimes import build, load, open_bundle, presence
from perceiver_export.runtimes.certificates import engine_of, may_be, precision_of
from perceiver_export.runtimes.engines import openvino
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, Source
from perceiver_export.runtimes.engines.openvino_engine import OpenvinoEngine
from perceiver_export.runtimes.errors import BuildError, BundleError, DeviceError
from perceiver_export.runtimes.manifest import TensorSpec
from tests.conftest import REPOSITORY
from tests.runtimes.built_engines import files_of_at_most
from tests.runtimes.products import UNIT_ROUNDOFF, multiplied_in, open_product, write_chain, write_product
from tests.runtimes.targets import needs_openvino

pytestmark = needs_openvino


@pytest.fixture(scope="module")
def ones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_product(tmp_path_factory.mktemp("ones") / "ones.onnx", 64, np.eye(64, dtype=np.float32))


def test_an_fp32_bundle_is_computed_in_fp32_even_where_the_cpu_prefers_bf16(fashion_bundle: Path) -> None:
    with np.load(fashion_bundle / "golden.npz") as golden, load(fashion_bundle, "openvino-cpu") as runtime:
        found, expected = runtime.run({"image": golden["input/image"]})["logits"], golden["output/logits"]
        assert runtime.describe()["arithmetic"] == "fp32"

    assert np.abs(found - expected).max() < 1e-5 * np.abs(expected).max()  # as `export` demands it of the graph


@pytest.mark.parametrize("precision", get_args(Precision))
@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_an_engine_computes_in_what_it_says(ones: Path, target: str, precision: Precision) -> None:
    try:
        engine = open_product(ones, target, precision)
    except DeviceError:
        assert precision != "fp32"
        assert target == "ort-cpu" or precision == "bf16"
        return

    assert engine.describe()["arithmetic"] == multiplied_in(engine)
    assert precision == "fp16" or multiplied_in(engine) == precision


def test_fp16_on_a_cpu_without_its_arithmetic_is_computed_in_fp32() -> None:
    command = [sys.executable, "-m", "tests.runtimes.products", "openvino-cpu", "fp16"]
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, cwd=REPOSITORY)

    assert json.loads(done.stdout) == ["fp32", "fp32"]


@pytest.mark.parametrize("precision", get_args(Precision))
def test_products_are_as_exact_as_what_they_are_computed_in(tmp_path: Path, precision: Precision) -> None:
    """Operands and the product are rounded to that precision once each, weights are kept in what was asked for, and
    sums are fp32: with K terms and none that is negative (Higham, Accuracy and Stability, 3.1), every answer is within
    (1 + u)³ (1 + γ_K) − 1 of the exact one, γ_K = K v / (1 − K v), u and v the unit roundoffs of precision and fp32.
    """
    rng, terms = np.random.default_rng(0), 512
    x = rng.uniform(0.5, 1, (8, terms)).astype(np.float32)
    weight = rng.uniform(0.5, 1, (terms, terms)).astype(np.float32)
    try:
        engine = open_product(write_product(tmp_path / "product.onnx", 8, weight), "openvino-cpu", precision)
    except DeviceError:
        assert precision == "bf16"
        return
    kept = weight.astype(np.float16) if precision == "fp16" else weight
    exact = x.astype(np.float64) @ kept.astype(np.float64)
    unit, sums = UNIT_ROUNDOFF[engine.describe()["arithmetic"]], terms * UNIT_ROUNDOFF["fp32"]

    bound = (1 + unit) ** 3 * (1 + sums / (1 - sums)) - 1
    assert (np.abs(engine.run({"x": x})["y"] - exact) / exact).max() <= bound


def test_bf16_keeps_a_shared_weight_once(tmp_path: Path) -> None:
    """OpenVINO 2026.4 transposed and converted it at each use: a Perceiver with shared blocks took 2.4 × the memory."""
    weight = np.random.default_rng(0).normal(size=(256, 256)).astype(np.float32) / 16
    path = write_chain(tmp_path / "chain.onnx", 64, weight, (False,) * 8)
    try:
        engine = open_product(path, "openvino-cpu", "bf16")
    except DeviceError:
        return
    assert isinstance(engine, OpenvinoEngine)
    layers = [node.get_rt_info()["layerType"].astype(str) for node in engine._compiled.get_runtime_model().get_ops()]
    x = np.random.default_rng(1).normal(size=(64, 256)).astype(np.float32)
    expected = x
    for _ in range(8):
        expected = np.tanh(expected @ weight)

    assert layers.count("FullyConnected") == 8
    assert layers.count("Transpose") == 0
    assert layers.count("Reorder") <= 2
    assert np.abs(engine.run({"x": x})["y"] - expected).max() <= 8 * 2.0**-7


def test_bf16_multiplies_constant_queries_in_bf16(tmp_path: Path) -> None:
    """OpenVINO 2026.4 by itself multiplies a constant first factor in fp32; integers stay constants."""
    from tests.calibration.onnx_text import write

    rng = np.random.default_rng(0)
    queries, scale = rng.normal(size=(64, 32)).astype(np.float32), np.full((), 0.1, np.float32)
    ends = "(float[32, 128] x) => (float[64, 128] y, float[64, 128] z)"
    body = "half = Mul(q, scale)  y = MatMul(half, x)  q8 = DequantizeLinear(i, scale)  "
    body += "integers = QuantizeLinear(x, scale, zero)  x8 = DequantizeLinear(integers, scale, zero) z = MatMul(q8, x8)"
    constants: dict[str, np.ndarray[Any, Any]] = {
        "q": queries,
        "scale": scale,
        "i": (20 * queries).astype(np.int8),
        "zero": np.zeros((), np.int8),
    }
    path = write(tmp_path / "queries.onnx", f"{ends} {{ {body} }}", 17, **constants)
    x = rng.normal(size=(32, 128)).astype(np.float32)
    x[0, 0] = np.inf
    try:
        engine = open_product(path, "openvino-cpu", "bf16")
    except DeviceError:
        return
    assert isinstance(engine, OpenvinoEngine)
    found, exact = engine.run({"x": x})["y"][:, 1:], 0.1 * queries.astype(np.float64) @ x[:, 1:]
    kernels = {name: kernel.precision for _, kernel in engine.kernels() if kernel.product for name in kernel.names}

    assert kernels["y"] == "bf16"
    assert kernels["z"] == "int8"
    assert np.abs(found - exact).max() <= 2.0**-6 * np.abs(exact).max()


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_weight_used_as_it_is_and_transposed_is_not_confused(tmp_path: Path, precision: Precision) -> None:
    """OpenVINO 2026.4 by itself takes one for the other where the weight is square."""
    weight = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32) / 8
    path = write_chain(tmp_path / "chain.onnx", 8, weight, (False, False, True))
    x = np.random.default_rng(1).normal(size=(8, 64)).astype(np.float32)
    found = open_product(path, "openvino-cpu", precision).run({"x": x})["y"]

    expected = np.tanh(np.tanh(np.tanh(x @ weight) @ weight) @ weight.T)
    assert np.abs(found - expected).max() <= 0.01


def test_weights_alone_are_integers_where_that_was_asked_for(tmp_path: Path) -> None:
    """OpenVINO by itself would round activations to int8 as well, on CPUs with VNNI."""
    rng, terms = np.random.default_rng(0), 512
    x = rng.uniform(0.5, 1, (8, terms)).astype(np.float32)
    weight, scale = rng.integers(1, 128, (terms, 64)).astype(np.int8), np.full(64, 0.01, np.float32)
    engine = open_product(write_product(tmp_path / "product.onnx", 8, weight, scale), "openvino-cpu")
    exact = x.astype(np.float64) @ (weight.astype(np.float64) * scale.astype(np.float64))

    assert engine.describe()["arithmetic"] == "fp32"
    sums = (terms + 3) * UNIT_ROUNDOFF["fp32"]  # scaling a weight and rounding the product are two roundings more
    assert (np.abs(engine.run({"x": x})["y"] - exact) / exact).max() <= sums / (1 - sums)


def test_fp16_halves_the_weights(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).normal(size=(512, 512)).astype(np.float32)
    graph, sizes = write_product(tmp_path / "product.onnx", 8, weight), []
    for precision in ("fp32", "fp16"):
        (tmp_path / precision).mkdir()
        source = Source("openvino-cpu", graph, EngineOptions(precision=precision))
        openvino.compile(source, tmp_path / precision, lambda what, done, total: None)
        sizes.append((tmp_path / precision / "model.blob").stat().st_size)

    assert sizes[0] - sizes[1] > 0.49 * weight.nbytes


def test_engines_that_may_compute_otherwise_have_other_names(ones: Path) -> None:
    flags = {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "32", "ENABLE_CPU_PINNING": "NO"}
    plain = open_product(ones, "openvino-cpu").describe()
    flagged = open_product(ones, "openvino-cpu", flags=flags).describe()
    half = {**plain, "precision": "fp16"}
    names = [engine_of(one) for one in (plain, flagged, {**half, "arithmetic": "fp16"}, half)]
    library = f"openvino {plain['version']}"
    built = [EngineOptions(), EngineOptions(flags=flags), EngineOptions(precision="fp16")]

    assert len(set(names)) == 4
    assert [[may_be(name, library, options) for options in built] for name in names] == [
        [True, False, False], [False, True, False], [False, False, True], [False, False, True],
    ]  # fmt: skip
    assert not any(may_be(name, "openvino 1.0", options) for name in names for options in built)


def test_an_engine_with_half_the_weights_gives_the_same_answer_at_every_call(copied_bundle: Path) -> None:
    """OpenVINO 2026.4 does not, where it compresses a constant that is multiplied from the left."""
    with np.load(copied_bundle / "golden.npz") as golden:
        feeds = {"image": golden["input/image"]}
    (built,) = build(copied_bundle, "openvino-cpu", precision="fp16")
    with load(copied_bundle, "openvino-cpu") as runtime:
        (built.directory / "model.blob").unlink()  # weights may still lie in its memory
        first = runtime.run(feeds)["logits"]
        for outputs in runtime.stream([feeds] * 6):
            np.testing.assert_array_equal(first, outputs["logits"])


def test_the_engine_that_was_asked_for_last_is_taken_and_a_named_precision_is_kept(copied_bundle: Path) -> None:
    for precision in ("fp16", "fp32", "fp16"):
        (built,) = build(copied_bundle, "openvino-cpu", precision=precision)
    with load(copied_bundle, "openvino-cpu") as last, load(copied_bundle, "openvino-cpu", precision="fp32") as named:
        described = last.describe()
        assert named.describe()["precision"] == "fp32"

    assert (described["precision"], described["compiled"]) == ("fp16", str(built.directory))
    assert precision_of(engine_of(described)) == "fp16"


def test_a_throughput_hint_is_kept_by_the_engine(copied_bundle: Path) -> None:
    (built,) = build(copied_bundle, "openvino-cpu", hint="throughput")

    with load(copied_bundle, "openvino-cpu", hint="throughput") as runtime:
        described = runtime.describe()
    assert (described["hint"], described["compiled"]) == ("throughput", str(built.directory))


def test_outputs_that_overflow_are_refused_where_that_is_asked_for(fashion_bundle: Path) -> None:
    image = (3e38 * np.sign(np.random.default_rng(0).normal(size=(1, 3, 28, 28)))).astype(np.float32)

    with load(fashion_bundle, "openvino-cpu") as runtime:
        assert not np.isfinite(runtime.run({"image": image})["logits"]).all()
    with load(fashion_bundle, "openvino-cpu", check_finite=True) as strict, pytest.raises(DeviceError, match="logits"):
        strict.run({"image": image})


@pytest.mark.parametrize("device", ["openvino-gpu", "openvino-npu"])
def test_a_device_that_is_not_here_is_refused(fashion_bundle: Path, device: str) -> None:
    with pytest.raises(DeviceError, match="OpenVINO finds no"):
        load(fashion_bundle, device)


def test_an_npu_computes_in_fp16_and_auto_takes_it_only_for_that(
    fashion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    npu, bundle = "openvino-npu", open_bundle(fashion_bundle)
    found = {npu: presence.Presence(presence.Device(npu, "an NPU", "openvino"))}
    monkeypatch.setattr(presence, "presence", lambda target: found.get(target.name, presence.Presence(None, "absent")))
    monkeypatch.setattr(presence, "_worth_asking", lambda target: True)

    assert [presence.choose_target(bundle, precision) for precision in (None, "fp32", "auto")] == ["ort-cpu"] * 3
    assert presence.choose_target(bundle, "fp16") == npu
    named = [Source(npu, Path("model.onnx"), precision=precision).compiled_precision for precision in ("fp32", "int8")]
    assert named == ["fp16", "int8 with fp16"]


def test_a_graph_that_cannot_be_read_is_a_broken_bundle(tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(b"\x08\x0a garbage")

    with pytest.raises(BundleError, match="cannot be loaded"):
        openvino.open(Source("openvino-cpu", tmp_path / "cut.onnx"), None, None)
    with pytest.raises(BundleError, match="does not exist"):
        openvino.open(Source("openvino-cpu", tmp_path / "none.onnx"), None, None)


@pytest.fixture(params=[1, None], ids=["one thread", "all threads"])
def product(tmp_path: Path, request: pytest.FixtureRequest) -> OpenvinoEngine:
    """Two matrices whose sizes only meet at run time."""
    from tests.calibration.onnx_text import write

    write(tmp_path / "product.onnx", "(float[m, k] a, float[n, p] b) => (float[m, p] c) { c = MatMul(a, b) }")
    spec = TensorSpec("a", "float32", ("m", "k"))
    source = Source("openvino-cpu", tmp_path / "product.onnx", EngineOptions(), inputs=(spec,))
    return openvino.open(source, None, request.param)


def test_an_inference_that_fails_raises_and_the_next_one_works(product: OpenvinoEngine) -> None:
    good = {"a": np.ones((2, 3), np.float32), "b": np.ones((3, 4), np.float32)}
    out = {"c": np.empty((2, 4), np.float32)}

    for wrong in ({**good, "b": np.ones((5, 4), np.float32)}, {**good, "a": np.ones((2, 3, 4), np.float32)}):
        with pytest.raises(DeviceError, match="inference failed"):
            product.run(wrong)
        np.testing.assert_array_equal(np.full((2, 4), 3, np.float32), product.run(good)["c"])
    product.run(good, out)
    np.testing.assert_array_equal(np.full((2, 4), 3, np.float32), out["c"])


def test_a_full_temporary_directory_is_said(copied_bundle: Path) -> None:
    """Halved weights are written there; the kernel writes no more than 10 kB to a file."""
    with files_of_at_most(10_000), pytest.raises(BuildError) as raised:
        build(copied_bundle, "openvino-cpu", precision="fp16")
    assert "TMPDIR" in raised.value.hint
