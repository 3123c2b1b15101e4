# SPDX-License-Identifier: Apache-2.0
"""The builder against the API of five versions of TensorRT's bindings: what is not in one is not touched; and the
table of what each version can do.
"""

from __future__ import annotations

import _thread
import json
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Progress, Source
from perceiver_export.runtimes.engines.tensorrt_build import LayerReport, build_engine
from perceiver_export.runtimes.engines.tensorrt_versions import TABLE, capabilities
from perceiver_export.runtimes.errors import BuildError, BundleError, DeviceError, MissingDependencyError
from perceiver_export.runtimes.manifest import TensorSpec
from tests.runtimes.fake_networks import RANGED, VERSIONS, X, Y, inspector, made, network, no_cuda
from tests.runtimes.fake_tensorrt import Fake, FakeModule, layer, tensor


def build(
    module: FakeModule, directory: Path, progress: Progress = lambda what, done, total: None, **options: Any
) -> LayerReport:
    graph = directory / "model.onnx"
    graph.write_bytes(b"")
    inputs = options.pop("inputs", (X,))
    source = Source("tensorrt", graph, EngineOptions(**{"precision": "fp16", **options}), inputs=inputs, outputs=(Y,))
    here = Platform("tensorrt", module.__version__, "NVIDIA Orin (sm_87)")
    can = capabilities("tensorrt", module.__version__)
    return build_engine(module, can, here, source, directory, progress)


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
    # An int8 weight and a constant in 16 bits of 64 numbers, of which two nodes take the second one thrice.
    assert (report.weight_bytes, report.bytes_each_use) == (64 * 3, 64 * (1 + 2 * 3))
    assert "profile x ((1, 3), (2, 3), (4, 3))" in module._calls
    assert "set_memory_pool_limit('MemoryPoolType.WORKSPACE', 536870912)" in module._calls
    # Precision is in the graph.
    assert not any(call.startswith("set_flag") or ".precision" in call for call in module._calls)
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
        (inspector(linear="Half"), "linear/MatMul_1: int8 requested, fp16 found"),
        (inspector(attention="Float"), "attention/MatMul_1: fp16 requested, fp32 found"),
        (inspector(attention="BFloat16"), "attention/MatMul_1: fp16 requested, bf16 found"),
        (inspector(last="Half"), "attention/MatMul_2:fp32: fp32 requested, fp16 found"),
        (inspector(attention="Int8"), "attention/MatMul_1: fp16 requested, int8 found"),
        ("not json", "linear/MatMul_1: int8 requested, nothing found"),
        ('{"Layers": ["linear/MatMul_1"]}', "linear/MatMul_1: int8 requested, nothing found"),
    ],
)
def test_another_precision_than_was_asked_for_fails_the_build(
    version: str, report: str, named: str, tmp_path: Path
) -> None:
    with pytest.raises(BuildError) as raised:
        build(made(version, report), tmp_path)

    assert named in raised.value.message
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize("kind", ["Reformat", "NoOp"])
def test_a_kernel_that_only_moves_numbers_is_no_proof_of_a_products_precision(kind: str, tmp_path: Path) -> None:
    report = json.loads(inspector(linear="Half"))
    moved = {**report["Layers"][0], "LayerType": kind, "Name": "Reformatting CopyNode for Input Tensor 0"}
    moved["Inputs"] = [{"Name": "a", "Format/Datatype": "Row major Int8 format"}]
    report["Layers"].append(moved)

    with pytest.raises(BuildError, match="linear/MatMul_1: int8 requested, fp16 found"):
        build(made("10.3.0", json.dumps(report)), tmp_path)


@pytest.mark.parametrize("attention", ["Half", "Float"])
def test_a_kernel_that_cuts_what_an_attention_gave_does_not_stand_for_its_products(
    attention: str, tmp_path: Path
) -> None:
    """TensorRT for RTX pads heads of 12, and slices them as the int8 that the next product takes."""
    report = json.loads(inspector(attention=attention))
    cut = {**report["Layers"][1], "LayerType": "kgen", "Name": "__myl_SlicMoveReshTran_myl0_19"}
    cut["Inputs"] = [{"Name": "a", "Format/Datatype": "Row major Int8 format"}]
    report["Layers"].append(cut)
    module = made("10.3.0", json.dumps(report))

    if attention == "Half":
        assert build(module, tmp_path).precisions == {"int8": 1, "fp16": 1, "fp32": 1}
    else:
        with pytest.raises(BuildError, match="attention/MatMul_1: fp16 requested, fp32 found"):
            build(module, tmp_path)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_graph_of_another_precision_is_refused_before_compiling(version: str, tmp_path: Path) -> None:
    module = FakeModule(version, network("float32"), inspector())

    with pytest.raises(BuildError, match=r"the build is fp16, but the products of model\.onnx are fp32") as raised:
        build(module, tmp_path)

    assert "--lower-only" in raised.value.hint
    assert "Builder.build_serialized_network" not in module._calls


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
@pytest.mark.parametrize("made_for", ["Builder", "Runtime"])
def test_cuda_that_does_not_start_is_an_error_of_the_device(version: str, made_for: str, tmp_path: Path) -> None:
    """As with a driver that is too old for this TensorRT: its bindings have nothing but a null pointer then."""
    module = made(version)
    setattr(module, made_for, no_cuda)

    with pytest.raises(DeviceError, match="does not start: CUDA initialization failure with error: 35") as raised:
        build(module, tmp_path)

    assert "newer driver" in raised.value.hint
    assert not (tmp_path / "model.engine").exists()


@pytest.mark.parametrize("version", VERSIONS)
def test_too_little_workspace_is_told_apart(version: str, tmp_path: Path) -> None:
    problem = "Could not find any implementation for node {ForeignNode[x]} due to insufficient workspace."
    module = made(version, problems=(problem,), build=lambda config: None)

    with pytest.raises(BuildError, match="insufficient workspace") as raised:
        build(module, tmp_path, flags={"workspace": "1KiB"})

    assert "--flag workspace=" in raised.value.hint


@pytest.mark.parametrize(
    "flags", [{"workspace": "0"}, {"workspace": "9999999999GiB"}], ids=lambda flags: " ".join(flags.values())[:20]
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
@pytest.mark.parametrize("version", VERSIONS)
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

    with pytest.raises(KeyboardInterrupt):
        build(made(version, build=compile_slowly), tmp_path, lambda *what: told.append(what))

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


@pytest.mark.parametrize(("version", "row"), [("10.7.0", (10, 3)), ("10.13.3.9", (10, 13)), ("11.5.0", (11, 0))])
def test_a_version_takes_the_row_at_or_below_it(version: str, row: tuple[int, int]) -> None:
    found = capabilities("tensorrt", version)

    assert found.since == row
    assert found.name == f"TensorRT {'.'.join(version.split('.')[:2])}"


@pytest.mark.parametrize(
    ("library", "version"),
    [
        *(("tensorrt", version) for version in ("8.6.1", "9.2", "10.2.0", "7.1.3", "12.0", "", "ten")),
        ("tensorrt-rtx", "10.3"),
    ],
)
def test_versions_that_are_not_supported_are_refused(library: str, version: str) -> None:
    with pytest.raises(DeviceError, match=re.escape(f"{library} {version} is not supported")):
        capabilities(library, version)


def test_every_row_of_the_table_is_sorted_and_grows() -> None:
    rows = [row for row in TABLE if row.library == "tensorrt"]

    assert [row.since for row in rows] == sorted(row.since for row in rows)
    assert [row.opset for row in rows] == sorted(row.opset for row in rows)
