# SPDX-License-Identifier: Apache-2.0
"""Quantizing that is interrupted, or that the disk is too full for."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perceiver_export.calibration import quantize
from perceiver_export.calibration import write as write_module
from perceiver_export.calibration.collect import Observer
from perceiver_export.calibration.observe import observe
from perceiver_export.runtimes import open_bundle
from perceiver_export.runtimes.bundle import cache_directory
from perceiver_export.runtimes.errors import ExportError
from tests.conftest import FASHION

HELD_OUT = FASHION / "held_out.npz"


def test_an_interrupted_pass_goes_on_where_it_stopped(
    fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = observe(open_bundle(fashion_bundle), str(HELD_OUT), 20, None, silent)
    runs: list[bool] = []
    original, stop_at = Observer.run, 12

    def run(self: Observer, feeds: Any, count: bool = True) -> Any:
        if len(runs) == stop_at:
            raise KeyboardInterrupt
        runs.append(count)
        return original(self, feeds, count)

    monkeypatch.setattr(Observer, "run", run)
    with pytest.raises(KeyboardInterrupt):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", samples=20)
    assert not (tmp_path / "out").exists()
    assert len(list((cache_directory() / "calibration").iterdir())) == 1
    runs.clear()
    stop_at = 1000
    resumed = observe(open_bundle(fashion_bundle), str(HELD_OUT), 20, None, silent)

    assert runs.count(True) == 8  # twelve were counted before
    assert resumed.data == whole.data
    for name, activation in whole.statistics["model"].activations.items():
        again = resumed.statistics["model"].activations[name]
        np.testing.assert_array_equal(again.low, activation.low)
        assert again.rows_seen == activation.rows_seen
    assert not list((cache_directory() / "calibration").iterdir())


def test_an_interrupted_pass_on_other_data_starts_again(fashion_bundle: Path, tmp_path: Path) -> None:
    with np.load(HELD_OUT) as archive:
        pictures = archive["image"][:6]
    data = tmp_path / "data.npz"
    np.savez(data, image=pictures)
    with pytest.raises(KeyboardInterrupt):
        observe(open_bundle(fashion_bundle), data, 6, None, interrupted_at(4))
    np.savez(data, image=pictures[::-1])
    found = observe(open_bundle(fashion_bundle), data, 6, None, silent)

    assert found.statistics["model"].calls == 6
    assert found.data.samples == 6


def silent(what: str, done: int, total: int) -> None:
    """No progress is shown."""


def interrupted_at(stop: int) -> Any:
    def report(what: str, done: int, total: int) -> None:
        if done == stop:
            raise KeyboardInterrupt

    return report


def test_a_full_disk_leaves_nothing(fashion_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write_module, "_sync", full)
    with pytest.raises(ExportError, match="the disk is full"):
        quantize(fashion_bundle, HELD_OUT, tmp_path / "out", samples=4)
    assert list(tmp_path.iterdir()) == []
