# SPDX-License-Identifier: Apache-2.0
"""Optical flow's first layer: 3×3 patches cut in numpy and projected, or one convolution in the graph?

python tests/benchmarks/flow_patches.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnxruntime
import torch
from torch import nn

from perceiver_export.exporter.checkpoints.huggingface_names import patches_to_kernel

HEIGHT, WIDTH, CHANNELS = 368, 496, 64
RUNS = 30


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


def median(call: Callable[[], object]) -> float:
    call()
    times = []
    for _ in range(RUNS):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return float(np.median(times) * 1e3)


def main() -> None:
    linear = nn.Linear(54, CHANNELS)
    convolution = nn.Conv2d(6, CHANNELS, 3, padding=1)
    with torch.no_grad():
        convolution.weight.copy_(patches_to_kernel(linear.weight))
        convolution.bias = linear.bias
    frames = np.random.default_rng(0).normal(size=(2, 3, HEIGHT, WIDTH)).astype(np.float32)
    pixels = frames.reshape(1, 6, HEIGHT, WIDTH)
    projected = session(linear, torch.from_numpy(cut(frames)))
    convolved = session(convolution, torch.from_numpy(pixels))

    apart = projected.run(None, {"x": cut(frames)})[0]
    together = convolved.run(None, {"x": pixels})[0].reshape(CHANNELS, -1).T
    print(f"largest difference {np.abs(apart - together).max():.1e} on values up to {np.abs(apart).max():.1f}")
    patches = cut(frames)
    print(f"patches in numpy          {median(lambda: cut(frames)):6.1f} ms, {patches.nbytes / 2**20:.0f} MiB")
    print(f"their projection in ONNX  {median(lambda: projected.run(None, {'x': patches})):6.1f} ms")
    print(f"one convolution in ONNX   {median(lambda: convolved.run(None, {'x': pixels})):6.1f} ms")


if __name__ == "__main__":
    main()
