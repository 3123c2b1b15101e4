# SPDX-License-Identifier: Apache-2.0
"""Train on Fashion-MNIST's images, each turned by some quarters, and write the weights and a sample for `run`.

    apt-get install dataset-fashion-mnist
    python -m examples.multitask.train
    python -m examples.multitask.train --baseline       # for the labels; or --baseline turn, --baseline upright

Training does not use the pictures that examples/fashion_mnist holds out for calibration.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import torch
from torch import Tensor, nn

from examples.fashion_mnist.train import HELD_OUT, read_split
from examples.multitask.data import TURNS, read, turned
from examples.multitask.model import LABELS, SIDE, WEIGHTS, Multitask
from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.runtime import Array

UPRIGHT = 5.0  # weight of the upright picture's error, relative to the two cross-entropies


def pictures() -> tuple[Array, Array]:
    """The images to train on, and their labels."""
    images, labels = read_split("train")
    return np.delete(images, np.r_[HELD_OUT], 0), np.delete(labels, np.r_[HELD_OUT], 0)


def batches(images: Array, labels: Array, size: int, rng: np.random.Generator) -> tuple[Tensor, ...]:
    """Random images, turned at random, and the three answers."""
    chosen, quarters = rng.integers(len(images), size=size), rng.integers(TURNS, size=size)
    upright = images[chosen]
    found = turned(upright, quarters), labels[chosen].astype(np.int64), quarters, upright.astype(np.float32) / 255
    return tuple(map(torch.from_numpy, found))


def train(epochs: int, seed: int) -> Multitask:
    """AdamW with a one-cycle learning rate, on the sum of the three losses."""
    torch.manual_seed(seed)
    rng, model, batch = np.random.default_rng(seed), Multitask(), 128
    images, labels = pictures()
    total = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total, pct_start=0.1)
    begun, losses = time.monotonic(), list[list[float]]()
    for step in range(total):
        image, label, quarters, picture = batches(images, labels, batch, rng)
        said, turn, upright = model(image)
        each = [nn.functional.cross_entropy(said, label), nn.functional.cross_entropy(turn, quarters)]
        each.append(UPRIGHT * (upright - picture).abs().mean())
        optimizer.zero_grad()
        sum(each, torch.zeros(())).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append([float(one.detach()) for one in each])
        if step % 100 == 99:
            means = ", ".join(f"{one:.3f}" for one in np.mean(losses[-100:], 0))
            print(f"step {step + 1} of {total}: losses {means}, {time.monotonic() - begun:.0f} s", flush=True)
    return model.eval()


def linear(targets: Array, images: Array, classes: int, test: Array) -> Array:
    """A softmax regression's answers to the test images, from their pixels, after 10 epochs with Adam."""
    torch.manual_seed(0)
    model, batch = nn.Linear(SIDE**2, classes), 128
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    rows, known = torch.from_numpy(images).flatten(1), torch.from_numpy(targets.astype(np.int64))
    for _ in range(10):
        for chosen in torch.randperm(len(rows)).split(batch):
            loss = nn.functional.cross_entropy(model(rows[chosen].float() / 255), known[chosen])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    with torch.no_grad():
        found: Array = model(torch.from_numpy(test).flatten(1).float() / 255).argmax(1).numpy()
    return found


def baseline(output: str) -> dict[str, object]:
    """A simple model's result on the test data: a regression on the pixels, or the mean training image."""
    test, (images, labels) = read("test.npz", 10_000), pictures()
    if output == "upright":
        error = float(np.abs(images.mean(0) - test["picture"]).mean())
        return {"baseline": "the mean picture", "metric": "upright", "value": error}
    quarters = np.random.default_rng(0).integers(TURNS, size=len(images))
    turns = output == "turn"
    found = linear(
        quarters if turns else labels, turned(images, quarters), TURNS if turns else len(LABELS), test["image"]
    )
    right = 100 * float((found == test["quarters" if turns else "labels"]).mean())
    metric = "turn" if turns else "top-1"
    return {"baseline": "softmax regression on the pixels", "metric": metric, "value": right}


def main() -> None:
    """Train and write; or measure a baseline on the test data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", nargs="?", const="label", choices=("label", "turn", "upright"))
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.baseline is not None:
        print(json.dumps(baseline(options.baseline)))
        return
    model = train(options.epochs, 0)
    torch.save(model.state_dict(), WEIGHTS)
    test = read("test.npz", 1_000)
    boots = (test["labels"] == LABELS.index("Ankle boot")) & (test["quarters"] == 1)
    write_npz(WEIGHTS.with_name("boot.npz"), {"image": test["image"][boots][:1]})


if __name__ == "__main__":
    main()
