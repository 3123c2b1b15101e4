# SPDX-License-Identifier: Apache-2.0
"""Metrics of every family by hand or by another library's numbers."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import special, stats

from perceiver_export.calibration.examples import Example
from perceiver_export.calibration.masking import mask_tokens
from perceiver_export.calibration.metrics import arrays, classification, flow, reconstruction, text
from perceiver_export.calibration.metrics.base import cosine, kl, sqnr
from perceiver_export.calibration.metrics.own import load_own
from perceiver_export.calibration.pairing import Pairing
from perceiver_export.calibration.scores import measure
from perceiver_export.runtimes.byte_tokenizer import FIRST_BYTE, MASK
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.tasks.video_autoencoding import psnr

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
    columns = classification.quality({"logits": LOGITS}, {"label": LABELS})

    for name, k in (("top-1", 1), ("top-5", 5)):
        assert columns[name].values.tolist() == (order[:, :k] == LABELS[:, None]).any(axis=1).tolist()
    tied = classification.quality({"logits": np.zeros((2, 7), np.float32)}, {"label": np.array([4, 5])})
    assert tied["top-5"].values.tolist() == [1, 0]
    assert "top-5" not in classification.quality({"logits": LOGITS[:, :5]}, {"label": np.minimum(LABELS, 4)})


def test_agreement_counts_flips_that_accuracy_hides() -> None:
    one, other = np.eye(4, dtype=np.float32)[[0, 1]], np.eye(4, dtype=np.float32)[[1, 0]]

    assert classification.likeness({"logits": one}, {"logits": other}, {})["agreement"].values.tolist() == [0, 0]


def test_text_is_judged_at_masked_positions_only_and_by_their_number() -> None:
    logits = np.zeros((2, 4, 6), np.float32)
    logits[0, 1, 3] = logits[1, 0, 2] = 5.0
    targets = np.array([[-1, 3, -1, -1], [2, 4, 5, -1]])
    metrics = {metric.name: metric for metric in text.METRICS}

    columns = text.quality({"logits": logits}, {"tokens": targets})
    accuracy = measure(metrics["token accuracy"], columns["token accuracy"], None).candidate.value
    perplexity = measure(metrics["perplexity"], columns["perplexity"], None).candidate.value

    right = 5 - np.log(np.exp(5) + 5)
    assert accuracy == pytest.approx(50.0)  # 2 of 4 bytes, not the mean of 1 and 1/3
    assert perplexity == pytest.approx(np.exp((-2 * right + 2 * np.log(6)) / 4), rel=1e-5)


@pytest.mark.parametrize(("right", "warned"), [(0, True), (1, True), (2, False), (40, False)])
def test_a_text_reference_that_guesses_is_warned_of(right: int, warned: bool) -> None:
    """One byte of 40 is as often as chance has it, of 40 choices; the candidate is right always."""
    tokens = np.arange(40)[None]
    candidate = np.eye(40, dtype=np.float32)[None]
    reference = np.roll(candidate, 1, axis=2)
    reference[0, :right] = candidate[0, :right]
    pairing = Pairing(text, None, 1, ())

    pairing.add([Example("a", {}, {})], {"logits": candidate}, {"logits": reference}, {"tokens": tokens})
    warnings = pairing.scores().warnings(300, 0)

    assert warnings.keys() == ({"chance"} if warned else set())
    if warned:
        assert warnings["chance"].startswith(f"the reference is no better than chance ({2.5 * right:.1f} % right, 40 ")


def test_a_worst_text_is_shown_in_the_units_of_the_table() -> None:
    pairing = Pairing(text, None, 1, ())
    logits = np.zeros((1, 2, 262), np.float32)

    pairing.add([Example("a", {}, {})], {"logits": logits}, None, {"tokens": np.array([[0, 7]])})
    table = {result.name: result.candidate.value for result in pairing.scores().results()}
    (sample,) = pairing.worst.samples()

    assert sample.scores == pytest.approx({"token accuracy": 50.0, "perplexity": 262.0})
    assert sample.scores == pytest.approx(table)


def test_masks_are_chosen_by_the_text_alone() -> None:
    tokens = np.concatenate(
        [np.frombuffer(b"a text of some forty bytes, not very long", np.uint8) + FIRST_BYTE, [0, 0]]
    )
    mask = np.concatenate([np.ones(len(tokens) - 2, np.int32), [0, 0]])

    masked, hidden = mask_tokens(tokens.astype(np.int32), mask)
    again, _ = mask_tokens(tokens.astype(np.int32), mask)

    assert (masked == again).all()
    assert (hidden >= 0).sum() == round(0.15 * (len(tokens) - 2))
    assert (masked[hidden >= 0] == MASK).all()
    assert (hidden[hidden >= 0] == tokens[hidden >= 0]).all()
    assert (masked[hidden < 0] == tokens[hidden < 0]).all()


def test_flow_errors_and_outliers_where_the_truth_is_known() -> None:
    truth = np.zeros((1, 2, 3, 2), np.float32)
    truth[0, 0, 0], truth[0, 1, 2] = (100, 0), np.nan
    found = np.zeros_like(truth)
    found[0, 0, 0], found[0, 0, 1], found[0, 0, 2] = (104, 0), (3, 4), (0, 2)

    columns = flow.quality({"flow": found}, {"flow": truth})

    assert columns["epe"].weights.tolist() == [5]
    assert columns["epe"].values.tolist() == pytest.approx([(4 + 5 + 2) / 5])
    assert columns["outliers"].values.tolist() == pytest.approx([1 / 5])  # 4 of 100 pixels is below 5 %


def test_reconstruction_by_psnr_ssim_and_snr() -> None:
    frames = GENERATOR.uniform(size=(3, 2, 16, 16, 3)).astype(np.float32)
    sound = GENERATOR.normal(size=(3, 50, 1)).astype(np.float32)
    found = np.clip(frames + GENERATOR.normal(0, 0.05, frames.shape), 0, 1).astype(np.float32)

    columns = reconstruction.quality({"video": found, "sound": 0.9 * sound}, {"frames": frames, "audio": sound})
    equal = reconstruction.quality({"video": frames, "sound": sound}, {"frames": frames, "audio": sound})

    assert columns["psnr"].values[0] == pytest.approx(psnr(frames[0], found[0]), rel=1e-5)
    assert columns["sound snr"].values == pytest.approx([20, 20, 20], abs=1e-3)
    assert (columns["ssim"].values < 1).all()
    assert equal["ssim"].values == pytest.approx([1, 1, 1])
    assert (equal["psnr"].values == 100).all()


def test_arrays_by_error_sqnr_and_cosine_of_their_worst_output() -> None:
    one = {"a": np.ones((2, 3), np.float32), "b": np.ones((2, 4), np.float32)}
    other = {"a": np.ones((2, 3), np.float32), "b": np.array([[1.1] * 4, [1.0] * 4], np.float32)}

    columns = arrays.likeness(other, one, {})

    assert columns["error"].values == pytest.approx([0.1, 0], abs=1e-6)
    assert columns["sqnr"].values == pytest.approx([20, 200], abs=1e-4)
    assert columns["cosine"].values == pytest.approx([1, 1])
    assert cosine(one["a"], -one["a"]).tolist() == pytest.approx([-1, -1])
    assert sqnr(one["a"], np.zeros((2, 3), np.float32)).tolist() == pytest.approx([0, 0])


def test_a_metric_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_metrics.py").write_text(
        "def margin(outputs, targets):\n    top = sorted(outputs['logits'])\n    return top[-1] - top[-2]\n"
        "def loss(outputs, targets):\n    return float(outputs['logits'][targets['label']])\n"
        "loss.better, loss.unit = 'lower', 'nats'\n"
        "def nan(outputs, targets):\n    return float('nan')\n"
        "def broken(outputs, targets):\n    return outputs['flow']\n"
        "def odd(outputs, targets):\n    return 0\n"
        "odd.better = 'left'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    outputs, targets = {"logits": LOGITS[:3]}, {"label": LABELS[:3]}

    assert (load_own("own_metrics:margin").column(outputs, targets, 3).values > 0).all()
    loss = load_own("own_metrics:loss")
    assert (loss.metric.better, loss.metric.unit) == ("lower", "nats")
    assert loss.column(outputs, targets, 3).values == pytest.approx(LOGITS[np.arange(3), LABELS[:3]])
    with pytest.raises(DataError, match="gave nan"):
        load_own("own_metrics:nan").column(outputs, targets, 3)
    with pytest.raises(UsageError, match=r"own_metrics:broken failed: KeyError"):
        load_own("own_metrics:broken").column(outputs, targets, 3)
    for spec in ("own_metrics:odd", "own_metrics:absent", "absent:margin", "own_metrics:__name__", "own_metrics:"):
        with pytest.raises(UsageError):
            load_own(spec)
    sys.modules.pop("own_metrics", None)
