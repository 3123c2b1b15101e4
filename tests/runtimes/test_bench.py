# SPDX-License-Identifier: Apache-2.0
"""Bench on the real engine: figures that hang together."""

from __future__ import annotations

from pathlib import Path

import pytest

from perceiver_export.runtimes import bench, devices, doctor
from perceiver_export.runtimes.errors import BundleError, DeviceError, UsageError


def test_a_bundle_against_its_own_graph_is_about_as_fast(fashion_bundle: Path) -> None:
    result = bench(fashion_bundle, against=fashion_bundle / "model.onnx", runs=20, threads=1)
    first, second = result.measurements

    assert result.ratio is not None
    assert 0.2 < result.ratio < 5  # the same graph twice, on a machine that others use too
    assert 0 < first.p50 <= first.p95 <= first.p99
    assert first.throughput > 0
    assert (first.name, second.name) == (fashion_bundle.name, "model.onnx")
    for side in (first, second):
        assert 10 < side.base_memory < side.peak_memory < 1000


def test_what_cannot_be_measured_is_refused(fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        bench(fashion_bundle, runs=1)
    with pytest.raises(BundleError):
        bench(tmp_path)
    with pytest.raises(DeviceError, match="no target"):
        bench(fashion_bundle, device="abacus")
    (tmp_path / "cut.onnx").write_bytes((fashion_bundle / "model.onnx").read_bytes()[:1000])
    with pytest.raises(BundleError):
        bench(tmp_path / "cut.onnx")


def test_doctor_finds_what_is_here_and_says_how_to_get_the_rest() -> None:
    findings = {finding.what: finding for finding in doctor()}

    assert findings["onnxruntime"].found[0].isdigit()
    assert findings["onnxruntime"].fix == ""
    for finding in findings.values():
        assert (finding.found == "not installed") == bool(finding.fix)
    assert [device.target for device in devices()] == ["ort-cpu"]
