# SPDX-License-Identifier: Apache-2.0
"""Train the classifier of time series on Japanese Vowels, and write its checkpoint and its data.

    pip install --no-deps sktime
    python -m examples.sensors.train [--baseline]

The split is that of the data set: 270 utterances to train on, and 370 of other sessions to test. Of the 30 utterances
of each speaker, the last 5 are held out for calibration.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.sensors.model import CHANNELS, SPEAKERS, STEPS, WEIGHTS, untrained
from perceiver_export.exporter.model import PerceiverIO
from perceiver_export.exporter.model.inputs import ArrayAdapter
from perceiver_export.runtimes.npz import write_npz

HERE = Path(__file__).parent
HELD_OUT = 5  # of the 30 utterances of each speaker
Utterances = list[np.ndarray]


def read_split(name: str) -> tuple[Utterances, np.ndarray]:
    """Utterances (length, 12) and speakers from 0, of TRAIN or TEST, from the files in sktime's wheel."""
    package = importlib.util.find_spec("sktime")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("sktime is not installed, but its wheel has the data: pip install --no-deps sktime")
    folder = Path(package.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    lines = (folder / f"JapaneseVowels_{name}.ts").read_text(encoding="utf-8").splitlines()
    rows = [line.split(":") for line in lines[lines.index("@data") + 1 :]]
    series = [np.array([channel.split(",") for channel in row[:-1]], np.float32).T for row in rows]
    return series, np.array([int(row[-1]) - 1 for row in rows])


def splits() -> dict[str, tuple[Utterances, np.ndarray]]:
    """The utterances to learn from, those held out, and the test set."""
    series, speakers = read_split("TRAIN")
    late = np.arange(len(series)) % 30 >= 30 - HELD_OUT  # the file has 30 of the first speaker, then of the next
    chosen = {"learned": np.flatnonzero(~late), "held_out": np.flatnonzero(late)}
    parts = {name: ([series[index] for index in rows], speakers[rows]) for name, rows in chosen.items()}
    return {**parts, "test": read_split("TEST")}


def padded(series: Utterances) -> dict[str, np.ndarray]:
    """The model's inputs: `series` (n, 29, 12) with zeros at the end, and `series_mask` (n, 29)."""
    mask = np.stack([(np.arange(STEPS) < len(one)).astype(np.int32) for one in series])
    rows = np.stack([np.pad(one, ((0, STEPS - len(one)), (0, 0))) for one in series])
    return {"series": rows.astype(np.float32), "series_mask": mask}


def augmented(series: Utterances, deviation: np.ndarray, generator: np.random.Generator) -> Utterances:
    """Each up to a fifth shorter or longer, shifted a little per channel as between sessions, and with noise."""
    found = []
    for one in series:
        length = int(np.clip(round(len(one) * generator.uniform(0.8, 1.2)), 5, STEPS))
        first, last = generator.uniform(0, 0.15), generator.uniform(0.85, 1)
        places = np.linspace(first, last, length) * (len(one) - 1)
        warped = np.stack([np.interp(places, np.arange(len(one)), channel) for channel in one.T], 1)
        warped += 0.2 * deviation * generator.normal(size=CHANNELS)
        found.append(warped + 0.15 * deviation * generator.normal(size=warped.shape))
    return found


def scores(model: PerceiverIO, series: Utterances) -> Tensor:
    found: Tensor = model({name: torch.from_numpy(array) for name, array in padded(series).items()})["scores"]
    return found


@torch.no_grad()
def accuracy(model: PerceiverIO, series: Utterances, speakers: np.ndarray) -> float:
    """Top-1 in percent."""
    return 100 * float((scores(model, series).argmax(-1).numpy() == speakers).mean())


@torch.no_grad()
def initialise(model: PerceiverIO, frames: np.ndarray) -> None:
    """Start from latents that differ, and from a projection that sees every channel at the same scale."""
    model.encoder.latents.normal_(std=0.5)
    adapter = model.inputs["series"]
    assert isinstance(adapter, ArrayAdapter)
    assert isinstance(adapter.projection, nn.Linear)
    mean, deviation = (torch.from_numpy(one) for one in (frames.mean(0), frames.std(0)))
    adapter.projection.weight.normal_(std=0.5).div_(deviation)
    adapter.projection.bias.copy_(-adapter.projection.weight @ mean)


def train(model: PerceiverIO, series: Utterances, speakers: np.ndarray, epochs: int, seed: int) -> None:
    """AdamW, one-cycle learning rate, label smoothing 0.1, batches of 45; prints the loss from time to time."""
    generator, targets = np.random.default_rng(seed), torch.from_numpy(speakers)
    deviation, count = np.concatenate(series).std(0), len(series) // 45
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, epochs * count, pct_start=0.1)
    start = time.perf_counter()
    for epoch in range(1, epochs + 1):
        for rows in generator.permutation(len(series))[: 45 * count].reshape(count, 45):
            found = scores(model, augmented([series[row] for row in rows], deviation, generator))
            loss = nn.functional.cross_entropy(found, targets[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        if epoch % 20 == 0:
            print(f"epoch {epoch}/{epochs}  loss {loss.item():.3f}  {time.perf_counter() - start:.0f} s", flush=True)


def baseline() -> dict[str, object]:
    """Predict the speaker of the most similar training utterance, by the means of the channels over time."""
    parts = splits()
    learned, tested = (np.stack([one.mean(0) for one in parts[name][0]]) for name in ("learned", "test"))
    nearest = ((tested[:, None] - learned) ** 2).sum(-1).argmin(-1)
    value = 100 * float((parts["learned"][1][nearest] == parts["test"][1]).mean())
    return {"baseline": "nearest neighbour of the channels' means", "metric": "top-1", "value": value}


def draw(series: Utterances, speakers: np.ndarray, path: Path) -> None:
    """Draw the first utterance of each speaker, channels downwards, time to the right: blue is low, red is high."""
    chosen = padded([series[int(np.argmax(speakers == speaker))] for speaker in range(SPEAKERS)])["series"]
    shade = np.clip(chosen.transpose(0, 2, 1) / 1.5, -1, 1)[..., None]
    colours = 255 * (1 - np.abs(shade) * np.where(shade > 0, [0.2, 0.9, 0.9], [0.9, 0.7, 0.2]))
    tiles = np.pad(colours.repeat(5, 1).repeat(5, 2), ((0, 0), (4, 4), (4, 4), (0, 0)), constant_values=255)
    rows = [np.concatenate(list(tiles[row : row + 3]), 1) for row in range(0, SPEAKERS, 3)]
    Image.fromarray(np.concatenate(rows).astype(np.uint8)).save(path, optimize=True)


def main() -> None:
    """Train, test, write; or measure the baseline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", action="store_true", help="measure a simple baseline instead")
    parser.add_argument("--epochs", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    if arguments.baseline:
        print(json.dumps(baseline()))
        return
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # batches are small: two threads wait for each other
    parts, model = splits(), untrained()
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters")
    initialise(model, np.concatenate(parts["learned"][0]))
    train(model, *parts["learned"], arguments.epochs, arguments.seed)
    model.eval()
    (arguments.out / "checkpoint").mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.out / "checkpoint" / WEIGHTS.name)
    for name in ("held_out", "test"):
        series, speakers = parts[name]
        write_npz(arguments.out / f"{name}.npz", {**padded(series), "labels": speakers})
        print(f"{name} top-1 {accuracy(model, series, speakers):.2f} %")
    first = [parts["test"][0][int(np.argmax(parts["test"][1] == speaker))] for speaker in range(SPEAKERS)]
    write_npz(arguments.out / "utterances.npz", padded(first))
    draw(*parts["test"], arguments.out / "utterances.png")


if __name__ == "__main__":
    main()
