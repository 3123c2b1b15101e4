# SPDX-License-Identifier: Apache-2.0
"""The search as a whole: a model where one layer must not be int8, options, and what is refused."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import validate
from perceiver_export.calibration.layer_errors import measure_layer_errors
from perceiver_export.calibration.lowering.ort import LOWERINGS
from perceiver_export.calibration.mixed_precision import search
from perceiver_export.calibration.pipeline import part_options, quantize
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.certificates import certificates
from perceiver_export.runtimes.errors import (
    DataError,
    DeviceError,
    GateError,
    PerceiverExportError,
    UndecidedError,
    UsageError,
)
from tests.calibration.cancelling_units import LAYER, with_cancelling_units
from tests.calibration.damaged_scales import with_a_scale_times

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


@pytest.fixture(scope="module")
def cancelling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(with_cancelling_units(), tmp_path_factory.mktemp("search") / "model").path


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("splits")
    with np.load(FASHION / "test.npz") as data:
        images, labels = data["image"], data["labels"]
    found = {}
    for name, start, stop in (("calibrate", 0, 24), ("search_on", 24, 174), ("certify_on", 174, 374)):
        found[name] = folder / f"{name}.npz"
        np.savez(found[name], image=images[start:stop], labels=labels[start:stop])
    return found


def test_a_layer_that_must_not_be_int8_goes_back(cancelling: Path, splits: dict[str, Any], tmp_path: Path) -> None:
    """Among the layers of a block and those around it; of all of them it is found in `search_seeds.py`."""
    others = ["encoder.self_attentions.0.0.*", "encoder.self_attentions.0.2.*", "decoder.*"]
    options: dict[str, Any] = {**splits, "keep_float": others, "samples": 16}

    found = search(cancelling, tmp_path / "mixed", **options, max_drop=6, min_agreement=90)

    assert [rung.step for rung in found.rungs] == [0, 1, 2]
    assert found.rungs[0].precision == {}
    assert not all(said.startswith("held") for said in found.rungs[0].search)
    kept = found.rungs[found.kept]
    assert next(iter(kept.precision)) == found.ranking[0].group == f"{LAYER}.output"
    assert all(said.startswith("held") for said in kept.certification)
    for rung in found.rungs:
        assert [time.target for time in rung.times] == ["ort-cpu"]
        assert rung.time == pytest.approx(rung.times[0].ratio)
        assert rung.times[0].milliseconds > 0
        assert 0.7 < rung.size < 0.95  # most layers are float
    bundle = open_bundle(tmp_path / "mixed", verify="always")
    assert certificates(bundle) == found.certificates
    assert bundle.manifest.name == "mixed"
    assert found.certificates[0].samples == 200
    with pytest.raises(DataError, match=r"150 of 150 samples .* searched on"):
        validate(bundle, splits["search_on"], against=cancelling, max_drop=5, allow_overlap=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "mixed"]


def test_a_search_without_a_gate_or_with_shared_samples_is_refused(
    fashion_bundle: Path, splits: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="good enough"):
        search(fashion_bundle, tmp_path / "mixed", **splits)
    overlapping = {**splits, "certify_on": splits["search_on"]}
    with pytest.raises(DataError, match="150 of 150 samples"):
        search(fashion_bundle, tmp_path / "mixed", **overlapping, max_drop=2)
    assert not (tmp_path / "mixed").exists()


def test_a_search_takes_all_that_quantize_takes() -> None:
    """Or a command line that has both would leave something out without a word."""
    taken = {**inspect.signature(search).parameters, **inspect.signature(part_options).parameters}

    assert set(inspect.signature(quantize).parameters) - {"data"} <= set(taken)


@pytest.mark.parametrize(
    ("wishes", "error", "message"),
    [
        ({"scheme": "int3"}, UsageError, "no scheme 'int3'"),
        ({"method": "magic"}, UsageError, "no method 'magic'"),
        ({"samples": 0}, UsageError, "samples is 0"),
        ({"weight_bits": 5}, UsageError, "weights of 5 bits"),
        ({"precision": {"*": "int3"}}, UsageError, "no scheme 'int3'"),
        ({"keep_float": ["head"]}, UsageError, "no layer is called 'head'"),
        ({"keep_float": ["*"], "samples": 1}, UsageError, "no layer is left to quantize"),
        ({"min_coverage": 120.0}, UsageError, "min-coverage is 120"),
        ({"least_gain": 100.0}, UsageError, "least-gain is 100"),
        ({"device": "tpu"}, DeviceError, "no target 'tpu'"),
        ({"device": "tensorrt-rtx"}, DeviceError, "tensorrt-rtx runs engines that take minutes to build"),
        ({"calibrate": "random"}, DataError, "random"),
        ({"metric": "epe", "max_metric_change": 1}, UsageError, "no metric 'epe'"),
        ({"max_drop": -1}, UsageError, "--max-drop is -1"),
        ({"metric": "kl"}, UsageError, "--metric has no effect without --max-metric-change"),
    ],
)
def test_no_option_is_ignored(
    wishes: dict[str, Any],
    error: type[PerceiverExportError],
    message: str,
    fashion_bundle: Path,
    splits: dict[str, Any],
    tmp_path: Path,
) -> None:
    with pytest.raises(error, match=message):
        search(fashion_bundle, tmp_path / "mixed", **{**splits, "max_drop": 5, "samples": 8, **wishes})
    assert list(tmp_path.iterdir()) == []


def test_coverage_counts_and_what_held_on_one_split_must_hold_on_the_other(
    fashion_bundle: Path, splits: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its lowering ONNX Runtime computes in float, and 20 samples certify nothing."""
    monkeypatch.setitem(LOWERINGS, "ort-cpu", lambda model: None)
    with np.load(splits["certify_on"]) as data:
        np.savez(tmp_path / "few.npz", image=data["image"][:20], labels=data["labels"][:20])
    few: dict[str, Any] = {**splits, "certify_on": tmp_path / "few.npz", "samples": 8, "max_drop": 5}
    few["keep_float"] = ["encoder.*", "decoder.plain.logits.attention.*", "decoder.plain.logits.tail.weights.*"]

    with pytest.raises(GateError, match=r"0\.00 % of multiply-adds run in integer kernels on ort-cpu"):
        search(fashion_bundle, tmp_path / "mixed", **few)
    with pytest.raises(UndecidedError, match="could not be certified: undecided: --max-drop 5"):
        search(fashion_bundle, tmp_path / "mixed", **few, min_coverage=0)
    assert list(tmp_path.iterdir()) == [tmp_path / "few.npz"]


def test_a_layer_whose_scale_was_ruined_is_refused_and_named_first(
    int8_bundle: Path, fashion_bundle: Path, tmp_path: Path
) -> None:
    group = "encoder.self_attentions.0.1.mlp.output"
    ruined = with_a_scale_times(4.0, group, int8_bundle, tmp_path / "ruined")

    result = validate(ruined, FASHION / "test.npz", against=fashion_bundle, samples=200, max_drop=1, min_agreement=97)
    errors = measure_layer_errors(ruined, fashion_bundle, FASHION / "test.npz")

    assert [gate.outcome for gate in result.gates].count("held") == 0
    with pytest.raises(GateError):
        result.require()
    assert errors[0].group == group
    assert errors[0].sqnr == pytest.approx(-9.5, abs=1)  # an error of three times the signal
    assert measure_layer_errors(int8_bundle, fashion_bundle, FASHION / "test.npz")[0].sqnr > 10
