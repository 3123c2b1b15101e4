# SPDX-License-Identifier: Apache-2.0
"""Files that hold a lucidrains state dict, or should: read without executing anything, or an error that says why."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import CheckpointError, UsageError

from .lucidrains_reference import arguments, assert_same, load, make_lucidrains_model, write_config


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".ckpt", ""])
@pytest.mark.parametrize("nested", [None, "state_dict", "model_state_dict", "model"])
def test_files_of_pytorch(tmp_path: Path, suffix: str, nested: str | None) -> None:
    config = arguments("PerceiverIO")
    state = make_lucidrains_model(config).state_dict()
    expected = load(tmp_path, state, config)
    file = tmp_path / f"other{suffix}"
    torch.save({nested: state, "epoch": 3, "optimizer": {"lr": 0.1}} if nested else state, file)

    assert_same(load_model(f"lucidrains:{file}", config=tmp_path / "model.json"), expected)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    model = load(tmp_path, make_lucidrains_model(config).half().state_dict(), config).model

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_files_that_are_not_there(tmp_path: Path) -> None:
    config = write_config(tmp_path, arguments("Perceiver"))
    with pytest.raises(UsageError, match="does not say its sizes"):
        load_model(f"lucidrains:{tmp_path}/model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt is not a file"):
        load_model(f"lucidrains:{tmp_path}/model.pt", config=config)
    with pytest.raises(CheckpointError, match="is not a file"):
        load_model(f"lucidrains:{tmp_path}", config=config)
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(f"lucidrains:{tmp_path}/model.pt", config=tmp_path / "absent.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"class": 3}', '{"class": ["Perceiver"]}', "\ud800"])
def test_configs_that_are_none(tmp_path: Path, content: str) -> None:
    config = tmp_path / "model.json"
    config.write_bytes(content.encode("utf-8", "surrogatepass"))

    with pytest.raises(CheckpointError, match=r"model\.json"):
        load_model(f"lucidrains:{tmp_path}/model.pt", config=config)


def test_choices_that_are_none(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    load(tmp_path, make_lucidrains_model(config).state_dict(), config)
    source, file = f"lucidrains:{tmp_path}/model.pt", tmp_path / "model.json"

    with pytest.raises(UsageError, match="no numerics but their own"):
        load_model(source, config=file, parity="deepmind")
    with pytest.raises(UsageError, match="those that its config says"):
        load_model(source, config=file, shape={"image": (3, 8, 8)})
    with pytest.raises(UsageError, match="is a model of arrays, not of optical-flow"):
        load_model(source, config=file, task="optical-flow")


def test_a_whole_model_is_refused_and_not_executed(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    torch.save(make_lucidrains_model(config), tmp_path / "model.pt")
    with pytest.raises(CheckpointError, match="it holds more than tensors"):
        load_model(f"lucidrains:{tmp_path}/model.pt", config=write_config(tmp_path, config))


def test_a_lightning_checkpoint_with_objects_gets_the_command_that_takes_the_tensors_out(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    state = make_lucidrains_model(config).state_dict()
    torch.save({"state_dict": state, "hyper_parameters": Namespace(depth=3)}, tmp_path / "last.ckpt")
    file = write_config(tmp_path, config)

    with pytest.raises(CheckpointError, match="refused") as caught:
        load_model(f"lucidrains:{tmp_path}/last.ckpt", config=file)
    command = caught.value.hint.partition("take the tensors out: ")[2].replace("'last.ckpt'", f"'{tmp_path}/last.ckpt'")
    exec(command.replace("'model.pt'", f"'{tmp_path}/model.pt'"), {"torch": torch})
    assert load_model(f"lucidrains:{tmp_path}/model.pt", config=file).task == "arrays"


@pytest.mark.parametrize("damage", ["nan", "integers", "truncated", "list"])
def test_damaged_files(tmp_path: Path, damage: str) -> None:
    config = arguments("Perceiver")
    state = make_lucidrains_model(config).state_dict()
    load(tmp_path, state, config)
    file = tmp_path / "model.pt"
    if damage == "nan":
        state["latents"][0, 0] = torch.nan
    if damage == "integers":
        state["latents"] = state["latents"].int()
    torch.save(list(state.values()) if damage == "list" else state, file)
    if damage == "truncated":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])

    with pytest.raises(CheckpointError):
        load_model(f"lucidrains:{file}", config=tmp_path / "model.json")


def test_metadata_of_safetensors_that_names_nothing(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    state = make_lucidrains_model(config).state_dict()
    file = write_config(tmp_path, config)
    save_file(state, tmp_path / "model.safetensors", {"format": "pt", "extra": "absent"})
    assert load_model(f"lucidrains:{tmp_path}/model.safetensors", config=file).task == "arrays"

    save_file(state, tmp_path / "model.safetensors", {"extra": "latents"})
    with pytest.raises(CheckpointError, match="1 tensor is unknown to the model: extra"):
        load_model(f"lucidrains:{tmp_path}/model.safetensors", config=file)
