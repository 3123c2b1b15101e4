# SPDX-License-Identifier: Apache-2.0
"""Train the demo's Perceiver IO on Fashion-MNIST and write it as an ordinary Hugging Face directory.

    apt-get install dataset-fashion-mnist
    python -m examples.fashion_mnist.train [--baseline]

The model is transformers' `PerceiverForImageClassificationFourier`, only small: 32 latents of 128 channels, 2 times
the same 3 self-attentions. 2,000 of the 60,000 training pictures are left out (`HELD_OUT`), for calibration later.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.training import mixed_precision
from perceiver_export.exporter.checkpoints.huggingface import architecture, huggingface_sources
from perceiver_export.exporter.checkpoints.huggingface_config import read_config
from perceiver_export.exporter.model.attention import CrossAttention
from perceiver_export.exporter.model.config import ImageInput
from perceiver_export.exporter.model.inputs import ImageAdapter
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO

DATASET = Path("/usr/share/datasets/fashion-mnist")
HELD_OUT = slice(58_000, 60_000)
LABELS = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
MEAN, STD = 0.2860, 0.3530
NUM_BANDS = 64
CONFIG = {
    "architectures": ["PerceiverForImageClassificationFourier"],
    "model_type": "perceiver",
    "num_latents": 32,
    "d_latents": 128,
    "d_model": 261,
    "num_blocks": 2,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 1,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "image_size": 28,
    "id2label": {str(i): label for i, label in enumerate(LABELS)},
    "label2id": {label: i for i, label in enumerate(LABELS)},
}
PREPROCESSOR = {
    "image_processor_type": "PerceiverImageProcessor",
    "do_resize": True,
    "size": {"height": 28, "width": 28},
    "do_center_crop": False,
    "crop_size": {"height": 28, "width": 28},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [MEAN] * 3,
    "image_std": [STD] * 3,
}


def read_split(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Pictures (N, 28, 28) and labels (N,), uint8, from the dataset's IDX files (`name`: train or t10k)."""
    images = gzip.decompress((DATASET / f"{name}-images-idx3-ubyte.gz").read_bytes())
    labels = gzip.decompress((DATASET / f"{name}-labels-idx1-ubyte.gz").read_bytes())
    return np.frombuffer(images, np.uint8, offset=16).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8, offset=8)


def cross_attention(model: PerceiverIO) -> CrossAttention:
    """The one layer that reads the picture."""
    (layer,) = model.encoder.cross_attentions
    assert isinstance(layer, CrossAttention)
    return layer


class FastForward:
    """The model's own function in an order of products that costs a third (plain model in evaluation: same logits).

    Latents are the same for every picture and positions are constant, so a score is an additive constant plus three
    products, divided by the input's deviation; keys and values are never computed.
    """

    def __init__(self, model: PerceiverIO) -> None:
        self.model = model
        image = model.config.inputs["image"]
        assert isinstance(image, ImageInput)
        self.shape = (image.height, image.width)
        adapter = model.inputs["image"]
        assert isinstance(adapter, ImageAdapter)
        self.positions = adapter.positions
        grid = self.positions().reshape(*self.shape, -1)
        self.varies_by_row = (grid[:, :1] == grid).flatten(0, 1).all(0)

    def positions_read(self, weights: Tensor) -> Tensor:
        """``weights @ table`` (B, N, 258) by axes: each position channel depends on the row or the column alone."""
        grid = self.positions().reshape(*self.shape, -1)
        on_grid = weights.reshape(*weights.shape[:-1], *self.shape)
        per_row, per_column = on_grid.sum(-1), on_grid.sum(-2)
        return torch.where(self.varies_by_row, per_row @ grid[:, 0], per_column @ grid[0])

    def __call__(self, image: Tensor) -> Tensor:
        encoder, cross = self.model.encoder, cross_attention(self.model)
        attention, norm, table = cross.attention, cross.input_norm, self.positions()
        features = image.flatten(2)
        num_channels = features.shape[1] + table.shape[1]
        mean = (features.sum(1) + table.sum(1)) / num_channels
        variance = ((features**2).sum(1) + (table**2).sum(1)) / num_channels - mean**2
        deviation = (variance + norm.eps).sqrt().unsqueeze(1)

        queries = attention.query(cross.query_norm(encoder.latents))
        a = queries @ (attention.key.weight * norm.weight) / math.sqrt(queries.shape[-1])
        a = a - a.mean(-1, keepdim=True)
        split = features.shape[1]
        scores = (a[:, :split] @ features + a[:, split:] @ table.T) / deviation
        weights = torch.softmax(scores, -1) / deviation
        context = torch.cat([weights @ features.transpose(1, 2), self.positions_read(weights)], -1)
        context = (context - context.mean(-1, keepdim=True)) * norm.weight + norm.bias
        x = attention.output(attention.value(context)) + encoder.latents
        latents = x + cross.mlp(cross.mlp_norm(x))
        for _ in range(encoder.config.num_blocks):
            for layer in encoder.self_attentions[0].children():
                latents = layer(latents)
        return self.model.decode("logits", latents, None, {}).squeeze(1)


@torch.no_grad()
def initialise(model: PerceiverIO) -> None:
    """Start from latents that differ, look at smooth and different regions, and see pixels beside positions.

    With transformers' initialisation all latents read the picture's mean for thousands of steps, and 3 pixel channels
    are drowned by 258 position channels.
    """
    encoder, cross = model.encoder, cross_attention(model)
    encoder.latents.normal_(std=0.5)
    assert isinstance(model.decoder, PerceiverDecoder)
    for queries in model.decoder.queries.parameters():
        queries.normal_(std=0.5)
    cross.input_norm.weight[:3] = 8.0
    damping = torch.exp(-torch.arange(NUM_BANDS) / 8)  # low frequencies: smooth attention maps
    per_channel = torch.cat([torch.ones(3 + 2), damping, damping, damping, damping])
    cross.attention.key.weight.mul_(8 * per_channel / per_channel.square().mean().sqrt())


def to_inputs(images: Tensor) -> Tensor:
    """uint8 (B, 28, 28) -> normalised float32 (B, 3, 28, 28)."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1).expand(-1, 3, -1, -1).contiguous()


@torch.no_grad()
def accuracy(model: PerceiverIO, images: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 of the plain model."""
    hits = 0
    for start in range(0, len(images), 250):
        pictures = to_inputs(torch.from_numpy(images[start : start + 250].copy()))
        logits = model({"image": pictures})["logits"]
        hits += int((logits.argmax(-1).numpy() == labels[start : start + 250]).sum())
    return hits / len(images)


def train(model: PerceiverIO, images: np.ndarray, labels: np.ndarray, epochs: int, seed: int, batch: int = 64) -> None:
    """AdamW, one-cycle learning rate, label smoothing 0.05, mixed precision; prints one line an epoch."""
    generator = torch.Generator().manual_seed(seed)
    pictures, targets = torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))
    steps = len(pictures) // batch
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}], lr=1e-3
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=epochs * steps, pct_start=0.1)
    forward, criterion = FastForward(model), torch.nn.CrossEntropyLoss(label_smoothing=0.05)
    start = time.perf_counter()
    for epoch in range(epochs):
        losses = []
        for indices in torch.randperm(len(pictures), generator=generator)[: steps * batch].reshape(steps, batch):
            with mixed_precision():
                logits = forward(to_inputs(pictures[indices]))
            loss = criterion(logits.float(), targets[indices])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(
            f"epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.4f}  {time.perf_counter() - start:.0f} s", flush=True
        )


def baseline() -> dict[str, object]:
    """A linear function of the pixels for each label, by least squares."""
    (images, labels), (test_images, test_labels) = read_split("train"), read_split("t10k")
    learned, tested = (
        np.pad(one.reshape(-1, 784) / np.float32(255), ((0, 0), (0, 1)), constant_values=1)
        for one in (images[: HELD_OUT.start], test_images)
    )
    ridge, targets = 10 * np.eye(785, dtype=np.float32), np.eye(10, dtype=np.float32)[labels[: HELD_OUT.start]]
    weights = np.linalg.solve(learned.T @ learned + ridge, learned.T @ targets)
    value = 100 * float(((tested @ weights).argmax(-1) == test_labels).mean())
    return {"baseline": "least squares on pixels", "metric": "top-1", "value": value}


def main() -> None:
    """Train, test, write; or measure the baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--baseline", action="store_true", help="measure a simple baseline instead")
    parser.add_argument("--epochs", type=int, default=22)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=58_000, help="the first ones only (for a test)")
    arguments = parser.parse_args()
    if arguments.baseline:
        print(json.dumps(baseline()))
        return
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")

    model = PerceiverIO(architecture(read_config(arguments.out), "huggingface", (3, 28, 28)))
    initialise(model)
    images, labels = read_split("train")
    kept = np.delete(np.arange(len(images)), np.r_[HELD_OUT])[: arguments.pictures]
    train(model, images[kept], labels[kept], arguments.epochs, arguments.seed)
    model.eval()
    sources = huggingface_sources("image-classification")
    state = {sources(name).name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, arguments.out / "model.safetensors", metadata={"format": "pt"})
    first = slice(arguments.pictures)
    print(f"held-out top-1 {accuracy(model, images[HELD_OUT][first], labels[HELD_OUT][first]):.4f}")
    print(f"test top-1     {accuracy(model, *(array[first] for array in read_split('t10k'))):.4f}")


if __name__ == "__main__":
    main()
