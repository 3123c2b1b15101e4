# SPDX-License-Identifier: Apache-2.0
"""Models of your own: any torch module, and a Perceiver IO for any arrays and any queries.

    cd examples
    perceiver-export export your_own:clothes -o clothes --batch 1:1:64
    perceiver-export quantize clothes --data fashion_mnist/held_out.npz -o int8
    perceiver-export validate int8 --data fashion_mnist/test.npz --against your_own:clothes --max-drop 1 --certify \
        --device openvino-cpu
    perceiver-export run int8 fashion_mnist/images/bag.png

`clothes` is a plain `torch.nn.Module` that was trained here: `python your_own.py` trains it again, in a few minutes,
from Debian's `dataset-fashion-mnist`. `robot` reads sound, touch and joint positions, and predicts which objects are
near and how its arm will move. `shapes` is a classifier of point clouds. Both have random weights.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from perceiver_export.exporter import LoadedModel, OwnModel
from perceiver_export.exporter.model import (
    ArrayInput,
    EncoderSizes,
    FourierPositions,
    LearnedPositions,
    LearnedQueries,
    OutputConfig,
    PerceiverIO,
    PositionQueries,
    own_model,
)
from perceiver_export.runtimes.preprocessing import ImagePreprocessing, Normalize, PointsPreprocessing, Rescale, Resize

WEIGHTS = Path(__file__).with_suffix(".pt")
LABELS = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
STEPS = (Resize(28, 28, "bicubic"), Rescale(1 / 255, 0.0), Normalize((0.286,) * 3, (0.353,) * 3))


class Clothes(nn.Module):
    """Images (B, 3, 28, 28) -> scores (B, 10): twelve latents read 196 patches, then each other."""

    def __init__(self, width: int = 64, latents: int = 12) -> None:
        super().__init__()
        self.patch, self.positions = nn.Conv2d(3, width, 2, 2), nn.Parameter(0.1 * torch.randn(196, width))
        self.latents, self.norm = nn.Parameter(torch.randn(latents, width)), nn.LayerNorm(width)
        self.read = nn.MultiheadAttention(width, 1, batch_first=True)
        layer = nn.TransformerEncoderLayer(width, 4, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
        self.blocks = nn.TransformerEncoder(layer, 3, enable_nested_tensor=False)
        self.head = nn.Linear(width, len(LABELS))

    def forward(self, image: Tensor) -> Tensor:
        patches = self.norm(self.patch(image).flatten(2).transpose(1, 2) + self.positions)
        latents = self.latents.expand(image.shape[0], -1, -1)
        latents = latents + self.read(latents, patches, patches, need_weights=False)[0]
        scores: Tensor = self.head(self.blocks(latents).mean(1))
        return scores


def clothes() -> OwnModel:
    """A trained classifier. With its labels and preprocessing, `run` takes images and `validate` measures top-1."""
    model = Clothes()
    model.load_state_dict(torch.load(WEIGHTS, weights_only=True))
    inputs = {"image": torch.randn(1, 3, 28, 28)}
    return OwnModel(model, inputs, ("logits",), "image-classification", LABELS, ImagePreprocessing(28, 28, STEPS))


def robot() -> PerceiverIO:
    """Three inputs of three ranks, read by 16 latents; two outputs."""
    inputs = {
        "sound": ArrayInput((160,), 1, patch=(8,), positions=FourierPositions(6, (160,))),
        "touch": ArrayInput((6, 8), 2, positions=FourierPositions(4, (6, 8))),
        "joints": ArrayInput((7,), 3, positions=LearnedPositions((7,), 12), masked=True),
    }
    outputs = {
        "objects": OutputConfig(LearnedQueries(5, 32), shape=(5, 10), num_channels=10),
        "motion": OutputConfig(PositionQueries((20,), FourierPositions(6, (20,))), shape=(20, 7), num_channels=7),
    }
    return PerceiverIO(own_model(inputs, outputs, EncoderSizes(16, 32, num_self_attentions_per_block=2)))


def shapes() -> LoadedModel:
    """Point clouds of 64 points in, one of three labels out. The kind of `scores` is given, but is also the default."""
    points = ArrayInput((64,), 3, positions=LearnedPositions((64,), 8))
    scores = OutputConfig(LearnedQueries(1, 32), shape=(3,), num_channels=3)
    model = PerceiverIO(own_model({"points": points}, {"scores": scores}, EncoderSizes(16, 32, 2)))
    return LoadedModel.own(
        model,
        "point-cloud-classification",
        labels=("cube", "ball", "cone"),
        preprocessing=PointsPreprocessing(64),
        output_kinds={"scores": "single-label"},
    )


def train(epochs: int = 2) -> None:
    """Train `clothes` on all images except the held-out ones, and write its weights."""
    import sys

    sys.path.insert(0, str(WEIGHTS.parent / "fashion_mnist"))
    from train import HELD_OUT, read_split

    torch.manual_seed(0)
    images, labels = (torch.from_numpy(array) for array in read_split("train"))
    kept = torch.ones(len(images), dtype=torch.bool)
    kept[HELD_OUT] = False
    images, labels = images[kept], labels[kept].long()
    model, batch = Clothes(), 128
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in range(steps):
        chosen = torch.randint(len(images), (batch,))
        image = ((images[chosen].float() / 255 - 0.286) / 0.353).unsqueeze(1).expand(-1, 3, -1, -1)
        loss = nn.functional.cross_entropy(model(image), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 0:
            print(f"step {step} of {steps}: loss {float(loss):.3f}", flush=True)
    torch.save(model.state_dict(), WEIGHTS)


if __name__ == "__main__":
    train()
