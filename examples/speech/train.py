# SPDX-License-Identifier: Apache-2.0
"""Train the language classifier on telephone prompts, and write its checkpoint and its data.

    apt-get install asterisk-core-sounds-{en,es,fr,it,ru}-wav
    python -m examples.speech.train [--data | --baseline | --voice FOLDER]

Whole prompts are held out, not windows; a prompt and its translations are in the same part of the data.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from examples.speech.data import HOPS, SOUNDS, VOICES, part_of, prompts, read_parts, spectrograms, stored
from examples.speech.model import BINS, FRAMES, LABELS, WEIGHTS, untrained
from examples.training import mixed_precision
from perceiver_export.exporter.model import PerceiverIO
from perceiver_export.exporter.model.inputs import ArrayAdapter, LearnedPositionEncoding
from perceiver_export.exporter.model.perceiver import LearnedQueryTable
from perceiver_export.runtimes.npz import write_npz

HERE = Path(__file__).parent
SAMPLE = "conf-placeintoconf"  # a prompt of the test part, which is copied in each language


def scores(model: PerceiverIO, heard: Tensor) -> Tensor:
    found: Tensor = model({"mel": heard.unsqueeze(-1)})["logits"]
    return found


@torch.no_grad()
def answers(model: PerceiverIO, heard: np.ndarray) -> np.ndarray:
    """The most probable label of each spectrogram."""
    best: np.ndarray = torch.cat(
        [scores(model, part).argmax(-1) for part in torch.from_numpy(heard).split(256)]
    ).numpy()
    return best


def accuracy(model: PerceiverIO, heard: np.ndarray, labels: np.ndarray) -> float:
    """Top-1 in percent."""
    return 100 * float((answers(model, heard) == labels).mean())


def augmented(heard: Tensor) -> Tensor:
    """Louder or quieter, with a tilted spectrum as on another line, and with a stretch of time and of bins hidden."""
    count, mean = len(heard), heard.mean()
    tilt = torch.randn(count, 1, 1) * torch.linspace(-1, 1, BINS)
    heard = (heard + 1.5 * torch.randn(count, 1, 1) + tilt).clamp(min=-23)
    for size, widest, shape in ((FRAMES, 9, (count, FRAMES, 1)), (BINS, 5, (count, 1, BINS))):
        first, width = torch.randint(0, size, (count, 1)), torch.randint(0, widest, (count, 1))
        places = torch.arange(size)
        heard = torch.where(((places >= first) & (places < first + width)).reshape(shape), mean, heard)
    return heard


@torch.no_grad()
def initialise(model: PerceiverIO, heard: Tensor) -> None:
    """Start from latents and positions that differ, and from a projection that sees values around 0."""
    adapter, queries = model.inputs["mel"], model.decoder.get_submodule("queries.logits")
    assert isinstance(adapter, ArrayAdapter)
    assert isinstance(adapter.projection, nn.Linear)
    assert isinstance(adapter.positions, LearnedPositionEncoding)
    assert isinstance(queries, LearnedQueryTable)
    for table in (model.encoder.latents, adapter.positions.table, queries.table):
        table.normal_(std=0.5)
    adapter.projection.weight.div_(heard.std())
    adapter.projection.bias.sub_(adapter.projection.weight.sum(1) * heard.mean())


def train(model: PerceiverIO, heard: np.ndarray, labels: np.ndarray, epochs: int, batch: int = 64) -> None:
    """AdamW, one-cycle learning rate, label smoothing 0.05, mixed precision; prints the loss of each epoch."""
    inputs, targets = torch.from_numpy(heard), torch.from_numpy(labels).long()
    count = len(inputs) // batch
    decayed = [one for one in model.parameters() if one.ndim > 1]
    others = [one for one in model.parameters() if one.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}])
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, epochs * count, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        losses = []
        for rows in torch.randperm(len(inputs))[: count * batch].reshape(count, batch):
            with mixed_precision():
                found = scores(model, augmented(inputs[rows]))
            loss = nn.functional.cross_entropy(found.float(), targets[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
        print(f"epoch {epoch}/{epochs}  loss {np.mean(losses):.3f}  {time.perf_counter() - start:.0f} s", flush=True)


def baseline() -> dict[str, object]:
    """Logistic regression on the mean and the deviation of each mel bin over time."""
    parts = read_parts()
    learned, tested = (
        torch.from_numpy(np.concatenate([parts[name][0].mean(1), parts[name][0].std(1)], 1))
        for name in ("train", "test")
    )
    mean, deviation = learned.mean(0), learned.std(0)
    layer, targets = nn.Linear(2 * BINS, len(LABELS)), torch.from_numpy(parts["train"][1]).long()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = (
            nn.functional.cross_entropy(layer((learned - mean) / deviation), targets)
            + 1e-4 * layer.weight.square().sum()
        )
        loss.backward()
        return loss

    optimizer.step(step)
    best = layer((tested - mean) / deviation).argmax(-1).numpy()
    value = 100 * float((best == parts["test"][1]).mean())
    return {"baseline": "logistic regression on means and deviations of mel bins", "metric": "top-1", "value": value}


def heard_as(voice: str) -> dict[str, int]:
    """The number of windows of another voice that the trained model assigns to each language."""
    model = untrained().eval()
    model.load_state_dict(load_file(WEIGHTS))
    heard = [one for _, sound in prompts(voice) for one in spectrograms(sound, HOPS["test"])]
    counts = np.bincount(answers(model, np.stack(heard)), minlength=len(LABELS))
    return dict(zip(LABELS, counts.tolist(), strict=True))


def write_data(parts: dict[str, tuple[np.ndarray, np.ndarray]], out: Path) -> None:
    """Write held_out.npz, test.npz, and one prompt of the test part in each language as a WAV file."""
    assert part_of(SAMPLE) == "test"
    (out / "prompts").mkdir(parents=True, exist_ok=True)
    for name in ("held_out", "test"):
        write_npz(out / f"{name}.npz", stored(*parts[name]))
    for label, voice in zip(LABELS, VOICES, strict=True):
        shutil.copyfile(SOUNDS / voice / f"{SAMPLE}.wav", out / "prompts" / f"{label.lower()}.wav")


def main() -> None:
    """Train, test, write; or measure the baseline or another voice."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", action="store_true", help="measure a simple baseline instead")
    parser.add_argument("--voice", metavar="FOLDER", help=f"a folder in {SOUNDS}: count the model's answers to it")
    parser.add_argument("--data", action="store_true", help="write the data only")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # batches are small: two threads wait for each other
    if arguments.baseline or arguments.voice:
        print(json.dumps(baseline() if arguments.baseline else heard_as(arguments.voice)))
        return
    parts, model = read_parts(), untrained()
    write_data(parts, arguments.out)
    if arguments.data:
        return
    size = sum(one.numel() for one in model.parameters())
    print(f"{size:,} parameters, {len(parts['train'][0]):,} windows to learn from")
    initialise(model, torch.from_numpy(parts["train"][0]))
    train(model, *parts["train"], arguments.epochs)
    model.eval()
    (arguments.out / "checkpoint").mkdir(exist_ok=True)
    save_file(model.state_dict(), arguments.out / "checkpoint" / WEIGHTS.name)
    for name in ("held_out", "test"):
        print(f"{name} top-1 {accuracy(model, *parts[name]):.2f} % of {len(parts[name][1]):,} windows")
    confusion = np.zeros((len(LABELS), len(LABELS)), np.int64)
    np.add.at(confusion, (parts["test"][1], answers(model, parts["test"][0])), 1)
    print(f"rows are the spoken language, columns the answer:\n{confusion}")


if __name__ == "__main__":
    main()
