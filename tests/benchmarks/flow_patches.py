# SPDX-License-Identifier: Apache-2.0
"""Optical flow's first layer: 3×3 patches cut in numpy and projected, or one convolution in the graph?

python -m tests.benchmarks.flow_patches
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from torch import nn

from perceiver_export.exporter.checkpoints.huggingface import patches_to_kernel
from tests.benchmarks.harness import Row, command, medians, seconds_in_turn

HEIGHT, WIDTH, CHANNELS = 368, 496, 64


def measure(work: Path, runs: int = 30) -> Iterator[Row]:
    linear = nn.Linear(54, CHANNELS)
    convolution = nn.Conv2d(6, CHANNELS, 3, padding=1)
    with torch.no_grad():
        convolution.weight.copy_(patches_to_kernel(linear.weight))
        convolution.bias = linear.bias
    frames = np.random.default_rng(0).normal(size=(2, 3, HEIGHT, WIDTH)).astype(np.float32)
    pixels, patches = frames.reshape(1, 6, HEIGHT, WIDTH), cut(frames)
    projected = partial(session(linear, torch.from_numpy(patches)).run, None, {"x": patches})
    convolved = partial(session(convolution, torch.from_numpy(pixels)).run, None, {"x": pixels})
    difference = float(np.abs(projected()[0] - convolved()[0].reshape(CHANNELS, -1).T).max())
    sides = {"patches in numpy": partial(cut, frames), "their projection": projected, "one convolution": convolved}
    found = medians(seconds_in_turn(sides, runs))
    for name, median in found.items():
        yield {"side": name, "ms": 1e3 * median, "largest difference": difference}


def cut(frames: np.ndarray) -> np.ndarray:
    """Zero-padded 3×3 patches: (2, 3, H, W) -> (H·W, 54), frame, row, column, channel."""
    padded = np.pad(frames, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    return np.ascontiguousarray(windows.transpose(2, 3, 0, 4, 5, 1)).reshape(HEIGHT * WIDTH, 54)


def session(module: nn.Module, example: torch.Tensor) -> onnxruntime.InferenceSession:
    program = torch.onnx.export(module, (example,), dynamo=True, verbose=False, input_names=["x"])
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(program.model_proto.SerializeToString(), options)


if __name__ == "__main__":
    command(measure)
