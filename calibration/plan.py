# SPDX-License-Identifier: Apache-2.0
"""From statistics to integers: for each run of a linear its weight, its activation's scale and its bias."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, get_args

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.activations import Statistics
from perceiver_export.calibration.linears import Linear
from perceiver_export.calibration.qdq import LinearPlan
from perceiver_export.calibration.ranges import LEVELS, Method, fake_quantize, find_range
from perceiver_export.calibration.weights import IntegerWeight, block_size, quantize_blocks, quantize_channels
from perceiver_export.runtimes.errors import UsageError
from perceiver_export.runtimes.runtime import Array

Scheme = Literal["int8", "int8-weights", "int4-weights", "float"]


def schemes_of(linears: Sequence[Linear], scheme: Scheme, precision: Mapping[str, Scheme]) -> dict[str, Scheme]:
    """The scheme of each group: that of the last pattern (`encoder.*.mlp.*`) that its name matches, else ``scheme``.

    In place of int4 a weight that cannot be cut into blocks gets int8.
    Raises UsageError: an unknown scheme, or a pattern that matches nothing.
    """
    for asked in (scheme, *precision.values()):
        if asked not in get_args(Scheme):
            raise UsageError(f"there is no scheme {asked!r}", f"it is one of {', '.join(get_args(Scheme))}")
    groups = list(dict.fromkeys(linear.group for linear in linears))
    chosen = dict.fromkeys(groups, scheme)
    for pattern, asked in precision.items():
        for group in groups:
            if fnmatchcase(group, pattern):
                chosen[group] = asked
    too_odd = {linear.group for linear in linears if _block(linear.weight) is None}
    return {
        group: "int8-weights" if asked == "int4-weights" and group in too_odd else asked
        for group, asked in chosen.items()
    }


def check_patterns(groups: Sequence[str], patterns: Sequence[str]) -> None:
    """Raise UsageError where a pattern matches no group of any part."""
    for pattern in patterns:
        if not any(fnmatchcase(group, pattern) for group in groups):
            near = ", ".join(sorted(groups)[:4])
            raise UsageError(f"no layer is called {pattern!r}", f"there are {near}, …; `--sensitivity` lists all")


def make_plans(
    linears: Sequence[Linear],
    schemes: Mapping[str, Scheme],
    statistics: Statistics,
    method: Method,
    bits: int,
    correct_bias: bool,
) -> list[LinearPlan]:
    """Plans of all linears that do not stay float."""
    weights: dict[ir.Value, IntegerWeight] = {}
    clips = _clips([linear for linear in linears if schemes[linear.group] == "int8"], statistics, method)
    plans = []
    for linear in linears:
        scheme = schemes[linear.group]
        if scheme == "float":
            continue
        if linear.weight not in weights:
            weights[linear.weight] = _integers(linear.weight, scheme, bits)
        weight = weights[linear.weight]
        clip = clips.get(str(linear.activation.name)) if scheme == "int8" else None
        bias = corrected_bias(linear, weight, clip, statistics) if correct_bias else None
        plans.append(LinearPlan(linear, weight, None if clip is None else clip / LEVELS, bias))
    return plans


def corrected_bias(linear: Linear, weight: IntegerWeight, clip: float | None, statistics: Statistics) -> Array | None:
    """The bias plus the mean error of the product on the sampled rows; None where there is no bias.

    Nagel et al., "Data-Free Quantization" (arXiv 1906.04721), section 4.2, with measured instead of modelled means.
    """
    activation = statistics.activations.get(str(linear.activation.name))
    if linear.bias is None or activation is None or not activation.rows_kept or weight.values.ndim != 2:
        return None
    rows = activation.sample
    read = rows if clip is None else fake_quantize(rows, clip)
    mean_error = rows.mean(0) @ array_of(linear.weight) - read.mean(0) @ weight.dequantized()
    corrected: Array = (array_of(linear.bias).reshape(-1) + mean_error).astype(np.float32)
    return corrected


def product_sqnr(linear: Linear, weight: IntegerWeight, clip: float | None, statistics: Statistics) -> float:
    """Decibels of the product over what quantization changes in it, on the sampled rows."""
    rows = statistics.activations[str(linear.activation.name)].sample[:256]
    exact = rows @ array_of(linear.weight)
    found = (rows if clip is None else fake_quantize(rows, clip)) @ weight.dequantized()
    return decibels(exact, found)


def decibels(exact: Array, found: Array) -> float:
    """Signal to quantization noise: 10 log10 of Σ exact² over Σ (found − exact)²; 200 where they are equal, −200 where
    what was found is not finite: JSON and the order of layers take numbers.
    """
    exact = exact.astype(np.float64)
    noise = float(np.square(found - exact).sum())
    signal = float(np.square(exact).sum())
    if not np.isfinite(noise):
        return -200.0
    return 200.0 if noise == 0.0 else float(10 * np.log10(max(signal, 1e-300) / noise))


def array_of(value: ir.Value) -> Array:
    """An initializer's numbers."""
    assert value.const_value is not None
    return value.const_value.numpy()


def _clips(linears: Sequence[Linear], statistics: Statistics, method: Method) -> dict[str, float]:
    """One clipping value a tensor, whoever reads it."""
    readers: dict[str, dict[ir.Value, None]] = {}
    for linear in linears:
        readers.setdefault(str(linear.activation.name), {})[linear.weight] = None
    by_weights: dict[tuple[ir.Value, ...], list[str]] = {}
    for name, weights in readers.items():
        by_weights.setdefault(tuple(weights), []).append(name)
    clips: dict[str, float] = {}
    for weights_read, names in by_weights.items():  # one K × K matrix at a time
        gram = _gram(weights_read) if method == "mse" else np.empty((0, 0), np.float32)
        for name in names:
            activation = statistics.activations[name]
            clips[name] = find_range(method, activation.sample, float(activation.largest.max()), gram)
    return clips


def _gram(weights: tuple[ir.Value, ...]) -> Array:
    """Σ W Wᵀ (K, K)."""
    matrices = [array_of(weight) for weight in weights]
    wide = np.concatenate([np.moveaxis(one, -2, 0).reshape(one.shape[-2], -1) for one in matrices], axis=1)
    gram: Array = wide @ wide.T
    return gram


def _integers(value: ir.Value, scheme: Scheme, bits: int) -> IntegerWeight:
    weight, block = array_of(value), _block(value)
    if scheme == "int4-weights" and block is not None:
        return quantize_blocks(weight, block)
    # Float activations are multiplied in float, so nothing saturates there.
    return quantize_channels(weight, bits if scheme == "int8" else 8)


def _block(value: ir.Value) -> int | None:
    """How many inputs of a weight share an int4 scale; None where it cannot be in int4."""
    weight = array_of(value)
    if weight.ndim != 2 or weight.size % 2:  # TensorRT refuses an odd number of int4
        return None
    return block_size(weight.shape[0])
