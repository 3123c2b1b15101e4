# SPDX-License-Identifier: Apache-2.0
"""Weights as integers: int8 with a scale for each output channel, int4 with a scale for each block of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perceiver_export.runtimes.runtime import Array

INT4_BLOCK = 32
_LEAST_BLOCK = 16
_INT4_LEVELS = 7
# Narrower clippings are tried for int4, whose largest value costs all others much.
_INT4_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class IntegerWeight:
    """``values`` (…, K, N) int8, ``scales`` (N), () for stacks, or (blocks, N) where ``block`` inputs share one."""

    values: Array
    scales: Array
    bits: int
    block: int | None = None

    def dequantized(self) -> Array:
        """What an engine computes with, float32."""
        scales = self.scales
        if self.block is not None:
            scales = np.repeat(scales, self.block, axis=0)
        restored: Array = self.values.astype(np.float32) * scales
        return restored


def quantize_channels(weight: Array, bits: int = 8) -> IntegerWeight:
    """Symmetric, nearest, one scale an output channel. Weights of 7 bits lie in -63 … 63.

    A stack of weights (h, K, N), one a head, has one scale: onnxruntime's kernel takes no more there.

    An x86 CPU without VNNI adds two products of a uint8 and an int8 in 16 bits; 2 × 255 × 63 still fits.
    """
    levels = (1 << (bits - 1)) - 1
    largest = np.abs(weight).max(axis=0 if weight.ndim == 2 else None)
    scales = np.asarray(np.where(largest > 0, largest, 1.0) / levels, np.float32)
    values = np.clip(np.rint(weight / scales), -levels, levels).astype(np.int8)
    return IntegerWeight(values, scales, bits)


def block_size(depth: int) -> int | None:
    """Inputs that share a scale: the largest even divisor of ``depth`` from 16 to 32; None where there is none.

    OpenVINO 2026.4 refuses a last block that is shorter. It computes wrong numbers, or NaN, with odd blocks, and with
    blocks of more than 32 where there are few rows.
    """
    return max((size for size in range(_LEAST_BLOCK, INT4_BLOCK + 1, 2) if depth % size == 0), default=None)


def quantize_blocks(weight: Array, block: int) -> IntegerWeight:
    """int4, symmetric, one scale for ``block`` inputs of an output channel, clipped where that errs least.

    ``weight`` is (K, N), K a multiple of ``block``.
    """
    depth, width = weight.shape
    grouped = weight.reshape(depth // block, block, width)
    largest = np.abs(grouped).max(axis=1)
    largest = np.where(largest > 0, largest, 1.0).astype(np.float32)
    best_error = np.full(largest.shape, np.inf, np.float32)
    scales = np.empty_like(largest)
    for clip in _INT4_CLIPS:
        tried = largest * np.float32(clip / _INT4_LEVELS)
        error = np.square(grouped - _round4(grouped, tried) * tried[:, None]).sum(axis=1)
        better = error < best_error
        scales[better], best_error[better] = tried[better], error[better]
    values = _round4(grouped, scales).reshape(depth, width).astype(np.int8)
    return IntegerWeight(values, scales, 4, block)


def _round4(grouped: Array, scales: Array) -> Array:
    rounded: Array = np.clip(np.rint(grouped / scales[:, None]), -_INT4_LEVELS - 1, _INT4_LEVELS)
    return rounded
