# SPDX-License-Identifier: Apache-2.0
"""The first Perceiver, small and on the CPU, against loops written out by hand; and the AudioSet inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from perceiver_export.exporter.model.architectures import (
    AudioVideoSizes,
    EncoderSizes,
    Parity,
    audio_video_classifier,
    first_perceiver,
    point_input,
)
from perceiver_export.exporter.model.config import ArrayInput, AverageDecoder, PerceiverConfig, Sharing
from perceiver_export.exporter.model.perceiver import PerceiverIO

BLOCKS, LAYERS, CHANNELS, LABELS = 4, 2, 16, 5
ENCODER = EncoderSizes(6, CHANNELS, LAYERS, BLOCKS, num_self_attention_heads=4)


@pytest.fixture(autouse=True)
def double_precision() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def build(config: PerceiverConfig) -> PerceiverIO:
    """A model none of whose parameters is at its default."""
    torch.manual_seed(0)
    model = PerceiverIO(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def attention(weights: dict[str, Tensor], prefix: str, queries: Tensor, inputs: Tensor, heads: int) -> Tensor:
    """softmax(QKᵀ/√d)V of one sample, head by head."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ weights[f"{prefix}.{name}.weight"].T + weights[f"{prefix}.{name}.bias"]

    q, k, v = linear("query", queries), linear("key", inputs), linear("value", inputs)
    width, read = q.shape[1] // heads, []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        scores = q[:, part] @ k[:, part].T / math.sqrt(width)
        read.append(torch.exp(scores) / torch.exp(scores).sum(dim=1, keepdim=True) @ v[:, part])
    return linear("output", torch.cat(read, dim=1))


def norm(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    centred = x - x.mean(dim=1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(dim=1, keepdim=True) + 1e-5)
    return scaled * weights[f"{prefix}.weight"] + weights[f"{prefix}.bias"]


def mlp(weights: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """With DeepMind's GELU, the tanh approximation."""
    hidden = norm(weights, f"{prefix}.mlp_norm", x) @ weights[f"{prefix}.mlp.hidden.weight"].T
    hidden = hidden + weights[f"{prefix}.mlp.hidden.bias"]
    hidden = hidden / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (hidden + 0.044715 * hidden**3)))
    return hidden @ weights[f"{prefix}.mlp.output.weight"].T + weights[f"{prefix}.mlp.output.bias"]


def by_hand(model: PerceiverIO, inputs: Tensor, reads: list[int | None], blocks: list[int]) -> Tensor:
    """Logits of one sample (M, C). ``reads``: before each block, with which weights the inputs are read, if at all."""
    weights = model.state_dict()
    latents = weights["encoder.latents"]
    for read, block in zip(reads, blocks, strict=True):
        if read is not None:
            prefix = f"encoder.cross_attentions.{read}"
            queries, keys = (
                norm(weights, f"{prefix}.query_norm", latents),
                norm(weights, f"{prefix}.input_norm", inputs),
            )
            latents = latents + attention(weights, f"{prefix}.attention", queries, keys, heads=1)
            latents = latents + mlp(weights, prefix, latents)
        for layer in range(LAYERS):
            prefix = f"encoder.self_attentions.{block}.{layer}"
            own = norm(weights, f"{prefix}.norm", latents)
            latents = latents + attention(weights, f"{prefix}.attention", own, own, heads=4)
            latents = latents + mlp(weights, prefix, latents)
    logits: Tensor = latents.mean(dim=0) @ weights["decoder.output.weight"].T + weights["decoder.output.bias"]
    return logits


@dataclass(frozen=True)
class Repeated:
    """How often the inputs are read and what is shared, as a config says it and as the loop goes."""

    num_cross_attentions: int
    sharing: Sharing
    block_sharing: Sharing
    reads: list[int | None]
    blocks: list[int]

    def build(self) -> PerceiverIO:
        return build(
            first_perceiver(
                {"points": ArrayInput((9,), 7)},
                ENCODER,
                LABELS,
                "deepmind",
                self.num_cross_attentions,
                self.sharing,
                self.block_sharing,
            )
        )


REPEATED = [
    Repeated(1, "all-but-first", "all", [0, None, None, None], [0, 0, 0, 0]),
    Repeated(2, "all-but-first", "all", [0, 1, None, None], [0, 0, 0, 0]),
    Repeated(4, "all-but-first", "all", [0, 1, 1, 1], [0, 0, 0, 0]),
    Repeated(4, "none", "none", [0, 1, 2, 3], [0, 1, 2, 3]),
    Repeated(3, "all", "all-but-first", [0, 0, 0, None], [0, 1, 1, 1]),
]


@pytest.mark.parametrize("repeated", REPEATED, ids=str)
def test_repeated_reading_against_a_loop_by_hand(repeated: Repeated) -> None:
    model, reads, blocks = repeated.build(), repeated.reads, repeated.blocks
    inputs = torch.randn(2, 9, 7)
    logits = model({"points": inputs})["logits"]

    expected = torch.stack([by_hand(model, sample, reads, blocks) for sample in inputs])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)
    if len({read for read in reads if read is not None}) > 1:  # weights of another read would be seen
        swapped: list[int | None] = [None if read is None else 0 for read in reads]
        assert (by_hand(model, inputs[0], swapped, blocks) - expected[0]).abs().max() > 1e-3


def test_number_of_weights_by_sharing() -> None:
    """7 input channels, so attention is 7 wide: one read, one layer, the rest."""
    read = (2 * 16 + 2 * 7) + (16 * 7 + 7) + 2 * (7 * 7 + 7) + (7 * 16 + 16) + 2 * 16 + 2 * (16 * 16 + 16)
    layer = 2 * 16 + 4 * (16 * 16 + 16) + 2 * 16 + 2 * (16 * 16 + 16)
    rest = 6 * 16 + 16 * LABELS + LABELS

    def parameters(num_cross_attentions: int, sharing: Sharing, block_sharing: Sharing) -> int:
        points = {"points": ArrayInput((9,), 7)}
        config = first_perceiver(points, ENCODER, LABELS, "deepmind", num_cross_attentions, sharing, block_sharing)
        return sum(parameter.numel() for parameter in PerceiverIO(config).parameters())

    assert parameters(4, "all-but-first", "all") == 2 * read + LAYERS * layer + rest
    assert parameters(1, "all-but-first", "all") == read + LAYERS * layer + rest
    assert parameters(4, "none", "none") == 4 * read + BLOCKS * LAYERS * layer + rest
    assert parameters(3, "all", "all-but-first") == read + 2 * LAYERS * layer + rest


def test_the_head_averages_before_it_projects() -> None:
    model = build(first_perceiver({"points": ArrayInput((9,), 7)}, ENCODER, LABELS, "deepmind", 2))
    assert model.config.decoder == AverageDecoder(LABELS)
    latents = torch.randn(3, 6, CHANNELS)
    weights = model.state_dict()

    expected = latents.mean(dim=1) @ weights["decoder.output.weight"].T + weights["decoder.output.bias"]
    torch.testing.assert_close(model.decoder(latents), expected, rtol=0, atol=1e-13)


def test_points_are_their_fourier_features_and_masked_ones_are_not_read() -> None:
    points = point_input(11, num_bands=3, max_frequency=1120, parity="deepmind")
    model = build(first_perceiver({"points": points}, ENCODER, LABELS, "deepmind", 2))
    cloud, mask = torch.rand(2, 11, 3) * 2 - 1, torch.ones(2, 11, dtype=torch.int32)
    mask[:, 8:] = 0
    features, _ = model.embed({"points": cloud, "points_mask": mask})

    x, y, z = cloud[0, 4].tolist()
    frequencies = (1, (1 + 1120) / 2, 1120)  # the highest is 1120 (section 4.3), so the resolution is 2240
    waves = [wave(math.pi * f * p) for wave in (math.sin, math.cos) for p in (x, y, z) for f in frequencies]
    np.testing.assert_allclose(features[0, 4].numpy(), [x, y, z, *waves], atol=1e-10)

    logits = model({"points": cloud, "points_mask": mask})["logits"]
    moved = cloud.clone()
    moved[:, 8:] = 0.5
    torch.testing.assert_close(model({"points": moved, "points_mask": mask})["logits"], logits, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        model({"points": moved[:, :8], "points_mask": mask[:, :8]})["logits"], logits, rtol=0, atol=1e-12
    )
    assert (model({"points": cloud, "points_mask": torch.ones_like(mask)})["logits"] - logits).abs().max() > 1e-3


@pytest.mark.parametrize("parity", ["deepmind", "huggingface"])
@pytest.mark.parametrize("mel", [None, (3, 5)])
def test_sound_and_frames_side_by_side(mel: tuple[int, int] | None, parity: Parity) -> None:
    sizes = AudioVideoSizes(48, 6, mel, 4, 8, 12, (2, 4, 3), audio_bands=2, video_bands=1)
    assert sizes.num_input_channels == 72 + 9 + 4  # 2 × 4 × 3 of RGB, three axes of 2·1 + 1, the modality

    config = audio_video_classifier(sizes, EncoderSizes(5, 16, 2), LABELS, parity, num_query_channels=24)
    model = build(config)
    name, shape, rows = ("mel", (*mel, 1), 15) if mel else ("audio", (48, 1), 8)
    sound, frames = torch.randn(2, *shape), torch.rand(2, 4, 8, 12, 3)
    inputs, mask = model.embed({name: sound, "frames": frames})

    assert inputs.shape == (2, rows + 2 * 2 * 4, 85)
    assert mask is None
    values = 1 if mel else 6
    torch.testing.assert_close(inputs[:, :rows, :values], sound.reshape(2, rows, values))
    patch = frames[1, 2:4, 4:8, 3:6]  # patch (1, 1, 1) of the grid 2 × 2 × 4
    torch.testing.assert_close(inputs[1, rows + 1 * 8 + 1 * 4 + 1, :72], patch.flatten())
    last = inputs[0, -1, 72:81]  # the end of all three axes: position 1, sin(π), cos(π)
    torch.testing.assert_close(last, torch.tensor([1.0, 1, 1, 0, 0, 0, -1, -1, -1]), rtol=0, atol=1e-6)
    padding = inputs[:, :rows, -1]
    assert (padding == padding[0, 0]).all()
    assert model({name: sound, "frames": frames})["logits"].shape == (2, LABELS)
