# SPDX-License-Identifier: Apache-2.0
"""Ranges and integers, number by number."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from perceiver_export.calibration.quantization.integers import (
    block_size,
    fake_quantize,
    find_range,
    quantize_blocks,
    quantize_channels,
)
from perceiver_export.calibration.quantization.options import Method
from perceiver_export.calibration.quantization.statistics import Activation
from perceiver_export.runtimes.machine import saturates
from perceiver_export.runtimes.runtime import Array

GENERATOR = np.random.default_rng(0)


def heavy_tailed() -> Array:
    """Normal values, and one that is 15 times as large as the next."""
    rows = GENERATOR.normal(size=(120, 16)).astype(np.float32)
    rows[0, 0] = 60.0
    return rows


@pytest.mark.parametrize("method", get_args(Method))
def test_ranges_lie_inside_what_was_seen(method: Method) -> None:
    rows = heavy_tailed()
    largest = float(np.abs(rows).max())
    clip = find_range(method, rows, largest, np.eye(16, dtype=np.float32))

    assert 0 < clip <= largest
    assert clip == largest or method != "minmax"
    assert find_range(method, 0 * rows, 0.0, np.eye(16, dtype=np.float32)) == 1.0


def test_mse_is_the_least_error_of_the_products() -> None:
    rows, weight = heavy_tailed(), GENERATOR.normal(size=(16, 8)).astype(np.float32)
    weight[0] = 0.01  # nobody reads the large channel, so clipping it is free
    largest = float(np.abs(rows).max())
    clip = find_range("mse", rows, largest, weight @ weight.T)

    def error(limit: float) -> float:
        return float(np.square(fake_quantize(rows, limit) @ weight - rows @ weight).sum())

    assert clip < 0.5 * largest
    assert error(clip) <= min(error(largest * share) for share in (1.0, 0.8, 0.6, 0.4, 0.2)) * 1.05


def test_weights_are_rounded_to_the_nearest_by_channel() -> None:
    weight = GENERATOR.normal(size=(32, 8)).astype(np.float32) * np.exp(np.arange(8, dtype=np.float32))
    weight[:, 5] = 0.0
    integers = quantize_channels(weight)

    assert integers.scales.shape == (8,)
    assert np.abs(integers.dequantized() - weight).max(axis=0) == pytest.approx(integers.scales / 2, rel=0.2, abs=1e-2)
    assert (np.abs(integers.values[:, :5]).max(axis=0) == 127).all()


def test_a_stack_of_weights_has_one_scale() -> None:
    integers = quantize_channels(GENERATOR.normal(size=(2, 8, 12)).astype(np.float32))

    assert integers.scales.shape == ()
    assert np.abs(integers.values).max() == 127


def test_int4_has_a_scale_a_block_and_fits_four_bits() -> None:
    weight = GENERATOR.normal(size=(64, 8)).astype(np.float32)
    integers = quantize_blocks(weight, 32)
    coarse = quantize_blocks(weight, 64)

    assert integers.scales.shape == (2, 8)
    assert -8 <= integers.values.min() <= integers.values.max() <= 7
    assert np.square(integers.dequantized() - weight).sum() < np.square(coarse.dequantized() - weight).sum()


@pytest.mark.parametrize(("depth", "block"), [(1280, 32), (261, None), (322, None), (128, 32), (13, None), (40, 20)])
def test_blocks_are_even_and_divide_the_inputs(depth: int, block: int | None) -> None:
    assert block_size((depth, 32)) == block


def pairwise_saturating(codes: Array, weights: Array) -> Array:
    """What AVX2's vpmaddubsw and vpmaddwd make of uint8 × int8: pairs of products are added in 16 bits, saturating."""
    products = codes[:, :, None].astype(np.int32) * weights[None].astype(np.int32)
    pairs = products[:, 0::2] + products[:, 1::2]
    clipped: Array = np.clip(pairs, -32768, 32767).sum(axis=1)
    return clipped


@pytest.mark.parametrize(("bits", "exact"), [(8, False), (7, True)])
def test_seven_bits_survive_the_sums_of_a_cpu_without_vnni(bits: int, exact: bool) -> None:
    """The worst case: every code 255, every weight the largest."""
    weights = quantize_channels(np.ones((64, 4), np.float32), bits).values
    codes = np.full((2, 64), 255, np.uint8)
    found = pairwise_saturating(codes, weights)

    assert (found == codes.astype(np.int32) @ weights.astype(np.int32)).all() == exact


@pytest.mark.parametrize(
    ("machine", "features", "expected"),
    [
        ("x86_64", ("avx2", "fma"), True),
        ("x86_64", ("avx2", "avx512f"), True),
        ("x86_64", ("avx2", "avx_vnni"), False),
        ("AMD64", ("avx512f", "avx512_vnni"), False),
        ("aarch64", ("asimd",), False),
    ],
)
def test_which_machines_saturate(machine: str, features: tuple[str, ...], expected: bool) -> None:
    assert saturates(machine, features) == expected


def test_a_sample_is_uniform_and_bounds_are_exact() -> None:
    activation, generator = Activation.empty(1, 100), np.random.default_rng(0)
    for start in range(0, 10_000, 10):
        rows = np.arange(start, start + 10, dtype=np.float32)[:, None]
        activation.add(rows.min(axis=0), rows.max(axis=0), rows, generator)

    assert activation.sample.shape == (100, 1)
    assert (float(activation.low[0]), float(activation.high[0])) == (0.0, 9999.0)
    assert activation.sample.mean() == pytest.approx(5000, abs=1000)
