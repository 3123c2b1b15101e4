# SPDX-License-Identifier: Apache-2.0
"""The classification task on real pictures, without torch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typing_extensions import assert_type

from perceiver_export.runtimes import open_task, tasks
from perceiver_export.runtimes.errors import InputError, UsageError
from perceiver_export.runtimes.tasks import FillMask, ImageClassification
from tests.conftest import FASHION

THREADS = """
import logging, sys, threading
from concurrent.futures import ThreadPoolExecutor
from perceiver_export.runtimes import open_task
loaded = []
logger = logging.getLogger("perceiver_export.runtimes.opening")
logger.setLevel("INFO")
logger.addFilter(lambda record: loaded.append(record.getMessage()))
with open_task(sys.argv[1]) as classify, ThreadPoolExecutor(4) as pool:
    barrier = threading.Barrier(4)
    print(*pool.map(lambda _: barrier.wait() * 0 or classify(sys.argv[2])[0].label, range(4)), len(loaded))
"""


@pytest.fixture(scope="module")
def classify(fashion_bundle: Path) -> Iterator[ImageClassification]:
    with open_task(fashion_bundle, ImageClassification, verify="never") as task:
        yield task


def test_clothes_are_recognised(classify: ImageClassification) -> None:
    rows = (FASHION / "images" / "labels.csv").read_text(encoding="utf-8").splitlines()[1:]
    answers = {row: classify(FASHION / "images" / row.split(",")[0])[0].label for row in rows}

    assert sum(row.split(",", 1)[1] == answer for row, answer in answers.items()) >= 8


def test_probabilities_are_sorted_and_sum_to_one(classify: ImageClassification) -> None:
    predictions = classify(FASHION / "images" / "bag.png", top=10)
    with pytest.raises(UsageError):
        classify(FASHION / "images" / "bag.png", top=0)

    probabilities = [prediction.probability for prediction in predictions]
    assert probabilities == sorted(probabilities, reverse=True)
    assert sum(probabilities) == pytest.approx(1)
    assert sorted(prediction.index for prediction in predictions) == list(range(10))


def test_the_expected_class_is_what_type_checkers_see_and_is_held_to(fashion_bundle: Path) -> None:
    """mypy runs over this file, and would find a type that is not the class's."""
    with open_task(fashion_bundle, ImageClassification, "ort-cpu", 1) as classify:
        assert_type(classify, ImageClassification)
        assert classify.runtime.describe()["threads"] == 1
    with open_task(fashion_bundle, expect=ImageClassification) as classify:
        assert_type(classify, ImageClassification)
    with open_task(fashion_bundle, "ort-cpu", 1) as found:
        assert isinstance(found, ImageClassification)
        assert found.runtime.describe()["threads"] == 1
    with pytest.raises(UsageError, match="image-classification, not FillMask"):
        open_task(fashion_bundle, FillMask)
    for module, name in tasks.TASKS.values():
        assert getattr(tasks, name).__module__ == f"{tasks.__name__}.{module}"


def test_files_and_arrays_give_the_same(classify: ImageClassification) -> None:
    with np.load(FASHION / "test.npz") as data:
        picture = data["image"][int(np.argmax(data["labels"] == 8))]

    assert classify(picture) == classify(FASHION / "images" / "bag.png")
    assert classify.logits([picture] * 3).shape == (3, 10)


def test_one_image_is_one_sample_and_colours_have_an_order(classify: ImageClassification) -> None:
    path = FASHION / "images" / "bag.png"
    with Image.open(path) as image:
        turned = image.convert("RGB")
    blue = np.asarray(turned) // np.array([1, 2, 4], np.uint8)

    expected = classify.logits([blue])
    for same in (blue, Image.fromarray(blue)):
        np.testing.assert_array_equal(classify.logits(same), expected)
    np.testing.assert_array_equal(classify.logits(blue[..., ::-1], color="bgr"), expected)
    assert classify(blue[..., ::-1], color="bgr") == classify(blue)
    for one in (path, str(path), np.asarray(turned)[:, :, 0], np.asarray(turned)[:, :, :1]):
        assert classify.logits(one).shape == (1, 10)
    for several in (np.stack([blue] * 4), np.stack([blue[:, :, 0]] * 4)):
        assert classify.logits(several).shape == (4, 10)


def test_the_first_calls_may_come_from_many_threads(fashion_bundle: Path) -> None:
    command = [sys.executable, "-c", THREADS, str(fashion_bundle), str(FASHION / "images" / "bag.png")]
    cold = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]

    assert [process.communicate()[0].split() for process in cold] == [["Bag"] * 4 + ["1"]] * 2


def test_without_names_the_index_is_the_label(copied_bundle: Path) -> None:
    path = copied_bundle / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "labels": []}), encoding="utf-8")
    with open_task(copied_bundle) as classify:
        found = classify(FASHION / "images" / "bag.png")[0]

    assert (found.label, found.index) == ("8", 8)


def test_what_is_no_picture_or_no_list_of_them_is_refused(classify: ImageClassification) -> None:
    none_and_no_lists: list[Any] = [[], 3]
    for pictures in none_and_no_lists:
        with pytest.raises(InputError, match="images"):
            classify.logits(pictures)
    no_pictures: list[Any] = [[[1.5, 2.5]], [[1], [2, 3]], None, 3]
    for picture in no_pictures:
        with pytest.raises(InputError):
            classify(picture)
    with pytest.raises(InputError, match="'image' has 0"):
        classify.run_inputs({"image": np.zeros((0, 1, 28, 28), np.float32)})
