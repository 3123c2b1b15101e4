# SPDX-License-Identifier: Apache-2.0
"""Every target that is here, held against one reference: one table, a certificate each, a folder of samples each."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from perceiver_export.calibration.report.report import gather, render
from perceiver_export.calibration.validation.certify import certify
from perceiver_export.calibration.validation.validation import validate_targets
from perceiver_export.runtimes import load
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.presence import devices
from tests.calibration.asked import TEST, asked


def test_all_targets_are_in_one_report_each_with_its_certificate(
    int8_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    bundle = Path(shutil.copytree(int8_bundle, tmp_path / "int8"))
    present = [device.target for device in devices()]
    assert {"ort-cpu", "openvino-cpu"} <= set(present)

    results = validate_targets(
        bundle, TEST, asked(device="all", against=fashion_bundle, samples=200, max_drop=8, min_agreement=90)
    )
    made = certify(bundle, results)

    assert [result.candidate["target"] for result in results] == present
    assert {(result.reference or {})["target"] for result in results} == {present[0]}
    assert len({result.data.fingerprint for result in results}) == 1
    assert [one.target for one in made] == present
    for target, certificate in zip(present, made, strict=True):
        with load(bundle, target) as runtime:
            assert runtime.describe()["certificates"] == (str(certificate),)
    with load(bundle, "openvino-cpu", precision="fp16") as runtime:  # weights that nothing was measured with
        assert "certificates" not in runtime.describe()
    report = gather(bundle, results, fashion_bundle)
    assert [row[0] for row in report.accuracy.rows[:: len(results[0].metrics)]] == present
    assert [(speed.target, speed.name) for speed in report.speeds] == [
        (target, name) for target in present for name in ("int8", "fashion")
    ]
    assert all(speed.p50 > 0 and speed.peak_memory > 0 and speed.size > 0.5 for speed in report.speeds)
    assert render(report).count("Certified:") == len(present)


def test_worst_samples_have_a_folder_a_target(int8_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    present = [device.target for device in devices()]

    validate_targets(
        int8_bundle,
        TEST,
        asked(device="all", against=fashion_bundle, samples=20, worst=2, save_worst=tmp_path / "worst"),
    )

    assert sorted(path.name for path in tmp_path.iterdir()) == ["worst"]
    assert sorted(path.name for path in (tmp_path / "worst").iterdir()) == sorted(present)
    for target in present:
        assert len(list((tmp_path / "worst" / target).glob("*.npz"))) == 2
    with pytest.raises(DataError, match="already exists"):
        validate_targets(int8_bundle, TEST, asked(device="all", samples=3, save_worst=tmp_path / "worst"))
