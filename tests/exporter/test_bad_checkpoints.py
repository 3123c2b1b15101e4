# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that are cut, of something else, or hostile: an error that says so, and nothing executed."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import CheckpointError, UnsupportedModelError, UsageError

from .conftest import MakeCheckpoint


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("fourier")


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def edit_weights(directory: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    state = load_file(directory / "model.safetensors")
    edit(state)
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.999])
def test_truncated_safetensors(checkpoint: Path, share: float) -> None:
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])

    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load_model(checkpoint)


def test_a_flipped_bit_in_the_header_of_safetensors(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[9] ^= 0x40
    weights.write_bytes(content)

    with pytest.raises(CheckpointError):
        load_model(checkpoint)


def test_missing_keys_are_listed_with_the_nearest(checkpoint: Path) -> None:
    def rename(state: dict[str, torch.Tensor]) -> None:
        state["perceiver.embeddings.latent"] = state.pop("perceiver.embeddings.latents")

    edit_weights(checkpoint, rename)
    with pytest.raises(
        CheckpointError,
        match=r"embeddings\.latents \(nearest: perceiver\.embeddings\.latent\).*unknown to the model",
    ):
        load_model(checkpoint)


def test_keys_too_many_are_listed(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state.update({f"extra.{i}": torch.zeros(1) for i in range(9)}))

    with pytest.raises(CheckpointError, match=r"9 tensors are unknown to the model: extra\.0.* and 4 more"):
        load_model(checkpoint)


def test_wrong_shape(checkpoint: Path) -> None:
    edit_weights(checkpoint, lambda state: state.update({"perceiver.embeddings.latents": torch.zeros(8, 24)}))

    with pytest.raises(CheckpointError, match=r"shape \(8, 24\), the config asks for \(7, 24\)"):
        load_model(checkpoint)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite(checkpoint: Path, value: float) -> None:
    edit_weights(checkpoint, lambda state: state["perceiver.embeddings.latents"].view(-1)[3].fill_(value))

    with pytest.raises(CheckpointError, match=r"'perceiver\.embeddings\.latents' holds NaN"):
        load_model(checkpoint)


def test_integer_weights(checkpoint: Path) -> None:
    edit_weights(
        checkpoint, lambda state: state.update({"perceiver.embeddings.latents": torch.zeros(7, 24, dtype=torch.int32)})
    )

    with pytest.raises(CheckpointError, match="dtype"):
        load_model(checkpoint)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"model_type": "bert"}, UnsupportedModelError, "of a 'bert' model"),
        ({"architectures": ["PerceiverForOpticalFlow"]}, CheckpointError, "reads 322 channels"),
        ({"architectures": ["PerceiverModel"]}, UnsupportedModelError, "cannot be exported"),
        ({"architectures": ["PerceiverForImageClassificationFourrier"]}, UnsupportedModelError, "cannot be exported"),
        ({"architectures": ["PerceiverForImageClassificationLearned"]}, CheckpointError, "d_model is 261"),
        ({"num_latents": 0}, CheckpointError, "num_latents is 0"),
        ({"num_latents": "seven"}, CheckpointError, "num_latents"),
        ({"num_self_attention_heads": 5}, CheckpointError, "5 heads"),
        ({"hidden_act": "relu"}, UnsupportedModelError, "hidden_act is 'relu'"),
        ({"cross_attention_shape_for_attention": "v"}, CheckpointError, "shape_for_attention"),
        ({"num_blocks": -1}, CheckpointError, "num_blocks is -1"),
        ({"num_latents": 8}, CheckpointError, "shape"),
        ({"num_latents": 10**12}, CheckpointError, "num_latents is"),
        ({"d_latents": 1_000_000}, CheckpointError, "shape"),
        ({"id2label": {"a": "cat"}}, CheckpointError, "cannot be read"),
    ],
)
def test_configs_that_do_not_fit(
    checkpoint: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    edit_config(checkpoint, **changes)

    with pytest.raises(error, match=message):
        load_model(checkpoint)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00"])
def test_config_json_that_is_not_json(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)

    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(checkpoint)


def test_places_without_a_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_model(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"config\.json does not exist"):
        load_model(tmp_path / "empty")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        load_model(checkpoint)


class Hostile:
    """A pickle of this would create a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", ["torch", "pickle"])
def test_a_bin_file_that_wants_to_execute_code_is_refused(checkpoint: Path, tmp_path: Path, writer: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    hostile = {"perceiver.embeddings.latents": Hostile(tmp_path / "executed")}
    if writer == "torch":
        torch.save(hostile, checkpoint / "pytorch_model.bin")
    else:
        (checkpoint / "pytorch_model.bin").write_bytes(pickle.dumps(hostile))

    with pytest.raises(CheckpointError, match="refused"):
        load_model(checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_bin_file(checkpoint: Path, share: float) -> None:
    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    weights = checkpoint / "pytorch_model.bin"
    weights.write_bytes(weights.read_bytes()[: int(share * weights.stat().st_size)])

    with pytest.raises(CheckpointError):
        load_model(checkpoint)


def test_an_index_that_names_files_elsewhere(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").rename(checkpoint.parent / "outside.safetensors")
    index = {"weight_map": {"perceiver.embeddings.latents": "../outside.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))

    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        load_model(checkpoint)


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": "absent.safetensors"}}'])
def test_an_index_that_is_not_one(checkpoint: Path, index: str) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / "model.safetensors.index.json").write_text(index)

    with pytest.raises(CheckpointError):
        load_model(checkpoint)


@pytest.mark.parametrize(
    "settings",
    [
        {"resample": 0},
        {"size": {"shortest_edge": 224}},
        {"size": {"height": 0, "width": 1}},
        *({"image_std": std} for std in ([0.5, 0, 0.5], [0.5, -1, 0.5], [0.5], [0.5] * 4, "half")),
        {"image_mean": [0.5]},
        {"rescale_factor": 0},
    ],
)
def test_a_preprocessor_that_cannot_be_followed(checkpoint: Path, settings: dict[str, Any]) -> None:
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))

    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        load_model(checkpoint)
    assert "image_std are three numbers" in caught.value.hint or not {*settings} & {"image_std", "image_mean"}


def test_arguments_that_make_no_sense(checkpoint: Path) -> None:
    with pytest.raises(UsageError, match="no preset") as caught:
        load_model("preset:imagenet-fourrier")
    assert caught.value.hint == "did you mean imagenet-fourier?"
    with pytest.raises(UsageError, match="is a model of image-classification, not of juggling"):
        load_model(checkpoint, task="juggling")
    with pytest.raises(UsageError, match="parity"):
        load_model(checkpoint, parity="mine")
    for shape in ({"pixels": (3, 4, 4)}, {"image": (4, 4)}, {"image": (3, 0, 4)}):
        with pytest.raises(UsageError):
            load_model(checkpoint, shape=shape)
    with pytest.raises(CheckpointError, match="1 channels"):
        load_model(checkpoint, shape={"image": (1, 4, 4)})


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bin_files_never_show_a_trace(checkpoint: Path, legacy: bool) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save({"perceiver.embeddings.latents": torch.zeros(7, 24)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 200)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):  # if it can be read at all, most tensors are missing
            load_model(checkpoint)
