# SPDX-License-Identifier: Apache-2.0
"""Train a small masked language model of bytes on real text and write it as an ordinary Hugging Face directory.

    apt-get install bible-kjv
    python -m examples.text_bytes.train [--baseline]

The model is a small `PerceiverForMaskedLM` of transformers: 64 bytes and as many latents. The text is the King James
Bible, verse by verse; every 20th verse is held out, for calibration and for tests on text that it has never seen.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from examples.training import mixed_precision
from perceiver_export.exporter.checkpoints.huggingface import architecture, huggingface_sources
from perceiver_export.exporter.checkpoints.huggingface_config import read_config
from perceiver_export.exporter.model.attention import Attention, CrossAttention, SelfAttention
from perceiver_export.exporter.model.inputs import TokenAdapter
from perceiver_export.exporter.model.perceiver import PerceiverDecoder, PerceiverIO

LENGTH = 64
ROOM = LENGTH - 2  # bytes between [CLS] and [SEP], where transformers' tokenizer puts them
MASK, CLS, SEP, FIRST_BYTE = 3, 4, 5, 6
MASKED = 0.15  # of the bytes, as in the paper
EVERY = 20  # one verse in so many is held out
RATE, WARMUP = 2e-3, 200
CALIBRATION, TEST = 512, 2500  # pieces of held-out verses in files beside the checkpoint, masked and unmasked
CODE = 24  # channels that say where a byte or a latent is
FREQUENCIES = 2 * math.pi / torch.logspace(math.log10(3.5), math.log10(2 * LENGTH), CODE // 2)
CONFIG = {
    "architectures": ["PerceiverForMaskedLM"],
    "model_type": "perceiver",
    "vocab_size": 262,
    "max_position_embeddings": LENGTH,
    "d_model": 96,
    "num_latents": LENGTH,
    "d_latents": 128,
    "num_blocks": 1,
    "num_self_attends_per_block": 4,
    "num_self_attention_heads": 4,
    "num_cross_attention_heads": 4,
    "qk_channels": 96,
    "v_channels": 128,
    "cross_attention_shape_for_attention": "kv",
    "self_attention_widening_factor": 1,
    "cross_attention_widening_factor": 1,
    "hidden_act": "gelu",
    "use_query_residual": True,
}


def verses() -> list[bytes]:
    """The text, one verse per item, without its number."""
    done = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True)
    return [line.split(b" ", 1)[1].strip() for line in done.stdout.splitlines() if b" " in line]


def windows(lines: list[bytes]) -> np.ndarray:
    """Tokens (n, LENGTH): the verses one after the other, cut into pieces."""
    joined = np.frombuffer(b" ".join(lines), np.uint8)
    count = len(joined) // ROOM
    pieces = joined[: count * ROOM].reshape(count, ROOM).astype(np.int64) + FIRST_BYTE
    return np.pad(np.pad(pieces, ((0, 0), (1, 0)), constant_values=CLS), ((0, 0), (0, 1)), constant_values=SEP)


def split() -> tuple[np.ndarray, np.ndarray]:
    """Tokens to train on, and tokens of the held-out verses."""
    lines = verses()
    kept = [line for index, line in enumerate(lines) if index % EVERY]
    return windows(kept), windows(lines[::EVERY])


def masked(tokens: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with 15 % of the bytes masked, and the mask."""
    places = (np.random.default_rng(seed).random(tokens.shape) < MASKED) & (tokens >= FIRST_BYTE)
    return np.where(places, MASK, tokens), places


def write_texts(path: Path, tokens: np.ndarray) -> None:
    """Write one JSON object per line, for `quantize --data` and `validate --data`; masked bytes are [MASK]."""
    rows = ("".join("[MASK]" if token == MASK else chr(token - FIRST_BYTE) for token in row[1:-1]) for row in tokens)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def accuracy(model: PerceiverIO, tokens: np.ndarray, seed: int = 0) -> float:
    """The share of masked bytes that the model fills correctly."""
    given, places = masked(tokens, seed)
    hits = 0
    for start in range(0, len(tokens), 256):
        batch = torch.from_numpy(given[start : start + 256])
        logits = model({"tokens": batch.int(), "tokens_mask": torch.ones_like(batch).int()})["logits"]
        best = logits.argmax(-1).numpy()
        there = places[start : start + 256]
        hits += int((best == tokens[start : start + 256])[there].sum())
    return hits / int(places.sum())


def positional_code(positions: Tensor) -> Tensor:
    """Cosines and sines (n, 24) of twelve wavelengths from 3.5 bytes to twice the window, which `shift` rotates."""
    angles = positions[:, None] * FREQUENCIES
    return torch.stack([angles.cos(), angles.sin()], -1).flatten(1)


def shift(offset: float) -> Tensor:
    """The rotation (24, 24) with shift(o) · code(x) = code(x + o)."""
    cos, sin = (FREQUENCIES * offset).cos(), (FREQUENCIES * offset).sin()
    turns = (torch.tensor([[c, -s], [s, c]]) for c, s in zip(cos, sin, strict=True))
    rotation: Tensor = torch.block_diag(*turns)
    return rotation


def look_at(attention: Attention, offsets: tuple[float, ...], sharpness: float) -> None:
    """Head h of a query at position x reads from x + offsets[h]. Codes are the first channels on both sides."""
    width = len(attention.query.weight) // attention.num_heads
    for head, offset in enumerate(offsets):
        rows = slice(head * width, head * width + CODE)
        for linear, matrix in ((attention.query, sharpness * shift(offset)), (attention.key, torch.eye(CODE))):
            linear.weight[rows, :CODE] = matrix
            linear.weight[rows, CODE:] *= 0.1
    attention.query.bias.zero_()
    attention.key.bias.zero_()


@torch.no_grad()
def initialise(model: PerceiverIO) -> None:
    """Start from latents with a place each, and heads that read the bytes near it.

    With transformers' initialization (everything normal, 0.02) no latent is nearer to one byte than to another, every
    byte reads the same mean, and for hours training learns nothing but the frequencies of bytes.
    """
    code = positional_code(torch.arange(float(LENGTH)))
    tokens, encoder, decoder = model.inputs["tokens"], model.encoder, model.decoder
    assert isinstance(tokens, TokenAdapter)
    assert isinstance(decoder, PerceiverDecoder)
    tokens.embedding.weight.normal_(std=0.7)
    tokens.embedding.weight[:, :CODE] = 0
    for table in (tokens.positions, *decoder.queries.parameters(), encoder.latents):
        table.normal_(std=0.1)
        table[:, :CODE] = code
    cross = encoder.cross_attentions[0]
    assert isinstance(cross, CrossAttention)
    look_at(cross.attention, (-2, -1, 1, 2), sharpness=4.0)
    for layer in encoder.self_attentions[0].children():
        assert isinstance(layer, SelfAttention)
        look_at(layer.attention, (-3, -1, 1, 3), sharpness=2.0)
    look_at(decoder.cross_attention.attention, (0,) * 8, sharpness=2.0)


def train(model: PerceiverIO, tokens: np.ndarray, steps: int, seed: int, batch: int = 64) -> None:
    """AdamW, warmup and a cosine, mixed precision; prints the loss (nats per masked byte) from time to time."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.01, betas=(0.9, 0.98))
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        rate = RATE * min(1.0, step / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = tokens[generator.integers(len(tokens), size=batch)]
        given, places = masked(chosen, int(generator.integers(1 << 31)))
        there, inputs = torch.from_numpy(places), torch.from_numpy(given).int()
        with mixed_precision():
            logits = model({"tokens": inputs, "tokens_mask": torch.ones_like(inputs)})["logits"]
        loss = torch.nn.functional.cross_entropy(logits[there].float(), torch.from_numpy(chosen)[there])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        if step % 200 == 0:
            print(
                f"step {step}/{steps}  loss {np.mean(losses[-200:]):.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )


def neighbours(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two bytes beside each byte, as one number, and the byte itself."""
    before, byte, after = (tokens[:, start : start + ROOM - 2] - FIRST_BYTE for start in (1, 2, 3))
    return before * 256 + after, byte


def baseline() -> dict[str, object]:
    """Predict each byte of the test pieces as the most frequent one between its two neighbors."""
    learned, held_out = split()
    (beside, byte), (beside_test, byte_test) = map(neighbours, (learned, held_out[CALIBRATION : CALIBRATION + TEST]))
    counts = np.zeros((1 << 16, 256), np.int32)
    np.add.at(counts, (beside, byte), 1)
    value = 100 * float((counts.argmax(-1)[beside_test] == byte_test).mean())
    return {"baseline": "most frequent byte between its two neighbours", "metric": "token accuracy", "value": value}


def main() -> None:
    """Train, test, write; or measure the baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--baseline", action="store_true", help="measure a simple baseline instead")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measured", type=int, help="test on the first pieces only (for a test)")
    arguments = parser.parse_args()
    if arguments.baseline:
        print(json.dumps(baseline()))
        return
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # batches are small: two threads wait for each other
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model = PerceiverIO(architecture(read_config(arguments.out), "huggingface", (1, 1)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    initialise(model)
    learned, held_out = split()
    train(model, learned, arguments.steps, arguments.seed)
    model.eval()
    sources = huggingface_sources("fill-mask")
    state = {sources(name).name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, arguments.out / "model.safetensors", metadata={"format": "pt"})
    write_texts(arguments.out.parent / "calibration.jsonl", masked(held_out[:CALIBRATION], seed=1)[0])
    write_texts(arguments.out.parent / "test.jsonl", held_out[CALIBRATION : CALIBRATION + TEST])
    print(f"held-out masked bytes filled correctly {accuracy(model, held_out[: arguments.measured]):.4f}")


if __name__ == "__main__":
    main()
