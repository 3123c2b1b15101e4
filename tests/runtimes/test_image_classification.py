# SPDX-License-Identifier: Apache-2.0
"""The classification task on real pictures, without torch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import BundleError, UsageError

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"


def test_clothes_are_recognised(fashion_bundle: Path) -> None:
    rows = (FASHION / "pictures" / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
    with open_task(fashion_bundle) as classify:
        answers = {row: classify(FASHION / "pictures" / row.split(",")[0])[0].label for row in rows}

    assert sum(row.split(",", 1)[1] == answer for row, answer in answers.items()) >= 8


def test_probabilities_are_sorted_and_sum_to_one(fashion_bundle: Path) -> None:
    with open_task(fashion_bundle) as classify:
        predictions = classify(FASHION / "pictures" / "bag.png", top=10)
        with pytest.raises(UsageError):
            classify(FASHION / "pictures" / "bag.png", top=0)

    probabilities = [prediction.probability for prediction in predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert sorted(prediction.index for prediction in predictions) == list(range(10))


def test_files_and_arrays_give_the_same(fashion_bundle: Path) -> None:
    with np.load(FASHION / "test.npz") as data:
        picture = data["image"][int(np.argmax(data["labels"] == 8))]
    with open_task(fashion_bundle) as classify:
        assert classify(picture) == classify(FASHION / "pictures" / "bag.png")
        logits = classify.logits([picture] * 3)

    assert logits.shape == (3, 10)


def test_a_manifest_without_labels_is_refused(edit_manifest: Callable[[str, str], Path]) -> None:
    import json

    bundle = edit_manifest('"task"', '"task"')
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "labels": []}), encoding="utf-8")

    with pytest.raises(BundleError, match="no labels"):
        open_task(bundle)
