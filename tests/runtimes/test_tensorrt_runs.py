# SPDX-License-Identifier: Apache-2.0
"""Running engines, against the API of TensorRT's bindings and a driver that is numpy: what is not in one is not
touched.
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, Source
from perceiver_export.runtimes.engines.cuda import Cuda
from perceiver_export.runtimes.engines.tensorrt_engine import TensorrtEngine
from perceiver_export.runtimes.errors import DeviceError, EngineError
from perceiver_export.runtimes.manifest import TensorSpec
from perceiver_export.runtimes.runtime import Runtime
from tests.runtimes.fake_cuda import FakeMemory
from tests.runtimes.fake_networks import RANGED, RTX, VERSIONS, X, Y, made, no_cuda
from tests.runtimes.fake_tensorrt import FakeModule

ALL = (*VERSIONS, RTX)


def target(version: str) -> str:
    return "tensorrt-rtx" if version == RTX else "tensorrt"


def opened(
    version: str, path: Path, memory: FakeMemory, specs: tuple[TensorSpec, TensorSpec] = (X, Y), **options: Any
) -> TensorrtEngine:
    path.write_bytes(b"engine")
    return loaded(made(version, memory=memory), path, memory, specs, **options)


def loaded(
    module: FakeModule, path: Path, memory: FakeMemory, specs: tuple[TensorSpec, TensorSpec] = (X, Y), **options: Any
) -> TensorrtEngine:
    library = target(module.__version__)
    source = Source(library, path, EngineOptions(precision="fp16", **options), inputs=specs[:1], outputs=specs[1:])
    return TensorrtEngine(
        module, Platform(library, module.__version__, "NVIDIA Orin (sm_87)"), source, path, Cuda(memory)
    )


@pytest.mark.parametrize("version", ALL)
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
    out = {"y": np.zeros((2, 3), np.float32)}
    engine.run({"x": np.ones((2, 3), np.float32)}, out)
    np.testing.assert_array_equal(out["y"], 2)


def test_flags_are_described_because_certificates_name_them(tmp_path: Path) -> None:
    flags = {"optimization_level": "4"}
    assert opened("10.3.0", tmp_path / "engine", FakeMemory(), flags=flags).describe()["flags"] == flags
    assert "flags" not in opened("10.3.0", tmp_path / "engine", FakeMemory()).describe()


@pytest.mark.parametrize("version", ALL)
def test_named_dimensions_are_set_and_not_replayed(version: str, tmp_path: Path) -> None:
    specs = (TensorSpec("x", "float32", ("batch", 3), "", RANGED), TensorSpec("y", "float32", ("batch", 3), "", RANGED))
    memory = FakeMemory()
    engine = opened(version, tmp_path / "engine", memory, specs, shapes={"batch": (1, 1, 4)})

    for batch in (1, 4, 2):
        x = np.arange(3 * batch, dtype=np.float32).reshape(batch, 3)
        np.testing.assert_array_equal(engine.run({"x": x})["y"], 2 * x)
    assert "cuGraphLaunch" not in memory.calls


def test_callers_at_once_have_streams_of_their_own_also_where_the_driver_records_no_graphs(tmp_path: Path) -> None:
    memory = FakeMemory(graphs=False)
    engine = opened("10.3.0", tmp_path / "engine", memory)

    def call(value: float) -> None:
        for _ in range(50):
            np.testing.assert_array_equal(engine.run({"x": np.full((2, 3), value, np.float32)})["y"], 2 * value)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(call, range(4)))

    assert not engine.describe()["cuda_graph"]
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


@pytest.mark.parametrize("version", ALL)
def test_an_engine_that_is_cut_in_half_is_refused(version: str, tmp_path: Path) -> None:
    path = tmp_path / "engine"
    path.write_bytes(b"eng")

    with pytest.raises(EngineError, match="Magic tag does not match") as raised:
        loaded(made(version), path, FakeMemory())

    assert raised.value.hint.endswith(f"build {tmp_path} --target {target(version)} --precision fp16 --force")


@pytest.mark.parametrize("version", ALL)
def test_cuda_that_does_not_start_is_an_error_of_the_device(version: str, tmp_path: Path) -> None:
    path, module = tmp_path / "engine", made(version)
    path.write_bytes(b"engine")
    setattr(module, "Runtime", no_cuda)  # noqa: B010

    with pytest.raises(DeviceError, match="does not start: CUDA initialization failure with error: 35") as raised:
        loaded(module, path, FakeMemory())

    assert "newer driver" in raised.value.hint


def test_submitted_runs_have_streams_of_their_own(tmp_path: Path) -> None:
    memory = FakeMemory()
    runtime = Runtime(opened("10.3.0", tmp_path / "engine", memory), (X,), (Y,), "fp32")
    memory.running.clear()  # the first one goes on until the second has begun
    first, second = (runtime.submit({"x": np.full((2, 3), value, np.float32)}) for value in (1, 2))
    while memory.calls.count("cuStreamSynchronize") < 2:
        time.sleep(0.001)
    assert not first.done()
    memory.running.set()

    assert [future.result(60)["y"][0, 0] for future in (first, second)] == [2, 4]
    assert memory.calls.count("cuStreamCreate") == 2
    runtime.close()


def test_an_engine_of_another_model_is_refused(tmp_path: Path) -> None:
    other = TensorSpec("latents", "float32", (2, 3))

    with pytest.raises(EngineError, match="the engine has the tensors x, y, but the bundle latents, y"):
        opened("10.3.0", tmp_path / "engine", FakeMemory(), (other, Y))


def test_kernels_that_rtx_compiled_are_kept_for_the_next_load(tmp_path: Path, own_cache: Path) -> None:
    path, kernels = tmp_path / "key" / "model.engine", own_cache / "perceiver-export" / "kernels" / "key.cache"
    path.parent.mkdir()
    path.write_bytes(b"engine")
    calls = []
    for stored in (None, None, b"of another GPU"):
        if stored:
            kernels.write_bytes(stored)
        memory = FakeMemory()
        module = made(RTX, memory=memory)
        engine = loaded(module, path, memory)
        assert "IRuntimeCache.serialize" not in module._calls  # nothing is compiled before the first run
        for _ in range(3):
            engine.run({"x": np.ones((2, 3), np.float32)})
        calls.append(module._calls)
        assert kernels.read_bytes() == b"kernels"
        assert [file.name for file in kernels.parent.iterdir()] == ["key.cache"]

    assert [[call for call in one if call.startswith("kernels of")] for one in calls] == [
        [],
        ["kernels of 7 bytes"],
        ["kernels of 14 bytes"],
    ]
    assert all(one.count("IRuntimeCache.serialize") == 1 for one in calls)
    assert all("IRuntimeConfig.set_runtime_cache" in one for one in calls)


def test_kernels_that_cannot_be_written_are_compiled_again(tmp_path: Path, own_cache: Path) -> None:
    (own_cache / "perceiver-export").write_text("not a directory")
    engine = opened(RTX, tmp_path / "engine", FakeMemory())

    assert engine.run({"x": np.ones((2, 3), np.float32)})["y"][0, 0] == 2
