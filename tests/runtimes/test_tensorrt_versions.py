# SPDX-License-Identifier: Apache-2.0
"""Builder and runtime against the API of five versions of TensorRT's bindings: what is not in one is not touched."""

from __future__ import annotations

import _thread
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.engines import tensorrt_build
from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Source
from perceiver_export.runtimes.engines.cuda_memory import Cuda
from perceiver_export.runtimes.engines.tensorrt_build import build_engine
from perceiver_export.runtimes.engines.tensorrt_capabilities import capabilities, table
from perceiver_export.runtimes.engines.tensorrt_engine import TensorrtEngine
from perceiver_export.runtimes.errors import (
    BuildError,
    BundleError,
    DeviceError,
    EngineError,
    MissingDependencyError,
)
from perceiver_export.runtimes.manifest import TensorSpec
from tests.runtimes.fake_tensorrt import API, Fake, FakeMemory, FakeModule, layer, tensor

VERSIONS = tuple(API)
STRONG = tuple(version for version in VERSIONS if not version.startswith("8."))
X, Y = TensorSpec("x", "float32", (2, 3)), TensorSpec("y", "float32", (2, 3))
RANGED = {"batch": (1, 4)}


def network(half: str) -> Callable[[FakeModule], list[Fake]]:
    """A normalization, an int8 product, a product of activations of type ``half``, one that overflows, an index that is
    computed beside it, and a product of constants, which no engine has a kernel for.
    """

    def layers(module: FakeModule) -> list[Fake]:
        types = (half, "int8", half, "int8", half, half, "float32", half, half, half, "int32")
        x, q, d, w, wd, y, z, c, sums, product, row = (
            tensor(module, name, dtype)
            for name, dtype in zip(
                ["x", "q", "d", "w", "e", "y", "z", "c", "sums", "product", "row"], types, strict=True
            )
        )
        return [
            layer(module, "NORMALIZATION", "norm", [x], x),
            layer(module, "QUANTIZE", "x/Quantize", [x], q),
            layer(module, "DEQUANTIZE", "x/Dequantize", [q], d),
            layer(module, "CONSTANT", "w", [], w),
            layer(module, "DEQUANTIZE", "w/Dequantize", [w], wd),
            layer(module, "MATRIX_MULTIPLY", "linear/MatMul_1", [d, wd], y),
            layer(module, "MATRIX_MULTIPLY", "attention/MatMul_1", [y, x], y),
            layer(module, "SOFTMAX", "attention/Softmax_1", [y], y),
            layer(module, "MATRIX_MULTIPLY", "attention/MatMul_2:fp32", [z, z], z),
            layer(module, "CAST", "row/Cast:fp32", [z], row),
            layer(module, "CONSTANT", "c", [], c),
            layer(module, "CONCATENATION", "c/Concat", [c, c], sums),
            layer(module, "MATRIX_MULTIPLY", "constants/MatMul", [sums, c], product),
        ]

    return layers


def inspector(linear: str = "Int8", attention: str = "Half", last: str = "Float") -> str:
    """What TensorRT's inspector gives of that network."""
    found = {"linear/MatMul_1": linear, "attention/MatMul_1": attention, "attention/MatMul_2:fp32": last}
    layers = [
        {
            "Name": name,
            "LayerType": "gemm",
            "Inputs": [{"Name": "a", "Format/Datatype": f"Row major linear {dtype}"}],
            "Outputs": [],
            "Metadata": f"[ONNX Layer: {name}]",
        }
        for name, dtype in found.items()
    ]
    return json.dumps({"Layers": layers})


def build(module: FakeModule, directory: Path, **options: Any) -> tensorrt_build.LayerReport:
    graph = directory / "model.onnx"
    graph.write_bytes(b"")
    inputs = options.pop("inputs", (X,))
    source = Source("tensorrt", graph, EngineOptions(**{"precision": "fp16", **options}), inputs=inputs, outputs=(Y,))
    here = Platform("tensorrt", module.__version__, "NVIDIA Orin (sm_87)")
    can = capabilities("tensorrt", module.__version__)
    return build_engine(module, can, here, source, directory, lambda what, done, total: None)


def made(version: str, report: str | None = None, **more: Any) -> FakeModule:
    return FakeModule(version, network("float16"), inspector() if report is None else report, **more)


@pytest.mark.parametrize("version", VERSIONS)
def test_every_version_builds_with_nothing_that_it_lacks(version: str, tmp_path: Path) -> None:
    module = made(version)

    report = build(
        module,
        tmp_path,
        shapes={"batch": (1, 2, 4)},
        inputs=(TensorSpec("x", "float32", ("batch", 3), "", RANGED),),
        flags={"workspace": "512MiB", "optimization_level": "4"},
    )

    assert (tmp_path / "model.engine").read_bytes() == b"engine"
    assert report.precisions == {"int8": 1, "fp16": 1, "fp32": 1}
    assert report.int8_products == 1
    assert "profile x ((1, 3), (2, 3), (4, 3))" in module._calls
    assert "set_memory_pool_limit('MemoryPoolType.WORKSPACE', 536870912)" in module._calls


@pytest.mark.parametrize("version", VERSIONS)
def test_precision_is_in_flags_on_8_and_in_the_graph_from_10_on(version: str, tmp_path: Path) -> None:
    module = made(version)
    build(module, tmp_path)
    flags = [call for call in module._calls if call.startswith("set_flag")]

    if version.startswith("8."):
        assert flags == [
            "set_flag('BuilderFlag.OBEY_PRECISION_CONSTRAINTS',)",
            "set_flag('BuilderFlag.INT8',)",
            "set_flag('BuilderFlag.FP16',)",
        ]
        assert "attention/MatMul_1 has precision float16" in module._calls
        assert "attention/MatMul_2:fp32 has precision float32" in module._calls  # it overflows
        assert "attention/MatMul_2:fp32 gives float32" in module._calls
        assert "row/Cast:fp32 gives float32" not in module._calls  # it gives integers
        assert not any(call.startswith("linear/MatMul_1 has precision") for call in module._calls)  # it is int8
        assert "INormalizationLayer.compute_precision = float32" in module._calls
    else:
        assert flags == []
        assert not any(".precision" in call for call in module._calls)
    created = next(call for call in module._calls if call.startswith("create_network"))
    assert (created == "create_network(0)") == version.startswith("11.")


@pytest.mark.parametrize("version", VERSIONS)
def test_fp32_is_not_tf32(version: str, tmp_path: Path) -> None:
    module = FakeModule(version, network("float32"), inspector(attention="Float"))
    build(module, tmp_path, precision="fp32")

    assert "clear_flag('BuilderFlag.TF32',)" in module._calls


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize(
    ("report", "named"),
    [
        (inspector(linear="Half"), "linear/MatMul_1: int8 asked, fp16 found"),
        (inspector(attention="Float"), "attention/MatMul_1: fp16 asked, fp32 found"),
        (inspector(attention="BFloat16"), "attention/MatMul_1: fp16 asked, bf16 found"),
        (inspector(last="Half"), "attention/MatMul_2:fp32: fp32 asked, fp16 found"),
        (inspector(attention="Int8"), "attention/MatMul_1: fp16 asked, int8 found"),
        ("not json", "linear/MatMul_1: int8 asked, nothing found"),
        ('{"Layers": ["linear/MatMul_1"]}', "linear/MatMul_1: int8 asked, nothing found"),
    ],
)
def test_another_precision_than_was_asked_for_fails_the_build(
    version: str, report: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError) as raised:
        build(made(version, report), tmp_path)

    assert named in raised.value.message
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize("version", STRONG)
def test_a_graph_of_another_precision_is_refused_before_compiling(version: str, tmp_path: Path) -> None:
    module = FakeModule(version, network("float32"), inspector())

    with pytest.raises(BuildError, match=r"fp16 was asked for, and the products of model\.onnx are fp32") as raised:
        build(module, tmp_path)

    assert "--lower-only" in raised.value.hint
    assert "Builder.build_serialized_network" not in module._calls


def test_8_has_no_bf16(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="no bf16"):
        build(made("8.6.1"), tmp_path, precision="bf16")


@pytest.mark.parametrize("version", VERSIONS)
def test_an_operator_that_a_version_lacks_is_named(version: str, tmp_path: Path) -> None:
    def layers(module: FakeModule) -> list[Fake]:
        return [layer(module, "CONSTANT", "unreadable", [], tensor(module, "x", "float16"))]

    with pytest.raises(BundleError, match="No importer registered for op: Gelu") as raised:
        build(FakeModule(version, layers, ""), tmp_path)

    assert "lint" in raised.value.hint


def test_tensorrt_without_its_parser_says_what_to_install(tmp_path: Path) -> None:
    module = made("10.3.0")
    module._api = {**module._api, "module": [name for name in module._api["module"] if name != "OnnxParser"]}

    with pytest.raises(MissingDependencyError, match="no ONNX parser") as raised:
        build(module, tmp_path)

    assert "apt install" in raised.value.hint


@pytest.mark.parametrize("version", VERSIONS)
def test_too_little_workspace_is_told_apart(version: str, tmp_path: Path) -> None:
    problem = "Could not find any implementation for node {ForeignNode[x]} due to insufficient workspace."
    module = made(version, problems=(problem,), build=lambda config: None)

    with pytest.raises(BuildError, match="insufficient workspace") as raised:
        build(module, tmp_path, flags={"workspace": "1KiB"})

    assert "--flag workspace=" in raised.value.hint


@pytest.mark.parametrize(
    "flags", [{"workspace": "much"}, {"workspace": "0"}, {"optimization_level": "6"}, {"speed": "high"}]
)
def test_flags_that_make_no_sense_are_refused(flags: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=next(iter(flags))):
        build(made("10.3.0"), tmp_path, flags=flags)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """Ctrl-C as at a terminal: shells let what runs in the background ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("version", STRONG)
def test_progress_is_told_and_ctrl_c_stops_the_compiler_before_it_is_raised(version: str, tmp_path: Path) -> None:
    told: list[tuple[str, int, int | None]] = []
    steps: list[bool] = []

    def compile_slowly(config: Fake) -> None:
        monitor = config.progress_monitor
        monitor.phase_start("Building", None, 10)
        monitor.phase_start("inner", "Building", 3)
        steps.append(monitor.step_complete("Building", 0))
        _thread.interrupt_main(signal.SIGINT)
        while monitor.step_complete("Building", 1):
            time.sleep(0.001)
        steps.append(False)

    module = made(version, build=compile_slowly)
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"")
    source = Source("tensorrt", graph, EngineOptions(precision="fp16"), inputs=(X,), outputs=(Y,))
    with pytest.raises(KeyboardInterrupt):
        build_engine(
            module,
            capabilities("tensorrt", version),
            Platform("tensorrt", version, "NVIDIA Orin (sm_87)"),
            source,
            tmp_path,
            lambda what, done, total: told.append((what, done, total)),
        )

    assert steps == [True, False]
    assert ("Building", 1, 10) in told
    assert ("stopping", 0, None) in told
    assert not any(what == "inner" for what, _, _ in told)


def test_what_was_measured_is_kept_for_the_next_build(tmp_path: Path, own_cache: Path) -> None:
    first, second, third = made("10.3.0"), made("10.3.0"), made("10.3.0")
    build(first, tmp_path)
    (cache,) = (own_cache / "perceiver-export" / "timing").iterdir()
    build(second, tmp_path)
    cache.write_bytes(b"damaged")
    build(third, tmp_path)

    assert cache.name == "tensorrt-10.3.0-NVIDIA-Orin-sm-87-.cache"
    assert "timing cache of 0 bytes" in first._calls
    assert "timing cache of 8 bytes" in second._calls
    assert third._calls[third._calls.index("timing cache of 7 bytes") :].count("timing cache of 0 bytes") > 0


def opened(
    version: str, path: Path, memory: FakeMemory, specs: tuple[TensorSpec, TensorSpec] = (X, Y), **options: Any
) -> TensorrtEngine:
    path.write_bytes(b"engine")
    source = Source("tensorrt", path, EngineOptions(precision="fp16", **options), inputs=specs[:1], outputs=specs[1:])
    module = FakeModule(version, network("float16"), inspector(), memory=memory)
    return TensorrtEngine(module, Platform("tensorrt", version, "NVIDIA Orin (sm_87)"), source, path, Cuda(memory))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("shared", [False, True], ids=["beside", "shared"])
def test_every_version_runs_and_replays_where_shapes_are_fixed(version: str, shared: bool, tmp_path: Path) -> None:
    memory = FakeMemory(shared)
    engine = opened(version, tmp_path / "engine", memory)
    answers = [engine.run({"x": np.full((2, 3), value, np.float32)})["y"] for value in (1, 2, 3)]

    for value, answer in zip((1, 2, 3), answers, strict=True):
        np.testing.assert_array_equal(answer, np.full((2, 3), 2 * value))
    assert memory.calls.count("cuGraphLaunch") == 2  # the first runs plainly, and is then recorded
    assert ("cuMemcpyHtoDAsync_v2" in memory.calls) == (not shared)
    assert engine.describe()["zero_copy"] == shared
    assert engine.describe()["cuda_graph"]


def test_outputs_go_into_the_callers_arrays(tmp_path: Path) -> None:
    engine = opened("10.3.0", tmp_path / "engine", FakeMemory())
    out = {"y": np.zeros((2, 3), np.float32)}
    engine.run_into({"x": np.ones((2, 3), np.float32)}, out)

    np.testing.assert_array_equal(out["y"], 2)


@pytest.mark.parametrize("version", VERSIONS)
def test_named_dimensions_are_set_and_not_replayed(version: str, tmp_path: Path) -> None:
    specs = (TensorSpec("x", "float32", ("batch", 3), "", RANGED), TensorSpec("y", "float32", ("batch", 3), "", RANGED))
    memory = FakeMemory()
    engine = opened(version, tmp_path / "engine", memory, specs, shapes={"batch": (1, 1, 4)})

    for batch in (1, 4, 2):
        x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)
    assert "cuGraphLaunch" not in memory.calls


def test_a_driver_that_records_no_graphs_runs_plainly(tmp_path: Path) -> None:
    memory = FakeMemory(graphs=False)
    engine = opened("10.3.0", tmp_path / "engine", memory)
    answers = [engine.run({"x": np.full((2, 3), value, np.float32)})["y"][0, 0] for value in (1, 2)]

    assert answers == [2, 4]
    assert not engine.describe()["cuda_graph"]


def test_callers_at_once_have_streams_of_their_own(tmp_path: Path) -> None:
    memory = FakeMemory(graphs=False)
    engine = opened("10.3.0", tmp_path / "engine", memory)
    wrong: list[float] = []

    def call(value: float) -> None:
        for _ in range(50):
            answer = engine.run({"x": np.full((2, 3), value, np.float32)})["y"]
            wrong.extend(answer[answer != 2 * value])

    threads = [threading.Thread(target=call, args=(value,)) for value in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert not wrong
    assert 1 <= memory.calls.count("cuStreamCreate") <= 2


def test_a_caller_without_memory_of_its_own_waits_its_turn(tmp_path: Path) -> None:
    memory = FakeMemory(graphs=False)
    engine = opened("10.3.0", tmp_path / "engine", memory)
    memory.capacity = 8  # too little for another place to run in
    memory.running.clear()
    answers: list[float] = []

    def call(value: float) -> None:
        answers.append(float(engine.run({"x": np.full((2, 3), value, np.float32)})["y"][0, 0]))

    first, second = (threading.Thread(target=call, args=(value,)) for value in (1, 2))
    first.start()
    while "cuStreamSynchronize" not in memory.calls:
        time.sleep(0.001)
    tried = memory.calls.count("cuMemHostAlloc")
    second.start()
    while memory.calls.count("cuMemHostAlloc") == tried:
        time.sleep(0.001)
    assert not engine.describe()["cuda_graph"]  # answered while all is taken
    memory.running.set()
    first.join()
    second.join()

    assert answers == [2, 4]


def test_memory_is_given_back(tmp_path: Path) -> None:
    memory = FakeMemory()
    engine = opened("10.3.0", tmp_path / "engine", memory)
    engine.run({"x": np.ones((2, 3), np.float32)})
    del engine

    for taken, freed in (
        ("cuMemHostAlloc", "cuMemFreeHost"),
        ("cuMemAlloc_v2", "cuMemFree_v2"),
        ("cuStreamCreate", "cuStreamDestroy_v2"),
        ("cuStreamEndCapture", "cuGraphDestroy"),
        ("cuGraphInstantiateWithFlags", "cuGraphExecDestroy"),
    ):
        assert memory.calls.count(taken) == memory.calls.count(freed) > 0


def test_too_little_gpu_memory_is_an_error_of_the_device(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match="CUDA error 2 in cuMemHostAlloc: out of memory") as raised:
        opened("10.3.0", tmp_path / "engine", FakeMemory(capacity=8))

    assert "memory" in raised.value.hint


@pytest.mark.parametrize("version", VERSIONS)
def test_an_engine_that_is_cut_in_half_is_refused(version: str, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    path.write_bytes(b"eng")
    source = Source("tensorrt", path, EngineOptions(), inputs=(X,), outputs=(Y,))
    module = made(version)

    with pytest.raises(EngineError, match="Magic tag does not match") as raised:
        TensorrtEngine(module, Platform("tensorrt", version, "NVIDIA Orin (sm_87)"), source, path, Cuda(FakeMemory()))

    assert "--force" in raised.value.hint


def test_an_engine_of_another_model_is_refused(tmp_path: Path) -> None:
    other = TensorSpec("latents", "float32", (2, 3))

    with pytest.raises(EngineError, match="the engine has the tensors x, y, the bundle latents, y"):
        opened("10.3.0", tmp_path / "engine", FakeMemory(), (other, Y))


@pytest.mark.parametrize(
    ("version", "row"),
    [("8.6.2.3", (8, 6)), ("10.7.0", (10, 3)), ("10.13.3.9", (10, 13)), ("11.5.0", (11, 0))],
)
def test_a_version_takes_the_row_at_or_below_it(version: str, row: tuple[int, int]) -> None:
    found = capabilities("tensorrt", version)

    assert found.since == row
    assert found.name == f"TensorRT {'.'.join(version.split('.')[:2])}"


@pytest.mark.parametrize("version", ["8.5.2", "9.2", "7.1.3", "12.0", "", "ten"])
def test_versions_that_are_not_supported_are_refused(version: str) -> None:
    with pytest.raises(DeviceError, match="is not supported"):
        capabilities("tensorrt", version)


def test_a_version_of_tensorrt_is_none_of_tensorrt_for_rtx() -> None:
    with pytest.raises(DeviceError, match=r"tensorrt-rtx 10\.3 is not supported"):
        capabilities("tensorrt-rtx", "10.3")


def test_every_row_of_the_table_is_sorted_and_grows() -> None:
    rows = [row for row in table() if row.library == "tensorrt"]

    assert [row.since for row in rows] == sorted(row.since for row in rows)
    assert [row.opset for row in rows] == sorted(row.opset for row in rows)
