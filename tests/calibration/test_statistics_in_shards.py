# SPDX-License-Identifier: Apache-2.0
"""Statistics in shards give the int8 graphs of one pass, bit for bit; files that do not belong together are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import QuantizeOptions, collect_statistics, quantize
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.npz import read_npz, write_npz
from tests.calibration.test_validate_every_task import flow_file
from tests.cli.commands import fail, succeed
from tests.conftest import FASHION

DATA, OPTIONS = FASHION / "held_out.npz", QuantizeOptions(samples=20)


def graphs(bundle: Bundle) -> dict[str, str]:
    return {name: one.sha256 for name, one in bundle.manifest.files.items() if name.endswith((".onnx", ".weights"))}


@pytest.fixture(scope="session")
def parts(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = [tmp_path_factory.mktemp("statistics") / f"part{index}.npz" for index in (1, 2, 3)]
    for index, file in enumerate(files, start=1):
        collect_statistics(fashion_bundle, DATA, file, (index, 3), OPTIONS)
    return files


@pytest.mark.usefixtures("untimed")
def test_merged_statistics_give_the_graphs_of_one_pass(parts: list[Path], fashion_bundle: Path, tmp_path: Path) -> None:
    whole = quantize(fashion_bundle, DATA, tmp_path / "whole", OPTIONS)
    merged = quantize(fashion_bundle, None, tmp_path / "merged", OPTIONS, statistics=[*parts[::-1], parts[1]])

    assert graphs(merged) == graphs(whole)
    records = [read_calibration(bundle) for bundle in (merged, whole)]
    assert records[0] is not None
    assert records[1] is not None
    assert (records[0].data, records[0].effects) == (records[1].data, records[1].effects)


@pytest.mark.usefixtures("untimed")
def test_the_command_merges_a_split_bundle(small_bundle: Callable[..., Path], tmp_path: Path) -> None:
    """Its decoder takes random queries."""
    bundle, data = small_bundle("flow", split=True), flow_file(tmp_path)
    files = [tmp_path / f"part{index}.npz" for index in (1, 2)]
    common: list[str | Path] = ["quantize", bundle, "--data", data, "--min-coverage", "0"]
    for index, file in enumerate(files, start=1):
        succeed(*common, "--shard", f"{index}/2", "--statistics", file)
    succeed(*common, "-o", tmp_path / "whole")
    succeed("quantize", bundle, *files, "--merge", "--min-coverage", "0", "-o", tmp_path / "merged")

    assert graphs(open_bundle(tmp_path / "merged")) == graphs(open_bundle(tmp_path / "whole"))
    said = fail("quantize", bundle, files[1], "--merge", "--min-coverage", "0", "-o", tmp_path / "other")
    assert "1/2" in said
    assert not (tmp_path / "other").exists()


def cut(arrays: dict[str, Any]) -> None:
    arrays.pop(next(name for name in arrays if name.startswith("rows")))


def not_finite(arrays: dict[str, Any]) -> None:
    arrays[next(name for name in arrays if name.startswith("low"))][0] = np.nan


def foreign(arrays: dict[str, Any]) -> None:
    arrays[next(name for name in arrays if name.startswith("own"))][:] = True


def without_call(arrays: dict[str, Any]) -> None:
    for name in [name for name in arrays if name.startswith(("feed 1 ", "output 1 "))]:
        arrays.pop(name)


def wider(arrays: dict[str, Any]) -> None:
    arrays[next(name for name in arrays if name.startswith("high"))][0] += 1


def renamed(old: bytes, new: bytes) -> Callable[[dict[str, Any]], None]:
    def change(arrays: dict[str, Any]) -> None:
        text = arrays["about"].tobytes()
        assert old in text
        arrays["about"] = np.frombuffer(text.replace(old, new, 1), np.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (cut, "do not fit"),
        (without_call, "8 calls"),
        (not_finite, "NaN"),
        (foreign, "several shards"),
        (wider, "other results"),
        (renamed(b'"shards": 3', b'"shards": 4'), "another number of shards"),
        (renamed(b'"shard": 2', b'"shard": 1'), "shard 1/3"),
        (renamed(b'"shard": 2', b'"shard": 9'), "9/3"),
        (renamed(b'"package": "', b'"package": "9'), "another version"),
        (renamed(b'"engine": "', b'"engine": "9'), "another version of onnxruntime"),
        (renamed(b'"instruction_set": [', b'"instruction_set": ["mmx", '), "another instruction set"),
        (renamed(b'"fingerprint": "', b'"fingerprint": "9'), "another data"),
        (renamed(b'{"shard"', b'{"shape"'), "does not hold statistics"),
    ],
)
def test_files_that_do_not_belong_together(
    change: Callable[[dict[str, Any]], None], said: str, parts: list[Path], fashion_bundle: Path, tmp_path: Path
) -> None:
    arrays = read_npz(parts[1])
    change(arrays)
    write_npz(tmp_path / "part2.npz", arrays)
    files = [parts[0], *[parts[1]] * (change is wider), tmp_path / "part2.npz", parts[2]]

    with pytest.raises(DataError) as caught:
        quantize(fashion_bundle, None, tmp_path / "out", OPTIONS, statistics=files)
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


def test_other_bundles_options_and_links(
    parts: list[Path], fashion_bundle: Path, plain_fashion_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="not of the bundle"):
        quantize(plain_fashion_bundle, None, tmp_path / "out", OPTIONS, statistics=parts)
    with pytest.raises(UsageError, match="--samples 20"):
        quantize(fashion_bundle, None, tmp_path / "out", statistics=parts)
    (tmp_path / "link.npz").symlink_to(parts[0])
    with pytest.raises(DataError, match="link"):
        quantize(fashion_bundle, None, tmp_path / "out", OPTIONS, statistics=[tmp_path / "link.npz", *parts[1:]])
    with pytest.raises(UsageError, match="'1/0'"):
        collect_statistics(fashion_bundle, DATA, tmp_path / "part.npz", (1, 0), OPTIONS)
    with pytest.raises(DataError, match="no samples"):
        collect_statistics(fashion_bundle, DATA, tmp_path / "part.npz", (3, 3), QuantizeOptions(samples=2))
