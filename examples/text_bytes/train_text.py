# SPDX-License-Identifier: Apache-2.0
"""Train a small masked language model of bytes on real text and write it as an ordinary Hugging Face directory.

    apt-get install bible-kjv
    python examples/text_bytes/train_text.py --out examples/text_bytes/checkpoint

The model is transformers' `PerceiverForMaskedLM`, only small. The text is the King James Bible, verse by verse; every
20th verse is held out (`held_out`), so that a quantized model can be measured on text that it has never seen.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import subprocess
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from perceiver_export.exporter.checkpoints.huggingface import architecture
from perceiver_export.exporter.checkpoints.huggingface_config import read_config
from perceiver_export.exporter.checkpoints.huggingface_names import huggingface_sources
from perceiver_export.exporter.perceiver.model import PerceiverIO

LENGTH = 64
ROOM = LENGTH - 2  # bytes between [CLS] and [SEP], where transformers' tokenizer puts them
MASK, CLS, SEP, FIRST_BYTE = 3, 4, 5, 6
MASKED = 0.15  # of the bytes, as in the paper
EVERY = 20  # of so many verses one is held out
PIECES = 2000  # of them are kept beside the checkpoint
CONFIG = {
    "architectures": ["PerceiverForMaskedLM"],
    "model_type": "perceiver",
    "vocab_size": 262,
    "max_position_embeddings": LENGTH,
    "d_model": 96,
    "num_latents": 32,
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
    """The text, a verse an item, without its number."""
    done = subprocess.run(["bible", "-f", "gen1:1-rev22:21"], capture_output=True, check=True)
    return [line.split(b" ", 1)[1].strip() for line in done.stdout.splitlines() if b" " in line]


def windows(lines: list[bytes]) -> np.ndarray:
    """Tokens (n, LENGTH): the verses one after the other, cut into pieces."""
    joined = np.frombuffer(b" ".join(lines), np.uint8)
    count = len(joined) // ROOM
    pieces = joined[: count * ROOM].reshape(count, ROOM).astype(np.int64) + FIRST_BYTE
    return np.pad(np.pad(pieces, ((0, 0), (1, 0)), constant_values=CLS), ((0, 0), (0, 1)), constant_values=SEP)


def split() -> tuple[np.ndarray, np.ndarray]:
    """Tokens to train on, and tokens of the verses that are held out."""
    lines = verses()
    kept = [line for index, line in enumerate(lines) if index % EVERY]
    return windows(kept), windows(lines[::EVERY])


def masked(tokens: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens with 15 % of the bytes masked, and where."""
    places = (np.random.default_rng(seed).random(tokens.shape) < MASKED) & (tokens >= FIRST_BYTE)
    return np.where(places, MASK, tokens), places


def write_held_out(path: Path, tokens: np.ndarray) -> None:
    """Pieces of the held-out verses as they were masked, as `tokens` and `masked`, without a date in the archive."""
    places = masked(tokens, seed=0)[1]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in (("tokens", tokens.astype(np.int16)), ("masked", places)):
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, np.ascontiguousarray(array), allow_pickle=False)
            archive.writestr(zipfile.ZipInfo(f"{name}.npy", (1980, 1, 1, 0, 0, 0)), buffer.getvalue())


def write_lines(path: Path, tokens: np.ndarray) -> None:
    """The same as text, a line a piece, as `quantize --data` takes it."""
    given = masked(tokens, seed=0)[0]
    rows = ("".join("[MASK]" if token == MASK else chr(token - FIRST_BYTE) for token in row[1:-1]) for row in given)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")


@torch.no_grad()
def accuracy(model: PerceiverIO, tokens: np.ndarray, seed: int = 0) -> float:
    """The share of masked bytes that the model fills rightly."""
    given, places = masked(tokens, seed)
    hits = 0
    for start in range(0, len(tokens), 256):
        batch = torch.from_numpy(given[start : start + 256])
        logits = model({"tokens": batch.int(), "tokens_mask": torch.ones_like(batch).int()})["logits"]
        best = logits.argmax(-1).numpy()
        there = places[start : start + 256]
        hits += int((best == tokens[start : start + 256])[there].sum())
    return hits / int(places.sum())


@torch.no_grad()
def initialise(model: PerceiverIO) -> None:
    """Start from latents, positions and tokens that can be told apart; transformers' 0.02 takes hours to leave."""
    for name, parameter in model.named_parameters():
        if name.endswith("latents") or "position" in name or "embedding" in name or "table" in name:
            parameter.normal_(std=0.5 if name.endswith("latents") else 0.3)


def train(model: PerceiverIO, tokens: np.ndarray, minutes: float, seed: int, batch: int = 128) -> None:
    """AdamW with a cosine over the given time; prints the loss from time to time."""
    generator = np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01, betas=(0.9, 0.98))
    start, step, losses = time.perf_counter(), 0, []
    while (elapsed := (time.perf_counter() - start) / (60 * minutes)) < 1.0:
        rate = 2e-3 * min(1.0, (step + 1) / 200) * 0.5 * (1 + math.cos(math.pi * elapsed))
        for group in optimizer.param_groups:
            group["lr"] = rate
        chosen = tokens[generator.integers(len(tokens), size=batch)]
        given, places = masked(chosen, int(generator.integers(1 << 31)))
        there = torch.from_numpy(places)
        inputs = torch.from_numpy(given)
        logits = model({"tokens": inputs.int(), "tokens_mask": torch.ones_like(inputs).int()})["logits"]
        loss = torch.nn.functional.cross_entropy(logits[there], torch.from_numpy(chosen)[there])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        step += 1
        if step % 200 == 0:
            print(f"step {step}  loss {np.mean(losses[-200:]):.3f}  {elapsed:.0%}", flush=True)


def main() -> None:
    """Train, test, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    model = PerceiverIO(architecture(read_config(arguments.out), "huggingface", (3, 1, 1)))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    initialise(model)
    learned, held_out = split()
    train(model, learned, arguments.minutes, arguments.seed)
    model.eval()
    sources = huggingface_sources("fill-mask")
    state = {sources(name).name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(state, arguments.out / "model.safetensors", metadata={"format": "pt"})
    kept = held_out[:PIECES]
    write_held_out(arguments.out.parent / "held_out.npz", kept)
    write_lines(arguments.out.parent / "calibration.jsonl", kept[:256])
    print(f"held-out masked bytes filled rightly {accuracy(model, held_out):.4f}")


if __name__ == "__main__":
    main()
