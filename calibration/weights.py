# SPDX-License-Identifier: Apache-2.0
"""Weights as integers: int8 with a scale for each output channel, int4 with a scale for each block of inputs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from perceiver_export.runtimes.runtime import Array

INT4_BLOCK = 32
_INT4_LEVELS = 7
# Narrower clippings are tried for int4, whose largest value costs all others much.
_INT4_CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)


@dataclass(frozen=True)
class IntegerWeight:
    """``values`` (…, K, N) int8, ``scales`` (N), or (blocks, N) where ``block`` inputs share one."""

    values: Array
    scales: Array
    bits: int
    block: int | None = None

    def dequantized(self) -> Array:
        """What an engine computes with, float32."""
        scales = self.scales
        if self.block is not None:
            scales = np.repeat(scales, self.block, axis=0)[: self.values.shape[0]]
        restored: Array = self.values.astype(np.float32) * scales
        return restored


def quantize_channels(weight: Array, bits: int = 8) -> IntegerWeight:
    """Symmetric, nearest, one scale an output channel. Weights of 7 bits lie in -63 … 63.

    An x86 CPU without VNNI adds two products of a uint8 and an int8 in 16 bits; 2 × 255 × 63 still fits.
    """
    levels = (1 << (bits - 1)) - 1
    largest = np.abs(weight).max(axis=tuple(range(weight.ndim - 1)))
    scales = (np.where(largest > 0, largest, 1.0) / levels).astype(np.float32)
    values = np.clip(np.rint(weight / scales), -levels, levels).astype(np.int8)
    return IntegerWeight(values, scales, bits)


def quantize_blocks(weight: Array, block: int = INT4_BLOCK) -> IntegerWeight:
    """int4, symmetric, one scale for ``block`` inputs of an output channel, clipped where that errs least.

    The last block may be shorter. ``weight`` is (K, N).
    """
    depth, width = weight.shape
    blocks = -(-depth // block)
    padded = np.zeros((blocks * block, width), np.float32)
    padded[:depth] = weight
    grouped = padded.reshape(blocks, block, width)
    largest = np.abs(grouped).max(axis=1)
    largest = np.where(largest > 0, largest, 1.0).astype(np.float32)
    best_error = np.full(largest.shape, np.inf, np.float32)
    scales = np.empty_like(largest)
    for clip in _INT4_CLIPS:
        tried = largest * np.float32(clip / _INT4_LEVELS)
        error = np.square(grouped - _round4(grouped, tried) * tried[:, None]).sum(axis=1)
        better = error < best_error
        scales[better], best_error[better] = tried[better], error[better]
    values = _round4(grouped, scales).reshape(-1, width)[:depth].astype(np.int8)
    return IntegerWeight(values, scales, 4, block)


def _round4(grouped: Array, scales: Array) -> Array:
    rounded: Array = np.clip(np.rint(grouped / scales[:, None]), -_INT4_LEVELS - 1, _INT4_LEVELS)
    return rounded
