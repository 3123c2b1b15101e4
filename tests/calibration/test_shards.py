# SPDX-License-Identifier: Apache-2.0
"""Merged shards of validation and of statistics give what one run gives, bit for bit; files that do not belong together
are refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from perceiver_export.calibration import (
    Gates,
    QuantizeOptions,
    ValidateOptions,
    certify,
    collect_statistics,
    merge,
    quantize,
    validate,
    validate_shard,
)
from perceiver_export.calibration.data.samples import Samples
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.calibration.validation.options import parse_shard
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.calibration.validation.shards import Shard, encode_shard
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.npz import read_npz, write_npz
from tests.calibration.asked import TEST, asked, pictures
from tests.calibration.test_validate_every_task import CASES, flow_file
from tests.cli.commands import fail, succeed
from tests.conftest import FASHION

GATES: dict[str, Any] = {"max_drop": 3, "min_agreement": 90}
COUNT, SAMPLES = 3, 200
DATA, OPTIONS = FASHION / "held_out.npz", QuantizeOptions(samples=20)


def in_shards(folder: Path, bundle: Path, data: Path | str, count: int = COUNT, **given: Any) -> list[Path]:
    """The files of all shards."""
    folder.mkdir(exist_ok=True)
    files = [folder / f"part{index}.json" for index in range(1, count + 1)]
    for index, file in enumerate(files, start=1):
        file.write_bytes(encode_shard(validate_shard(bundle, data, (index, count), asked(**given))))
    return files


@pytest.fixture(scope="session")
def parts(
    int8_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    return in_shards(tmp_path_factory.mktemp("parts"), int8_bundle, thousand, against=fashion_bundle, samples=SAMPLES)


def same(one: Validation, other: Validation) -> bool:
    """To the bit, as JSON shows them."""
    return msgspec.json.encode(one) == msgspec.json.encode(other)


def test_merged_shards_are_one_run(
    parts: list[Path], int8_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    one, other = (Path(shutil.copytree(int8_bundle, tmp_path / name)) for name in ("one", "other"))
    whole = validate(one, thousand, asked(against=fashion_bundle, samples=SAMPLES, certify=True, **GATES))
    (merged,) = merge(other, [*reversed(parts), parts[0]], asked(certify=True, **GATES))  # one counts once

    assert same(merged, whole)
    assert [gate.outcome for gate in merged.gates] == ["held", "held"]
    assert certify(other, [merged]) == certify(one, [whole])


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_every_task_merges(case: Any, small_bundle: Callable[..., Path], tmp_path: Path) -> None:
    bundle, data = small_bundle(case[0]), case[1](tmp_path)
    files = in_shards(tmp_path / "parts", bundle, data, 2, against_device="ort-cpu")

    (merged,) = merge(bundle, files)

    assert same(merged, validate(bundle, data, asked(against_device="ort-cpu")))


@pytest.mark.usefixtures("one_process")
def test_the_command_writes_shards_and_judges_them(
    copied_int8: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    bundle = copied_int8
    common: list[str | Path] = ["validate", bundle, "--data", thousand, "--samples", "150", "--against", fashion_bundle]
    files = [tmp_path / f"part{index}.json" for index in (1, 2)]
    for index, file in enumerate(files, start=1):
        succeed(*common, "--shard", f"{index}/2", "--scores", file)
    gates = ("--max-drop", "4", "--certify", "--json")

    whole = json.loads(succeed(*common, *gates))
    merged = json.loads(succeed("validate", bundle, *files, "--merge", *gates, "--report", tmp_path / "report.md"))

    assert merged.pop("written").keys() == {"certificate", "report"}
    assert whole.pop("written").keys() == {"certificate"}
    assert merged == whole
    assert "2/2" in fail("validate", bundle, files[0], "--merge", "--max-drop", "4")


def changed(**fields: Any) -> Callable[[Shard], Shard]:
    return lambda shard: msgspec.structs.replace(shard, **fields).signed()


def damaged(shard: Shard) -> Shard:
    return msgspec.structs.replace(shard, digests=shard.digests[::-1])


def other_results(shard: Shard) -> Shard:
    return changed(digests=shard.digests[::-1])(shard)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (damaged, "changed or cut"),
        (changed(positions=[0]), "samples of shard 2/3"),
        (changed(shard=1), "samples of shard 1/3"),
        (other_results, "different results"),
        (changed(shards=4), "samples of shard 2/4"),
        (changed(bundle="0"), "in its bundle"),
        (changed(rows="0"), "in its data"),
        (changed(package="0.0"), "in its version"),
        (changed(metric="module:function"), "in its metric"),
        (changed(reference=None), "in its reference"),
        (changed(columns={}), "in its set of values"),
        (changed(sums=[]), "in its set of values"),
        (changed(reads={}), "do not fit"),
        (changed(machine={}), "instruction set"),
        (changed(candidate={}), "target"),
        (changed(machine={"instruction set": "mmx"}), "shards are missing on"),
    ],
)
def test_files_that_do_not_belong_together(
    change: Callable[[Shard], Shard], said: str, parts: list[Path], int8_bundle: Path, tmp_path: Path
) -> None:
    shard = msgspec.json.decode(parts[1].read_bytes(), type=Shard)
    (tmp_path / "part2.json").write_bytes(encode_shard(change(shard)))
    twice = [parts[1]] * (change is other_results)

    with pytest.raises(DataError) as caught:
        merge(int8_bundle, [parts[0], *twice, tmp_path / "part2.json", parts[2]], asked(**GATES))
    assert said in caught.value.message
    assert "\n" not in caught.value.message


def test_numbers_that_are_not_finite_and_links_are_refused(
    parts: list[Path], int8_bundle: Path, tmp_path: Path
) -> None:
    content = json.loads(parts[0].read_bytes())
    for value in ("NaN", "1e999", "null", '"1"'):
        content["columns"]["likeness"]["kl"]["values"][0] = "HERE"
        (tmp_path / "part.json").write_text(json.dumps(content).replace('"HERE"', value))
        with pytest.raises(DataError):
            merge(int8_bundle, [tmp_path / "part.json", *parts[1:]])
    (tmp_path / "link.json").symlink_to(parts[0])
    with pytest.raises(DataError, match="link"):
        merge(int8_bundle, [tmp_path / "link.json", *parts[1:]])
    with pytest.raises(DataError, match="missing"):
        merge(int8_bundle, parts[:2])


def test_each_instruction_set_is_judged_by_itself(parts: list[Path], copied_int8: Path, tmp_path: Path) -> None:
    bundle, others = copied_int8, [tmp_path / part.name for part in parts]
    for part, other in zip(parts, others, strict=True):
        shard = msgspec.json.decode(part.read_bytes(), type=Shard)
        machine = {**shard.machine, "instruction set": "asimd i8mm"}
        sides = {side: {**getattr(shard, side), "version": "9.9"} for side in ("candidate", "reference")}
        other.write_bytes(encode_shard(changed(machine=machine, **sides)(shard)))

    results = merge(bundle, [*parts, *others], asked(**GATES))

    assert [result.samples for result in results] == [SAMPLES, SAMPLES]
    assert certify(bundle, results)[1].instruction_set == ("asimd", "i8mm")
    one = msgspec.json.decode(others[1].read_bytes(), type=Shard)
    others[1].write_bytes(encode_shard(changed(reference={**(one.reference or {}), "version": "9.8"})(one)))
    with pytest.raises(DataError, match="reference's target or engine"):
        merge(bundle, [*parts, *others])


@pytest.mark.parametrize(
    ("options", "shard"),
    [
        (asked(max_drop=1), (1, 2)),
        (asked(allow_overlap=True), (1, 2)),
        (asked(save_worst="worst"), (1, 2)),
        (ValidateOptions(device="all"), (1, 2)),
        (asked(samples=2), (3, 3)),
        (asked(), (1, 0)),
        (asked(), (5, 3)),
    ],
)
def test_shards_that_cannot_be_judged(options: ValidateOptions, shard: tuple[int, int], fashion_bundle: Path) -> None:
    with pytest.raises((UsageError, DataError)):
        validate_shard(fashion_bundle, TEST, shard, options)


@pytest.mark.parametrize("text", ["1/" + "9" * 5_000, "3", "1/2/3", "0/2", "a/b"], ids=lambda text: text[:5])
def test_numbers_of_shards_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--shard"):
        parse_shard(text)


def test_a_bundle_that_the_shards_did_not_judge(parts: list[Path], fashion_bundle: Path) -> None:
    with pytest.raises(DataError, match="not from the bundle"):
        merge(fashion_bundle, parts)


@pytest.mark.parametrize("reference", ["int8_bundle", "plain_fashion_bundle"])
def test_a_reference_that_the_shards_did_not_have(
    reference: str, parts: list[Path], int8_bundle: Path, request: pytest.FixtureRequest
) -> None:
    with pytest.raises(UsageError, match="another reference"):
        merge(int8_bundle, parts, asked(against=request.getfixturevalue(reference)))
    with pytest.raises(UsageError, match="without --metric"):
        merge(int8_bundle, parts, asked(metric="mine:right"))


def test_other_contents_under_the_same_names_are_other_data(fashion_bundle: Path, tmp_path: Path) -> None:
    manifest = open_bundle(fashion_bundle).manifest

    def rows(data: Path) -> str:
        opened = Samples(data, manifest, shard=(2, 2))
        assert len(list(opened.stream)) == opened.total // 2
        return opened.rows

    archive, folder = tmp_path / "data.npz", shutil.copytree(FASHION / "images", tmp_path / "pictures")
    before = rows(pictures(archive, slice(0, 4))), rows(folder)
    first, *_, last = sorted(folder.glob("*.png"))
    shutil.copy(last, first)
    with np.load(archive) as data:
        np.savez(archive, image=data["image"][[1, 1, 2, 3]], labels=data["labels"])

    assert not {rows(archive), rows(folder)} & set(before)


def test_own_metrics_merge(fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def right(outputs, targets): return outputs['logits'].argmax() == targets['label']"
    )
    monkeypatch.chdir(tmp_path)
    options = asked(against_device="ort-cpu", metric="mine:right")
    data = pictures(tmp_path / "data.npz", slice(0, 60))
    files = in_shards(tmp_path / "parts", fashion_bundle, data, 2, against_device="ort-cpu", metric="mine:right")

    (merged,) = merge(fashion_bundle, files, ValidateOptions(gates=Gates(metric="mine:right")))

    assert merged.metrics == validate(fashion_bundle, data, options).metrics
    for metric in (None, "mine:wrong"):
        with pytest.raises(UsageError, match="--metric mine:right"):
            merge(fashion_bundle, files, asked(metric=metric))


def graphs(bundle: Bundle) -> dict[str, str]:
    return {name: one.sha256 for name, one in bundle.manifest.files.items() if name.endswith((".onnx", ".weights"))}


@pytest.fixture(scope="session")
def statistics(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    files = [tmp_path_factory.mktemp("statistics") / f"part{index}.npz" for index in (1, 2, 3)]
    for index, file in enumerate(files, start=1):
        collect_statistics(fashion_bundle, DATA, file, (index, 3), OPTIONS)
    return files


@pytest.mark.usefixtures("untimed")
def test_merged_statistics_give_the_graphs_of_one_pass(
    statistics: list[Path], fashion_bundle: Path, tmp_path: Path
) -> None:
    whole = quantize(fashion_bundle, DATA, tmp_path / "whole", OPTIONS)
    merged = quantize(fashion_bundle, None, tmp_path / "merged", OPTIONS, statistics=[*statistics[::-1], statistics[1]])

    assert graphs(merged) == graphs(whole)
    records = [read_calibration(bundle) for bundle in (merged, whole)]
    assert records[0] is not None
    assert records[1] is not None
    assert (records[0].data, records[0].effects) == (records[1].data, records[1].effects)


@pytest.mark.usefixtures("untimed")
def test_the_command_merges_the_statistics_of_a_split_bundle(small_bundle: Callable[..., Path], tmp_path: Path) -> None:
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
        (wider, "different results"),
        (renamed(b'"shards": 3', b'"shards": 4'), "in its number of shards"),
        (renamed(b'"shard": 2', b'"shard": 1'), "shard 1/3"),
        (renamed(b'"shard": 2', b'"shard": 9'), "9/3"),
        (renamed(b'"package": "', b'"package": "9'), "in its version"),
        (renamed(b'"engine": "', b'"engine": "9'), "in its version of onnxruntime"),
        (renamed(b'"instruction_set": [', b'"instruction_set": ["mmx", '), "in its instruction set"),
        (renamed(b'"fingerprint": "', b'"fingerprint": "9'), "in its data"),
        (renamed(b'{"shard"', b'{"shape"'), "does not hold statistics"),
    ],
)
def test_statistics_that_do_not_belong_together(
    change: Callable[[dict[str, Any]], None], said: str, statistics: list[Path], fashion_bundle: Path, tmp_path: Path
) -> None:
    arrays = read_npz(statistics[1])
    change(arrays)
    write_npz(tmp_path / "part2.npz", arrays)
    files = [statistics[0], *[statistics[1]] * (change is wider), tmp_path / "part2.npz", statistics[2]]

    with pytest.raises(DataError) as caught:
        quantize(fashion_bundle, None, tmp_path / "out", OPTIONS, statistics=files)
    assert said in caught.value.message
    assert not (tmp_path / "out").exists()


def test_statistics_of_other_bundles_and_options_and_links(
    statistics: list[Path], fashion_bundle: Path, plain_fashion_bundle: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match="not from the bundle"):
        quantize(plain_fashion_bundle, None, tmp_path / "out", OPTIONS, statistics=statistics)
    with pytest.raises(UsageError, match="--samples 20"):
        quantize(fashion_bundle, None, tmp_path / "out", statistics=statistics)
    (tmp_path / "link.npz").symlink_to(statistics[0])
    with pytest.raises(DataError, match="link"):
        quantize(fashion_bundle, None, tmp_path / "out", OPTIONS, statistics=[tmp_path / "link.npz", *statistics[1:]])
    with pytest.raises(UsageError, match="'1/0'"):
        collect_statistics(fashion_bundle, DATA, tmp_path / "part.npz", (1, 0), OPTIONS)
    with pytest.raises(DataError, match="no samples"):
        collect_statistics(fashion_bundle, DATA, tmp_path / "part.npz", (3, 3), QuantizeOptions(samples=2))
