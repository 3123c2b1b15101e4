# SPDX-License-Identifier: Apache-2.0
"""Bundle in, int8 bundle out: on the trained Fashion-MNIST model and real pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import openvino
import pytest

from perceiver_export.calibration import measure_sensitivity, quantize, validate
from perceiver_export.calibration.effects import openvino_runner, ort_runner
from perceiver_export.calibration.plan import decibels
from perceiver_export.calibration.record import Calibration, read_calibration
from perceiver_export.calibration.sensitivity import write_sensitivity
from perceiver_export.calibration.validated import Validation
from perceiver_export.runtimes import Bundle, load, open_bundle, open_task
from perceiver_export.runtimes.errors import DataError, DeviceError, ExportError, GateError, UsageError
from perceiver_export.runtimes.runtime import Array
from tests.conftest import FASHION

HELD_OUT = FASHION / "held_out.npz"
TOLD = ("originalLayersNames", "layerType", "runtimePrecision")


@pytest.fixture(scope="module")
def pictures(fashion_bundle: Path) -> Array:
    """Prepared inputs of 300 test pictures."""
    with open_task(fashion_bundle) as task, np.load(FASHION / "test.npz") as archive:
        return np.stack([task.preprocess(picture) for picture in archive["image"][:300]])


@pytest.fixture(scope="module")
def int8(fashion_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return quantize(fashion_bundle, HELD_OUT, tmp_path_factory.mktemp("int8") / "int8", samples=64)


@pytest.fixture(scope="module")
def calibration(int8: Bundle) -> Calibration:
    found = read_calibration(int8)
    assert found is not None
    return found


def logits(run: Any, pictures: Array) -> Array:
    return np.concatenate([run({"image": picture[None]})["logits"] for picture in pictures])


def int8_products(graph: Path, floats: str) -> set[str]:
    """Linears that OpenVINO runs in integer kernels."""
    compiled = openvino.Core().compile_model(str(graph), "CPU", {"INFERENCE_PRECISION_HINT": floats})
    told = [
        {key: str(value.astype(str)) for key, value in op.get_rt_info().items() if key in TOLD}
        for op in compiled.get_runtime_model().get_ops()
    ]
    return {
        one["originalLayersNames"].split(",")[0]
        for one in told
        if (one["layerType"], one["runtimePrecision"]) == ("FullyConnected", "i8")
    }


def test_the_int8_bundle_is_accurate_and_small(int8: Bundle, fashion_bundle: Path, pictures: Array) -> None:
    with load(int8) as runtime, load(fashion_bundle) as reference:
        found, exact = (logits(one.run, pictures) for one in (runtime, reference))
        assert runtime.describe()["precision"] == "int8"

    assert decibels(exact, found) > 24
    assert (found.argmax(1) == exact.argmax(1)).mean() >= 0.97
    weights = {path: open_bundle(path).manifest.files["model.weights"].size for path in (int8.path, fashion_bundle)}
    assert weights[int8.path] < 0.5 * weights[fashion_bundle]  # positions, a quarter of this small model, stay float


def test_two_engines_agree_far_better_than_int8_agrees_with_fp32(
    int8: Bundle, fashion_bundle: Path, pictures: Array
) -> None:
    """Roundings that are nearly ties fall either way, so engines are not bit-equal."""
    part = int8.part()
    ort = ort_runner(int8.file(part.graph_for("ort-cpu")))
    openvino = openvino_runner(int8.file(part.graph_for("openvino-cpu")))
    exact = logits(ort_runner(fashion_bundle / "model.onnx"), pictures)
    here, there = logits(ort, pictures), logits(openvino, pictures)

    assert decibels(here, there) > decibels(exact, here) + 10
    assert (here.argmax(1) == there.argmax(1)).mean() >= 0.99


def test_linears_stay_int8_beside_floats_of_16_bits(int8: Bundle, pictures: Array) -> None:
    part, core = int8.part(), openvino.Core()
    if "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
        with pytest.raises(DeviceError, match="bf16"):
            load(int8, "openvino-cpu", precision="bf16")
        return

    with load(int8, "openvino-cpu") as plain, load(int8, "openvino-cpu", precision="bf16") as half:
        exact, found = logits(plain.run, pictures), logits(half.run, pictures)
        assert (plain.describe()["precision"], half.describe()["precision"]) == ("int8", "int8 with bf16")
    assert np.abs(found - exact).max() > 0
    assert decibels(exact, found) > 24  # what int8 itself must reach

    graph = int8.file(part.file)
    assert int8_products(graph, "bf16") == int8_products(graph, "f32") != set()


def test_it_says_what_it_is_and_what_it_was_calibrated_on(int8: Bundle, calibration: Calibration) -> None:
    assert int8.manifest.quantization is not None
    assert int8.manifest.quantization.integer_share == {"ort-cpu": 1.0, "openvino-cpu": 1.0}
    assert int8.manifest.precision == "int8"
    assert calibration.data.samples == len(set(calibration.data.digests)) == 64
    assert calibration.warnings == tuple(one for one in calibration.warnings if one.startswith("not faster"))
    assert {layer.kernel.split()[0] for one in calibration.parts["model"].coverage for layer in one.layers} == {
        "MatMulIntegerToFloat",
        "FullyConnected",
    }
    assert all(one.sqnr is not None and one.sqnr > 20 for one in calibration.parts["model"].linears)
    assert calibration.effects[0].sqnr > 24


def test_validate_gates_hold_before_anything_is_written(
    plain_fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Validation] = []

    def judge(*arguments: Any, **options: Any) -> Validation:
        judged.append(validate(*arguments, **options))
        return judged[-1]

    monkeypatch.setattr("perceiver_export.calibration.validation.validate", judge)
    data = tmp_path / "few.npz"
    with np.load(HELD_OUT) as archive:
        np.savez(data, image=archive["image"][:200], labels=archive["labels"][:200])
    options: dict[str, Any] = {"samples": 40, "threads": 1}
    made = quantize(plain_fashion_bundle, data, tmp_path / "held", max_drop=10.0, min_agreement=50.0, **options)
    (found,) = judged
    assert found.candidate["threads"] == (found.reference or {})["threads"] == 1
    assert validate(made, data, against=plain_fashion_bundle).samples == 200
    with pytest.raises(GateError, match=r"not held|undecided"):
        quantize(plain_fashion_bundle, data, tmp_path / "not", samples=40, min_agreement=99.9)
    assert not (tmp_path / "not").exists()


def test_coverage_below_what_was_asked_fails(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its lowering ONNX Runtime computes in float, and quantize must not call that int8."""
    from perceiver_export.calibration.lowering.ort import LOWERINGS

    monkeypatch.setitem(LOWERINGS, "ort-cpu", lambda model: None)
    with pytest.raises(GateError, match=r"0\.00 % of multiply-adds run in integer kernels on ort-cpu, 100 %"):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", samples=8)
    made = quantize(fashion_bundle, HELD_OUT, tmp_path / "out", samples=8, min_coverage=0)
    assert made.manifest.quantization is not None
    assert made.manifest.quantization.integer_share["ort-cpu"] == 0.0


def test_layers_stay_float_by_name(plain_fashion_bundle: Path, tmp_path: Path) -> None:
    made = quantize(
        plain_fashion_bundle,
        HELD_OUT,
        tmp_path / "out",
        samples=8,
        keep_float=["encoder.cross_attentions.0.attention.*"],
    )
    assert made.manifest.quantization is not None
    kept = made.manifest.quantization.kept_float

    assert set(kept) == {f"encoder.cross_attentions.0.attention.{name}" for name in ("key", "value", "output")}
    assert made.manifest.quantization.integer_share["ort-cpu"] == 1.0  # of what was to be int8
    with pytest.raises(UsageError, match="no layer is called 'nonsense'"):
        quantize(plain_fashion_bundle, HELD_OUT, tmp_path / "other", keep_float=["nonsense"])


def test_sensitivity_puts_the_worst_layer_first(plain_fashion_bundle: Path, tmp_path: Path) -> None:
    groups = measure_sensitivity(plain_fashion_bundle, HELD_OUT, samples=8)

    # Its scores reach 700, so that a step of its int8 moves a softmax.
    assert groups[0].group == "encoder.cross_attentions.0.attention.key"
    assert len(groups) == 29
    assert sum(one.share for one in groups) == pytest.approx(1.0)
    for name in ("all.json", "all.svg", "all.png"):
        write_sensitivity(tmp_path / name, groups)
        assert (tmp_path / name).stat().st_size > 1000
    weights_alone = tuple(msgspec.structs.replace(one, scheme="int8-weights") for one in groups)
    for name, drawn, scheme in (("int8.svg", groups, "int8"), ("weights.svg", weights_alone, "int8-weights")):
        write_sensitivity(tmp_path / name, drawn)
        assert f"with this layer alone in {scheme}:" in (tmp_path / name).read_text(encoding="utf-8")
    (tmp_path / "file").write_text("")
    for name in ("in.json", "in.svg"):
        with pytest.raises(ExportError, match="cannot be written"):
            write_sensitivity(tmp_path / "file" / name, groups)


def test_three_samples_one_class_and_random_data_are_told(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(HELD_OUT) as archive:
        shirts = archive["image"][archive["labels"] == 6][:3]
        np.savez(tmp_path / "shirts.npz", image=shirts, labels=np.full(3, 6))
    few = quantize(fashion_bundle, tmp_path / "shirts.npz", tmp_path / "few")
    random = quantize(fashion_bundle, "random", tmp_path / "random", samples=4)

    assert any(note.startswith("3 samples to calibrate on") for note in few.manifest.notes)
    assert any("one class, 'Shirt'" in note for note in few.manifest.notes)
    assert any("random numbers" in note for note in random.manifest.notes)
    assert random.manifest.quantization is not None
    assert random.manifest.quantization.random_data


def test_a_cpu_without_vnni_gets_seven_bits_or_a_refusal(
    int8: Bundle, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("perceiver_export.runtimes.machine.saturates", lambda: True)
    monkeypatch.setattr("perceiver_export.calibration.pipeline.saturates", lambda: True)
    with pytest.raises(DeviceError, match="no VNNI"):
        load(int8)
    seven = quantize(fashion_bundle, HELD_OUT, tmp_path / "seven", samples=8)

    assert seven.manifest.quantization is not None
    assert seven.manifest.quantization.weight_bits == 7
    with load(seven) as runtime:
        assert np.isfinite(runtime.run({"image": np.zeros((1, 3, 28, 28), np.float32)})["logits"]).all()


def test_a_generator_is_read_once_and_may_be_short(fashion_bundle: Path, tmp_path: Path) -> None:
    def samples() -> Iterator[dict[str, Array]]:
        generator = np.random.default_rng(0)
        for _ in range(5):
            yield {"image": generator.normal(size=(3, 28, 28)).astype(np.float32)}

    used_up = samples()
    made = quantize(fashion_bundle, used_up, tmp_path / "out")
    calibration = read_calibration(made)

    assert calibration is not None
    assert calibration.data.samples == 5
    with pytest.raises(DataError, match="no samples"):
        quantize(fashion_bundle, used_up, tmp_path / "again")
