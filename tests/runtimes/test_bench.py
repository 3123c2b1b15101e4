# SPDX-License-Identifier: Apache-2.0
"""Bench on the real engines: figures that hang together."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from perceiver_export.runtimes import bench, benchmark, build, figures, load, open_bundle
from perceiver_export.runtimes.benchmark import unsteady
from perceiver_export.runtimes.bundle import change_report, golden_arrays, read_report
from perceiver_export.runtimes.engines.backend import find_target
from perceiver_export.runtimes.errors import BundleError, DeviceError, UsageError
from perceiver_export.runtimes.figures import relative_times, save_relative
from perceiver_export.runtimes.machine import cpu_name
from perceiver_export.runtimes.presence import choose_target
from perceiver_export.runtimes.runtime import fastest, scattered
from tests.runtimes.targets import EXPECTED, latencies, needs_openvino


def test_a_bundle_against_its_own_graph_is_about_as_fast(fashion_bundle: Path) -> None:
    result = bench(fashion_bundle, against=fashion_bundle / "model.onnx", device="ort-cpu", runs=20, threads=1)
    first, second = result.measurements

    assert result.ratio is not None
    assert 0.2 < result.ratio < 5  # the same graph twice, on a machine that others use too
    assert 0 < first.p50 <= first.p95 <= first.p99
    assert first.throughput > 0
    assert (first.name, second.name) == (fashion_bundle.name, "model.onnx")
    assert (second.difference, second.within_tolerance) == (None, None)
    for side in (first, second):
        assert 10 < side.base_memory < side.peak_memory < 1000


def test_a_graph_whose_first_input_is_a_scalar_has_the_batch_of_the_next(tmp_path: Path) -> None:
    pytest.importorskip("onnx")  # not where the runtime alone is tested
    from tests.calibration.onnx_text import write

    write(tmp_path / "scaled.onnx", "(float s, float[3, 8] x) => (float[3, 8] y) { y = Mul(s, x) }")

    assert bench(tmp_path / "scaled.onnx", runs=5).measurements[0].batch == 3


def test_every_target_that_is_here_stands_in_one_table_and_near_torch(copied_bundle: Path) -> None:
    result = bench(copied_bundle, device="all", runs=5, save=True)

    assert [side.target for side in result.measurements] == list(EXPECTED)
    for side in result.measurements:
        assert side.difference is not None
        assert side.difference < 1e-4 == side.tolerance
        assert side.within_tolerance
        assert (side.ratio is None) == (side is result.measurements[0])
        assert (side.precision, side.compiled) == ("fp32", "at load")
    saved = read_report(copied_bundle)["bench"][cpu_name()]
    assert {name: one["p50"] for name, one in saved.items()} == {one.target: one.p50 for one in result.measurements}


@pytest.mark.usefixtures("one_process")
@needs_openvino
def test_fewer_bits_are_held_to_a_wider_tolerance(copied_bundle: Path) -> None:
    build(copied_bundle, "openvino-cpu", precision="fp16")
    (side,) = bench(copied_bundle, device="openvino-cpu", runs=5).measurements

    assert side.difference is not None
    assert side.difference > 1e-5
    assert side.tolerance == 1e-2
    assert side.within_tolerance == (side.difference <= side.tolerance)
    assert len(side.compiled) == 16


@needs_openvino
def test_auto_takes_the_faster_target_of_the_report_of_this_machine(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def chosen() -> str:
        return choose_target(open_bundle(copied_bundle))

    def keep(here: dict[str, Any]) -> None:
        change_report(copied_bundle, "bench", lambda _: {cpu_name(): here, "another CPU": latencies(ort_cpu=0.001)})

    assert chosen() == "ort-cpu"
    for here in ({}, latencies(ort_cpu=1.0, openvino_cpu=2.0), latencies(openvino_cpu=1.0, precision="bf16")):
        keep(here)
        assert chosen() == "ort-cpu"
    keep(latencies(ort_cpu=2.0, openvino_cpu=1.0))
    for threads, target in ((None, "openvino-cpu"), (1, "ort-cpu")):
        with load(copied_bundle, threads=threads) as runtime:
            assert runtime.describe()["target"] == target
    with monkeypatch.context() as there:
        there.setattr(figures, "available_cores", lambda: 99)
        more_cores = latencies(openvino_cpu=1.0)
    keep(more_cores)
    assert chosen() == "ort-cpu"
    (copied_bundle / "report.json").write_text("cut", encoding="utf-8")
    assert chosen() == "ort-cpu"
    with pytest.raises(BundleError, match=r"report\.json cannot be read"):
        change_report(copied_bundle, "bench", lambda _: {})


@needs_openvino
def test_auto_measures_each_precision_that_the_target_computes_in(copied_bundle: Path) -> None:
    here = {target: ("fp32", *find_target(target).backend().precisions(target)) for target in EXPECTED}
    result = bench(copied_bundle, device="all", precision="auto", runs=20, save=True)

    assert [(side.target, side.precision) for side in result.measurements] == [
        (target, precision) for target, found in here.items() for precision in found
    ]
    assert here["ort-cpu"] == ("fp32",)
    assert all(side.within_tolerance and side.size > 1 for side in result.measurements)
    assert bool(result.fastest) != bool(result.unsteady)
    saved = read_report(copied_bundle)
    assert {target: one["precision"] for target, one in saved["bench"][cpu_name()].items()} == dict.fromkeys(
        here, "fp32"
    )
    times = {target: one["times"] for target, one in saved["precisions"][cpu_name()].items()}
    if result.unsteady:
        assert times == {target: {} for target in here}
    else:
        assert {target: tuple(found) for target, found in times.items()} == here
        assert all(found["fp32"] == [1, 1, 1] for found in times.values())


@pytest.mark.usefixtures("one_process")
def test_sides_whose_spreads_overlap_tie_and_a_throttled_machine_decides_nothing(fashion_bundle: Path) -> None:
    noise = np.random.default_rng(0).uniform(0.95, 1.05, (3, 25))

    assert fastest(np.array([[2.0], [1.0], [1.5]]) * noise) == (1,)
    assert fastest(np.array([[2.0], [1.0], [1.005]]) * noise) == (1, 2)
    busy = np.linspace(1, 3, 25)  # slows all sides alike
    assert fastest(np.array([[2.0], [1.0], [1.5]]) * noise * busy) == (1,)
    (side,) = bench(fashion_bundle, device="ort-cpu", runs=5).measurements
    assert side.spread[0] <= side.median <= side.spread[1]
    steady = msgspec.structs.replace(side, p50=9.0, median=1.0, spread=(0.95, 1.05))
    assert unsteady([steady, steady], 20) == ""
    assert "1.300" in unsteady([steady, msgspec.structs.replace(steady, spread=(0.8, 1.3))], 20)
    assert "too few" in unsteady([steady, steady], 16)
    flagged = msgspec.structs.replace(steady, spread=(0.8, 1.3), flags={"NUM_STREAMS": "2"})
    assert "in fp32, with NUM_STREAMS=2 on ort-cpu lie" in unsteady([flagged], 20)
    assert "0.001" in scattered("a layer below the clock's resolution", 0.0, 0.0, 0.001)


@pytest.mark.usefixtures("one_process")
def test_nan_in_one_of_several_outputs_is_seen_and_never_the_fastest(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")  # not where the runtime alone is tested
    path, read = request.getfixturevalue("small_bundle")("glue"), golden_arrays
    last = open_bundle(path).part().outputs[-1].name

    def golden(bundle: Any, part: str, kind: Any) -> dict[str, Any]:
        return {name: array * (np.nan if name == last else 1) for name, array in read(bundle, part, kind).items()}

    monkeypatch.setattr(benchmark, "golden_arrays", lambda *of: golden(*of) if of[2] == "output" else read(*of))
    result = bench(path, against=path, device="ort-cpu", runs=20)

    assert [one.within_tolerance for one in result.measurements] == [False, False]
    assert all(np.isnan(one.difference or 0) for one in result.measurements)
    assert result.fastest == ()


@pytest.mark.usefixtures("one_process")
def test_auto_ends_after_the_blocks_that_decide_where_calls_take_long(
    fashion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_MOST", 0.0)

    assert bench(fashion_bundle, device="ort-cpu", precision="auto", runs=40).runs == 20
    assert bench(fashion_bundle, device="ort-cpu", runs=40).runs == 40


def test_relative_times_hold_where_they_were_measured_and_end_with_new_ones_that_lack_fp32(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times, (target, other) = np.ones(5), ("ort-cpu", "openvino-cpu")
    timed = [(target, "fp32", times), (target, "fp16", times / 2)]
    save_relative(copied_bundle, [target], None, timed)
    assert relative_times(copied_bundle, target) == {"fp32": (1, 1, 1), "fp16": (0.5, 0.5, 0.5)}
    assert relative_times(copied_bundle, target, threads=2) == relative_times(copied_bundle, other) == {}
    with monkeypatch.context() as there:
        there.setattr(figures, "available_cores", lambda: 99)
        assert relative_times(copied_bundle, target) == {}

    save_relative(copied_bundle, [target], None, timed[1:])
    assert relative_times(copied_bundle, target) == {}
    before = {cpu_name(): {target: {"fp32": [1, 1, 1], "fp16": [0.5, 0.5, 0.5]}}}  # as reports were before
    change_report(copied_bundle, "precisions", lambda _: before)
    assert relative_times(copied_bundle, target) == {}


def test_a_report_that_cannot_be_written_is_refused_before_anything_is_measured(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark, "_open", None)
    with monkeypatch.context() as there:
        there.setattr("perceiver_export.runtimes.files.os.access", lambda *_, **__: False)
        with pytest.raises(BundleError, match="not a writable directory"):
            bench(copied_bundle, device="ort-cpu", save=True)
    (copied_bundle / "report.json").write_text("cut", encoding="utf-8")
    with pytest.raises(BundleError, match=r"report\.json cannot be read"):
        bench(copied_bundle, device="ort-cpu", save=True)


def test_figures_of_a_bundle_on_a_read_only_file_system(copied_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There even removing a file that was never written fails."""

    def read_only(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(BundleError, match=r"report\.json cannot be written: Read-only file system"):
        change_report(copied_bundle, "bench", lambda _: {})


@pytest.mark.usefixtures("one_process")
@needs_openvino
def test_one_side_alone_is_unsteady_too_and_auto_takes_no_such_figures(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: dict[str, Any] = {"device": "openvino-cpu"}
    assert "too few" not in bench(copied_bundle, **where, runs=5).unsteady
    assert "too few" in bench(copied_bundle, **where, runs=5, save=True).unsteady  # `auto` would compare them
    for why, chosen in (("busy", "ort-cpu"), ("", "openvino-cpu")):
        monkeypatch.setattr(benchmark, "scattered", lambda *_, why=why: why)
        result = bench(copied_bundle, **where, precision="auto", runs=20, save=True)
        assert [result.unsteady, *(side.unsteady for side in result.measurements)] == [why] * (
            1 + len(result.measurements)
        )
        assert choose_target(open_bundle(copied_bundle)) == chosen


@pytest.mark.usefixtures("one_process")
@needs_openvino
def test_auto_measures_the_target_that_load_takes_with_as_many_threads(copied_bundle: Path) -> None:
    change_report(copied_bundle, "bench", lambda _: {cpu_name(): latencies(threads="1", openvino_cpu=1.0)})

    for threads, target in ((None, "ort-cpu"), (1, "openvino-cpu")):
        assert bench(copied_bundle, runs=5, threads=threads).measurements[0].target == target


@pytest.mark.usefixtures("one_process")
@needs_openvino
def test_an_engine_with_flags_is_named_by_them_and_without_its_directory(
    copied_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (built,) = build(copied_bundle, "openvino-cpu", flags={"NUM_STREAMS": "2"})
    monkeypatch.chdir(copied_bundle.parent)
    (side,) = bench(copied_bundle.name, device="openvino-cpu", runs=5).measurements

    assert (side.flags, side.compiled) == ({"NUM_STREAMS": "2"}, built.directory.name)


@pytest.mark.usefixtures("one_process")
@needs_openvino
def test_both_bundles_run_on_one_target_whatever_auto_is_for_the_other(
    copied_bundle: Path, fashion_bundle: Path
) -> None:
    measured = latencies(ort_cpu=2.0, openvino_cpu=1.0)
    change_report(copied_bundle, "bench", lambda _: {cpu_name(): measured})

    for first, second, target in (
        (copied_bundle, fashion_bundle, "openvino-cpu"),
        (fashion_bundle, copied_bundle, "ort-cpu"),
    ):
        assert {side.target for side in bench(first, against=second, runs=5).measurements} == {target}


@pytest.mark.usefixtures("one_process")
def test_what_cannot_be_measured_is_refused(fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        bench(fashion_bundle, runs=1)
    with pytest.raises(BundleError):
        bench(tmp_path)
    with pytest.raises(DeviceError, match="no target"):
        bench(fashion_bundle, device="abacus")
    with pytest.raises(UsageError, match="has its own precision"):
        bench(fashion_bundle / "model.onnx", against=fashion_bundle, precision="bf16")
    with pytest.raises(UsageError, match="--part"):
        bench(fashion_bundle, part="model", save=True)
    with pytest.raises(UsageError, match=r"model\.onnx"):
        bench(fashion_bundle / "model.onnx", save=True)
    (tmp_path / "cut.onnx").write_bytes((fashion_bundle / "model.onnx").read_bytes()[:1000])
    with pytest.raises(BundleError):
        bench(tmp_path / "cut.onnx")
