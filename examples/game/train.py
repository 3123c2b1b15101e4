# SPDX-License-Identifier: Apache-2.0
"""Train on positions of random games, labeled by the rules of chess, and write weights and data.

    pip install chess
    python -m examples.game.train
    python -m examples.game.train --baseline

One side captures when it can, the other plays at random, and neither gives checkmate. Wherever checkmate is possible,
three positions are kept: after a move that mates, after one that only gives check, and after one that does neither. So
the three labels are equally frequent, and counting pieces hardly helps. Training, calibration and test use different
games.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from examples.game.model import LABELS, WEIGHTS, untrained
from examples.game.positions import KINDS, features, inputs, mirrored, padded, pieces
from perceiver_export.exporter.model import PerceiverIO
from perceiver_export.runtimes.npz import write_npz
from perceiver_export.runtimes.runtime import Array

if TYPE_CHECKING:
    import chess

HERE = Path(__file__).parent
PLIES, A_GAME = 160, 8  # the longest game, and the most triples kept of a game
GREED = 0.6  # how often the stronger side captures the most valuable piece that it can
TRAIN, CALIBRATION, TEST = (0, 12_000), (10_000_000, 200), (20_000_000, 1_000)  # seed of the first game, triples


def triples(seed: int) -> Iterator[tuple[str, ...]]:
    """Positions of one game in FEN, by label, wherever the stronger side has a move for each of the three labels."""
    import chess

    rng, board, kept = random.Random(seed), chess.Board(), 0
    strong = rng.choice([chess.WHITE, chess.BLACK])
    for _ in range(PLIES):
        moves = list(board.legal_moves)
        if board.turn == strong:
            by_label = sorted_moves(board, moves)
            if all(by_label):
                yield tuple(after(board, rng.choice(some)) for some in by_label)
                kept += 1
            moves = by_label[0] + by_label[1]
            captures = [move for move in moves if board.is_capture(move)]
            if captures and rng.random() < GREED:
                moves = [max(captures, key=lambda move: board.piece_type_at(move.to_square) or 1)]
        if not moves or kept == A_GAME:
            return
        board.push(rng.choice(moves))


def sorted_moves(board: chess.Board, moves: list[chess.Move]) -> list[list[chess.Move]]:
    """The moves after which the other side is not in check, in check, and checkmated."""
    found: list[list[chess.Move]] = [[], [], []]
    for move in moves:
        label = 0
        if board.gives_check(move):
            board.push(move)
            label = 2 if board.is_checkmate() else 1
            board.pop()
        found[label].append(move)
    return found


def after(board: chess.Board, move: chess.Move) -> str:
    """The position after a move, in FEN."""
    board.push(move)
    fen: str = board.fen()
    board.pop()
    return fen


def play(first: int, count: int) -> list[tuple[str, int]]:
    """FEN and label of ``count`` triples, without repetitions, from games that start at the seed ``first``."""
    found: dict[str, int] = {}
    seed = first
    while len(found) < 3 * count:
        for triple in triples(seed):
            found.update((fen, label) for label, fen in enumerate(triple))
        seed += 1
    return list(found.items())[: 3 * count]


def write_data() -> tuple[Array, Array, Array]:
    """Write calibration and test data and a sample for `run`; returns the training data: pieces, masks, labels."""
    for name, which in (("held_out", CALIBRATION), ("test", TEST)):
        fens, labels = zip(*play(*which), strict=True)
        arrays = {**inputs(fens), "labels": np.array(labels)}
        once = np.sort(np.unique(arrays["pieces"].reshape(len(fens), -1), axis=0, return_index=True)[1])
        write_npz(HERE / f"{name}.npz", {key: array[once] for key, array in arrays.items()})
    write_npz(HERE / "sample.npz", {key: array[:3] for key, array in arrays.items() if key != "labels"})
    fens, labels = zip(*play(*TRAIN), strict=True)
    return *padded([pieces(fen) for fen in fens]), np.array(labels)


def prepared(model: PerceiverIO) -> PerceiverIO:
    """Make latents and queries differ from the start: with small default values they read the same for a long time."""
    with torch.no_grad():
        model.encoder.latents.normal_()
        for queries in model.decoder.get_submodule("queries").parameters():
            queries.normal_()
    return model


def train(found: Array, mask: Array, labels: Array, epochs: int, seed: int) -> PerceiverIO:
    """AdamW with a one-cycle learning rate; half of the positions are mirrored, at random."""
    torch.manual_seed(seed)
    rng, model, batch = np.random.default_rng(seed), prepared(untrained()), 128
    total = epochs * (len(labels) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total, pct_start=0.1)
    begun, losses = time.monotonic(), list[float]()
    for step in range(total):
        chosen = rng.integers(len(labels), size=batch)
        flipped = np.where(rng.random((batch, 1, 1)) < 0.5, mirrored(found[chosen]), found[chosen])
        loss = nn.functional.cross_entropy(scores(model, flipped, mask[chosen]), torch.from_numpy(labels[chosen]))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if step % 200 == 199:
            took = time.monotonic() - begun
            print(f"step {step + 1} of {total}: loss {np.mean(losses[-200:]):.3f}, {took:.0f} s", flush=True)
    return model.eval()


def scores(model: PerceiverIO, found: Array, mask: Array) -> Tensor:
    """The model's scores of positions, (n, 3)."""
    feeds = {"pieces": torch.from_numpy(features(found, mask)), "pieces_mask": torch.from_numpy(mask)}
    given: Tensor = model(feeds)["scores"]
    return given


def counts(given: Array) -> Tensor:
    """How many pieces of each kind a position has: (n, 12)."""
    return torch.from_numpy(given[..., : len(KINDS)].sum(1, dtype=np.float32))


def baseline(test: dict[str, Array]) -> float:
    """Top-1 on the test data, in percent, of a logistic regression on the numbers of pieces of each kind."""
    fens, known = zip(*play(TRAIN[0], 3_000), strict=True)
    rows, labels, model = counts(inputs(fens)["pieces"]), torch.tensor(known), nn.Linear(len(KINDS), len(LABELS))
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=200)

    def loss() -> Tensor:
        optimizer.zero_grad()
        found = nn.functional.cross_entropy(model(rows), labels)
        found.backward()
        return found

    optimizer.step(loss)
    return top1(model(counts(test["pieces"])), test["labels"])


def top1(given: Tensor, labels: Array) -> float:
    """Correct answers in percent."""
    return 100 * float((given.argmax(1).numpy() == labels).mean())


def main() -> None:
    """Play, train, write; or measure the baseline on the test data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baseline", action="store_true", help="measure the baseline on the test data instead")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not options.baseline:
        model = train(*write_data(), options.epochs, 0)
        torch.save(model.state_dict(), WEIGHTS)
    with np.load(HERE / "test.npz") as data:
        test = dict(data)
    if options.baseline:
        named = "logistic regression on the numbers of pieces of each kind"
        print(json.dumps({"baseline": named, "metric": "top-1", "value": baseline(test)}))
        return
    with torch.no_grad():
        feeds = {name: torch.from_numpy(test[name]) for name in ("pieces", "pieces_mask")}
        found = model({**feeds, "pieces": feeds["pieces"].float()})["scores"]
    print(f"test top-1 {top1(found, test['labels']):.2f} %")


if __name__ == "__main__":
    main()
