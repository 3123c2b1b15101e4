# SPDX-License-Identifier: Apache-2.0
"""Comparisons that must fail do fail."""

from __future__ import annotations

import numpy as np
import pytest

from perceiver_export.runtimes.runtime import compare

REFERENCE = np.array([1.0, -2.0], np.float32)


def test_a_difference_is_measured_against_the_references_scale() -> None:
    comparison = compare(np.array([1.0, -2.002], np.float32), REFERENCE, 1e-2)

    assert comparison
    assert comparison.difference == pytest.approx(1e-3, rel=1e-3)
    assert not compare(np.array([1.0, -2.2], np.float32), REFERENCE, 1e-2)


@pytest.mark.parametrize("fill", [-1e9, np.finfo(np.float32).min, -np.inf])
def test_a_masks_fill_hides_no_difference(fill: float) -> None:
    reference = np.array([1.0, 2.0, fill], np.float32)

    assert compare(np.array([1.0, 2.0001, fill], np.float32), reference, 1e-4).scale == 2.0
    assert not compare(np.array([100.0, -50.0, fill], np.float32), reference, 1e-4)
    assert not compare(np.array([1.0, 2.0, fill / 2 if np.isfinite(fill) else -fill]), reference, 1e-4)
    assert not compare(np.array([1.0, fill, fill], np.float32), reference, 1e-4)


def test_large_results_are_no_fill() -> None:
    reference = np.array([1e10, 2e9, 5.0])

    assert compare(reference + np.array([300.0, 0.0, 300.0]), reference, 1e-4).scale == 1e10


def test_an_output_of_fills_alone_has_a_finite_scale() -> None:
    reference = np.array([0.0, -np.inf])

    assert compare(reference, reference, 1e-4)
    assert compare(reference, reference, 1e-4).scale == 0.0


@pytest.mark.parametrize("dtype", [np.int64, np.bool_])
def test_integers_are_equal_or_not(dtype: type[np.generic]) -> None:
    reference = np.array([30000, 0]).astype(dtype)
    comparison = compare(np.array([30000, 3]).astype(dtype), reference, 1e-4)

    assert compare(reference, reference, 0.0)
    assert not comparison
    assert (comparison.difference, comparison.scale) == (0.5, 2.0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_never_pass(bad: float) -> None:
    assert not compare(np.array([1.0, bad]), REFERENCE, 1.0)
    assert not compare(REFERENCE, np.array([1.0, bad]), 1.0)


def test_another_shape_never_passes() -> None:
    assert not compare(REFERENCE[:1], REFERENCE, 1.0)
