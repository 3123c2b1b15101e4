# SPDX-License-Identifier: Apache-2.0
"""What only the ONNX Runtime backend does: its errors told apart, its own fallback, memory options of large plans."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnxruntime
import pytest

from perceiver_export.runtimes import Runtime, build, load_onnx
from perceiver_export.runtimes.engines import ort
from perceiver_export.runtimes.engines.backend import EngineOptions, Source
from perceiver_export.runtimes.errors import BundleError, DeviceError
from perceiver_export.runtimes.manifest import MemoryPlan

CALLS: dict[str, Callable[[Runtime, dict[str, Any]], Any]] = {
    "run": lambda runtime, feeds: runtime.run(feeds),
    "out": lambda runtime, feeds: runtime.run(feeds, out={"y": np.empty((), np.float32)}),
    "submit": lambda runtime, feeds: runtime.submit(feeds).result(timeout=60),
}


@pytest.fixture(scope="module")
def four_tebibytes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small graph whose run needs more memory than there is."""
    pytest.importorskip("onnx")  # not where the runtime alone is tested
    from tests.calibration.onnx_text import write

    body = """(float[1] x) => (float y)
        { large = Expand(x, shape)  shares = Softmax(large)  y = ReduceSum<keepdims = 0>(shares) }"""
    return write(tmp_path_factory.mktemp("graphs") / "large.onnx", body, 17, shape=np.array([2**20, 2**20]))


@pytest.mark.parametrize("call", CALLS)
def test_a_run_without_memory_is_no_damaged_file(four_tebibytes: Path, call: str) -> None:
    with load_onnx(four_tebibytes) as runtime, pytest.raises(DeviceError, match=r"inference failed: .*alloc") as caught:
        CALLS[call](runtime, {"x": np.ones(1, np.float32)})

    assert "damaged" not in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint == "free memory, or export with a smaller --memory-budget"


def test_a_flag_that_onnxruntime_refuses_is_named_and_nothing_falls_back(
    copied_bundle: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DeviceError, match="--") as caught:
        build(copied_bundle, "ort-cpu", flags={"session.intra_op_thread_affinities": "--"})

    assert caught.value.hint == "omit --flag session.intra_op_thread_affinities"
    assert capfd.readouterr() == ("", "")


def test_a_damaged_graph_below_a_directory_named_write_is_no_full_disk(tmp_path: Path) -> None:
    directory = tmp_path / "writer" / "engine"
    directory.mkdir(parents=True)
    graph = tmp_path / "writer" / "model.onnx"
    graph.write_bytes(b"no graph")

    with pytest.raises(BundleError, match=r"model\.onnx cannot be loaded"):
        ort.compile(Source("ort-cpu", graph), directory, lambda what, done, total: None)


@pytest.mark.parametrize(("peak", "kept"), [(2**24, False), (2**24 - 1, True), (None, True)])
def test_a_large_plan_has_memory_given_back_at_once(peak: int | None, kept: bool) -> None:
    plan = None if peak is None else MemoryPlan(budget=2**29, peak=peak, stages=())
    source = Source("ort-cpu", Path("model.onnx"), EngineOptions(), plan=plan)
    options = ort._session_options(onnxruntime, source, None)

    assert (options.enable_mem_pattern, options.enable_mem_reuse) == (kept, kept)


def test_cuda_computes_fp32_in_fp32_and_not_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    session = mock.Mock(**{"get_providers.return_value": ["CUDAExecutionProvider"]})
    session.get_inputs.return_value = session.get_outputs.return_value = []
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    opened = mock.Mock(return_value=session)
    monkeypatch.setattr(onnxruntime, "InferenceSession", opened)
    ort.open(Source("ort-cuda", Path("model.onnx")), None, None)

    assert list(opened.call_args.args[2:]) == [["CUDAExecutionProvider"], [{"use_tf32": "0"}]]


def test_a_model_of_compiled_nodes_is_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")  # not where the runtime alone is tested
    model = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17, "com.microsoft" : 1]> compiled (float[1] x) => (float[1] y)'
        '{ y = com.microsoft.EPContext <embed_mode = 1, ep_cache_context = "", source = "Abacus"> (x) }'
    )
    onnx.save(model, tmp_path / "compiled.onnx")

    with pytest.raises((BundleError, DeviceError), match="EPContext"):
        load_onnx(tmp_path / "compiled.onnx")
