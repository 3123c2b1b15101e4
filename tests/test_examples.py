# SPDX-License-Identifier: Apache-2.0
"""The examples run, as their first lines say.

Two need data sets that Debian packages, and are skipped without; with PERCEIVER_EXPECT_DATASETS=1 their absence is a
failure.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer.main

from perceiver_export.exporter.cli.demo import read_example, step_command
from perceiver_export.exporter.cli.main import app
from perceiver_export.runtimes.files import encode_json

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Debian packages that the examples are trained on, and where each is.
DATASET = Path("/usr/share/datasets/fashion-mnist")
BIBLE = shutil.which("bible")


def run(*command: str | Path) -> str:
    return subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=True).stdout


def test_run_in_an_app(fashion_bundle: Path) -> None:
    output = run(EXAMPLES / "01_run_in_an_app.py", fashion_bundle, EXAMPLES / "fashion_mnist" / "images" / "bag.png")

    assert "bag.png: Bag" in output


def test_run_arrays(fashion_bundle: Path) -> None:
    rows = [line for line in run(EXAMPLES / "02_run_arrays.py", fashion_bundle).splitlines() if line.startswith("[[")]

    assert len(rows) == 3
    assert len(set(rows)) == 1


@pytest.mark.parametrize("name", ["fashion_mnist", "text_bytes"])
def test_the_checkpoint_is_one_that_transformers_loads(name: str) -> None:
    import torch
    from transformers import PerceiverForImageClassificationFourier, PerceiverForMaskedLM

    from perceiver_export.exporter import load_model

    checkpoint, generator = EXAMPLES / name / "checkpoint", torch.Generator().manual_seed(0)
    feeds = {"image": torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=generator)}
    theirs: type[Any] = PerceiverForImageClassificationFourier
    given = {"inputs": feeds["image"]}
    if name == "text_bytes":
        tokens = torch.randint(6, 128, (2, 64), generator=generator)
        feeds = {"tokens": tokens.int(), "tokens_mask": torch.ones(2, 64, dtype=torch.int32)}
        theirs, given = PerceiverForMaskedLM, {"inputs": tokens, "attention_mask": torch.ones(2, 64)}

    with torch.no_grad():
        expected = theirs.from_pretrained(checkpoint).double()(**given).logits
        found = load_model(checkpoint).model.double()(feeds)["logits"]
    assert (found - expected).abs().max() <= 1e-10 * expected.abs().max()
    assert sum(path.stat().st_size for path in checkpoint.iterdir()) <= 3_000_000


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray: pip install ray")
def test_shards_on_a_cluster_survive_a_worker_that_dies(fashion_bundle: Path, tmp_path: Path) -> None:
    import psutil

    from perceiver_export.calibration import Gates, ValidateOptions, validate

    data, against = EXAMPLES / "fashion_mnist" / "test.npz", str(fashion_bundle)
    command = [EXAMPLES / "cluster" / "validate_on_ray.py", fashion_bundle, "--data", data, "--against", against]
    command += ["--samples", "90", "--shards", "3", "--parts", tmp_path / "parts", "--min-agreement", "90", "--json"]
    running = subprocess.Popen(
        [sys.executable, *map(str, command)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    killed = None
    while killed is None and running.poll() is None:
        for one in psutil.Process(running.pid).children(recursive=True):
            if killed is None and "ray::judge" in " ".join(one.cmdline()):
                one.kill()
                killed = one.pid
        time.sleep(0.05)
    output = running.communicate(timeout=300)[0]

    assert killed is not None
    assert running.returncode == 0
    expected = validate(fashion_bundle, data, ValidateOptions(against, Gates(min_agreement=90), samples=90))
    found = json.loads(output[output.index("{\n") :])  # Ray writes there that a worker died
    assert found["metrics"] == json.loads(encode_json(expected.metrics))
    assert [gate["outcome"] for gate in found["gates"]] == ["held"]


@pytest.mark.parametrize(
    "folder", sorted(file.parent for file in EXAMPLES.glob("*/demo.json")), ids=lambda one: one.name
)
def test_a_demo_is_commands_on_files_that_are_there(folder: Path, tmp_path: Path) -> None:
    example, commands = read_example(folder), typer.main.get_command(app).commands  # type: ignore[attr-defined]
    made = set()
    for step in example.steps:
        command, *words = step_command(step, folder, tmp_path)
        sources = [word.partition(":")[0] for word in words if ":" in word and word.startswith("examples.")]
        files = [EXAMPLES.parent / f"{name.replace('.', '/')}.py" for name in sources]
        files += [Path(word) for word in words if word.startswith(str(folder))]
        assert [file for file in files if not file.exists()] == []
        made |= {Path(word).name for option, word in pairwise(words) if option == "-o"}
        commands[command].make_context(command, words)

    assert made >= {example.bundle, example.quantized}
    assert len(example.shows) <= 62  # a line of `demo --list` in 80 columns
    data = [folder / name for name in (example.calibration, example.test) if ":" not in name]
    for files, most in ((data, 6_000_000), ([*folder.glob("checkpoint/*"), *folder.glob("*.pt")], 3_000_000)):
        assert sum(file.stat().st_size for file in files) <= most
    assert all((folder / name).is_file() for name in ("README.md", "NOTICE", "train.py"))


def test_the_shipped_data_is_the_datasets() -> None:
    with np.load(EXAMPLES / "fashion_mnist" / "test.npz") as data:
        assert data["image"].shape == (10_000, 28, 28)
        assert np.bincount(data["labels"]).tolist() == [1000] * 10
    with np.load(EXAMPLES / "fashion_mnist" / "held_out.npz") as data:
        assert data["image"].shape == (2_000, 28, 28)


def test_the_data_sets_are_there_where_they_must_be() -> None:
    expected = os.environ.get("PERCEIVER_EXPECT_DATASETS") == "1"
    assert (DATASET.is_dir() and BIBLE) or not expected, "CI trains the examples, and lacks their data sets"


@pytest.mark.skipif(not DATASET.is_dir(), reason="needs Debian's dataset-fashion-mnist")
def test_training_runs_and_writes_a_checkpoint(tmp_path: Path) -> None:
    output = run("-m", "examples.fashion_mnist.train", "--out", tmp_path, "--epochs", "1", "--pictures", "256")

    assert "test top-1" in output
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "perceiver"
    assert (tmp_path / "model.safetensors").stat().st_size < 3_000_000


@pytest.mark.skipif(BIBLE is None, reason="needs Debian's bible-kjv")
def test_training_on_text_runs_and_writes_a_checkpoint(tmp_path: Path) -> None:
    output = run(
        "-m", "examples.text_bytes.train", "--out", tmp_path / "checkpoint", "--steps", "2", "--measured", "64"
    )

    assert "filled correctly" in output
    assert (tmp_path / "checkpoint" / "model.safetensors").stat().st_size < 3_000_000
    for name, count in (("calibration.jsonl", 512), ("test.jsonl", 2500)):
        lines = [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        assert len(lines) == count
        assert all(("[MASK]" in line["text"]) == (name == "calibration.jsonl") for line in lines)
        assert (EXAMPLES / "text_bytes" / name).read_text() == (tmp_path / name).read_text()


@pytest.mark.parametrize("seed", range(3))
def test_the_fast_forward_of_training_is_the_models_own_function(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from perceiver_export.exporter import load_model

    monkeypatch.syspath_prepend(EXAMPLES / "fashion_mnist")
    import train

    model = load_model(EXAMPLES / "fashion_mnist" / "checkpoint").model.double()
    image = torch.randn(2, 3, 28, 28, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        assert (train.FastForward(model)(image) - model({"image": image})["logits"]).abs().max() < 1e-10
