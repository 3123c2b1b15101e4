# SPDX-License-Identifier: Apache-2.0
"""Single functions of ours beside DeepMind's: positions, encodings, attention, convolution, patches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from perceiver_export.exporter.checkpoints.haiku import hwio_to_oihw
from perceiver_export.exporter.model.attention import attend
from perceiver_export.exporter.model.config import FourierPositions, PositionQueries
from perceiver_export.exporter.model.inputs import ConvDownsample, fourier_features, grid_positions, space_to_depth
from perceiver_export.exporter.model.perceiver import PositionQueryTable

from .deepmind_reference import arrays, function_folders, precision
from .deepmind_runs import patches

Case = tuple[Path, str]


def _all_cases() -> list[Case]:
    found = []
    for folder in function_folders():
        content = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
        found += [(folder, name) for name in content["cases"]]
    return found


def _cases(group: str, in_double: bool = False) -> list[Case]:
    """The cases of one function, and of those with float64 values only, if asked for."""
    found = [(folder, name) for folder, name in _all_cases() if name.partition("/")[0] == group]
    if in_double:
        found = [(folder, name) for folder, name in found if f"{name}/out" in arrays(folder, "functions_f64.npz")]
    assert found
    return found


def _name(case: Case) -> str:
    return case[1]


def _facts(case: Case) -> dict[str, Any]:
    folder, name = case
    content = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    facts: dict[str, Any] = content["cases"][name]
    return facts


def _array(case: Case, name: str) -> Tensor:
    return torch.from_numpy(arrays(case[0], "functions.npz")[f"{case[1]}/{name}"])


def _check(case: Case, found: Tensor, tolerance: float, name: str = "out", file: str = "functions.npz") -> None:
    expected = arrays(case[0], file)[f"{case[1]}/{name}"]
    assert tuple(found.shape) == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, rtol=0, atol=tolerance)


def _encoding_tolerance(name: str) -> float:
    """What the vectors' README allows: DeepMind's own float32 encodings differ by as much from one another."""
    if "audio" in name:
        return 2e-2
    if "released" in name or "video" in name:
        return 5e-4 if "flow" in name else 2e-4
    return 1e-5


def _fourier(case: Case, endpoint: bool = True) -> FourierPositions:
    kwargs = _facts(case)["kwargs"]
    return FourierPositions(kwargs["num_bands"], tuple(kwargs["max_resolution"]), endpoint)


def _features(case: Case) -> Tensor:
    """Our features at the case's positions, less the columns that the case leaves out (no model does)."""
    kwargs, config = _facts(case)["kwargs"], _fourier(case)
    table = fourier_features(_array(case, "pos").double(), config)
    axes, sines = len(config.max_resolution), len(config.max_resolution) * config.num_bands
    start = 0 if kwargs["concat_pos"] else axes
    return table[:, start : axes + (sines if kwargs["sine_only"] else 2 * sines)]


@pytest.mark.parametrize("case", _cases("fourier"), ids=_name)
def test_fourier_features(case: Case) -> None:
    _check(case, _features(case), _encoding_tolerance(case[1]))


@pytest.mark.parametrize("case", _cases("fourier", in_double=True), ids=_name)
def test_fourier_features_in_double_precision(case: Case) -> None:
    _check(case, _features(case), 1e-9, file="functions_f64.npz")


@pytest.mark.parametrize("case", _cases("positions"), ids=_name)
def test_positions(case: Case) -> None:
    kwargs = _facts(case)["kwargs"]
    low, high = kwargs.get("output_range", (-1.0, 1.0))
    ours = grid_positions(tuple(kwargs["index_dims"]), endpoint=True, dtype=torch.float64)

    scaled = (low + (ours + 1) / 2 * (high - low)).reshape(*kwargs["index_dims"], -1)
    _check(case, scaled, 5e-7)  # a few steps of float32


@pytest.mark.parametrize("case", _cases("queries"), ids=_name)
def test_queries_at_some_points(case: Case) -> None:
    _check(case, _query_rows(case), _encoding_tolerance(case[1]))


@pytest.mark.parametrize("case", _cases("queries", in_double=True), ids=_name)
def test_queries_in_double_precision(case: Case) -> None:
    with precision(torch.float64):
        _check(case, _query_rows(case), 1e-9, file="functions_f64.npz")


def _query_rows(case: Case) -> Tensor:
    shape = tuple(_facts(case)["output_index_dims"])
    table = PositionQueryTable(PositionQueries(shape, _fourier(case, endpoint=False)))
    rows: Tensor = table(_array(case, "points").unsqueeze(0))[0]
    return rows


@pytest.mark.parametrize("case", _cases("attend"), ids=_name)
def test_attention_and_its_masks(case: Case) -> None:
    q, k, v = (_array(case, name) for name in "qkv")
    heads, queries = q.shape[2], q.shape[1]
    _check(case, attend(q.flatten(2), k.flatten(2), v.flatten(2), heads), 1e-5, "out_no_mask")

    # A mask of its own for each query: every query as a sample of its own.
    alone = q.flatten(0, 1).flatten(1).unsqueeze(1)
    keys, values = (x.repeat_interleave(queries, 0).flatten(2) for x in (k, v))
    rows = attend(alone, keys, values, heads, _array(case, "mask").flatten(0, 1), masked_rows="zero")
    _check(case, rows.reshape(q.shape[0], queries, -1), 1e-5, "out_mask")

    # Keys that are not there, and queries that may not read.
    read = attend(q.flatten(2), k.flatten(2), v.flatten(2), heads, _array(case, "kv_mask"), masked_rows="zero")
    _check(case, read * _array(case, "q_mask").unsqueeze(-1), 1e-5, "out_cross_mask")


@pytest.mark.parametrize("case", _cases("conv_downsample"), ids=_name)
def test_convolution_batch_norm_and_pool(case: Case) -> None:
    kwargs = _facts(case)["kwargs"]
    x = _array(case, "in").permute(0, 3, 1, 2)
    for layer in range(kwargs["num_layers"]):
        x = _downsample(case, x, f"_{layer}" if layer else "", kwargs["use_batchnorm"])

    _check(case, x.permute(0, 2, 3, 1), 1e-5)


@torch.no_grad()
def _downsample(case: Case, x: Tensor, suffix: str, batch_norm: bool) -> Tensor:
    module, norm = "params/conv2_d_downsample/~", f"state/conv2_d_downsample/~/batchnorm{suffix}/~"
    kernel = hwio_to_oihw(_array(case, f"{module}/conv{suffix}/w"))
    ours = ConvDownsample(kernel.shape[1], kernel.shape[0], "same").eval()
    ours.conv.weight.copy_(kernel)
    if batch_norm:
        ours.norm.weight.copy_(_array(case, f"{module}/batchnorm{suffix}/scale").flatten())
        ours.norm.bias.copy_(_array(case, f"{module}/batchnorm{suffix}/offset").flatten())
        assert ours.norm.running_mean is not None
        assert ours.norm.running_var is not None
        ours.norm.running_mean.copy_(_array(case, f"{norm}/mean_ema/average").flatten())
        ours.norm.running_var.copy_(_array(case, f"{norm}/var_ema/average").flatten())
    else:
        ours.add_module("norm", nn.Identity())
    y: Tensor = ours(x)
    return y


@pytest.mark.parametrize("case", _cases("space_to_depth"), ids=_name)
def test_space_to_depth(case: Case) -> None:
    kwargs, x = _facts(case)["kwargs"], _array(case, "in")
    spatial = (kwargs["spatial_block_size"],) * 2
    patch = spatial if x.ndim == 4 else (kwargs["temporal_block_size"], *spatial)

    grid = [size // step for size, step in zip(x.shape[1:-1], patch, strict=True)]
    _check(case, space_to_depth(x, patch).reshape(x.shape[0], *grid, -1), 0.0)


@pytest.mark.parametrize("case", _cases("patches_for_flow"), ids=_name)
def test_patches_of_frames(case: Case) -> None:
    _check(case, patches(_array(case, "in").permute(0, 1, 4, 2, 3)).detach(), 0.0)
