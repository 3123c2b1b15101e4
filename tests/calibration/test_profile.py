# SPDX-License-Identifier: Apache-2.0
"""Profiles: every layer of the model with what was asked and built, its time, and what lowering it costs."""

from __future__ import annotations

import statistics
import timeit
from functools import partial
from pathlib import Path

import pytest
import torch

from perceiver_export.calibration import measure_layer_errors, profile
from perceiver_export.calibration.quantization.engines import Reading, built_kernels, read_in_turn, read_kernels
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.calibration.report.peaks import Peaks
from perceiver_export.exporter import ExportOptions, OwnModel, export
from perceiver_export.runtimes import load, open_bundle
from perceiver_export.runtimes.bundle import golden_arrays
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, find_target
from perceiver_export.runtimes.errors import DeviceError, MissingDependencyError, UsageError
from tests.calibration.asked import TEST
from tests.calibration.damaged_scales import with_a_scale_times
from tests.calibration.linear_bundles import CASES
from tests.calibration.lint_cases import compiled, partly_int8_attention
from tests.cli import small_models
from tests.conftest import SmallBundle

TARGETS = ("ort-cpu", "openvino-cpu")


@pytest.mark.parametrize("target", TARGETS)
def test_each_layer_has_its_kernel(target: str, int8_bundle: Path) -> None:
    found = profile(int8_bundle, device=target, threads=1)
    record = read_calibration(open_bundle(int8_bundle))
    assert record is not None
    layers = {one.layer: one for one in found.layers}

    assert (found.target, found.precision, set(found.peaks)) == (target, "int8", {"fp32", "int8"})
    assert min(found.peaks.values()) > 1e9
    for linear in record.parts["model"].linears:
        one = layers[linear.name.rpartition("/")[0]]
        assert one.asked == "int8"
        assert "int8" in one.built.split(", ")
        assert one.sqnr is not None
        assert one.flops >= 2 * linear.macs > 0
        assert one.bytes > 0
        assert one.milliseconds > 0
    attention = layers["encoder.self_attentions.0.0.attention"]
    assert (attention.asked, attention.built) == ("fp32", "fp32")
    assert found.worst()[0].milliseconds == max(one.milliseconds for one in found.layers)


def test_what_was_built_is_read_and_not_what_was_asked(fashion_bundle: Path) -> None:
    """fp16 is stored on every CPU, and computed on few; bf16 where the CPU has it."""
    here = find_target("openvino-cpu").backend().precisions("openvino-cpu")
    asked: tuple[Precision, ...] = ("fp16", "bf16") if "bf16" in here else ("fp16",)
    for precision in asked:
        found = profile(fashion_bundle, device="openvino-cpu", precision=precision, threads=1)
        with load(fashion_bundle, "openvino-cpu", precision=precision) as runtime:
            arithmetic = runtime.describe()["arithmetic"]
        hidden = next(one for one in found.layers if one.layer.endswith("self_attentions.0.0.mlp.hidden"))
        assert (found.precision, hidden.asked) == (precision, precision)
        assert hidden.built == (precision if precision in here else "fp32")
        assert set(hidden.built.split(", ")) <= set(arithmetic.replace(" and ", ", ").split(", "))


def test_beside_the_float_bundle_a_damaged_layer_comes_first(
    int8_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    group = "encoder.self_attentions.0.1.mlp.output"
    ruined = with_a_scale_times(4.0, group, int8_bundle, tmp_path / "ruined")
    found = profile(ruined, device="ort-cpu", against=fashion_bundle, data=thousand)

    assert found.worst("loss")[0].layer == group
    assert found.worst("loss")[0].sqnr == measure_layer_errors(ruined, fashion_bundle, thousand)[0].sqnr
    assert sum(one.against or 0 for one in found.layers) > 0
    assert found.against == f"{fashion_bundle.name} in fp32"


def test_what_cannot_be_compared_is_refused_before_anything_runs(
    int8_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unrelated = CASES["arrays"].write(tmp_path / "one")
    with pytest.raises(UsageError, match="layers"):
        profile(int8_bundle, device="ort-cpu", against=unrelated)
    monkeypatch.setattr("perceiver_export.calibration.quantization.engines.read_in_turn", pytest.fail)
    with_data = partial(profile, int8_bundle, device="ort-cpu", data=TEST)
    for refused in (with_data, partial(with_data, against=int8_bundle), partial(profile, int8_bundle, threads=0)):
        with pytest.raises(UsageError):
            refused()


def test_graphs_are_run_in_turn() -> None:
    ran = []

    def calls(name: str, count: int) -> Reading:
        for _ in range(count):
            ran.append(name)
            yield
        return name, []

    assert read_in_turn([calls("a", 3), calls("b", 2)]) == [("a", []), ("b", [])]
    assert "".join(ran) == "ababa"


def test_a_bundle_of_one_layer_without_names_has_its_product(tmp_path: Path) -> None:
    bundle = CASES["arrays"].write(tmp_path / "one")
    for target in TARGETS:
        found = profile(bundle, device=target)
        (product,) = (one for one in found.layers if one.flops)
        assert product.built == "fp32"
        assert found.table().rows


def test_all_the_time_of_a_call_is_some_layers(tmp_path: Path) -> None:
    layers = [torch.nn.Linear(512, 512) for _ in range(4)]  # large enough that profiling takes little of the time
    bundle = export(OwnModel(torch.nn.Sequential(*layers), {"input": torch.zeros(1, 256, 512)}), tmp_path / "linears")
    feeds = golden_arrays(bundle, "model", "input")

    def share(target: str) -> float:
        found = profile(bundle, device=target, threads=1)
        with load(bundle, target, threads=1) as runtime:
            wall = 1e3 * statistics.median(timeit.repeat(partial(runtime.run, feeds), number=1, repeat=15))
        return sum(one.milliseconds for one in found.layers) / wall

    for target in TARGETS:  # a machine that stalls in one of the two is asked again
        assert any(0.3 < share(target) < 3 for _ in range(3)), target


def test_operations_are_of_the_sizes_that_were_timed(fashion_bundle: Path, batched_bundle: Path) -> None:
    one, four = (
        {layer.layer: layer.flops for layer in profile(path, device="ort-cpu").layers if "encoder" in layer.layer}
        for path in (fashion_bundle, batched_bundle)
    )
    assert sum(one.values()) > 0
    assert four == {layer: 4 * flops for layer, flops in one.items()}


def test_of_a_split_bundle_the_calls_that_decode_all_queries_count(small_bundle: SmallBundle, tmp_path: Path) -> None:
    """Of 384 queries: two calls, one."""
    options = ExportOptions(split=True, shape={"queries": (256,)})
    bundles = (export(small_models.flow(), tmp_path / "flow", options), small_bundle("flow", split=True))
    two, one = (profile(bundle, device="ort-cpu") for bundle in bundles)
    flops = [sum(layer.flops for layer in of.layers if layer.part == "decoder") for of in (two, one)]

    assert (two.calls, one.calls) == ({"decoder": 2}, {})
    assert 512 / 384 <= flops[0] / flops[1] <= 2
    assert "decoder 2 times" in two.table().note


def test_what_a_cache_may_hold_takes_no_time_however_many_kernels_read_it() -> None:
    peaks, small, large = Peaks({"fp32": 1e9}, 1e9), 1 << 20, 1 << 26

    assert peaks.milliseconds(0, "fp32", [small] * 100) == 0
    assert peaks.milliseconds(0, "fp32", [small, large, large]) == pytest.approx(2e3 * large / 1e9)
    assert peaks.milliseconds(10**9, "fp32", [large]) == pytest.approx(1e3)


def test_no_layer_is_faster_than_the_peak() -> None:
    peaks, moved = Peaks({"fp32": 1e9}, 1e9), [1 << 30]
    for flops, milliseconds in ((10**9, 500.0), (10**6, 100.0), (1, 1e4)):
        peaks = peaks.beside(flops, "fp32", moved, milliseconds)
        assert peaks.milliseconds(flops, "fp32", moved) <= milliseconds * (1 + 1e-9)
    assert peaks.beside(10**9, "int8", [], 1.0) is peaks


def test_times_of_the_other_bundle_that_vary_are_told(
    int8_bundle: Path, fashion_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, other = "perceiver_export.calibration.report.profile", f"{fashion_bundle.name} (model)"
    monkeypatch.setattr(f"{module}.scattered", lambda where, *times: where * (where == other))

    assert profile(int8_bundle, device="ort-cpu", against=fashion_bundle).unsteady == other
    assert profile(int8_bundle, device="ort-cpu").unsteady == ""


def test_kernels_are_those_of_the_engine_with_its_flags(int8_bundle: Path) -> None:
    bundle = open_bundle(int8_bundle)
    graph, feeds = bundle.file(bundle.part("model").file), golden_arrays(bundle, "model", "input")
    types = {}
    for value in ("0", "1"):
        options = EngineOptions(flags={"session.disable_quant_qdq": value})
        types[value] = {one.precision for one in read_kernels("ort-cpu", graph, feeds, options)[1] if one.product}

    assert "int8" in types["0"]
    assert types["1"] == {"fp32"}


def test_sqnr_beside_another_precision_is_told_to_be_beside_fp32(int8_bundle: Path) -> None:
    lower = profile(int8_bundle, device="openvino-cpu", precision="fp16", threads=1)

    assert lower.precision == "int8 with fp16"
    assert "fp16" in lower.table().note.split(". ")[-1]


class Residual(torch.nn.Module):
    """Engines add ``x`` in the kernel of ``second``."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (torch.nn.Conv2d(8, 8, 3, padding=1) for _ in range(2))

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x: torch.Tensor = self.first(image)
        return torch.add(self.second(torch.sigmoid(x)), x)


def test_a_kernel_counts_for_its_own_product_not_for_one_before_it(tmp_path: Path) -> None:
    own = OwnModel(Residual(), {"image": torch.zeros(1, 8, 32, 32)})
    bundle = export(own, tmp_path / "residual").path
    for target in TARGETS:
        times = {one.layer: one.milliseconds for one in profile(bundle, device=target).layers if one.flops}
        assert times.keys() == {"first", "second"}
        assert min(times.values()) > 0


class Masked(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(8, 4)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return torch.where(~mask[..., None], self.linear(x), 1.0)


def test_nodes_of_the_whole_model_are_layers_and_booleans_are_no_int8(tmp_path: Path) -> None:
    own = OwnModel(Masked(), {"x": torch.zeros(1, 6, 8), "mask": torch.ones(1, 6, dtype=torch.bool)})
    found = profile(export(own, tmp_path / "masked").path, device="openvino-cpu")

    built = {one.layer: one.built for one in found.layers}
    assert len(built) > 1
    assert not {"model"} & built.keys()
    assert "int8" not in ", ".join(built.values())


def test_a_bundle_without_products_has_no_peaks(tmp_path: Path) -> None:
    own = OwnModel(torch.nn.Softmax(-1), {"input": torch.zeros(1, 4)})
    found = profile(export(own, tmp_path / "one").path, device="ort-cpu")

    assert (found.peaks, found.memory) == ({}, 0.0)
    assert "peak" not in found.table().note


def test_the_kernels_of_a_tensorrt_engine_are_those_that_its_builder_reported(tmp_path: Path) -> None:
    compiled(partly_int8_attention(tmp_path / "attention.onnx"))
    kernels = built_kernels(tmp_path / "attention.engine")

    products = {name: one.precision for one in kernels if one.product for name in one.names}
    assert products["MatMul_4"] == "int8"
    assert products["MatMul_6"] == "fp16"
    assert not any(one.times for one in kernels)


def test_an_engine_that_is_not_here_or_says_nothing_is_refused(fashion_bundle: Path) -> None:
    for target in ("openvino-npu", "tensorrt", "ort-coreml"):
        with pytest.raises((DeviceError, MissingDependencyError)):
            profile(fashion_bundle, device=target)
