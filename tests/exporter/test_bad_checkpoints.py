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
from perceiver_export.runtimes.errors import CheckpointError, PerceiverExportError, UnsupportedModelError, UsageError

from .conftest import MakeCheckpoint

LATENTS = "perceiver.embeddings.latents"
QUERY = "perceiver.encoder.cross_attention.attention.self.query"
State = dict[str, torch.Tensor]
Damage = Callable[[Path], object]


@pytest.fixture
def checkpoint(make_checkpoint: MakeCheckpoint) -> Path:
    return make_checkpoint("fourier")


def config(**changes: Any) -> Damage:
    def edit(directory: Path) -> None:
        fields = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(json.dumps({**fields, **changes}), encoding="utf-8")

    return edit


def weights(change: Callable[[State], object]) -> Damage:
    def edit(directory: Path) -> None:
        state = load_file(directory / "model.safetensors")
        change(state)
        save_file(state, directory / "model.safetensors")

    return edit


def set_latents(value: torch.Tensor) -> Damage:
    return weights(lambda state: state.update({LATENTS: value}))


def cut(share: float, name: str = "model.safetensors") -> Damage:
    def edit(directory: Path) -> None:
        if name != "model.safetensors":
            torch.save(load_file(directory / "model.safetensors"), directory / name)
            (directory / "model.safetensors").unlink()
        content = (directory / name).read_bytes()
        (directory / name).write_bytes(content[: int(share * len(content))])

    return edit


def flip_a_bit(directory: Path) -> None:
    content = bytearray((directory / "model.safetensors").read_bytes())
    content[9] ^= 0x40
    (directory / "model.safetensors").write_bytes(content)


def rename_latents(state: State) -> None:
    state[LATENTS[:-1]] = state.pop(LATENTS)


def add_nine(state: State) -> None:
    state |= {f"extra.{i}": torch.zeros(1) for i in range(9)}


def adapt(state: State) -> None:
    state[f"{QUERY}.base_layer.weight"] = state.pop(f"{QUERY}.weight")
    state[f"{QUERY}.lora_A.default.weight"] = torch.zeros(2, 24)


def adapter(with_config: bool) -> Damage:
    settings = {
        "peft_type": "LORA",
        "base_model_name_or_path": "somebody/base",
        "auto_mapping": {"base_model_class": "PerceiverForImageClassificationFourier"},
    }

    def edit(directory: Path) -> None:
        (directory / "adapter_config.json").write_text(json.dumps(settings))
        if not with_config:
            (directory / "config.json").unlink()

    return edit


def index(text: str, aside: str = "outside.safetensors") -> Damage:
    def edit(directory: Path) -> None:
        (directory / "model.safetensors").rename(directory.parent / aside)
        (directory / "model.safetensors.index.json").write_text(text)

    return edit


def config_of(content: bytes) -> Damage:
    return lambda directory: (directory / "config.json").write_bytes(content)


def training(directory: Path) -> None:
    """As a Trainer leaves its output."""
    (directory / "config.json").unlink()
    for step in (500, 1000, 90):
        (directory / f"checkpoint-{step}").mkdir()


def processor(**settings: Any) -> Damage:
    return lambda directory: (directory / "preprocessor_config.json").write_text(json.dumps(settings))


MERGE = "merge_and_unload()"
FOURIER = "PerceiverForImageClassificationFourier"
# What is done to a checkpoint, and what the message and the hint name.
BAD: list[tuple[Damage, str, str]] = [
    *((cut(share), "not a readable safetensors file", "") for share in (0.0, 0.001, 0.5, 0.999)),
    *((cut(share, "pytorch_model.bin"), "pytorch_model.bin", "") for share in (0.0, 0.5)),
    (flip_a_bit, "model.safetensors", ""),
    (weights(rename_latents), f"embeddings.latents (nearest: {LATENTS[:-1]})", ""),
    (weights(add_nine), "9 tensors are unknown to the model: extra.0", ""),
    (set_latents(torch.zeros(8, 24)), "shape (8, 24), but the config asks for (7, 24)", ""),
    (set_latents(torch.full((7, 24), float("nan"))), f"'{LATENTS}' holds NaN", ""),
    (set_latents(torch.full((7, 24), float("inf"))), f"'{LATENTS}' holds NaN", ""),
    (set_latents(torch.zeros(7, 24, dtype=torch.int32)), "dtype", ""),
    (weights(lambda state: state.update({f"ema.{k}": v.clone() for k, v in state.items()})), "ema", ""),
    (weights(adapt), "unmerged PEFT", MERGE),
    (adapter(True), "somebody/base", f"{FOURIER}.from_pretrained('somebody/base')"),
    (adapter(False), "somebody/base", MERGE),
    (config(architectures=["PerceiverForOpticalFlow"]), "conv_after_patches", ""),
    (config(architectures=["PerceiverForImageClassificationLearned"]), "convnet_1x1", ""),
    (config(num_latents=0), "num_latents is 0", ""),
    (config(num_latents="seven"), "num_latents", ""),
    (config(num_latents=8), "shape", ""),
    (config(num_latents=10**12), "num_latents is", ""),
    (config(d_latents=1_000_000), "parameters", ""),
    (config(num_self_attention_heads=5), "5 heads", ""),
    (config(num_blocks=-1), "num_blocks is -1", ""),
    (config(hidden_act="gello"), "hidden_act is 'gello'", ""),
    (config(cross_attention_shape_for_attention="v"), "shape_for_attention", ""),
    *((config(id2label=labels), "id2label", "") for labels in ({"a": "cat"}, ["cat"], {})),
    (config(num_labels=0), "num_labels is 0", ""),
    *((config_of(content), "config.json", "") for content in (b"", b"{", b"[]", b"\xff\xfe\x00")),
    (lambda directory: (directory / "config.json").unlink(), "config.json does not exist", ""),
    (lambda directory: (directory / "model.safetensors").unlink(), "no weights", ""),
    (training, "", "checkpoint-1000"),
    (index(json.dumps({"weight_map": {LATENTS: "../outside.safetensors"}})), "outside the checkpoint", ""),
    *((index(text), "", "") for text in ("{", "[]", "{}", '{"weight_map": {"a": "absent.safetensors"}}')),
    (processor(image_std=[0.5, 0, 0.5]), "preprocessor_config.json", ""),
]
UNSUPPORTED: list[tuple[Damage, str, str]] = [
    (config(model_type="bert"), "a 'bert' model", ""),
    (config(architectures=["PerceiverModel"]), "'PerceiverModel'", "module:function"),
    (config(architectures=["PerceiverForTokenClassification"]), "'PerceiverForTokenClassification'", "module:function"),
    (config(architectures=["MyPerceiver"]), "'MyPerceiver'", "module:function"),
    (config(architectures=[FOURIER.replace("Fourier", "Fourrier")]), "Fourrier", f"did you mean {FOURIER}?"),
    (config(architectures=None), "class", ""),
    (config(hidden_act="prelu"), "hidden_act is 'prelu'", ""),
    (config(quantization_config={"load_in_8bit": True}), "quantization_config", ""),
]


@pytest.mark.parametrize(
    ("error", "damage", "message", "hint"),
    [*((CheckpointError, *row) for row in BAD), *((UnsupportedModelError, *row) for row in UNSUPPORTED)],
)
def test_a_checkpoint_that_cannot_be_used_says_why(
    error: type[PerceiverExportError], damage: Damage, message: str, hint: str, checkpoint: Path
) -> None:
    damage(checkpoint)

    with pytest.raises(error) as caught:
        load_model(checkpoint)
    assert message in caught.value.message
    assert hint in caught.value.hint


# What `load_model` is given beside a good checkpoint; "absent" stands for a folder that is not there.
ARGUMENTS: list[tuple[str, dict[str, Any], type[PerceiverExportError], str, str]] = [
    ("absent", {}, CheckpointError, "does not exist", ""),
    ("preset:imagenet-fourrier", {}, UsageError, "no preset 'imagenet-fourrier'", "did you mean imagenet-fourier?"),
    ("preset:", {}, UsageError, "''", "presets: language-bytes, "),
    ("preset:optical-flow", {"shape": {"image": (3, 64, 64)}}, UsageError, "optical-flow", "leave --shape out"),
    ("preset:imagenet-conv", {"shape": {"image": (1, 64, 64)}}, UsageError, "3 channels", "3xHxW"),
    (
        "preset:imagenet-conv",
        {"shape": {"image": (3, 4, 64)}, "parity": "huggingface"},
        UsageError,
        "4 × 64",
        "5 or more",
    ),
    ("", {"task": "juggling"}, UsageError, "is a model of image-classification, not of juggling", ""),
    ("", {"parity": "mine"}, UsageError, "parity", ""),
    ("", {"shape": {"pixels": (3, 4, 4)}}, UsageError, "pixels", ""),
    ("", {"shape": {"image": (4, 4)}}, UsageError, "", ""),
    ("", {"shape": {"image": (3, 0, 4)}}, UsageError, "", ""),
    ("", {"shape": {"image": (1, 4, 4)}}, UsageError, "3 channels", "3xHxW"),
]


@pytest.mark.parametrize(("source", "options", "error", "message", "hint"), ARGUMENTS)
def test_arguments_that_do_not_fit_the_checkpoint(
    source: str, options: dict[str, Any], error: type[PerceiverExportError], message: str, hint: str, checkpoint: Path
) -> None:
    place = {"": checkpoint, "absent": checkpoint / "absent"}.get(source, source)

    with pytest.raises(error) as caught:
        load_model(place, **options)
    assert message in caught.value.message
    assert hint in caught.value.hint


class Hostile:
    """A pickle of this would create a folder when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_a_bin_file_that_wants_to_execute_code_is_refused(
    checkpoint: Path, tmp_path: Path, writer: Callable[[object, Path], object]
) -> None:
    (checkpoint / "model.safetensors").unlink()
    writer({LATENTS: Hostile(tmp_path / "executed")}, checkpoint / "pytorch_model.bin")

    with pytest.raises(CheckpointError, match="refused"):
        load_model(checkpoint)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("legacy", [False, True])
def test_damaged_bin_files_never_show_a_trace(checkpoint: Path, legacy: bool) -> None:
    (checkpoint / "model.safetensors").unlink()
    path = checkpoint / "pytorch_model.bin"
    torch.save({LATENTS: torch.zeros(7, 24)}, path, _use_new_zipfile_serialization=not legacy)
    content = path.read_bytes()
    for position in range(0, len(content), max(1, len(content) // 100)):
        flipped = bytearray(content)
        flipped[position] ^= 0x10
        path.write_bytes(flipped)
        with pytest.raises(CheckpointError):  # if it can be read at all, most tensors are missing
            load_model(checkpoint)
