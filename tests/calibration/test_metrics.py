# SPDX-License-Identifier: Apache-2.0
"""Metrics of every family by hand or by another library's numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from perceiver_export.calibration.data.samples import Example
from perceiver_export.calibration.validation.metrics.base import Columns, Family
from perceiver_export.calibration.validation.metrics.classification import (
    MultiLabel,
    SingleLabel,
    Text,
    kl,
    mean_average_precision,
)
from perceiver_export.calibration.validation.metrics.own import load_own
from perceiver_export.calibration.validation.metrics.values import (
    Arrays,
    Flow,
    Reconstruction,
    Regression,
    cosine,
    sqnr,
)
from perceiver_export.calibration.validation.scores import Scores, estimate, value_of
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.tasks.video import psnr

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(0, 3, (200, 10)).astype(np.float32)
OTHERS = LOGITS + GENERATOR.normal(0, 1, LOGITS.shape).astype(np.float32)
LABELS = GENERATOR.integers(0, 10, 200)


def test_kl_is_scipys() -> None:
    expected = stats.entropy(special.softmax(LOGITS, 1), special.softmax(OTHERS, 1), axis=1)

    assert kl(LOGITS, OTHERS) == pytest.approx(expected, abs=1e-5)
    assert (kl(LOGITS, LOGITS) == 0).all()


def test_top_1_and_top_5_are_those_of_a_sort() -> None:
    order = np.argsort(-LOGITS, axis=1)
    columns = SingleLabel("logits").quality({"logits": LOGITS}, {"label": LABELS})

    for name, k in (("top-1", 1), ("top-5", 5)):
        assert columns[name].values.tolist() == (order[:, :k] == LABELS[:, None]).any(axis=1).tolist()
    tied = SingleLabel("logits").quality({"logits": np.zeros((2, 7), np.float32)}, {"label": np.array([4, 5])})
    assert tied["top-5"].values.tolist() == [1, 0]
    assert "top-5" not in SingleLabel("logits").quality({"logits": LOGITS[:, :5]}, {"label": np.minimum(LABELS, 4)})


def test_agreement_counts_flips_that_accuracy_hides() -> None:
    one, other = np.eye(4, dtype=np.float32)[[0, 1]], np.eye(4, dtype=np.float32)[[1, 0]]

    assert SingleLabel("logits").likeness({"logits": one}, {"logits": other}, {})["agreement"].values.tolist() == [0, 0]


def test_multi_label_by_the_definitions() -> None:
    """Values by scikit-learn 1.7 on the same numbers; the precision of ties by hand."""
    generator = np.random.default_rng(0)
    scores = np.round(generator.normal(size=(300, 6)), 1).astype(np.float32)
    truths = (generator.random((300, 6)) < [0.5, 0.3, 0.1, 0.05, 0.02, 0]).astype(np.float32)
    family = MultiLabel("tags")

    columns = family.quality({"tags": scores + truths}, {"label": truths})
    found = values(family, columns)

    expected = {"subset accuracy": 0.04, "label accuracy": 0.582222, "micro-f1": 0.401274, "macro-f1": 0.318312}
    assert found == pytest.approx(expected | {"map": 0.417781}, abs=1e-6)
    tied = np.stack([np.array([[2], [1], [1], [1], [0]]), np.array([[0], [1], [0], [1], [0]])], axis=1)
    assert mean_average_precision(tied, np.ones(5, int)) == pytest.approx(2 / 4)
    perfect = family.quality({"tags": 2 * truths - 1}, {"label": truths})
    assert values(family, perfect) == pytest.approx(dict.fromkeys(expected, 1) | {"macro-f1": 5 / 6, "map": 1})


def test_regression_by_the_definitions() -> None:
    family, (one, other) = Regression("y"), GENERATOR.normal(300, 2, (2, 90, 2)).round(1).astype(np.float32)
    columns = family.quality({"y": one}, {"label": other})
    found = values(family, columns)

    correlations = [
        [of(one[:, index], other[:, index])[0] for index in (0, 1)] for of in (stats.pearsonr, stats.spearmanr)
    ]
    assert [found["pearson"], found["spearman"]] == pytest.approx(np.mean(correlations, axis=1), abs=1e-5)
    errors = np.square(one.astype(float) - other)
    assert found["rmse"] == pytest.approx(np.sqrt(errors.mean()))
    assert found["mae"] == pytest.approx(np.abs(one.astype(float) - other).mean())
    assert found["r2"] == pytest.approx(1 - (errors.mean(axis=0) / other.astype(float).var(axis=0)).mean(), abs=1e-6)
    same = family.quality({"y": np.full((90, 2), 300.1, np.float32)}, {"label": other})
    assert [values(family, same)[name] for name in ("pearson", "spearman")] == [0, 0]
    ruined = family.likeness({"y": -3 * one + 100}, {"y": one}, {})
    assert values(family, ruined)["error"] > 3


@pytest.mark.parametrize("name", ["macro-f1", "map", "r2", "pearson", "spearman"])
def test_a_statistic_counts_a_sample_as_often_as_it_was_drawn(name: str) -> None:
    family: Family = MultiLabel("y") if name in ("macro-f1", "map") else Regression("y")
    scores = GENERATOR.normal(size=(50, 3)).round(1).astype(np.float32)
    truths = (scores + GENERATOR.normal(size=scores.shape) > 0).astype(np.float32)
    values_, rows = family.quality({"y": scores}, {"label": truths})[name].values, GENERATOR.integers(0, 50, (2, 4, 50))
    statistic = next(metric.statistic for metric in family.metrics if metric.name == name)
    assert statistic is not None

    counts = np.stack([[np.bincount(drawn, minlength=50) for drawn in row] for row in rows])

    drawn = [[statistic(values_[one], np.ones(50, int)) for one in row] for row in rows]
    assert statistic(values_, counts) == pytest.approx(np.array(drawn, float), abs=1e-6)


def values(family: Family, columns: Columns) -> dict[str, float]:
    return {
        metric.name: float(value_of(metric, columns[metric.name]))
        for metric in family.metrics
        if metric.name in columns
    }


def test_text_is_judged_at_masked_positions_only_and_by_their_number() -> None:
    logits = np.zeros((2, 4, 6), np.float32)
    logits[0, 1, 3] = logits[1, 0, 2] = 5.0
    targets = np.array([[-1, 3, -1, -1], [2, 4, 5, -1]])
    metrics = {metric.name: metric for metric in Text.metrics}

    columns = Text().quality({"logits": logits}, {"tokens": targets})
    accuracy, perplexity = (
        estimate(metrics[name], columns[name]).times(metrics[name].scale).value
        for name in ("token accuracy", "perplexity")
    )

    right = 5 - np.log(np.exp(5) + 5)
    assert accuracy == pytest.approx(50.0)  # 2 of 4 bytes, not the mean of 1 and 1/3
    assert perplexity == pytest.approx(np.exp((-2 * right + 2 * np.log(6)) / 4), rel=1e-5)


@pytest.mark.parametrize(("right", "warned"), [(0, True), (1, True), (2, True), (40, False)])
def test_a_text_reference_that_guesses_is_warned_of(right: int, warned: bool) -> None:
    """One byte of 40 is as often as chance has it, of 40 choices, and of one text nobody knows whether two are oftener;
    the candidate is right always.
    """
    tokens = np.arange(40)[None]
    candidate = np.eye(40, dtype=np.float32)[None]
    reference = np.roll(candidate, 1, axis=2)
    reference[0, :right] = candidate[0, :right]
    scores = Scores((Text(),), 1, ())

    for _ in range(30):
        scores.add([Example("a", {}, {})], {"logits": candidate}, {"logits": reference}, {"tokens": tokens})
    warnings = scores.warnings()

    assert warnings.keys() == ({"chance"} if warned else set())
    if warned:
        assert warnings["chance"].startswith(
            f"the reference is no better than chance on these samples (token accuracy {2.5 * right:g} %, "
        )


def test_a_worst_text_is_shown_in_the_units_of_the_table() -> None:
    scores = Scores((Text(),), 1, ())
    tokens = np.array([[0, 7]])

    scores.add([Example("a", {}, {})], {"logits": np.zeros((1, 2, 262), np.float32)}, None, {"tokens": tokens})
    (sample,) = scores.worst.samples()

    assert sample.scores == pytest.approx({"token accuracy": 50.0, "perplexity": 262.0})
    assert sample.scores == pytest.approx({result.name: result.candidate.value for result in scores.results()})


def test_flow_errors_and_outliers_where_the_truth_is_known() -> None:
    truth = np.zeros((1, 2, 3, 2), np.float32)
    truth[0, 0, 0], truth[0, 1, 2] = (100, 0), np.nan
    found = np.zeros_like(truth)
    found[0, 0, 0], found[0, 0, 1], found[0, 0, 2] = (104, 0), (3, 4), (0, 2)

    columns = Flow().quality({"flow": found}, {"flow": truth})

    assert columns["epe"].weights.tolist() == [5]
    assert columns["epe"].values.tolist() == pytest.approx([(4 + 5 + 2) / 5])
    assert columns["outliers"].values.tolist() == pytest.approx([1 / 5])  # 4 of 100 pixels is below 5 %


def test_reconstruction_by_psnr_ssim_and_snr() -> None:
    frames = GENERATOR.uniform(size=(3, 2, 16, 16, 3)).astype(np.float32)
    sound = GENERATOR.normal(size=(3, 50, 1)).astype(np.float32)
    found = np.clip(frames + GENERATOR.normal(0, 0.05, frames.shape), 0, 1).astype(np.float32)

    columns = Reconstruction().quality({"video": found, "sound": 0.9 * sound}, {"frames": frames, "audio": sound})
    equal = Reconstruction().quality({"video": frames, "sound": sound}, {"frames": frames, "audio": sound})

    assert columns["psnr"].values[0] == pytest.approx(psnr(frames[0], found[0]), rel=1e-5)
    assert columns["sound snr"].values == pytest.approx([20, 20, 20], abs=1e-3)
    assert (columns["ssim"].values < 1).all()
    assert equal["ssim"].values == pytest.approx([1, 1, 1])
    assert (equal["psnr"].values == 100).all()


def test_arrays_by_error_sqnr_and_cosine_of_their_worst_output() -> None:
    one = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 4), np.float32)}
    other = {"a": np.ones((2, 3), np.float32), "b": np.array([[1.1] * 4, [1.0] * 4], np.float32)}

    columns = Arrays().likeness(other, one, {})

    assert columns["error"].values == pytest.approx([0.1, 0], abs=1e-6)
    assert columns["sqnr"].values == pytest.approx([20, 200], abs=1e-4)
    assert columns["cosine"].values == pytest.approx([1, 1])
    assert cosine(one["a"], -one["a"]).tolist() == pytest.approx([-1, -1])
    assert sqnr(one["a"], np.zeros((2, 3), np.float32)).tolist() == pytest.approx([0, 0])


def test_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(
        "def margin(outputs, targets):\n    top = sorted(outputs['logits'])\n    return top[-1] - top[-2]\n"
        "def loss(outputs, targets):\n    return float(outputs['logits'][targets['label']])\n"
        "def same(outputs, targets):\n    return float(outputs['logits'][targets['labels']])\n"
        "loss.better, loss.unit = 'lower', 'nats'\n"
        "def nan(outputs, targets):\n    return float('nan')\n"
        "def broken(outputs, targets):\n    return outputs['flow']\n"
        "def odd(outputs, targets):\n    return 0\n"
        "odd.better = 'left'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outputs, targets = {"logits": LOGITS[:3]}, {"label": LABELS[:3]}

    def called(name: str) -> list[float]:
        (column,) = load_own(f"own_metrics:{name}").quality(outputs, targets).values()
        return [float(value) for value in column.values]

    assert min(called("margin")) > 0
    loss = load_own("own_metrics:loss").metric
    assert (loss.better, loss.unit) == ("lower", "nats")
    assert called("loss") == called("same") == pytest.approx(LOGITS[np.arange(3), LABELS[:3]])
    with pytest.raises(DataError, match="gave nan"):
        called("nan")
    with pytest.raises(UsageError, match=r"own_metrics:broken failed: KeyError"):
        called("broken")
    for spec in ("own_metrics:odd", "own_metrics:absent", "absent:margin", "own_metrics:__name__", "own_metrics:"):
        with pytest.raises(UsageError):
            load_own(spec)
    sys.modules.pop("own_metrics", None)
