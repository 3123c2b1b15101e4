# SPDX-License-Identifier: Apache-2.0
"""Bundle in, int8 bundle out, on the trained Fashion-MNIST model and real pictures; what `quantize` refuses before
anything is written, and what is left of a run that is interrupted.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from perceiver_export.calibration import QuantizeOptions, measure_sensitivity, quantize, validate
from perceiver_export.calibration.graphs import sqnr
from perceiver_export.calibration.lowering.onnxruntime import LOWERINGS
from perceiver_export.calibration.quantization import engines
from perceiver_export.calibration.quantization.record import Calibration, read_calibration
from perceiver_export.calibration.quantization.statistics import Observer
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.runtimes import Bundle, files, load, open_bundle, open_task
from perceiver_export.runtimes.engines import openvino
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision
from perceiver_export.runtimes.engines.cache import make_source
from perceiver_export.runtimes.errors import (
    BundleError,
    BundleExistsError,
    DataError,
    DeviceError,
    ExportError,
    GateError,
    UsageError,
)
from perceiver_export.runtimes.opening import open_engine
from perceiver_export.runtimes.runtime import Array
from tests.calibration.asked import HELD_OUT, TEST, pictures, quantizing
from tests.calibration.graphs import build, save
from tests.conftest import SmallBundle


@pytest.fixture(scope="module")
def prepared(fashion_bundle: Path) -> Array:
    """Prepared inputs of 300 test pictures."""
    with open_task(fashion_bundle) as task, np.load(TEST) as archive:
        return np.stack([task.preprocess(picture) for picture in archive["image"][:300]])


@pytest.fixture(scope="module")
def int8(int8_bundle: Path) -> Bundle:
    return open_bundle(int8_bundle)


@pytest.fixture(scope="module")
def calibration(int8: Bundle) -> Calibration:
    found = read_calibration(int8)
    assert found is not None
    return found


def logits(run: Any, pictures: Array) -> Array:
    return np.concatenate([run({"image": picture[None]})["logits"] for picture in pictures])


def int8_products(bundle: Bundle, precision: Precision) -> set[str]:
    """Linears that OpenVINO runs in integer kernels."""
    options = EngineOptions(precision=precision)
    openvino.platform("openvino-cpu", options)
    engine = openvino.open(make_source(bundle, bundle.part(), "openvino-cpu", options), None, None)
    products = (one.names for _, one in engine.kernels() if one.product and one.precision == "int8")
    return {next(name for name in names if not name.startswith("Multiply_")) for names in products}


def test_the_int8_bundle_is_accurate_and_small(int8: Bundle, fashion_bundle: Path, prepared: Array) -> None:
    with load(int8) as runtime, load(fashion_bundle) as reference:
        found, exact = (logits(one.run, prepared) for one in (runtime, reference))
        assert runtime.describe()["precision"] == "int8"

    assert sqnr(exact, found) > 24
    assert (found.argmax(1) == exact.argmax(1)).mean() >= 0.97
    weights = {path: open_bundle(path).manifest.files["model.weights"].size for path in (int8.path, fashion_bundle)}
    assert weights[int8.path] < 0.5 * weights[fashion_bundle]  # positions, a quarter of this small model, stay float


def test_two_engines_agree_far_better_than_int8_agrees_with_fp32(
    int8: Bundle, fashion_bundle: Path, prepared: Array
) -> None:
    """Roundings that are nearly ties fall either way, so engines are not bit-equal."""
    part = int8.part()
    exact = logits(open_engine(fashion_bundle / "model.onnx", "ort-cpu", None).run, prepared)
    here, there = (
        logits(open_engine(int8.file(part.graph_for(target)), target, None).run, prepared)
        for target in ("ort-cpu", "openvino-cpu")
    )

    assert sqnr(here, there) > sqnr(exact, here) + 10
    assert (here.argmax(1) == there.argmax(1)).mean() >= 0.99


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_linears_stay_int8_beside_floats_of_16_bits(int8: Bundle, prepared: Array, precision: Precision) -> None:
    try:
        found_in = int8_products(int8, precision)
    except DeviceError:
        assert precision == "bf16"  # on a CPU without it
        return
    assert found_in == int8_products(int8, "fp32") != set()

    with load(int8, "openvino-cpu") as plain, load(int8, "openvino-cpu", precision=precision) as half:
        exact, found = logits(plain.run, prepared[:60]), logits(half.run, prepared[:60])
        described = half.describe()
    assert described["precision"] == f"int8 with {precision}"
    assert described["arithmetic"].startswith("int8")
    # fp16 may be no more than how weights are kept, of which an int8 bundle has few that are floats.
    assert precision == "fp16" or np.abs(found - exact).max() > 0
    assert sqnr(exact, found) > 24  # what int8 itself must reach


def test_it_says_what_it_is_and_what_it_was_calibrated_on(int8: Bundle, calibration: Calibration) -> None:
    assert int8.manifest.quantization is not None
    assert int8.manifest.quantization.integer_share == {"ort-cpu": 1.0, "openvino-cpu": 1.0}
    assert int8.manifest.precision == "int8"
    assert calibration.data.samples == len(set(calibration.data.digests)) == 32
    assert calibration.warnings == tuple(
        one for one in calibration.warnings if one.startswith(("not faster", "the times on"))
    )
    assert {layer.kernel.split()[0] for one in calibration.parts["model"].coverage for layer in one.layers} == {
        "MatMulIntegerToFloat",
        "FullyConnected",
    }
    assert all(one.sqnr is not None and one.sqnr > 20 for one in calibration.parts["model"].linears)
    assert calibration.effects[0].sqnr > 24


@pytest.mark.usefixtures("untimed")
def test_validate_gates_hold_before_anything_is_written(
    plain_fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[Validation] = []

    def judge(*arguments: Any, **options: Any) -> Validation:
        judged.append(validate(*arguments, **options))
        return judged[-1]

    monkeypatch.setattr("perceiver_export.calibration.validation.validation.validate", judge)
    data = pictures(tmp_path / "few.npz", slice(100), source=HELD_OUT)
    options = quantizing(max_drop=10.0, min_agreement=50.0, samples=40, threads=1)
    quantize(plain_fashion_bundle, data, tmp_path / "held", options)
    (found,) = judged
    assert found.candidate["threads"] == (found.reference or {})["threads"] == 1
    assert found.samples == 100
    with pytest.raises(GateError, match=r"FAIL|NOT ENOUGH DATA"):
        quantize(plain_fashion_bundle, data, tmp_path / "not", quantizing(samples=40, min_agreement=99.9))
    assert not (tmp_path / "not").exists()


@pytest.mark.usefixtures("untimed")
def test_coverage_below_what_was_asked_fails(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without its lowering ONNX Runtime computes in float, and quantize must not call that int8."""
    monkeypatch.setitem(LOWERINGS, "ort-cpu", lambda model: None)
    with pytest.raises(GateError, match=r"\b0\.\d\d %.* ort-cpu"):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", QuantizeOptions(samples=8))
    made = quantize(fashion_bundle, HELD_OUT, tmp_path / "out", QuantizeOptions(samples=8, min_coverage=0))
    assert made.manifest.quantization is not None
    assert made.manifest.quantization.integer_share["ort-cpu"] < 0.01


@pytest.mark.usefixtures("untimed")
def test_layers_stay_float_by_name(plain_fashion_bundle: Path, tmp_path: Path) -> None:
    kept = "encoder.cross_attentions.0.attention"
    options = QuantizeOptions(samples=8, keep_float=[f"{kept}.*"])
    made = quantize(plain_fashion_bundle, HELD_OUT, tmp_path / "out", options).manifest.quantization

    assert made is not None
    assert set(made.kept_float) == {f"{kept}.{name}" for name in ("key", "value", "output")}
    assert made.integer_share["ort-cpu"] == 1.0  # of what was to be int8


def test_sensitivity_puts_the_worst_layer_first(plain_fashion_bundle: Path) -> None:
    groups = measure_sensitivity(plain_fashion_bundle, HELD_OUT, QuantizeOptions(samples=8))

    # Its scores reach 700, so that a step of its int8 moves a softmax.
    assert groups[0].group == "encoder.cross_attentions.0.attention.key"
    assert len(groups) == 29
    assert sum(one.share for one in groups) == pytest.approx(1.0)


@pytest.mark.usefixtures("untimed")
def test_three_samples_one_class_and_random_data_are_told(
    fashion_bundle: Path, small_bundle: SmallBundle, tmp_path: Path
) -> None:
    shirts = pictures(tmp_path / "shirts.npz", slice(3), of_class=6, source=HELD_OUT)
    few = quantize(fashion_bundle, shirts, tmp_path / "few")
    random = quantize(small_bundle("points"), "random", tmp_path / "random", QuantizeOptions(samples=4))

    assert any(note.startswith("only 3 calibration samples") for note in few.manifest.notes)
    assert any("same label, 'Shirt'" in note for note in few.manifest.notes)
    assert any("random numbers" in note for note in random.manifest.notes)
    assert random.manifest.quantization is not None
    assert random.manifest.quantization.random_data


@pytest.mark.usefixtures("untimed")
def test_a_cpu_without_vnni_gets_seven_bits_or_a_refusal(
    int8: Bundle, fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    eight = Path(shutil.copytree(int8.path, tmp_path / "eight"))
    manifest = (eight / "manifest.json").read_text(encoding="utf-8")  # which on such a CPU says 7
    (eight / "manifest.json").write_text(manifest.replace('"weight_bits": 7', '"weight_bits": 8'), encoding="utf-8")
    monkeypatch.setattr("perceiver_export.runtimes.machine.saturates", lambda: True)
    with pytest.raises(DeviceError, match="no VNNI"):
        load(eight)
    seven = quantize(fashion_bundle, HELD_OUT, tmp_path / "seven", QuantizeOptions(samples=8))

    assert seven.manifest.quantization is not None
    assert seven.manifest.quantization.weight_bits == 7
    with load(seven) as runtime:
        assert np.isfinite(runtime.run({"image": np.zeros((1, 3, 28, 28), np.float32)})["logits"]).all()


@pytest.mark.usefixtures("untimed")
def test_a_generator_is_read_once_and_may_be_short(small_bundle: SmallBundle, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    samples = ({"points": generator.normal(size=(20, 3)).astype(np.float32)} for _ in range(5))
    calibration = read_calibration(quantize(small_bundle("points"), samples, tmp_path / "out"))

    assert calibration is not None
    assert calibration.data.samples == 5
    with pytest.raises(DataError, match="no samples"):
        quantize(small_bundle("points"), samples, tmp_path / "again")


def test_a_precision_that_the_engine_cannot_compile_is_not_compared(
    small_bundle: SmallBundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As OpenVINO's fp16 with int8 queries without a bias, on CPUs that compute in fp16."""
    source = small_bundle("points")

    def open_no_int8_in_fp16(path: Path, target: str, threads: Any, options: Any, *rest: Any) -> Any:
        if options.precision == "fp16" and source not in path.parents:
            raise DeviceError("cannot compile", "")
        return open_engine(path, target, threads, options, *rest)

    monkeypatch.setattr(engines, "open_engine", open_no_int8_in_fp16)
    monkeypatch.setattr(openvino, "precisions", lambda target: ("fp16",))
    quantized = quantize(source, "random", tmp_path / "int8", quantizing(samples=2))

    record = read_calibration(quantized)
    assert record is not None
    assert {one.target: set(one.others) for one in record.speeds} == {"ort-cpu": set(), "openvino-cpu": {"fp16"}}


@pytest.mark.usefixtures("untimed")
def test_the_same_data_gives_the_same_bytes(int8_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    again = quantize(fashion_bundle, HELD_OUT, tmp_path / "again", QuantizeOptions(samples=32)).path
    graphs = [path.name for path in int8_bundle.iterdir() if path.suffix in (".onnx", ".weights")]
    assert len(graphs) >= 2
    for name in graphs:
        assert (again / name).read_bytes() == (int8_bundle / name).read_bytes(), name


@pytest.mark.parametrize(
    ("options", "datum"),
    [
        ({"scheme": "int2"}, "'int2'"),
        ({"scheme": "float"}, "'float'"),
        ({"method": "entropy"}, "'entropy'"),
        ({"samples": 0}, "samples is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"weight_bits": 5}, "weight_bits is 5"),
        ({"min_coverage": 120.0}, "min-coverage is 120"),
        ({"min_coverage": 0.97}, "97?"),
        ({"precision": {"*": "int3"}}, "'int3'"),
        ({"keep_float": "decoder.*"}, "'decoder.*'"),
    ],
)
def test_options_that_make_no_sense_cannot_be_made(options: dict[str, Any], datum: str) -> None:
    with pytest.raises(UsageError) as caught:
        QuantizeOptions(**options)
    assert datum in str(caught.value)


NAN = [{"image": np.full((3, 28, 28), np.nan, np.float32)}]


@pytest.mark.parametrize(
    ("options", "data", "error", "datum"),
    [
        ({"keep_float": ["nonsense"]}, HELD_OUT, UsageError, "'nonsense'"),
        ({"keep_float": ["*"]}, HELD_OUT, UsageError, "all layers stay float"),
        ({"precision": {"*": "float"}}, HELD_OUT, UsageError, "all layers stay float"),
        ({"max_drop": 1.0}, [{}], UsageError, "data that can be read twice"),
        ({"max_drop": 1.0}, "random", UsageError, "random numbers"),
        ({"metric": "kl"}, HELD_OUT, UsageError, "--metric has no effect without --max-metric-change"),
        ({"metric": "nonsense", "max_metric_change": 0.1}, HELD_OUT, UsageError, "no metric 'nonsense'"),
        ({}, "nowhere.npz", DataError, "nowhere.npz"),
        ({}, [], DataError, "no samples"),
        ({}, NAN, DataError, "the data[0]: 'image' contains NaN"),  # what else DATA may not be is in test_data
    ],
)
def test_options_and_data_that_do_not_fit_the_bundle_are_refused(
    options: dict[str, Any], data: Any, error: type[Exception], datum: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    ran: list[str] = []
    with pytest.raises(error) as caught:
        quantize(
            fashion_bundle, data, tmp_path / "out", quantizing(**options), progress=lambda what, *_: ran.append(what)
        )
    assert datum in str(caught.value)
    assert ran == [] or error is DataError
    assert not (tmp_path / "out").exists()


def test_bundles_that_cannot_be_quantized_are_refused(int8_bundle: Path, fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="already quantized"):
        quantize(int8_bundle, HELD_OUT, tmp_path / "twice")
    with pytest.raises(BundleExistsError):
        quantize(fashion_bundle, HELD_OUT, int8_bundle)
    with pytest.raises(BundleError, match="nothing"):
        quantize(tmp_path / "nothing", HELD_OUT, tmp_path / "out")
    shutil.copytree(int8_bundle, tmp_path / "damaged")
    (tmp_path / "damaged" / "calibration.json").write_text("{}")
    with pytest.raises(BundleError, match=r"calibration\.json"):
        read_calibration(Bundle(tmp_path / "damaged", open_bundle(int8_bundle).manifest))


@pytest.mark.usefixtures("untimed")
@pytest.mark.parametrize(
    ("place", "name", "raised", "expected"),
    [
        (Observer, "run", KeyboardInterrupt(), KeyboardInterrupt),
        (files, "sync", OSError(errno.ENOSPC, "No space left on device"), ExportError),
    ],
)
def test_an_interrupted_run_and_a_full_disk_leave_nothing(
    place: object, name: str, raised: BaseException, expected: type[BaseException], fashion_bundle: Path, tmp_path: Path
) -> None:
    with mock.patch.object(place, name, side_effect=raised), pytest.raises(expected):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", QuantizeOptions(samples=4))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("row", [0, 3, 5])
def test_nan_in_one_row_of_a_tensor_is_found(row: int, tmp_path: Path) -> None:
    """onnxruntime's reductions pass over a NaN that is not in the first row, so bounds alone do not show it."""
    text = """
    one (float[1, 6, 16] x, float[16, 16] w) => (float[1, 6, 16] y) { l = Log (x)  y = MatMul (l, w) }
    """
    model = build(text)
    observer = Observer(save(model, tmp_path), 1)
    rows = np.ones((1, 6, 16), np.float32)
    rows[0, row, 2] = -1.0

    observer.run({"x": np.ones_like(rows)})
    with pytest.raises(DataError, match="NaN or infinity in y"):
        observer.run({"x": rows})
    assert np.isfinite(observer.statistics.activations["l"].largest).all()
