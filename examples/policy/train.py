# SPDX-License-Identifier: Apache-2.0
"""Train the policy on Meta-World's scripted expert, and write its weights and data.

    pip install metaworld
    python -m examples.policy.train
    python -m examples.policy.train --baseline

The expert's actions are carried out with noise and recorded without it, so that the policy also sees states off the
expert's path. Episodes for training, calibration and test have different seeds.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch

from examples.policy.closed_loop import Act, expert, simulator, steps
from examples.policy.model import ACTION, CHUNK, WEIGHTS, Policy
from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.runtime import Array

HERE = Path(__file__).parent
NOISE = (0.0, 0.2, 0.4)  # standard deviations, one per episode in turn
# The first seed, the number of episodes, and of samples from each (None: all). One per episode makes them independent.
TRAIN, CALIBRATION, TEST = (0, 400, None), (50_000, 200, 1), (60_000, 500, 1)
SAMPLE = HERE / "sample.npz"


class Recorded:
    """The expert with noise: the states that it saw, and its actions before noise was added."""

    def __init__(self, act: Act, noise: float, rng: np.random.Generator) -> None:
        self.act, self.noise, self.rng = act, noise, rng
        self.seen: list[Array] = []
        self.said: list[Array] = []

    def __call__(self, state: Array) -> Array:
        self.seen.append(state.astype(np.float32))
        self.said.append(self.act(state).astype(np.float32))
        return np.clip(self.said[-1] + self.noise * self.rng.normal(size=ACTION), -1, 1)


def demonstrate(first: int, count: int, samples: int | None) -> tuple[Array, Array]:
    """States (n, 39) and the expert's next actions (n, 16, 4): ``samples`` of each episode, or all."""
    simulated, states, chunks = simulator(), [], []
    for seed in range(first, first + count):
        rng = np.random.default_rng(seed)
        recorded = Recorded(expert(), NOISE[seed % len(NOISE)], rng)
        left = CHUNK  # steps with the puck at its goal, so that the last chunks are whole
        for _, done in steps(simulated, recorded, seed):
            left -= done
            if not left:
                break
        starts = np.arange(len(recorded.seen) - CHUNK + 1)
        starts = starts if samples is None else rng.choice(starts, samples, replace=False)
        states.append(np.stack(recorded.seen)[starts])
        chunks.append(np.stack([np.stack(recorded.said[start : start + CHUNK]) for start in starts]))
    return np.concatenate(states), np.concatenate(chunks)


def write_data() -> tuple[Array, Array]:
    """Write calibration and test data and a sample for `run`; returns the training data."""
    made = [demonstrate(*which) for which in (CALIBRATION, TEST, TRAIN)]
    for name, (states, actions) in zip(("held_out", "test"), made[:2], strict=True):
        write_npz(HERE / f"{name}.npz", {"state": states, "label": actions})
    write_npz(SAMPLE, {"state": made[1][0][:1]})
    return made[2]


def train(states: Array, actions: Array, total: int, seed: int) -> Policy:
    """AdamW on the mean absolute error, as in ACT; the learning rate falls to zero in ``total`` steps."""
    torch.manual_seed(seed)
    model, batch = Policy(), 128
    inputs, targets = torch.from_numpy(states), torch.from_numpy(actions)
    features = model.features(inputs)
    model.mean, model.scale = features.mean(0), 1 / features.std(0).clamp(min=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total, pct_start=0.05)
    begun = time.monotonic()
    for step in range(total):
        chosen = torch.randint(len(inputs), (batch,))
        loss = (model(inputs[chosen]) - targets[chosen]).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(
                f"step {step} of {total}: loss {float(loss.detach()):.4f}, {time.monotonic() - begun:.0f} s", flush=True
            )
    return model.eval()


def mae(found: Array, true: Array) -> float:
    """Mean absolute error, as in `validate`."""
    return float(np.abs(found - true).mean())


def baseline(states: Array, actions: Array, test: tuple[Array, Array]) -> float:
    """The test error of the best linear map from states to chunks."""

    def rows(given: Array) -> Array:
        return np.column_stack([Policy().features(torch.from_numpy(given)).numpy(), np.ones(len(given))])

    weights = np.linalg.lstsq(rows(states), actions.reshape(len(actions), -1), rcond=None)[0]
    return mae((rows(test[0]) @ weights).reshape(-1, CHUNK, ACTION), test[1])


def tested() -> tuple[Array, Array]:
    """The states and actions of the test data."""
    with np.load(HERE / "test.npz") as data:
        return data["state"], data["label"]


def main() -> None:
    """Record, train, write; or measure the baseline on the test data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", action="store_true", help="measure the baseline on the test data instead")
    parser.add_argument("--steps", type=int, default=3_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.baseline:
        found = baseline(*demonstrate(0, 100, None), tested())
        print(json.dumps({"baseline": "a linear map, fitted to 100 episodes", "metric": "mae", "value": found}))
        return
    states, actions = write_data()
    print(f"{len(states)} states of {TRAIN[1]} episodes", flush=True)
    model = train(states, actions, options.steps, 0)
    torch.save(model.state_dict(), WEIGHTS)
    inputs, targets = tested()
    with torch.no_grad():
        print(f"test MAE {mae(model(torch.from_numpy(inputs)).numpy(), targets):.4f}")


if __name__ == "__main__":
    main()
