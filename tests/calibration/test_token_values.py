# SPDX-License-Identifier: Apache-2.0
"""Integers that an input may not hold never reach an engine, whatever road they come by."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import quantize
from perceiver_export.runtimes import Batcher, Runtime, load, open_task
from perceiver_export.runtimes.benchmark import bench
from perceiver_export.runtimes.errors import DataError, InputError
from perceiver_export.runtimes.runtime import Array
from tests.calibration.asked import judged
from tests.cli.commands import fail
from tests.conftest import SmallBundle

LENGTH = 32
WRONG = [("tokens", -1), ("tokens", 262), ("tokens", 2**31 - 1), ("tokens_mask", 2), ("tokens_mask", -1)]


@pytest.fixture(scope="module")
def bundles(small_bundle: SmallBundle) -> dict[str, Path]:
    """One model, whole and split."""
    return {name: small_bundle("language", name == "split") for name in ("whole", "split")}


@pytest.fixture(scope="module", params=["whole", "split"])
def bundle(request: pytest.FixtureRequest, bundles: dict[str, Path]) -> Path:
    return bundles[request.param]


@pytest.fixture(scope="module", params=["ort-cpu", "openvino-cpu"])
def runtime(request: pytest.FixtureRequest, bundle: Path) -> Iterator[Runtime]:
    with load(bundle, request.param) as loaded:
        yield loaded


def feeds(name: str = "", value: int = 0) -> dict[str, Array]:
    given = {"tokens": np.full((1, LENGTH), 100, np.int32), "tokens_mask": np.ones((1, LENGTH), np.int32)}
    if name:
        given[name][0, 3] = value
    return given


def batched(runtime: Runtime, given: dict[str, Array]) -> Future[dict[str, Array]]:
    with Batcher(runtime) as batcher:
        return batcher.submit(given)


ROADS: dict[str, Callable[[Runtime, dict[str, Array]], Any]] = {
    "run": lambda runtime, given: runtime.run(given),
    "out": lambda runtime, given: runtime.run(given, out=runtime.run(feeds())),
    "submit": lambda runtime, given: runtime.submit(given).result(),
    "stream": lambda runtime, given: list(runtime.stream([feeds(), given])),
    "batcher": lambda runtime, given: batched(runtime, given).result(),
}


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(("name", "value"), WRONG)
def test_no_road_to_an_engine_takes_them(road: str, name: str, value: int, runtime: Runtime) -> None:
    with pytest.raises(InputError, match=str(value)):
        ROADS[road](runtime, feeds(name, value))
    assert runtime.run(feeds())["logits"].shape == (1, LENGTH, 262)


@pytest.mark.parametrize("value", [-1, LENGTH])
def test_queries_are_those_of_the_decoder(value: int, bundles: dict[str, Path]) -> None:
    with open_task(bundles["split"], "openvino-cpu") as fill:
        spec = next(spec for spec in fill.part("decoder").inputs if spec.name == "queries")
        count = int(spec.shape[1])
        latents = fill.part("encoder").run(feeds())["latents"]
        with pytest.raises(InputError, match=str(value)):
            fill.part("decoder").run({"latents": latents, "queries": np.full((1, count), value, np.int32)})


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_data_that_holds_them_is_refused_by_sample(name: str, value: int, bundle: Path, tmp_path: Path) -> None:
    good, bad = feeds(), feeds(name, value)
    both: dict[str, Any] = {key: np.concatenate([good[key], bad[key]]) for key in good}
    np.savez(tmp_path / "data.npz", **both)
    before = sorted(path.name for path in tmp_path.iterdir())
    for road in (
        lambda: judged(bundle, tmp_path / "data.npz", device="ort-cpu"),
        lambda: quantize(bundle, tmp_path / "data.npz", tmp_path / "int8"),
    ):
        with pytest.raises(DataError, match=rf"\[1\].*{value}"):
            road()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.fixture(scope="module")
def token_ids(bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as one of token ids, and without arrays that bench could take."""
    copy = tmp_path_factory.mktemp("arrays") / "bundle"
    shutil.copytree(bundles["split"], copy)
    manifest = json.loads((copy / "manifest.json").read_bytes())
    del manifest["files"]["golden.npz"]
    (copy / "manifest.json").write_text(json.dumps({**manifest, "task": "arrays", "preprocessing": None}))
    return copy


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_token_ids_of_a_caller(target: str, token_ids: Path) -> None:
    with open_task(token_ids, target) as run:
        for wrong in (*WRONG, ("tokens", 2**40), ("tokens", np.nan)):
            name, value = wrong
            given: dict[str, Array] = feeds()
            given[name] = np.full((1, LENGTH), value)
            with pytest.raises(InputError):
                run(given)
        assert run(feeds())["logits"].shape == (1, LENGTH, 262)
    assert [one.target for one in bench(token_ids, device=target, runs=5).measurements] == [target]


def test_the_command_gives_one_line_and_no_answer(token_ids: Path, tmp_path: Path) -> None:
    wrong: dict[str, Any] = {**feeds("tokens", 262)}
    np.savez(tmp_path / "in.npz", **wrong)
    assert "262" in fail("run", token_ids, tmp_path / "in.npz", "-o", tmp_path / "out.npz")
    assert [path.name for path in tmp_path.iterdir()] == ["in.npz"]
