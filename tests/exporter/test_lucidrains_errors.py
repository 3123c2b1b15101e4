# SPDX-License-Identifier: Apache-2.0
"""State dicts and configs of lucidrains that are not of one model, or of another: an error that says so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import perceiver_pytorch.experimental
import perceiver_pytorch.gated
import perceiver_pytorch.mixed_latents
import pytest
import torch
from perceiver_pytorch import Perceiver
from perceiver_pytorch.perceiver_io import PerceiverLM
from torch import Tensor

from perceiver_export.runtimes.errors import CheckpointError, PerceiverExportError, UnsupportedModelError

from .lucidrains_reference import arguments, load, make_lucidrains_model, old_names

REMOVED = object()


def failure(tmp_path: Path, state: dict[str, Tensor], config: dict[str, Any]) -> PerceiverExportError:
    with pytest.raises((CheckpointError, UnsupportedModelError)) as caught:
        load(tmp_path, state, config)
    assert caught.value.hint
    error: PerceiverExportError = caught.value
    return error


def changed(config: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in {**config, **changes}.items() if value is not REMOVED}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_latents": 6}, "num_latents is 6 in the config, 5 in the checkpoint"),
        ({"latent_dim": 13}, "latent_dim is 13 in the config, 14 in"),
        ({"depth": 2}, "depth is 2 in the config, 3 in"),
        ({"depth": 4}, "depth is 4 in the config, 3 in"),
        ({"depth": 4, "weight_tie_layers": True}, "depth is 4 in the config, 3 in"),
        ({"cross_heads": 3}, "cross_heads · cross_dim_head is 12 in the config, 8 in"),
        ({"latent_dim_head": 4}, "latent_heads · latent_dim_head is 12 in the config, 15 in"),
        ({"num_classes": 8}, "num_classes is 8 in the config, 7 in"),
        ({"num_freq_bands": 4}, r"input_axis · \(2 · num_freq_bands \+ 1\) is 20 in the config, 16 in"),
        ({"input_channels": 3}, "is 17 in the config, 16 in"),
        ({"fourier_encode_data": False}, "input_channels is 2 in the config, 16 in"),
        ({"self_per_cross_attn": 2}, "self_per_cross_attn is 2 in the config, 1 in"),
        ({"weight_tie_layers": True}, r"'layers\.2\..*' and 'layers\.1\..*' differ, with weight_tie_layers"),
        ({"class": "PerceiverIO"}, "required field|unknown field"),
        ({"input_shape": [7]}, "input_shape has 1 axes, the model's input has 2"),
        ({"input_shape": [7, 0]}, r"`int` >= 1 - at `\$\.input_shape\[1\]`"),
        ({"input_shape": [2**20, 2**20]}, "input_shape has 1099511627776 elements"),
        ({"input_shape": REMOVED}, "missing required field `input_shape`"),
        ({"max_freq": "ten"}, r"Expected `float`, got `str` - at `\$\.max_freq`"),
        ({"max_freq": -1}, r"\$\.max_freq"),
        ({"class": REMOVED}, "there is no class"),
        ({"class": "PerceiverLM"}, "class is 'PerceiverLM'"),
        ({"inverted_cross_attn": True}, "inverted_cross_attn is not supported"),
        ({"inverted_cross_attn": [False, True, False]}, "inverted_cross_attn is not supported"),
        ({"attn_residual": True}, "attn_residual is not supported"),
        ({"final_classifier_head": False}, "no output but its latents"),
        ({"labels": ["cat"]}, "1 labels, num_classes is 7"),
        ({"task": "image-classification"}, "for pictures of 3 channels"),
        ({"task": "optical-flow"}, "task"),
        ({"prefix": "net."}, r"no tensor 'net\.latents'"),
    ],
)
def test_configs_that_do_not_fit_a_perceiver(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = arguments("Perceiver")
    state = make_lucidrains_model(config).state_dict()

    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        load(tmp_path, state, changed(config, changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 7}, "dim is 7 in the config, 6 in"),
        ({"queries_dim": 8}, "queries_dim is 8 in the config, 9 in"),
        ({"logits_dim": 5}, "logits_dim is 5 in the config, 4 in"),
        ({"logits_dim": None}, "logits_dim is 0 in the config, 4 in"),
        ({"decoder_ff": True}, "decoder_ff is True in the config, False in"),
        ({"depth": 3}, "depth is 3 in the config, 2 in"),
        ({"num_queries": REMOVED}, "neither num_queries nor queries are given"),
        ({"queries": "queries"}, "both num_queries and queries are given"),
        ({"queries_file": "queries.pt"}, "queries_file without queries"),
        ({"num_queries": REMOVED, "queries": "query"}, "no tensor 'query'"),
        ({"num_queries": REMOVED, "queries": "latents"}, r"queries 'latents' have shape \(5, 14\)"),
        ({"num_queries": REMOVED, "queries": "q", "queries_file": "absent.pt"}, r"absent\.pt is not a file"),
        ({"input_shape": [3, 4]}, "input_shape has 2 axes, the model's input has 1"),
        ({"task": "image-classification"}, "task"),
    ],
)
def test_configs_that_do_not_fit_a_perceiver_io(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    config = arguments("PerceiverIO")
    state = make_lucidrains_model(config).state_dict()

    with pytest.raises((CheckpointError, UnsupportedModelError), match=message):
        load(tmp_path, state, changed(config, changes))


@pytest.mark.parametrize(
    ("misspelt", "meant"),
    [("num_latent", "num_latents"), ("max_frequency", "max_freq"), ("weight_tie_layer", "weight_tie_layers")],
)
def test_a_misspelt_field_gets_the_nearest(tmp_path: Path, misspelt: str, meant: str) -> None:
    config = arguments("Perceiver")
    error = failure(tmp_path, make_lucidrains_model(config).state_dict(), {**config, misspelt: 3})

    assert f"unknown field `{misspelt}`" in error.message
    assert error.hint == f"did you mean {meant}?"


def test_a_field_of_no_version_gets_all_that_there_are(tmp_path: Path) -> None:
    config = arguments("PerceiverIO")
    error = failure(tmp_path, make_lucidrains_model(config).state_dict(), {**config, "zzz": 3})

    assert "queries_dim" in error.hint
    assert "max_freq" not in error.hint


def test_keys_that_were_renamed_are_listed_with_the_nearest(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    state = make_lucidrains_model(config).state_dict()
    state["layers.0.cross_ff.fn.net.0.weights"] = state.pop("layers.0.cross_ff.fn.net.0.weight")

    error = failure(tmp_path, state, config)
    assert "layers.0.cross_ff.fn.net.0.weight (nearest: layers.0.cross_ff.fn.net.0.weights)" in error.message


def test_errors_name_what_is_in_an_old_file(tmp_path: Path) -> None:
    config = arguments("PerceiverIO")
    state = old_names("PerceiverIO", make_lucidrains_model(config).state_dict())
    del state["layers.1.0.fn.to_kv.weight"]

    assert (
        "1 tensor is missing from the checkpoint: layers.1.0.fn.to_kv.weight"
        in failure(tmp_path, state, config).message
    )


@pytest.mark.parametrize("shape", [(), (16,), (15, 14), (16, 14, 1), (0, 14)])
def test_keys_and_values_that_cannot_be_parted(tmp_path: Path, shape: tuple[int, ...]) -> None:
    config = arguments("Perceiver")
    state = make_lucidrains_model(config).state_dict()
    state["layers.1.self_attns.0.0.fn.to_kv.weight"] = torch.zeros(shape)

    assert "'layers.1.self_attns.0.0.fn.to_kv.weight' has shape" in failure(tmp_path, state, config).message


def test_the_class_is_told_by_the_checkpoint(tmp_path: Path) -> None:
    state = make_lucidrains_model(arguments("PerceiverIO")).state_dict()
    error = failure(tmp_path, state, arguments("Perceiver"))
    assert "holds a PerceiverIO, the config says Perceiver" in error.message

    state = make_lucidrains_model(arguments("Perceiver")).state_dict()
    assert (
        "holds a Perceiver, the config says PerceiverIO" in failure(tmp_path, state, arguments("PerceiverIO")).message
    )


SIZES: dict[str, Any] = {"num_freq_bands": 3, "depth": 3, "max_freq": 9.5}
OTHERS: dict[str, tuple[Callable[[], Any], str]] = {
    "gated": (lambda: perceiver_pytorch.gated.Perceiver(**SIZES), "the gated Perceiver"),
    "experimental": (lambda: perceiver_pytorch.experimental.Perceiver(**SIZES), "the experimental Perceiver"),
    "mixed latents": (lambda: perceiver_pytorch.mixed_latents.Perceiver(**SIZES), "with mixed latents"),
    "residual": (lambda: Perceiver(**SIZES, attn_residual=True), "with attn_residual"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_models_of_the_package_are_named(tmp_path: Path, kind: str) -> None:
    make, message = OTHERS[kind]

    error = failure(tmp_path, make().state_dict(), arguments("Perceiver"))
    assert isinstance(error, UnsupportedModelError)
    assert message in error.message


def test_a_language_model_is_known_by_what_is_around_it(tmp_path: Path) -> None:
    theirs = PerceiverLM(depth=1, dim=6, num_tokens=9, max_seq_len=5)
    error = failure(tmp_path, theirs.state_dict(), arguments("PerceiverIO"))
    assert '"prefix": "perceiver_io."' in error.hint


def test_a_perceiver_io_of_before_0_7(tmp_path: Path) -> None:
    state = {
        name.replace("cross_attend_block.", "layers.0."): tensor
        for name, tensor in make_lucidrains_model(arguments("PerceiverIO")).state_dict().items()
    }
    error = failure(tmp_path, state, arguments("PerceiverIO"))
    assert isinstance(error, UnsupportedModelError)
    assert "0.6 or older" in error.message


def test_log_spaced_frequencies_of_old_versions_are_refused(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    state = {
        name.replace("fn.to_out.", "fn.to_out.0.").replace("fn.net.2.", "fn.net.3."): tensor
        for name, tensor in old_names("Perceiver", make_lucidrains_model(config).state_dict()).items()
    }
    error = failure(tmp_path, state, config)
    assert isinstance(error, UnsupportedModelError)
    assert "0.7 or older" in error.message


@pytest.mark.parametrize(
    ("state", "hint"),
    [
        ({"0.latent_provider._query": 1, "0.cross_attn_1.1.module.0.weight": 1}, "give krasserm:"),
        (
            {
                "perceiver.embeddings.latents": 1,
                "perceiver.encoder.cross_attention.attention.self.query.weight": 1,
            },
            "a checkpoint of transformers",
        ),
        ({"weight": 1, "bias": 1}, "model.state_dict()"),
        ({}, "model.state_dict()"),
    ],
)
def test_a_checkpoint_of_somebody_else(tmp_path: Path, state: dict[str, int], hint: str) -> None:
    error = failure(tmp_path, {name: torch.zeros(size) for name, size in state.items()}, arguments("Perceiver"))

    assert "holds no model of lucidrains" in error.message
    assert hint in error.hint


def test_the_prefix_of_a_wrapped_model_is_told(tmp_path: Path) -> None:
    config = arguments("Perceiver")
    state = {f"module.net.{name}": one for name, one in make_lucidrains_model(config).state_dict().items()}

    assert '"prefix": "module.net."' in failure(tmp_path, state, config).hint
    assert load(tmp_path, state, {**config, "prefix": "module.net."}).notes == ()
