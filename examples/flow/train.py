# SPDX-License-Identifier: Apache-2.0
"""Train a small Perceiver IO for optical flow on moving pieces of real images; write checkpoint and data.

    apt-get install opencv-doc
    pip install av
    python -m examples.flow.train [--baseline]

The model is a small `PerceiverForOpticalFlow` of transformers: tiles of 24 × 32 pixels, 48 latents of 96 channels.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.flow.data import HEIGHT, HERE, TRAINING, WIDTH, Bytes, Floats, Warps, write
from examples.training import Training, mixed_precision
from perceiver_export.exporter.checkpoints.huggingface import architecture, huggingface_sources
from perceiver_export.exporter.checkpoints.huggingface_config import read_config
from perceiver_export.exporter.model.attention import CrossAttention, attend
from perceiver_export.exporter.model.inputs import FramePairAdapter
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO

NUM_FEATURES, NUM_BANDS = 64, 64  # fixed by the class
RATE = 1e-3
CONFIG = {
    "architectures": ["PerceiverForOpticalFlow"],
    "model_type": "perceiver",
    "num_latents": 48,
    "d_latents": 96,
    "qk_channels": 96,
    "v_channels": 96,
    "num_blocks": 1,
    "num_self_attends_per_block": 4,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 3,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "train_size": [HEIGHT, WIDTH],
}
CENTRES, LOW_BANDS = (3, 4), 4  # rows and columns of the latents' first centers; bands per axis that encode them


def parts(model: PerceiverIO) -> tuple[FramePairAdapter, CrossAttention, PerceiverDecoder]:
    """The layers that read pixels and positions."""
    adapter, (cross,), decoder = model.inputs["frames"], model.encoder.cross_attentions, model.decoder
    assert isinstance(adapter, FramePairAdapter)
    assert isinstance(cross, CrossAttention)
    assert isinstance(decoder, PerceiverDecoder)
    return adapter, cross, decoder


class FastForward:
    """The model's function at some pixels only; the constant positions are projected once per batch."""

    def __init__(self, model: PerceiverIO) -> None:
        self.model = model

    def encode(self, features: Tensor, table: Tensor) -> Tensor:
        """Latents (B, N, D) of features (B, M, 64) beside positions (M, 258)."""
        _, cross, _ = parts(self.model)
        attention, norm = cross.attention, cross.input_norm
        weight = torch.cat([attention.key.weight, attention.value.weight])
        bias = torch.cat([attention.key.bias, attention.value.bias]) + weight @ norm.bias
        weight = weight * norm.weight
        count = features.shape[-1] + table.shape[-1]
        mean = (features.sum(-1) + table.sum(-1)) / count
        square = ((features**2).sum(-1) + (table**2).sum(-1)) / count
        deviation = (square - mean**2 + norm.eps).sqrt()[..., None]
        rows = features @ weight[:, :NUM_FEATURES].T + table @ weight[:, NUM_FEATURES:].T
        rows = (rows - mean[..., None] * weight.sum(1)) / deviation + bias
        queries = attention.query(cross.query_norm(self.model.encoder.latents))[None]
        keys, values = rows.split(attention.key.weight.shape[0], -1)
        read = attention.output(attend(queries, keys, values, attention.num_heads))
        latents: Tensor = read + self.model.encoder.latents
        latents = latents + cross.mlp(cross.mlp_norm(latents))
        for layer in self.model.encoder.self_attentions[0].children():
            latents = layer(latents)
        return latents

    def __call__(self, frames: Tensor, pixels: Tensor) -> Tensor:
        """The flow (B, Q, 2) at pixels (B, Q)."""
        adapter, _, _ = parts(self.model)
        features, table = adapter.features(frames.flatten(1, 2)).flatten(2).transpose(1, 2), adapter.positions()
        latents = self.encode(features, table)
        rows = features.gather(1, pixels[..., None].expand(-1, -1, NUM_FEATURES))
        inputs = torch.cat([rows, table[pixels]], -1)
        return self.model.decode("flow", latents, None, {}, inputs)


def low_bands() -> Tensor:
    """The channels of a pixel's inputs that hold the lowest sines and cosines of rows and columns."""
    first = NUM_FEATURES + 2
    return torch.cat([first + axis * NUM_BANDS + torch.arange(LOW_BANDS) for axis in range(4)])


@torch.no_grad()
def initialise(model: PerceiverIO, frames: Tensor) -> None:
    """Start from latents that each look around their own place, and from features with no response to a flat frame.

    With random weights, all latents read the mean of the tile, and 258 positions drown 64 features.
    """
    adapter, cross, decoder = parts(model)
    encoder, chosen, known = model.encoder, low_bands(), 4 * LOW_BANDS
    kernel = torch.randn_like(adapter.features.weight).unflatten(1, (2, 3))
    kernel[: NUM_FEATURES // 2, 1] = -kernel[: NUM_FEATURES // 2, 0]  # change in time
    kernel[NUM_FEATURES // 2 : NUM_FEATURES - 8] -= kernel[NUM_FEATURES // 2 : NUM_FEATURES - 8].mean((-1, -2), True)
    kernel = kernel.mean(2, True) + 0.2 * kernel  # mostly gray
    sobel = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([-1.0, 0.0, 1.0])
    kernel[0], kernel[1] = sobel, sobel.T
    kernel[2, 0], kernel[2, 1] = -1.0, 1.0
    adapter.features.weight.copy_(kernel.flatten(1, 2))
    assert adapter.features.bias is not None
    adapter.features.bias.zero_()
    adapter.features.weight.div_(adapter.features(frames.flatten(1, 2)).std((0, 2, 3))[:, None, None, None])

    rows, columns = (
        (torch.arange(count) + 0.5) * (size // count) for count, size in zip(CENTRES, (HEIGHT, WIDTH), strict=True)
    )
    middle = (rows.long()[:, None] * WIDTH + columns.long()).flatten()
    places = adapter.positions()[middle][:, chosen - NUM_FEATURES]
    encoder.latents.normal_(std=0.5)
    encoder.latents[:, :known] = places.repeat(encoder.latents.shape[0] // len(places), 1)
    query, key, value = cross.attention.query, cross.attention.key, cross.attention.value
    per_head = query.weight.shape[0] // cross.attention.num_heads
    for layer in (query, key):
        layer.weight.zero_()
    for head in range(cross.attention.num_heads):
        start = head * per_head
        spot, rest = torch.arange(start, start + known), slice(start + known, start + per_head)
        query.weight[spot, torch.arange(known)] = 1.1
        key.weight[spot, chosen] = 1.1
        query.weight[rest, known:].normal_(std=1 / math.sqrt(query.weight.shape[1] - known))
        key.weight[rest, :NUM_FEATURES].normal_(std=0.3 / math.sqrt(NUM_FEATURES))
        key.weight[rest, :2].normal_(std=1 / math.sqrt(2))  # attend to edges, of any direction
    value.weight.zero_()
    value.weight[:, :NUM_FEATURES].normal_(std=1 / math.sqrt(NUM_FEATURES))
    query, key = decoder.cross_attention.attention.query, decoder.cross_attention.attention.key
    query.weight.mul_(0.5)
    query.weight[torch.arange(known), chosen] = 1.9
    key.weight[torch.arange(known), torch.arange(known)] = 1.9


def train(model: PerceiverIO, source: Warps, steps: int, batch: int = 16) -> None:
    """AdamW, mixed precision; the loss is the end-point error at 64 pixels of each tile."""
    forward, training, losses, start = (
        FastForward(model),
        Training(model, RATE, steps),
        list[float](),
        time.perf_counter(),
    )
    for step in range(steps):
        frames, flow = source.batch(batch)
        pixels = torch.from_numpy(source.random.integers(HEIGHT * WIDTH, size=(batch, 64)))
        truth = flow.flatten(1, 2).gather(1, pixels[..., None].expand(-1, -1, 2))
        with mixed_precision():
            found = forward(frames, pixels)
        loss = ((found.float() - truth).square().sum(-1) + 1e-4).sqrt().mean()
        training.step(step, loss)
        losses.append(loss.item())
        if step % 100 == 99:
            taken = f"{time.perf_counter() - start:.0f} s"
            print(f"step {step + 1}/{steps}  end-point error {np.mean(losses[-100:]):.3f}  {taken}", flush=True)


def new_model(directory: Path, seed: int) -> tuple[PerceiverIO, Warps]:
    """The untrained model of a directory's config.json, and its training pairs."""
    torch.manual_seed(seed)
    model = PerceiverIO(architecture(read_config(directory), "huggingface", (HEIGHT, WIDTH)))
    source = Warps(TRAINING, seed)
    initialise(model, source.batch(64)[0])
    return model, source


def equalised(frame: Bytes) -> Floats:
    """The frame in gray with mean 0 and deviation 1, because the methods below assume constant brightness."""
    grey = frame.mean(-1, dtype=np.float32)
    result: Floats = (grey - grey.mean()) / (grey.std() + 1e-6)
    return result


def classical(pair: Bytes) -> dict[str, Floats]:
    """The flow (H, W, 2) of two frames by methods without training, with the best settings for test.npz."""
    registration: Any = importlib.import_module("skimage.registration")  # its functions have no types
    before, after = map(equalised, pair)
    found = {
        "TV-L1 (skimage, attachment 5)": registration.optical_flow_tvl1(before, after, attachment=5),
        "iterative Lucas-Kanade (skimage, radius 9)": registration.optical_flow_ilk(before, after, radius=9),
    }
    return {name: np.stack([columns, rows], -1) for name, (rows, columns) in found.items()}


def baseline() -> dict[str, float]:
    """Mean end-point errors on test.npz of the classical methods, and of predicting no motion."""
    with np.load(HERE / "test.npz") as test:
        pairs = [
            (classical(frames) | {"nothing moves": np.zeros_like(flow)}, flow)
            for frames, flow in zip(test["frames"], test["flow"], strict=True)
        ]
    return {
        name: float(np.mean([np.linalg.norm(found[name] - flow, axis=-1).mean() for found, flow in pairs]))
        for name in pairs[0][0]
    }


def main() -> None:
    """Train and write; or measure the baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", action="store_true", help="measure classical methods on test.npz instead")
    parser.add_argument("--steps", type=int, default=12_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.baseline:
        for name, value in sorted(baseline().items(), key=lambda error: -error[1]):  # the best is last
            print(json.dumps({"baseline": name, "metric": "epe", "value": round(value, 3)}))
        return
    write()
    torch.set_num_threads(2)
    checkpoint = HERE / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model, source = new_model(checkpoint, options.seed)
    train(model, source, options.steps)
    save(model, checkpoint)


def save(model: PerceiverIO, checkpoint: Path) -> None:
    """Write model.safetensors in 16 bits, with transformers' names."""
    sources = huggingface_sources("optical-flow")
    state = {}
    for name, tensor in model.state_dict().items():
        source = sources(name)
        if name == "inputs.frames.features.weight":  # a kernel (E, 6, 3, 3); in transformers a layer over patches
            tensor = tensor.unflatten(1, (2, 3)).permute(0, 1, 3, 4, 2).flatten(1)
        state[source.name] = tensor.half().contiguous()
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
