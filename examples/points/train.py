# SPDX-License-Identifier: Apache-2.0
"""Train the point cloud classifier on models of furniture, and write its checkpoint and its data.

    apt-get install sweethome3d-furniture
    python -m examples.points.train [--data | --baseline | --credits]

Whole models are held out, not clouds: no model is in two parts of the data.
"""

from __future__ import annotations

import argparse
import json
import textwrap
import time
import zlib
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from examples.points.data import Array, Model, parts, read_models, turned
from examples.points.model import LABELS, POINTS, WEIGHTS, untrained
from examples.training import mixed_precision
from perceiver_export.exporter.model import PerceiverIO
from perceiver_export.exporter.model.perceiver import LearnedQueryTable
from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.tasks.points import into_unit_cube, subsample

HERE = Path(__file__).parent
GRID = 64  # stored coordinates are rounded to 1/64
VIEWS = {"held_out": 4, "test": 1}  # clouds of each model; only one where samples must be independent
SHOWN = 1024  # points of a .ply file


def scores(model: PerceiverIO, clouds: Tensor) -> Tensor:
    found: Tensor = model({"points": clouds})["logits"]
    return found


def clouds(models: list[Model], views: int) -> dict[str, np.ndarray]:
    """Clouds as the bundle prepares them from a file, each turned by a random angle and rounded; and labels."""
    rows, labels = [], []
    for model in models:
        generator = np.random.default_rng(zlib.crc32(model.identity.encode()) + 1)
        for _ in range(views):
            points = turned(generator.permutation(model.points), generator.uniform(0, 2 * np.pi))
            rows.append(np.round(into_unit_cube(subsample(points, POINTS)) * GRID) / GRID)
            labels.append(model.label)
    return {"points": np.stack(rows).astype(np.float16), "labels": np.array(labels, np.uint8)}


def augmented(points: Tensor, generator: torch.Generator) -> Tensor:
    """512 points of each cloud (n, 4096, 3), turned, mirrored, stretched, sheared a little, and with noise."""
    count = len(points)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    chosen = torch.randint(points.shape[1], (count, POINTS, 1), generator=generator).expand(-1, -1, 3)
    found = points.gather(1, chosen) * torch.exp(0.2 * normal(count, 1, 3))
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros(count), torch.ones(count)
    side = torch.randint(2, (count,), generator=generator) * 2.0 - 1
    turn = torch.stack([cos, sin, zero, -sin * side, cos * side, zero, zero, zero, one], 1).reshape(count, 3, 3)
    found = in_cube(found @ turn @ (torch.eye(3) + 0.05 * normal(count, 3, 3)))
    return in_cube(found + 0.01 * normal(count, POINTS, 3))


def in_cube(points: Tensor) -> Tensor:
    """Like `into_unit_cube`, for many clouds."""
    centred = points - points.mean(1, keepdim=True)
    return centred / centred.abs().amax((1, 2), keepdim=True)


@torch.no_grad()
def initialise(model: PerceiverIO) -> None:
    """Start from latents and a query that differ from 0, so that latents read different points."""
    queries = model.decoder.get_submodule("queries.logits")
    assert isinstance(queries, LearnedQueryTable)
    for table in (model.encoder.latents, queries.table):
        table.normal_(std=0.5)


def train(model: PerceiverIO, models: list[Model], steps: int, seed: int, batch: int = 32) -> None:
    """AdamW, one-cycle learning rate, mixed precision; rare classes are drawn more often than they occur."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.from_numpy(np.stack([one.points for one in models]).astype(np.float32))
    labels = torch.tensor([one.label for one in models])
    weights = labels.bincount().float().rsqrt()[labels]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.1)
    start, losses = time.perf_counter(), []
    for step in range(1, steps + 1):
        rows = torch.multinomial(weights, batch, replacement=True, generator=generator)
        given = augmented(points[rows], generator)
        with mixed_precision():
            found = scores(model, given)
        loss = nn.functional.cross_entropy(found.float(), labels[rows], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if step % 100 == 0:
            mean = np.mean(losses[-100:])
            print(f"step {step}/{steps}  loss {mean:.3f}  {time.perf_counter() - start:.0f} s", flush=True)


@torch.no_grad()
def answers(model: PerceiverIO, data: dict[str, np.ndarray]) -> np.ndarray:
    """The most probable label of each cloud."""
    best: np.ndarray = scores(model, torch.from_numpy(data["points"]).float()).argmax(-1).numpy()
    return best


def baseline() -> dict[str, object]:
    """Logistic regression on histograms of height and of the distance from the vertical axis."""
    split = parts(read_models())
    learned, tested = (clouds(split[name], views) for name, views in (("train", 8), ("test", 1)))
    x, y = (torch.from_numpy(histograms(one["points"].astype(np.float64))) for one in (learned, tested))
    layer, targets = nn.Linear(x.shape[1], len(LABELS)), torch.from_numpy(learned["labels"]).long()
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(layer(x), targets) + 1e-3 * layer.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(step)
    value = 100 * float((layer(y).argmax(-1).numpy() == tested["labels"]).mean())
    return {"baseline": "logistic regression on histograms of height and radius", "metric": "top-1", "value": value}


def histograms(points: Array) -> np.ndarray:
    """Shares of points in 8 × 8 cells of height and distance from the vertical axis, (n, 64)."""
    height, radius = points[..., 2], np.hypot(points[..., 0], points[..., 1])
    cells = [np.histogram2d(h, r, 8, ((-1, 1), (0, 1.5)))[0].ravel() for h, r in zip(height, radius, strict=True)]
    return (10 * np.stack(cells) / POINTS).astype(np.float32)


def write_ply(path: Path, points: Array) -> None:
    """Write a binary .ply of x, y and z."""
    head = f"ply\nformat binary_little_endian 1.0\nelement vertex {len(points)}\n"
    head += "".join(f"property float {axis}\n" for axis in "xyz") + "end_header\n"
    path.write_bytes(head.encode() + points.astype("<f4").tobytes())


def write_data(split: dict[str, list[Model]], out: Path) -> dict[str, dict[str, np.ndarray]]:
    """Write held_out.npz and test.npz, which are also returned, and a .ply of each class's first test model."""
    (out / "clouds").mkdir(parents=True, exist_ok=True)
    found = {name: clouds(split[name], views) for name, views in VIEWS.items()}
    for name, data in found.items():
        write_npz(out / f"{name}.npz", data)
    for label, name in enumerate(LABELS):
        first = next(one for one in split["test"] if one.label == label)
        write_ply(out / "clouds" / f"{name.replace(' ', '_')}.ply", first.points[:SHOWN])
    return found


def credits(models: list[Model]) -> str:
    """The models in use, by catalog and author, with their names in the catalog."""
    found = defaultdict(list)
    for model in models:
        catalog, _, name = model.identity.partition("#")
        found[catalog, model.author].append(name)
    lines = (f"{catalog}, {author}: {', '.join(sorted(found[catalog, author]))}" for catalog, author in sorted(found))
    return "\n".join(textwrap.fill(line, 118, subsequent_indent="  ", break_on_hyphens=False) for line in lines)


def main() -> None:
    """Train, test, write; or measure the baseline, or list authors."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--baseline", action="store_true", help="measure a simple baseline instead")
    parser.add_argument("--credits", action="store_true", help="list the models and their authors instead")
    parser.add_argument("--data", action="store_true", help="write the data only")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # batches are small: two threads wait for each other
    if arguments.baseline or arguments.credits:
        print(json.dumps(baseline()) if arguments.baseline else credits(read_models()))
        return
    split, model = parts(read_models()), untrained()
    written = write_data(split, arguments.out)
    if arguments.data:
        return
    print(f"{sum(one.numel() for one in model.parameters()):,} parameters, {len(split['train'])} models to learn from")
    initialise(model)
    train(model, split["train"], arguments.steps, arguments.seed)
    model.eval()
    (arguments.out / "checkpoint").mkdir(exist_ok=True)
    save_file(model.state_dict(), arguments.out / "checkpoint" / WEIGHTS.name)
    for name, data in written.items():
        hits = answers(model, data) == data["labels"]
        print(f"{name} top-1 {100 * hits.mean():.2f} % of {len(hits)} clouds of {len(split[name])} models")
    confusion = np.zeros((len(LABELS), len(LABELS)), np.int64)
    np.add.at(confusion, (written["test"]["labels"], answers(model, written["test"])), 1)
    print(f"rows are the class, columns the answer, in the order of {', '.join(LABELS)}:\n{confusion}")


if __name__ == "__main__":
    main()
