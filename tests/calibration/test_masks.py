# SPDX-License-Identifier: Apache-2.0
"""Masks in DATA mean the same to `quantize` and to `validate`, and what no model would take is refused by both."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration.data_report import DataWatch
from perceiver_export.calibration.examples import open_examples
from perceiver_export.calibration.feeds import open_feeds
from perceiver_export.exporter import export
from perceiver_export.runtimes import open_task
from perceiver_export.runtimes.errors import DataError
from perceiver_export.runtimes.runtime import Array
from tests.cli import small_models

ENTITIES = np.random.default_rng(0).normal(size=(3, 12, 16)).astype(np.float32)
ONES = np.ones((3, 12), np.int32)
Read = Callable[[Path, Path], list[dict[str, Array]]]


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small_models.sets(), tmp_path_factory.mktemp("bundles") / "sets").path


def as_quantize(bundle: Path, data: Path) -> list[dict[str, Array]]:
    with open_task(bundle) as task:
        return [example.feeds for example in open_feeds(data, task.manifest).stream]


def as_validate(bundle: Path, data: Path) -> list[dict[str, Array]]:
    with open_task(bundle) as task:
        return [example.feeds for example in open_examples(task, data).stream]


def archive(folder: Path, **arrays: Any) -> Path:
    np.savez(folder / "data.npz", allow_pickle=False, **arrays)
    return folder / "data.npz"


@pytest.mark.parametrize("read", [as_quantize, as_validate])
@pytest.mark.parametrize("dtype", [None, bool, np.uint8, np.int64])
def test_no_mask_is_a_mask_of_ones_of_any_whole_dtype(read: Read, dtype: Any, sets: Path, tmp_path: Path) -> None:
    given = {} if dtype is None else {"entities_mask": ONES.astype(dtype)}

    found = read(sets, archive(tmp_path, entities=ENTITIES, **given))

    assert len(found) == 3
    for feeds in found:
        assert feeds["entities_mask"].dtype == np.int32
        np.testing.assert_array_equal(feeds["entities_mask"], ONES[0])


@pytest.mark.parametrize("read", [as_quantize, as_validate])
def test_masks_that_no_model_takes_are_refused(read: Read, sets: Path, tmp_path: Path) -> None:
    empty, lengths = ONES.copy(), ONES.copy()
    empty[1], lengths[:, 0] = 0, 12

    with pytest.raises(DataError, match=r"data\.npz\[1\]: 'entities_mask' masks everything"):
        read(sets, archive(tmp_path, entities=ENTITIES, entities_mask=empty))
    with pytest.raises(DataError, match="'entities_mask' holds other values than 0 and 1"):
        read(sets, archive(tmp_path, entities=ENTITIES, entities_mask=lengths))
    with pytest.raises(DataError, match=r"\[9\]"):
        read(sets, archive(tmp_path, entities=ENTITIES, entities_mask=ONES[:, :9]))


@pytest.mark.parametrize("read", [as_quantize, as_validate])
def test_a_mask_that_a_model_has_not_is_refused(read: Read, tmp_path: Path) -> None:
    """What it masks would count."""
    bundle = export(small_models.flow(), tmp_path / "flow").path
    frames = np.zeros((2, 2, 3, 16, 24), np.float32)

    with pytest.raises(DataError, match="frames_mask"):
        read(bundle, archive(tmp_path, frames=frames, frames_mask=np.ones((2, 2), np.int32)))


def test_a_sample_is_known_again_with_and_without_its_mask(sets: Path, tmp_path: Path) -> None:
    """Or what was calibrated on could be certified on."""
    with open_task(sets) as task:
        watch = DataWatch(task.manifest, "data")
        for example in open_feeds(archive(tmp_path, entities=ENTITIES), task.manifest).stream:
            watch.see(example)
        masked = archive(tmp_path, entities=ENTITIES, entities_mask=ONES.astype(np.int64))
        assert watch.digests == [example.digest for example in open_examples(task, masked).stream]
