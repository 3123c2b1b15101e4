# SPDX-License-Identifier: Apache-2.0
"""Validation of every task: small random models, real engines, and torch as the reference; and the trained byte-level
language model in int8, judged by what it fills in. Every target that is here is in one report.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import QuantizeOptions, certify, quantize
from perceiver_export.calibration.quantization.record import read_calibration
from perceiver_export.calibration.report.report import gather, render
from perceiver_export.calibration.validation.validation import validate_targets
from perceiver_export.runtimes import load, open_task
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.presence import devices
from perceiver_export.runtimes.runtime import Array
from tests.calibration import linear_bundles
from tests.calibration.asked import asked, judged, value
from tests.cli import small_models
from tests.conftest import FASHION, SmallBundle

GENERATOR = np.random.default_rng(0)
TEXT_BYTES = FASHION.parent / "text_bytes"
TEXTS = ["The quick brown fox jumps", "over the lazy dog.", "Pack my box with five", "dozen liquor jugs."]


def normal(*shape: int) -> Array:
    return GENERATOR.normal(size=shape).astype(np.float32)


def text_file(folder: Path) -> Path:
    path = folder / "texts.jsonl"
    rows = [{"text": text, "label": ("bad", "good")[number % 2]} for number, text in enumerate(TEXTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def archive(folder: Path, **arrays: Array) -> Path:
    np.savez(folder / "data.npz", **arrays)  # type: ignore[arg-type]
    return folder / "data.npz"


def flow_file(folder: Path) -> Path:
    frames = GENERATOR.integers(0, 256, (3, 2, 16, 24, 3), dtype=np.uint8)
    truth = normal(3, 16, 24, 2)
    truth[0, :4] = np.nan
    return archive(folder, frames=frames, flow=truth)


def video_file(folder: Path) -> Path:
    frames = GENERATOR.uniform(size=(2, 2, 16, 16, 3)).astype(np.float32)
    return archive(folder, frames=frames, audio=normal(2, 480, 1))


def points_file(folder: Path) -> Path:
    return archive(folder, points=normal(5, 20, 3), labels=np.array([0, 1, 2, 3, 0]))


def sets_file(folder: Path) -> Path:
    mask = np.ones((3, 12), np.int64)
    mask[:, 9:] = 0
    return archive(folder, entities=normal(3, 12, 16), entities_mask=mask)


CASES: list[tuple[str, Callable[[Path], Path], set[str], int]] = [
    ("language", text_file, {"token accuracy", "perplexity", "agreement", "kl"}, 4),
    ("sentiment", text_file, {"top-1", "agreement", "kl"}, 4),
    ("flow", flow_file, {"epe", "outliers", "distance", "sqnr"}, 3),
    ("video", video_file, {"psnr", "ssim", "sound snr", "sqnr", "agreement", "kl"}, 2),
    ("points", points_file, {"top-1", "agreement", "kl"}, 5),
    ("sets", sets_file, {"error", "sqnr", "cosine"}, 3),
]


@pytest.mark.parametrize(("system", "data", "names", "count"), CASES, ids=[case[0] for case in CASES])
def test_a_bundle_is_as_good_as_torch(
    tmp_path: Path, small_bundle: SmallBundle, system: str, data: Callable[[Path], Path], names: set[str], count: int
) -> None:
    bundle, path = small_bundle(system, split=system == "video"), data(tmp_path)
    run = getattr(small_models, system)().run

    result = judged(bundle, path, against=run)

    assert {metric.name for metric in result.metrics} == names
    assert result.samples == len(result.worst_samples) == count
    for metric in result.metrics:
        if metric.reference is not None:
            assert metric.candidate.value == pytest.approx(metric.reference.value, rel=1e-3, abs=1e-4)
    likeness = {metric.name: metric.candidate.value for metric in result.metrics if metric.of == "likeness"}
    assert likeness.get("agreement", 100) == 100
    assert likeness.get("kl", 0) < 1e-6
    assert likeness.get("sqnr", 100) > 80
    assert result == judged(bundle, path, against=run)  # nothing is left to chance


def test_labels_that_judge_nothing_are_told(tmp_path: Path) -> None:
    case = linear_bundles.CASES["arrays"]
    bundle = case.write(tmp_path / "bundle")
    data = archive(tmp_path, **case.feeds(), labels=np.zeros(linear_bundles.SAMPLES, np.int64))

    assert "no metric uses the data's label: " in "".join(judged(bundle, data, against=bundle).warnings)


def test_gates_that_do_not_fit_the_task(small_bundle: SmallBundle, tmp_path: Path) -> None:
    bundle, data = small_bundle("flow"), flow_file(tmp_path)
    with np.load(data) as arrays:
        frames = arrays["frames"]

    for gates in ({"max_drop": 1}, {"min_agreement": 99}):
        with pytest.raises(UsageError, match="does not fit this task"):
            judged(bundle, data, against=bundle, **gates)
    (gate,) = judged(bundle, data, against=bundle, max_metric_change="2%").gates
    assert gate.outcome == "vacuous"  # random weights are no better than a flow of zero
    (gate,) = judged(bundle, data, against=bundle, metric="distance", max_metric_change=1e-6).gates
    assert (gate.outcome, gate.samples_to_decide) == ("undecided", 30)  # 3 pairs, though they are equal
    result = judged(bundle, archive(tmp_path, frames=frames, flows=normal(3, 16, 24, 2)), against=bundle)
    assert result.warning_kinds == ("itself", "few", "unused")
    assert result.warnings[2] == "no metric uses the data's flows: this task is judged by `flow`"
    unknown = archive(tmp_path, frames=frames)
    assert {metric.name for metric in judged(bundle, unknown, against=bundle).metrics} == {"distance", "sqnr"}
    with pytest.raises(DataError, match="epe was not measured"):
        judged(bundle, unknown, against=bundle, metric="epe", max_metric_change=1)


def test_it_fills_bytes_that_their_neighbours_tell(text_bundle: Path) -> None:
    with open_task(text_bundle) as fill:
        filled = fill("And the LORD sp[MASK]ke unto M[MASK]ses, saying, Speak u[MASK]to the")
    assert filled.text == "And the LORD spake unto Moses, saying, Speak unto the"


@pytest.mark.usefixtures("untimed")
def test_int8_fills_as_many_bytes_rightly(text_bundle: Path, tmp_path: Path) -> None:
    int8 = quantize(text_bundle, TEXT_BYTES / "calibration.jsonl", tmp_path / "int8", QuantizeOptions(samples=64))
    for target in ("ort-cpu", "openvino-cpu"):
        given: dict[str, Any] = {"against": text_bundle, "device": target, "against_device": "ort-cpu"}
        result = judged(int8, TEXT_BYTES / "test.jsonl", **given, samples=400)
        accuracy: Any = result.metric("token accuracy")
        assert accuracy.reference.value > 60  # the commonest byte, a space, is one of five
        assert accuracy.worsening.value < 0.5
        assert value(result, "kl") < 0.01
        assert value(result, "agreement") > 97
    calibration = read_calibration(int8)

    assert calibration is not None
    assert calibration.data.warnings == ()
    assert int8.manifest.quantization is not None
    assert int8.manifest.quantization.integer_share == {"ort-cpu": 1.0, "openvino-cpu": 1.0}


@pytest.mark.usefixtures("one_process")
def test_all_targets_are_in_one_report_each_with_its_certificate(
    copied_int8: Path, fashion_bundle: Path, thousand: Path
) -> None:
    bundle = copied_int8
    present = [device.target for device in devices()]
    assert {"ort-cpu", "openvino-cpu"} <= set(present)

    results = validate_targets(
        bundle, thousand, asked(device="all", against=fashion_bundle, samples=200, max_drop=8, min_agreement=90)
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
        (target, name) for target in present for name in ("fashion-int8", "fashion")
    ]
    assert all(speed.p50 > 0 and speed.peak_memory > 0 and speed.size > 0.5 for speed in report.speeds)
    assert render(report).count("Certified:") == len(present)
