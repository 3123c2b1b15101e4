# SPDX-License-Identifier: Apache-2.0
"""TensorRT on a real GPU: `make test-gpu`. Nobody has run these yet; where there is no GPU they skip.

They need a driver, `tensorrt` or `tensorrt-rtx`, and for the rewriting of graphs onnx-ir, unless PERCEIVER_TEST_BUNDLE
names a bundle that has them.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import Runtime, build, load, open_bundle
from perceiver_export.runtimes.engines.backend import TARGETS
from perceiver_export.runtimes.engines.cuda import cuda_gpus
from perceiver_export.runtimes.errors import BundleError, EngineError
from tests.fuzz.loads import differing_answers

pytestmark = pytest.mark.skipif(not cuda_gpus(), reason="no NVIDIA GPU here; `make test-gpu` runs these on one")


@pytest.fixture(params=["tensorrt", "tensorrt-rtx"], scope="module")
def target(request: pytest.FixtureRequest) -> str:
    if not TARGETS[request.param].version():
        pytest.skip(f"{request.param} is not installed here")
    return str(request.param)


@pytest.fixture(params=["fp32", "fp16"], scope="module")
def built(
    request: pytest.FixtureRequest, target: str, fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    copy = Path(shutil.copytree(fashion_bundle, tmp_path_factory.mktemp("gpu") / "fashion"))
    if not any(key.endswith(request.param) for key in open_bundle(copy).manifest.parts["model"].lowered):
        from perceiver_export.calibration.lowering.tensorrt import lower_bundle

        lower_bundle(copy, request.param)
    build(copy, target, precision=request.param)
    return copy


@pytest.fixture
def runtime(built: Path, target: str) -> Runtime:
    return load(built, target)


@pytest.fixture
def feeds(golden: dict[str, Any]) -> dict[str, Any]:
    return {"image": golden["image"]}


def test_answers_are_those_of_torch(runtime: Runtime, golden: dict[str, Any], feeds: dict[str, Any]) -> None:
    expected = golden["logits"]
    difference = np.abs(runtime.run(feeds)["logits"] - expected).max() / np.abs(expected).max()

    assert difference < (1e-4 if runtime.describe()["precision"] == "fp32" else 2e-2)


def test_replayed_runs_give_the_same_numbers(runtime: Runtime, feeds: dict[str, Any]) -> None:
    first, *others = [runtime.run(feeds)["logits"] for _ in range(5)]

    for other in others:
        np.testing.assert_array_equal(other, first)
    assert runtime.describe()["cuda_graph"]


def test_callers_at_once_get_their_own_answers(runtime: Runtime) -> None:
    assert differing_answers(runtime, threads=4, calls=20) == 0


def test_submitted_runs_finish_and_out_is_written(runtime: Runtime, feeds: dict[str, Any]) -> None:
    expected = runtime.run(feeds)["logits"]
    futures = [runtime.submit(feeds) for _ in range(8)]
    out = {"logits": np.empty_like(expected)}
    runtime.run(feeds, out=out)

    for future in futures:
        np.testing.assert_array_equal(future.result(60)["logits"], expected)
    np.testing.assert_array_equal(out["logits"], expected)


def test_an_engine_that_is_cut_in_half_is_refused(built: Path, target: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(built, tmp_path / "cut"))
    for engine in copy.glob("engines/*/*/model.engine"):
        engine.write_bytes(engine.read_bytes()[: engine.stat().st_size // 2])

    with pytest.raises((BundleError, EngineError)):
        load(copy, target)
