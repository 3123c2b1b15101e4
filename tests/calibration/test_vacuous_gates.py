# SPDX-License-Identifier: Apache-2.0
"""No gate can be passed by everybody: for every task and metric a ruined candidate fails, or the gate is vacuous."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import Gates, certify
from perceiver_export.calibration.data.samples import Example
from perceiver_export.calibration.validation.gates import judge
from perceiver_export.calibration.validation.metrics import families, share_of_right
from perceiver_export.calibration.validation.metrics.base import Metric
from perceiver_export.calibration.validation.metrics.own import Own, load_own
from perceiver_export.calibration.validation.scores import Scores
from perceiver_export.runtimes import load
from perceiver_export.runtimes.bundle import read_manifest
from perceiver_export.runtimes.errors import GateError, UsageError, VacuousGateError
from perceiver_export.runtimes.runtime import Array
from tests.calibration.asked import judged
from tests.calibration.linear_bundles import CASES, SAMPLES, Arrays, Case, Weights


def good(weights: Weights) -> Weights:
    return weights


def near(weights: Weights) -> Weights:
    return {name: array + np.float32(0.02) * array.std() * noise(array) for name, array in weights.items()}


def noise(array: Array) -> Array:
    """The same in every order of tests: bounds of a metric that nothing changed are those of no data."""
    return np.random.default_rng(array.size).normal(size=array.shape).astype(np.float32)


def negated(weights: Weights) -> Weights:
    return {name: -3 * array + 100 * np.float32(name.endswith("offset")) for name, array in weights.items()}


def constant(weights: Weights) -> Weights:
    return {name: array * np.float32(name.endswith("offset")) for name, array in weights.items()}


def shuffled(weights: Weights) -> Weights:
    return {name: np.random.default_rng(3).permutation(array) for name, array in weights.items()}


Change = Callable[[Weights], Weights]


class Runs:
    """The outputs of a case's models on the same inputs, each run once."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder, self.inputs = case, folder, case.feeds()
        self._found: dict[Change, Arrays] = {}
        self.good = self.outputs(good)
        self.targets = case.targets(self.inputs, self.good, np.random.default_rng(4))
        self.manifest = read_manifest(folder / "good")

    def outputs(self, change: Change) -> Arrays:
        if change not in self._found:
            path = self.case.write(self.folder / change.__name__, change(self.case.weights()))
            with load(path, device="ort-cpu") as runtime:
                self._found[change] = dict(runtime.run(self.inputs))
        return self._found[change]

    def scores(self, candidate: Arrays, reference: Arrays, targets: Arrays, own: Own | None = None) -> Scores:
        judges = (*([] if own is None else [own]), *families(self.manifest))
        scores = Scores(judges, 3, self.manifest.labels)
        scores.add([Example(str(index), {}, {}) for index in range(SAMPLES)], candidate, reference, targets)
        return scores

    def save(self, folder: Path) -> Path:
        """Inputs and labels as DATA."""
        np.savez(folder / "data.npz", **(self.inputs | self.targets))  # type: ignore[arg-type]
        return folder / "data.npz"

    def gates(self, scores: Scores) -> list[Gates]:
        """Each gate that the task can have, half as far as a model gets that ignores its input."""
        found = []
        for metric in scores.metrics:
            if metric.name in scores.measured and metric.can_worsen:
                margin = abs(scores.guessed(metric) or 0.0) / 2 * metric.scale
                found.append(Gates(max_metric_change=margin, metric=metric.name))
        found += [Gates(max_drop=12)] if share_of_right(scores.metrics) is not None else []
        return found + ([Gates(min_agreement=80)] if "agreement" in scores.measured else [])


@pytest.fixture(scope="module", params=CASES)
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(CASES[request.param], tmp_path_factory.mktemp("runs"))


def test_a_ruined_candidate_passes_no_gate(runs: Runs) -> None:
    ruined = {change.__name__: runs.outputs(change) for change in (negated, constant, shuffled)}
    passed = runs.scores(runs.outputs(near), runs.good, runs.targets)

    wanted = runs.gates(passed)
    assert wanted
    for gates in wanted:
        (gate,) = judge(gates, passed)
        assert gate.outcome == "held", str(gate)
    assert "chance" not in passed.warnings()
    for name, outputs in ruined.items():
        scores = runs.scores(outputs, runs.good, runs.targets)
        for gates in wanted:
            (gate,) = judge(gates, scores)
            assert not gate.held, f"{name}: {gate}"


def test_a_reference_that_guesses_lets_no_gate_pass(runs: Runs) -> None:
    """One that always says the same: every gate is vacuous. Shuffled targets: it is no better than chance."""
    same = runs.outputs(constant)
    near_by = {name: array + 1e-7 * np.float32(noise(array).flat[0]) for name, array in same.items()}

    scores = runs.scores(near_by, same, runs.targets)
    for gates in runs.gates(scores):
        (gate,) = judge(gates, scores)
        assert gate.outcome == "vacuous" or (gate.outcome == "not held" and not gates.change), str(gate)
    if runs.targets:
        assert "chance" in scores.warnings()
        order = np.random.default_rng(5).permutation(SAMPLES)
        mixed = {name: array[order] for name, array in runs.targets.items()}
        assert "chance" in runs.scores(runs.outputs(near), runs.good, mixed).warnings()


def test_a_regression_is_not_certified_by_agreement_nor_on_a_metric_that_is_blind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fault that was reported: the last weights times −3 and shifted by 100 was certified."""
    runs = Runs(CASES["values of arrays"], tmp_path)
    ruined = runs.case.write(tmp_path / "ruined", negated(runs.case.weights()))
    data = runs.save(tmp_path)
    (tmp_path / "blind_metrics.py").write_text(
        "def blind(outputs, targets):\n    return 1.0\n"
        "def size(outputs, targets):\n    return float(abs(outputs['y']).sum())\n"
        "size.better = 'lower'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    for gates in ({"min_agreement": 90}, {"max_drop": 5}):
        with pytest.raises(UsageError, match="does not fit this task"):
            judged(ruined, data, against=tmp_path / "good", **gates)
    found = judged(ruined, data, against=tmp_path / "good", metric="blind_metrics:blind", max_metric_change=1)
    with pytest.raises(VacuousGateError, match="does not depend on the outputs"):
        certify(ruined, [found])
    error = judged(ruined, data, against=tmp_path / "good", metric="error", max_metric_change="2%")
    with pytest.raises(GateError, match=r"^FAIL  error ≤ 2 %"):
        certify(ruined, [error])
    size = load_own("blind_metrics:size")
    size.seen(runs.good, {})
    assert size.reads("blind_metrics:size", tuple(runs.good)) == ("y",)
    sys.modules.pop("blind_metrics", None)


def absolute_error(outputs: Arrays, targets: Arrays) -> float:
    return float(np.abs(outputs["y"] - targets["label"]).mean())


def near_zero(outputs: Arrays, targets: Arrays) -> float:
    return float(np.abs(outputs["y"]).mean())


def not_zero(outputs: Arrays, targets: Arrays) -> float:
    """Of no meaning at zeros, which it fails for; it writes into what it is given."""
    if not outputs["y"].any():
        raise ZeroDivisionError
    outputs["y"] -= targets["label"]
    return float(np.abs(outputs["y"]).mean())


@pytest.mark.parametrize(
    ("function", "change", "outcome"),
    [
        (absolute_error, 0.2, "held"),
        (absolute_error, 10.0, "vacuous"),  # always the mean of each output is no worse
        (near_zero, 0.2, "vacuous"),
        (not_zero, 0.2, "held"),
        (not_zero, 10.0, "vacuous"),
    ],
)
def test_an_own_metric_that_a_constant_answer_passes_is_vacuous(
    function: Callable[..., float], change: float, outcome: str, tmp_path: Path
) -> None:
    runs = Runs(CASES["values of arrays"], tmp_path)
    own = Own(Metric(f"mine:{function.__name__}", "quality", "lower"), function)
    near_by = runs.outputs(near)

    scores = runs.scores(near_by, runs.good, runs.targets, own)
    (gate,) = judge(Gates(max_metric_change=change, metric=own.metric.name), scores)

    assert gate.outcome == outcome, str(gate)


@pytest.mark.parametrize("order", ["sorted", "in turn"])
def test_the_naive_models_of_an_own_metric_are_judged_by_few_samples_of_all(order: str) -> None:
    """Sorted data: by the first samples alone, a model that always says 0 would seem right."""
    calls = []

    def right(outputs: Arrays, targets: Arrays) -> float:
        calls.append(1)
        return float(outputs["y"] == targets["label"])

    own, labels = Own(Metric("mine:right", "quality", "higher"), right), np.repeat(np.arange(4), 5_000)
    labels = labels if order == "sorted" else labels.reshape(4, -1).T.ravel()
    seen: dict[str, Any] = {}
    for start in range(0, len(labels), 100):
        batch = labels[start : start + 100]
        found = own.seen({"y": batch.astype(np.float32)}, {"label": batch})
        seen = {name: seen.get(name, 0) + value for name, value in found.items()}

    assert own.naive(seen, ())[1] == {"mine:right": pytest.approx(0.25, abs=0.01)}
    assert len(calls) < 3 * 4_000


def test_a_gate_on_an_output_that_is_always_the_same_is_vacuous(tmp_path: Path) -> None:
    """The reference's other output varies: only gates that read the constant one say nothing."""
    runs = Runs(CASES["one of arrays"], tmp_path)
    same = np.broadcast_to(runs.good["logits"][:1], runs.good["logits"].shape)
    near_by = runs.outputs(near) | {"logits": same + 0.01 * noise(same)}

    scores = runs.scores(near_by, {**runs.good, "logits": same}, runs.targets)
    (by_logits,) = judge(Gates(max_metric_change=1, metric="kl"), scores)
    (by_all,) = judge(Gates(max_metric_change=20, metric="error"), scores)

    assert (by_logits.outcome, by_all.outcome) == ("vacuous", "held")
    assert "the same 'logits' for all samples" in by_logits.vacuous


def test_what_no_gate_looks_at_is_a_reservation(tmp_path: Path) -> None:
    runs = Runs(CASES["one of arrays"], tmp_path)
    good = runs.case.weights()
    candidate = near(good) | {"embedding.weight": -3 * good["embedding.weight"]}
    path = runs.case.write(tmp_path / "candidate", candidate)
    data = runs.save(tmp_path)

    by_labels = judged(path, data, against=tmp_path / "good", min_agreement=90)
    by_all = judged(path, data, against=tmp_path / "good", metric="error", max_metric_change=20)

    (gate,) = by_labels.gates
    assert gate.outcome == "held"
    assert gate.reservations == ("no gate depends on 'embedding': it could be anything",)
    (made,) = certify(path, [by_labels])
    assert made.caveats == gate.reservations
    assert [one.outcome for one in by_all.gates] == ["not held"]
    assert "unread" not in by_all.warning_kinds
