# SPDX-License-Identifier: Apache-2.0
"""Profiles: every layer of the model with what was asked and built, its time, and what lowering it costs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from perceiver_export.calibration import measure_layer_errors, profile
from perceiver_export.calibration.quantization.engines import built_kernels
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.exporter import OwnModel, export
from perceiver_export.runtimes import load, open_bundle
from perceiver_export.runtimes.engines.backend import Precision, find_target
from perceiver_export.runtimes.errors import DeviceError, MissingDependencyError, UsageError
from tests.calibration.damaged_scales import with_a_scale_times
from tests.calibration.linear_bundles import CASES
from tests.calibration.lint_cases import compiled, partly_int8_attention
from tests.conftest import FASHION


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_each_layer_has_its_kernel_and_all_the_time_is_some_layers(target: str, int8_bundle: Path) -> None:
    found = profile(int8_bundle, device=target, threads=1)
    record = read_calibration(open_bundle(int8_bundle))
    assert record is not None
    layers = {one.layer: one for one in found.layers}

    assert (found.target, found.precision, set(found.peaks)) == (target, "int8", {"fp32", "int8"})
    assert min(found.peaks.values()) > 1e9
    assert sum(one.share for one in found.layers) == pytest.approx(1)
    assert sum(one.milliseconds for one in found.layers) == pytest.approx(found.milliseconds)
    for linear in record.parts["model"].linears:
        one = layers[linear.name.rpartition("/")[0]]
        assert one.asked == "int8"
        assert "int8" in one.built.split(", ")
        assert one.sqnr is not None
        assert one.flops >= 2 * linear.macs > 0
        assert one.bytes > 0
        assert one.milliseconds > 0
    assert layers["encoder.self_attentions.0.0.attention"].asked == "fp32"
    assert layers["encoder.self_attentions.0.0.attention"].built == "fp32"
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
    int8_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    group, data = "encoder.self_attentions.0.1.mlp.output", FASHION / "test.npz"
    ruined = with_a_scale_times(4.0, group, int8_bundle, tmp_path / "ruined")
    found = profile(ruined, device="ort-cpu", against=fashion_bundle, data=data)

    assert found.worst("loss")[0].layer == group
    assert found.worst("loss")[0].sqnr == measure_layer_errors(ruined, fashion_bundle, data)[0].sqnr
    assert sum(one.against or 0 for one in found.layers) > 0
    with pytest.raises(UsageError, match="--against"):
        profile(int8_bundle, device="ort-cpu", data=data)


@pytest.mark.parametrize("target", ["ort-cpu", "openvino-cpu"])
def test_a_bundle_of_one_layer_without_names_has_its_product(target: str, tmp_path: Path) -> None:
    case = next(one for one in CASES if one.name == "arrays")
    found = profile(case.write(tmp_path / "one", case.weights()), device=target)

    (product,) = (one for one in found.layers if one.flops)
    assert product.built == "fp32"
    assert found.table().rows


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

    assert (found.peaks, found.memory, found.table().note) == ({}, 0.0, "")


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
