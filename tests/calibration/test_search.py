# SPDX-License-Identifier: Apache-2.0
"""Mixed precision: the ladder and the fixed sequence by themselves, rungs on trial, and the search as a whole."""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import onnx_ir as ir
import pytest

from perceiver_export.calibration import QuantizeOptions, measure_layer_errors, search
from perceiver_export.calibration.lowering.onnxruntime import LOWERINGS
from perceiver_export.calibration.lowering.tensorrt import lower_bundle
from perceiver_export.calibration.quantization import search as search_module
from perceiver_export.calibration.quantization.search import Trials, climb, fixed_order, fixed_sequence
from perceiver_export.calibration.quantization.sensitivity import Ladder, Step, mixtures, order_steps
from perceiver_export.calibration.quantization.statistics import observe
from perceiver_export.exporter import export
from perceiver_export.runtimes import errors, open_bundle
from perceiver_export.runtimes.benchmark import Bench, bench
from perceiver_export.runtimes.certificates import certificates
from perceiver_export.runtimes.engines import openvino
from tests.calibration.asked import HELD_OUT, judged, pictures, quantizing
from tests.calibration.cancelling_units import LAYER, with_cancelling_units
from tests.calibration.damaged_scales import with_a_scale_times

pytestmark = pytest.mark.usefixtures("one_process_in_module")


def _quiet(what: str, done: int, total: int) -> None: ...


def test_steps_come_by_what_they_take_from_the_noise() -> None:
    steps = order_steps({"a": 1.0, "b": 0.5, "c": 0.3}, {"a": 0.1, "b": 0.01, "c": 0.2})

    # Most of c's noise is that of its weights, so int8 weights are not worth a rung.
    assert [step[:2] for step in steps] == [
        ("a", "int8-weights"),
        ("b", "int8-weights"),
        ("c", "float"),
        ("a", "float"),
        ("b", "float"),
    ]
    assert [step.effect for step in steps] == pytest.approx([0.9, 0.49, 0.3, 0.1, 0.01])
    assert [step.scheme for step in order_steps({"a": 0.1}, {})] == ["float"]


def test_each_rung_is_the_one_before_with_one_layer_back_and_none_is_all_float() -> None:
    steps = (Step("a", "int8-weights", 3.0), Step("b", "float", 2.0), Step("a", "float", 1.0))

    assert mixtures({"a": "int8", "b": "int8"}, steps) == [
        {"a": "int8", "b": "int8"},
        {"a": "int8-weights", "b": "int8"},
        {"a": "int8-weights", "b": "float"},
    ]


def climbed(count: int, lowest: int, gain: bool) -> list[int]:
    """The rungs that climbing asks for."""
    questions: list[int] = []

    def holds(index: int) -> bool:
        questions.append(index)
        return index >= lowest

    climb(count, holds, lambda lower, upper: gain)
    return questions


@pytest.mark.parametrize("lowest", [*range(8), 20, 44])
def test_climbing_finds_the_lowest_rung_that_holds_with_few_questions(lowest: int) -> None:
    asked = climbed(45, lowest, gain=True)

    assert min(index for index in asked if index >= lowest) == lowest
    assert len(asked) == len(set(asked)) <= 2 * math.log2(45) + 3
    assert lowest == 44 or any(index > lowest for index in asked)  # a safer candidate
    assert lowest == 0 or lowest - 1 in asked


@pytest.mark.parametrize(
    ("count", "lowest", "questions"),
    [(5, 5, [0, 1, 2, 4]), (45, 20, [0, 1, 2, 4, 8, 16, 32, 44]), (1, 0, [0]), (1, 1, [0]), (2, 0, [0, 1])],
)
def test_climbing_ends_where_nothing_holds_or_nothing_is_to_gain(count: int, lowest: int, questions: list[int]) -> None:
    assert climbed(count, lowest, gain=False) == questions


@pytest.mark.parametrize(
    ("costs", "held", "least_gain", "order"),
    [
        ([0.4, 0.5, 0.6], [True, True, True], 0.0, [2, 1, 0]),
        ([0.4, 0.5, 0.6], [False, True, True], 0.0, [2, 1]),
        ([0.4, 0.7, 0.6], [False, True, True], 0.0, [2]),
        ([0.4, 0.6, 0.6], [True, True, True], 0.0, [2, 0]),
        ([0.58, 0.595, 0.6], [True, True, True], 0.02, [2, 0]),
        ([0.4], [False], 0.0, []),
    ],
)
def test_the_safest_is_tested_first_and_what_gains_too_little_never(
    costs: list[float], held: list[bool], least_gain: float, order: list[int]
) -> None:
    assert fixed_order(dict(enumerate(costs)), dict(enumerate(held)), least_gain) == order


def test_a_fixed_sequence_stops_at_the_first_that_fails_and_keeps_the_error_rate() -> None:
    questions: list[int] = []

    def holds(index: int) -> bool:
        questions.append(index)
        return index != 1

    assert fixed_sequence([2, 1, 0], holds) == 2
    assert questions == [2, 1]
    assert fixed_sequence([1, 2], holds) is fixed_sequence([], holds) is None
    # Every rung is on the margin, so certifying any is wrong: it happens in 5 %, however many rungs there are.
    generator = np.random.default_rng(0)
    wrong = sum(fixed_sequence(range(6), lambda index: generator.uniform() < 0.05) is not None for _ in range(4000))
    assert wrong / 4000 < 0.06


def test_layers_kept_float_are_float_in_every_rung_and_no_part_of_the_ladder(
    fashion_bundle: Path, tmp_path: Path
) -> None:
    """Layers that went back to float are fp16 where TensorRT is built so, but for what would overflow."""
    tail = "decoder.cross_attention.mlp.hidden"
    kept = ["encoder.self_attentions.0.[12].*", "encoder.cross_attentions.*"]
    options = QuantizeOptions(precision={tail: "int8-weights"}, keep_float=kept, weight_bits=7, smooth=False, samples=8)
    source = open_bundle(fashion_bundle)
    ladder = Ladder(source, observe(source, HELD_OUT, options, _quiet), options, _quiet)
    last = len(ladder.rungs) - 1
    ladder.build(last, tmp_path / "last")
    strong = lower_bundle(tmp_path / "last", "fp16")

    assert not any(group.startswith(("encoder.self_attentions.0.1", "encoder.cross")) for group in ladder.rungs[0])
    assert ladder.rungs[0][tail] == "int8-weights"
    quantization = open_bundle(tmp_path / "last").manifest.quantization
    assert quantization is not None
    assert quantization.weight_bits == 7
    back = {group for group, scheme in ladder.rungs[last].items() if scheme == "float"}
    assert {quantization.kept_float[name] for name in back} == {"chosen by the search"}
    asked = {why for name, why in quantization.kept_float.items() if name.startswith("encoder.self_attentions.0.1.")}
    assert asked == {"requested"}
    graph = ir.load(tmp_path / "last" / "model.tensorrt-fp16.onnx").graph
    products = [node for node in graph if node.op_type == "MatMul" and (node.name or "").split("/")[0] in back]
    assert len(products) >= len(back) - 1
    wide = {node.name for node in products if node.inputs[1] and node.inputs[1].dtype != ir.DataType.FLOAT16}
    assert wide <= set(strong.kept["model"])
    assert len(wide) < len(products) / 4


class Ready:
    """A ladder whose rungs are made: bundles, the riskiest first."""

    def __init__(self, bundles: Sequence[Path]) -> None:
        self.rungs = bundles

    def raised(self, index: int) -> dict[str, str]:
        return {f"layer {number}": "float" for number in range(index)}

    def build(self, index: int, path: Path) -> None:
        shutil.copytree(self.rungs[index], path)


def on_trial(fp32: Path, folder: Path, *rungs: Path, max_drop: float = 5) -> Trials:
    options = quantizing(scheme="int8-weights", max_drop=max_drop, threads=1)
    return Trials(cast("Ladder", Ready(rungs)), open_bundle(fp32), options, ("ort-cpu",), folder, "mixed", _quiet)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Files with some of the test images each."""
    folder = tmp_path_factory.mktemp("splits")
    ends = {"calibrate": (0, 24), "search_on": (24, 174), "certify_on": (174, 374)}
    ends |= {"few": (0, 100), "very few": (174, 194)}
    return {name: pictures(folder / f"{name}.npz", slice(*both)) for name, both in ends.items()}


@pytest.fixture
def splits(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: rows[name] for name in ("calibrate", "search_on", "certify_on")}


@pytest.fixture
def few(rows: dict[str, Any]) -> Path:
    path: Path = rows["few"]
    return path


def test_a_rung_with_nan_does_not_hold_and_the_search_goes_on(
    nan_bundle: Path, int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    trials = on_trial(fashion_bundle, tmp_path, nan_bundle, int8_bundle)
    order = trials.search(few, 0.0)
    kept, evidence = trials.certify(order, few)

    assert (order, kept) == ([1], 1)
    assert [said.partition(":")[0] for said in trials.rungs[0].search] == ["failed"]
    assert evidence[0].held
    assert not trials.path(0).exists()
    # An overflow may be in the second split only: NaN in certification is no pass.
    shutil.rmtree(trials.path(1))
    shutil.copytree(nan_bundle, trials.path(1))
    with pytest.raises(errors.GateError, match="not certified"):
        trials.certify([1], few)


def test_a_mixture_that_is_no_smaller_is_not_worth_it_and_a_tie_is_not_faster(
    fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    """The float bundle itself as a rung."""
    trials = on_trial(fashion_bundle, tmp_path, fashion_bundle)
    with pytest.raises(errors.GateError, match="smaller than the float bundle"):
        trials.search(few, 0.0)
    (time,) = trials.rungs[0].times
    assert time.quartiles[0] <= time.ratio <= time.quartiles[1]
    assert (time.against, list(trials.best)) == ("fp32", ["ort-cpu"])
    cases = [(0.9, ""), (1.1, ""), (0.9, "busy")]
    faster = [msgspec.structs.replace(time, quartiles=(0.8, high), unsteady=why).faster for high, why in cases]
    assert faster == [True, False, False]


def test_a_rung_is_timed_and_held_in_its_own_fastest_precision(
    int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here fp16, which every CPU takes."""
    monkeypatch.setattr(openvino, "precisions", lambda target: ("fp16",))
    monkeypatch.setattr(search_module, "fastest_precision", lambda measured: "fp16")
    monkeypatch.setattr(search_module.Time, "faster", True)
    trials = on_trial(fashion_bundle, tmp_path, int8_bundle)
    trials.targets, trials.options = ("openvino-cpu",), replace(trials.options, scheme="int8")
    order = trials.search(few, 0.0)
    (evidence,) = trials.certify(order, few)[1]

    assert [(time.precision, time.against) for time in trials.rungs[0].times] == [("fp16", "fp16")]
    assert evidence.candidate["precision"] == "int8 with fp16"


def test_the_float_side_is_measured_until_it_is_steady_and_then_the_same_for_all_rungs(
    nan_bundle: Path, int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    measured: list[Bench] = []

    def at_first_unsteady(*given: Any, **how: Any) -> Bench:
        found = bench(*given, **how)
        if how.get("precision") == "auto":
            sides = 2 * found.measurements  # of two precisions
            found = msgspec.structs.replace(found, measurements=sides, unsteady="" if measured else "busy")
            measured.append(found)
        return found

    monkeypatch.setattr(search_module, "bench", at_first_unsteady)
    trials = on_trial(fashion_bundle, tmp_path, nan_bundle, int8_bundle)
    trials.search(few, 0.0)

    assert len(measured) == 2
    assert trials.best == {"ort-cpu": measured[1]}


def test_a_safer_mixture_that_is_not_worth_it_hides_no_other(
    int8_bundle: Path, fashion_bundle: Path, few: Path, tmp_path: Path
) -> None:
    """int8 does not save 90 % of the float bundle's size, but that is no candidate itself."""
    assert on_trial(fashion_bundle, tmp_path, int8_bundle, fashion_bundle).search(few, 0.9) == [0]


@pytest.mark.parametrize(
    ("reference", "rungs", "max_drop", "error"),
    [
        ("fashion_bundle", ["nan_bundle"], 5, errors.GateError),
        ("nan_bundle", ["int8_bundle", "int8_bundle"], 5, errors.BrokenReferenceError),  # no rung could ever hold
        ("nan_bundle", ["nan_bundle"], 5, errors.BrokenReferenceError),
        ("fashion_bundle", ["int8_bundle"], 0.1, errors.UndecidedError),  # too few samples
    ],
)
def test_where_no_rung_holds_the_error_says_why(
    reference: str, rungs: list[str], max_drop: float, error: type, few: Path, tmp_path: Path, request: Any
) -> None:
    fp32, *bundles = (request.getfixturevalue(name) for name in (reference, *rungs))
    trials = on_trial(fp32, tmp_path, *bundles, max_drop=max_drop)
    with pytest.raises(error) as caught:
        trials.search(few, 0.0)
    assert type(caught.value) is error
    assert not trials.path(1).exists()


def test_the_worst_layer_comes_first(
    nan_bundle: Path, int8_bundle: Path, fashion_bundle: Path, thousand: Path, tmp_path: Path
) -> None:
    group = "encoder.self_attentions.0.1.mlp.output"
    ruined = with_a_scale_times(64.0, group, int8_bundle, tmp_path / "ruined")
    result = judged(ruined, thousand, against=fashion_bundle, samples=200, max_drop=1, min_agreement=97)
    worst = measure_layer_errors(ruined, fashion_bundle, thousand)[0]

    assert [gate.outcome for gate in result.gates].count("held") == 0
    with pytest.raises(errors.GateError):
        result.require()
    assert worst.group == group
    assert worst.sqnr == pytest.approx(-36, abs=1)  # an error of 63 times the signal
    assert measure_layer_errors(int8_bundle, fashion_bundle, thousand)[0].sqnr > 10
    assert measure_layer_errors(nan_bundle, fashion_bundle, thousand, samples=2)[0].sqnr == -200.0


def test_a_layer_that_must_not_be_int8_goes_back(
    splits: dict[str, Any], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Among the layers of a block and those around it; of all of them it is found in `search_seeds.py`."""
    cancelling = export(with_cancelling_units(), tmp_path_factory.mktemp("search") / "model").path
    others = ["encoder.self_attentions.0.0.*", "encoder.self_attentions.0.2.*", "decoder.*"]
    options = quantizing(keep_float=others, samples=16, max_drop=6, min_agreement=90)

    found = search(cancelling, tmp_path / "mixed", options, for_size=True, **splits)

    assert [rung.step for rung in found.rungs] == [0, 1, 2]
    assert found.rungs[0].precision == {}
    assert not all(said.startswith("PASS") for said in found.rungs[0].search)
    kept = found.rungs[found.kept]
    assert next(iter(kept.precision)) == found.ranking[0].group == f"{LAYER}.output"
    assert all(said.startswith("PASS") for said in kept.certification)
    for rung in found.rungs:
        assert [time.target for time in rung.times] == ["ort-cpu"]
        assert rung.time == pytest.approx(rung.times[0].ratio)
        assert rung.times[0].milliseconds > 0
        assert 0.7 < rung.size < 0.95  # most layers are float
    bundle = open_bundle(tmp_path / "mixed", verify="always")
    assert certificates(bundle) == found.certificates
    assert bundle.manifest.name == "mixed"
    assert found.certificates[0].samples == 200
    with pytest.raises(errors.DataError, match=r"150 of 150 samples"):
        judged(bundle, splits["search_on"], against=cancelling, max_drop=5, certify=True)
    assert list(tmp_path.iterdir()) == [tmp_path / "mixed"]


@pytest.mark.parametrize(
    ("options", "how", "error", "datum"),
    [
        ({"max_drop": None}, {}, errors.UsageError, "max-drop"),
        ({"keep_float": ["head"]}, {}, errors.UsageError, "'head'"),
        ({"keep_float": ["*"]}, {}, errors.UsageError, "all layers stay float"),
        ({"max_drop": None, "metric": "epe", "max_metric_change": 1}, {}, errors.UsageError, "'epe'"),
        ({"metric": "kl"}, {}, errors.UsageError, "--metric"),
        ({}, {"least_gain": 100.0}, errors.UsageError, "least-gain is 100"),
        ({}, {"least_gain": 0.02}, errors.UsageError, "2?"),
        ({}, {"device": "tpu"}, errors.DeviceError, "'tpu'"),
        ({}, {"device": "tensorrt-rtx"}, errors.DeviceError, "tensorrt-rtx"),
        ({}, {"calibrate": "random"}, errors.DataError, "random"),
        ({}, {"certify_on": "search_on"}, errors.DataError, "150 of 150 samples"),
    ],
)
def test_a_search_refuses_what_it_cannot_do(
    options: dict[str, Any], how: Any, error: type, datum: str, fashion_bundle: Path, splits: Any, tmp_path: Path
) -> None:
    how = {name: splits.get(value, value) for name, value in how.items()}
    asked = {"max_drop": 5, "samples": 8, **options}
    with pytest.raises(error) as caught:
        search(fashion_bundle, tmp_path / "mixed", quantizing(**asked), **{**splits, **how})
    assert datum in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("coverage", "error"), [(100.0, errors.GateError), (0, errors.UndecidedError)])
def test_coverage_counts_and_what_held_on_one_split_must_hold_on_the_other(
    coverage: float, error: type, fashion_bundle: Path, rows: Any, splits: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """Without its lowering ONNX Runtime computes in float, and 20 samples certify nothing."""
    monkeypatch.setitem(LOWERINGS, "ort-cpu", lambda model: None)
    kept = ["encoder.cross_attentions.*", "encoder.self_attentions.0.[01].*", "decoder.*"]
    options = quantizing(samples=8, max_drop=5, keep_float=kept, min_coverage=coverage)
    how = {**splits, "certify_on": rows["very few"], "for_size": True}  # in float it is not faster
    with pytest.raises(error) as caught:
        search(fashion_bundle, tmp_path / "mixed", options, **how)
    assert type(caught.value) is error
    assert list(tmp_path.iterdir()) == []
