# SPDX-License-Identifier: Apache-2.0
"""The classification task on real pictures, without torch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import BundleError, InputError, UsageError

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


def test_without_names_the_index_is_the_label(edit_manifest: Callable[[str, str], Path]) -> None:
    bundle = with_labels(edit_manifest, [])
    with open_task(bundle) as classify:
        found = classify(FASHION / "pictures" / "bag.png")[0]

    assert (found.label, found.index) == ("8", 8)


def test_labels_of_another_number_are_refused(edit_manifest: Callable[[str, str], Path]) -> None:
    with pytest.raises(BundleError, match="2 labels do not fit 10 scores"):
        open_task(with_labels(edit_manifest, ["cat", "dog"]))


def with_labels(edit_manifest: Callable[[str, str], Path], labels: list[str]) -> Path:
    bundle = edit_manifest('"task"', '"task"')
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    (bundle / "manifest.json").write_text(json.dumps({**manifest, "labels": labels}), encoding="utf-8")
    return bundle


def test_what_is_no_picture_or_no_list_of_them_is_refused(fashion_bundle: Path) -> None:
    with open_task(fashion_bundle) as classify:
        none_and_no_lists: list[Any] = [[], "bag.png", Path("bag.png"), 3]
        for pictures in none_and_no_lists:
            with pytest.raises(InputError, match="pictures are"):
                classify.logits(pictures)
        no_pictures: list[Any] = [[[1.5, 2.5]], [[1], [2, 3]], None, 3]
        for picture in no_pictures:
            with pytest.raises(InputError):
                classify(picture)
        with pytest.raises(InputError, match="'image' has 0"):
            classify.run_inputs(np.zeros((0, 1, 28, 28), np.float32))
