# SPDX-License-Identifier: Apache-2.0
"""Train the demo's Perceiver IO on Fashion-MNIST and write it as an ordinary Hugging Face directory.

    apt-get install dataset-fashion-mnist
    python -m examples.fashion_mnist.train [--baseline]

The model is a small `PerceiverForImageClassificationFourier` of transformers: 32 latents of 120 channels, and 3
self-attentions that run twice. It learns from labels, and from the scores of a convolutional network that is trained
first. 2,000 of the 60,000 training pictures are held out (`HELD_OUT`) for calibration.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

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
TEMPERATURE = 2.0
CONFIG = {
    "architectures": ["PerceiverForImageClassificationFourier"],
    "model_type": "perceiver",
    "num_latents": 32,
    "d_latents": 120,
    "d_model": 261,
    "num_blocks": 2,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 8,
    "num_cross_attention_heads": 3,
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
    """The one layer that reads the image."""
    (layer,) = model.encoder.cross_attentions
    assert isinstance(layer, CrossAttention)
    return layer


class FastForward:
    """The model's function with products in an order that costs a third. The plain model gives the same logits.

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
        """``weights @ table`` (B, N, 258) by axes: each position channel depends only on the row or the column."""
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

        heads = attention.num_heads
        queries = attention.query(cross.query_norm(encoder.latents)).unflatten(-1, (heads, -1)).transpose(0, 1)
        keys, values = (layer.weight.unflatten(0, (heads, -1)) for layer in (attention.key, attention.value))
        a = (queries @ (keys * norm.weight) / math.sqrt(queries.shape[-1])).flatten(0, 1)
        a = a - a.mean(-1, keepdim=True)
        split = features.shape[1]
        scores = (a[:, :split] @ features + a[:, split:] @ table.T) / deviation
        weights = torch.softmax(scores, -1) / deviation
        context = torch.cat([weights @ features.transpose(1, 2), self.positions_read(weights)], -1)
        context = (context - context.mean(-1, keepdim=True)) * norm.weight + norm.bias
        read = context.unflatten(1, (heads, -1)) @ values.transpose(1, 2)
        x = attention.output(read.transpose(1, 2).flatten(2) + attention.value.bias) + encoder.latents
        latents = x + cross.mlp(cross.mlp_norm(x))
        for _ in range(encoder.config.num_blocks):
            for layer in encoder.self_attentions[0].children():
                latents = layer(latents)
        return self.model.decode("logits", latents, None, {}).squeeze(1)


@torch.no_grad()
def initialise(model: PerceiverIO) -> None:
    """Start from latents that differ, attend to smooth and different regions, and see pixels beside positions.

    With transformers' initialization, all latents read the picture's mean for thousands of steps, and 258 position
    channels drown 3 pixel channels.
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
    """uint8 (B, 28, 28) -> normalized float32 (B, 3, 28, 28)."""
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


@dataclass
class Pictures:
    """Training images (N, 28, 28) with labels (N,), and a teacher's scores (N, 2, 10): as they are, and mirrored."""

    images: Tensor
    labels: Tensor
    scores: Tensor
    generator: torch.Generator

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """One epoch: inputs, labels and the teacher's scores; each image is mirrored with probability 1/2."""
        order = torch.randperm(len(self.images), generator=self.generator)
        for rows in order[: len(order) // size * size].reshape(-1, size):
            mirror = torch.rand(size, generator=self.generator) < 0.5
            images = torch.where(mirror[:, None, None], self.images[rows].flip(-1), self.images[rows])
            yield to_inputs(images), self.labels[rows], self.scores[rows, mirror.long()]


def teacher(pictures: Pictures, epochs: int) -> Tensor:
    """Scores of a small convolutional network, which learns these images faster and better: (N, 2, 10)."""
    widths, layers = (3, 32, 64, 128), list[nn.Module]()
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), nn.MaxPool2d(2)]
    network = nn.Sequential(*layers, nn.Flatten(), nn.Dropout(0.3), nn.Linear(9 * widths[-1], 10))
    fit(network, network, pictures, epochs, 128, 3e-3, lambda logits, labels, _: F.cross_entropy(logits, labels))
    network.eval()
    with torch.no_grad():
        both = [
            torch.cat([network(to_inputs(some)) for some in images.split(500)])
            for images in (pictures.images, pictures.images.flip(-1))
        ]
    return torch.stack(both, 1)


def fit(
    model: nn.Module,
    forward: Callable[[Tensor], Tensor],
    pictures: Pictures,
    epochs: int,
    batch: int,
    rate: float,
    loss_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> None:
    """AdamW, one-cycle learning rate, mirrored images, mixed precision; prints one line per epoch."""
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate)
    steps = epochs * (len(pictures.images) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(epochs):
        losses = []
        for inputs, labels, scores in pictures.batches(batch):
            with mixed_precision():
                logits = forward(inputs)
            loss = loss_of(logits.float(), labels, scores)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        took = time.perf_counter() - start
        print(f"epoch {epoch + 1}/{epochs}  loss {np.mean(losses):.4f}  {took:.0f} s", flush=True)


def distillation(logits: Tensor, labels: Tensor, scores: Tensor) -> Tensor:
    """Cross-entropy with labels and with the teacher's softened scores (Hinton et al. 2015, arXiv 1503.02531)."""
    soft = F.cross_entropy(logits / TEMPERATURE, (scores / TEMPERATURE).softmax(-1))
    return 0.3 * F.cross_entropy(logits, labels, label_smoothing=0.05) + 0.7 * TEMPERATURE**2 * soft


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
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=58_000, help="train on the first ones only (for a test)")
    arguments = parser.parse_args()
    if arguments.baseline:
        print(json.dumps(baseline()))
        return
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(2)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    (arguments.out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")

    model = PerceiverIO(architecture(read_config(arguments.out), "huggingface", (28, 28)))
    initialise(model)
    images, labels = read_split("train")
    kept = np.delete(np.arange(len(images)), np.r_[HELD_OUT])[: arguments.pictures]
    pictures = Pictures(
        torch.from_numpy(images[kept]),
        torch.from_numpy(labels[kept].astype(np.int64)),
        torch.zeros(len(kept), 2, 10),
        torch.Generator().manual_seed(arguments.seed),
    )
    pictures.scores = teacher(pictures, math.ceil(arguments.epochs / 3))
    fit(model, FastForward(model), pictures, arguments.epochs, 64, 1e-3, distillation)
    model.eval()
    sources = huggingface_sources("image-classification")
    state = {sources(name).name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, arguments.out / "model.safetensors", metadata={"format": "pt"})
    first = slice(arguments.pictures)
    print(f"held-out top-1 {accuracy(model, images[HELD_OUT][first], labels[HELD_OUT][first]):.4f}")
    print(f"test top-1     {accuracy(model, *(array[first] for array in read_split('t10k'))):.4f}")


if __name__ == "__main__":
    main()
