# SPDX-License-Identifier: Apache-2.0
"""Checkpoints and configs of perceiver-io that are not of one model, or of another: an error that says so."""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from perceiver_export.exporter import load_model
from perceiver_export.runtimes.errors import CheckpointError, PerceiverExportError, UnsupportedModelError, UsageError

from .krasserm_reference import read_vectors, write_directory
from .lucidrains_reference import arguments, make_lucidrains_model

POSITIONS = "backend_model.0.input_adapter.position_encoding.position_encoding"


def failure(source: Path, config: Path | None = None) -> PerceiverExportError:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        load_model(f"krasserm:{source}", config=config)
    assert caught.value.hint
    error: PerceiverExportError = caught.value
    return error


def edit_model(directory: Path, part: str | None, changes: dict[str, Any]) -> None:
    """Change fields of ``model_config``, or of the encoder or decoder in it; None removes them."""
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    fields = config["model_config"][part] if part else config["model_config"]
    for name, value in changes.items():
        if value is None:
            del fields[name]
        else:
            fields[name] = value
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")


def edit_weights(directory: Path, name: str, edit: Callable[[dict[str, Tensor]], object]) -> None:
    state = read_vectors(name)[0]
    edit(state)
    save_file(state, directory / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "part", "changes", "message"),
    [
        ("image", None, {"num_latents": 6}, r"latent_provider\._query' has shape \(5, 12\), the config asks for \(6,"),
        ("image", None, {"num_latents": None}, "model_config: Object missing required field `num_latents`"),
        ("image", None, {"encoder": 3}, r"model_config: Expected `object`, got `int` - at `\$\.encoder`"),
        ("image", "encoder", {"image_shape": [7, 5, 3]}, "is not the table of positions"),
        ("image", "encoder", {"image_shape": [5, 8, 3]}, r"\(35, 18\), is not the table of positions, \(40, 18\)"),
        ("image", "encoder", {"image_shape": [5, 7]}, r"at `\$\.encoder\.image_shape`"),
        ("image", "encoder", {"num_frequency_bands": 5}, r"shape \(21,\), the config asks for \(25,\)"),
        ("image", "encoder", {"num_cross_attention_heads": 3}, "22 qk_channels and 22 v_channels cannot be split into"),
        ("image", "encoder", {"num_self_attention_heads": 5}, "self_attention of the encoder: 12 qk_channels"),
        ("image", "encoder", {"num_self_attention_blocks": 1}, "2 num_cross_attention_layers, 1 num_self_attention"),
        ("image", "encoder", {"num_self_attention_layers_per_block": 3}, "tensors are missing.*self_attn_1.2"),
        ("image", "encoder", {"num_self_attention_layers_per_block": 1}, "are unknown to the model: .*self_attn_1.1"),
        ("image", "encoder", {"first_cross_attention_layer_shared": True}, "are unknown to the model: .*cross_attn_n"),
        (
            "image",
            "encoder",
            {"first_self_attention_block_shared": False},
            "missing from the .*self_attn_n",
        ),
        ("image", "decoder", {"cross_attention_residual": False}, "of the decoder is false .* a model with it"),
        ("image_one_channel", "decoder", {"cross_attention_residual": True}, "is true in .* a model without it"),
        ("image", "decoder", {"num_classes": 7}, r"output_adapter\.linear\.weight' has shape \(6, 10\)"),
        ("language", "encoder", {"vocab_size": 263}, "vocab_size is 263 in the encoder, 262 in the decoder"),
        ("language", "encoder", {"max_seq_len": 6}, r"pos_embedding\.weight' has shape \(7, 14\)"),
        ("language", "decoder", {"max_seq_len": 8}, r"query_provider\._query' has shape \(7, 14\), which is not"),
        (
            "language_untied",
            "decoder",
            {"num_output_query_channels": None},
            "to the model: 1.output_adapter.linear",
        ),
        ("flow", "encoder", {"num_patch_input_channels": 12}, "num_patch_input_channels is 12"),
        ("flow", "encoder", {"image_shape": [11, 9]}, r"\(11, 9\) in the encoder, \(9, 11\) in the decoder"),
        ("flow", "decoder", {"rescale_factor": 0}, r"at `\$\.decoder\.rescale_factor`"),
    ],
)
def test_configs_that_do_not_fit(
    tmp_path: Path, name: str, part: str | None, changes: dict[str, Any], message: str
) -> None:
    directory = write_directory(name, tmp_path / "model")
    edit_model(directory, part, changes)

    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        load_model(f"krasserm:{directory}")


@pytest.mark.parametrize(
    ("part", "misspelt", "meant"),
    [
        (None, "num_latent", "num_latents"),
        ("encoder", "num_cross_attention_layer", "num_cross_attention_layers"),
        ("decoder", "num_class", "num_classes"),
    ],
)
def test_a_misspelt_field_gets_the_nearest(tmp_path: Path, part: str | None, misspelt: str, meant: str) -> None:
    directory = write_directory("image", tmp_path / "model")
    edit_model(directory, part, {misspelt: 3})

    error = failure(directory)
    assert f"unknown field `{misspelt}`" in error.message
    assert error.hint == f"did you mean {meant}?"


@pytest.mark.parametrize(
    ("model_type", "hint"),
    [
        ("perceiver-io-image-clasifier", "did you mean perceiver-io-image-classifier?"),
        ("perceiver", "without krasserm:"),
        ("perceiver-ar-causal-language-model", "model_type is one of|did you mean"),
        ("", "model_type is one of"),
    ],
)
def test_models_of_another_kind(tmp_path: Path, model_type: str, hint: str) -> None:
    directory = write_directory("image", tmp_path / "model")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, "model_type": model_type}))

    error = failure(directory)
    assert isinstance(error, UnsupportedModelError)
    assert any(one in error.hint for one in hint.split("|"))


def test_keys_that_were_renamed_are_listed_with_the_nearest(tmp_path: Path) -> None:
    directory = write_directory("text", tmp_path / "model")
    key = "backend_model.0.self_attn_1.0.0.module.attention.q_proj.weight"
    edit_weights(directory, "text", lambda state: state.update({f"{key}s": state.pop(key)}))

    short = key.removeprefix("backend_model.")
    assert f"{short} (nearest: {short}s)" in failure(directory).message


def test_weights_of_another_of_its_models(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    save_file(read_vectors("text")[0], directory / "model.safetensors")

    assert "txt_embedding.weight" in failure(directory).message


@pytest.mark.parametrize("shape", [(), (35,), (18, 35), (35, 18, 1)])
def test_positions_of_another_shape(tmp_path: Path, shape: tuple[int, ...]) -> None:
    directory = write_directory("image", tmp_path / "model")
    edit_weights(directory, "image", lambda state: state.update({POSITIONS: torch.zeros(shape)}))

    assert "is not the table of positions" in failure(directory).message


def test_positions_where_none_are_computed(tmp_path: Path) -> None:
    directory = write_directory("text", tmp_path / "model")
    edit_weights(directory, "text", lambda state: state.update({POSITIONS: torch.zeros(35, 18)}))

    assert "1 tensor is unknown to the model: 0.input_adapter.position_encoding" in failure(directory).message


def test_a_checkpoint_of_lucidrains(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    torch.save(make_lucidrains_model(arguments("Perceiver")).state_dict(), tmp_path / "other.pt")

    error = failure(tmp_path / "other.pt", directory / "config.json")
    assert "holds no model of krasserm" in error.message
    assert error.hint.endswith(f"give lucidrains:{tmp_path / 'other.pt'}")


def test_a_config_of_lucidrains(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    (tmp_path / "other.json").write_text(json.dumps(arguments("Perceiver")))

    error = failure(directory, tmp_path / "other.json")
    assert "model_type is ''" in error.message


def test_a_lightning_checkpoint_with_objects_gets_the_command_that_takes_the_tensors_out(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    state = {name.replace("backend_model.", "model."): one for name, one in read_vectors("image")[0].items()}
    torch.save({"state_dict": state, "hyper_parameters": Namespace()}, directory / "last.ckpt")

    error = failure(directory / "last.ckpt")
    assert "was refused" in error.message
    assert "weights_only=False)['state_dict'], 'model.pt')" in error.hint


def test_files_that_are_not_there(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    assert "is not a file" in failure(directory / "absent.pt").message
    assert "does not exist" in failure(tmp_path / "absent.pt").message
    (tmp_path / "model.pt").touch()
    with pytest.raises(UsageError, match="does not say its sizes"):
        load_model(f"krasserm:{tmp_path}/model.pt")
    (directory / "model.safetensors").unlink()
    assert "no weights" in failure(directory).message
    (directory / "config.json").unlink()
    assert "config.json cannot be read" in failure(directory).message


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"model_type": 3}', '{"model_config": null}'])
def test_configs_that_are_none(tmp_path: Path, content: str) -> None:
    directory = write_directory("image", tmp_path / "model")
    (directory / "config.json").write_text(content)

    assert "config.json" in failure(directory).message


def test_a_model_config_that_is_not_there(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    (directory / "config.json").write_text('{"model_type": "perceiver-io-optical-flow"}')

    assert "model_config: Object missing required field" in failure(directory).message


def test_choices_that_are_none(tmp_path: Path) -> None:
    source = f"krasserm:{write_directory('image', tmp_path / 'model')}"

    assert load_model(source, parity="huggingface", task="image-classification").parity == "huggingface"
    with pytest.raises(UsageError, match="no numerics but their own"):
        load_model(source, parity="deepmind")
    with pytest.raises(UsageError, match="those that its config says"):
        load_model(source, shape={"image": (3, 8, 8)})
    with pytest.raises(UsageError, match="is a model of image-classification"):
        load_model(source, task="optical-flow")
