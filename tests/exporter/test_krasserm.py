# SPDX-License-Identifier: Apache-2.0
"""Our torch models are perceiver-io's to rounding, from every file layout that it writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from perceiver_export.exporter import export, load_model
from perceiver_export.runtimes.errors import CheckpointError
from perceiver_export.runtimes.preprocessing import FlowPreprocessing, ImagePreprocessing, TextPreprocessing
from perceiver_export.runtimes.tasks import open_task

from .krasserm_reference import MODELS, difference, outputs, read_vectors, write_directory
from .lucidrains_reference import assert_same

TASKS = {
    "flow": "optical-flow",
    "image": "image-classification",
    "image_one_channel": "arrays",
    "image_shared": "image-classification",
    "language": "fill-mask",
    "language_fewer_positions": "arrays",
    "language_untied": "arrays",
    "text": "text-classification",
    "text_several": "arrays",
}
POSITIONS = "backend_model.0.input_adapter.position_encoding.position_encoding"


def edit_config(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    (directory / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def test_all_models_are_there() -> None:
    assert sorted(TASKS) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_perceiver_ios(name: str) -> None:
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        assert difference(name, dtype) <= tolerance


@pytest.mark.parametrize("name", MODELS)
def test_what_a_directory_says(tmp_path: Path, name: str) -> None:
    loaded = load_model(f"krasserm:{write_directory(name, tmp_path / 'model')}")

    assert (loaded.task, loaded.parity, loaded.source) == (TASKS[name], "huggingface", "model")
    kinds = {
        "arrays": type(None),
        "optical-flow": FlowPreprocessing,
        "image-classification": ImagePreprocessing,
        "fill-mask": TextPreprocessing,
        "text-classification": TextPreprocessing,
    }
    assert type(loaded.preprocessing) is kinds[loaded.task]


def test_labels(tmp_path: Path) -> None:
    text = write_directory("text", tmp_path / "text")
    assert load_model(f"krasserm:{text}").labels == ("NEGATIVE", "POSITIVE")
    grey = write_directory("image_one_channel", tmp_path / "grey")
    assert load_model(f"krasserm:{grey}").labels == ("7", "8", "9")  # numbers, in the file
    assert load_model(f"krasserm:{write_directory('language', tmp_path / 'language')}").labels == ()

    for labels in (None, {"0": "A", "1": "B", "2": "C"}, {"0": "A"}, {"1": "A", "2": "B"}):
        edit_config(text, id2label=labels)
        loaded = load_model(f"krasserm:{text}")
        assert loaded.labels == ("LABEL_0", "LABEL_1")
        assert "names no labels" in loaded.notes[-1]


@pytest.mark.parametrize("prefix", ["", "model.", "backend_model.", "net.0."])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("name", ["image", "language", "flow"])
def test_state_dicts_with_any_prefix(tmp_path: Path, name: str, suffix: str, prefix: str) -> None:
    expected = load_model(f"krasserm:{write_directory(name, tmp_path / 'model')}")
    state = {f"{prefix}{key.removeprefix('backend_model.')}": one for key, one in read_vectors(name)[0].items()}
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, file)
    else:
        torch.save(state, file)

    loaded = load_model(f"krasserm:{file}", config=tmp_path / "model" / "config.json")
    assert_same(loaded, expected)
    assert loaded.source == f"weights{suffix}"
    (tmp_path / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    assert_same(load_model(f"krasserm:{file}"), expected)


def test_directories_with_a_bin_file(tmp_path: Path) -> None:
    directory = write_directory("text", tmp_path / "model")
    expected = load_model(f"krasserm:{directory}")
    torch.save(load_file(directory / "model.safetensors"), directory / "pytorch_model.bin")
    (directory / "model.safetensors").unlink()

    assert_same(load_model(f"krasserm:{directory}"), expected)


def test_a_lightning_checkpoint_of_plain_values(tmp_path: Path) -> None:
    directory = write_directory("image", tmp_path / "model")
    state = {key.replace("backend_model.", "model."): one for key, one in read_vectors("image")[0].items()}
    torch.save({"epoch": 1, "state_dict": state, "hyper_parameters": {"num_latents": 5}}, directory / "last.ckpt")

    assert_same(load_model(f"krasserm:{directory / 'last.ckpt'}"), load_model(f"krasserm:{directory}"))


@pytest.mark.parametrize("name", ["image", "flow"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    directory = write_directory(name, tmp_path / "model")
    state = {key: tensor.to(dtype) for key, tensor in read_vectors(name)[0].items()}
    save_file(state, directory / "model.safetensors")

    loaded = load_model(f"krasserm:{directory}")
    assert {tensor.dtype for tensor in loaded.model.state_dict().values()} == {torch.float32}
    found, expected = outputs(name, loaded, torch.float32)
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("name", ["image", "image_one_channel", "flow"])
def test_the_stored_positions_are_those_that_are_used(tmp_path: Path, name: str) -> None:
    directory = write_directory(name, tmp_path / "model")
    state = read_vectors(name)[0]
    state[POSITIONS] += 1e-4  # as much as two machines differ at high frequencies
    save_file(state, directory / "model.safetensors")
    ((own, _),) = (loaded := load_model(f"krasserm:{directory}")).config.inputs.items()
    assert torch.equal(loaded.model.inputs[own].get_submodule("positions").get_buffer("table"), state[POSITIONS])

    state[POSITIONS][2, 3] += 0.01
    save_file(state, directory / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not the table of positions"):
        load_model(f"krasserm:{directory}")


def test_a_checkpoint_without_stored_positions(tmp_path: Path) -> None:
    """They are computed, to the bit as perceiver-io does."""
    directory = write_directory("image", tmp_path / "model")
    expected = load_model(f"krasserm:{directory}")
    state = read_vectors("image")[0]
    stored = state.pop(POSITIONS)
    save_file(state, directory / "model.safetensors")

    loaded = load_model(f"krasserm:{directory}")
    assert_same(loaded, expected)
    assert torch.equal(loaded.model.inputs["image"].get_submodule("positions").get_buffer("table"), stored)


@pytest.mark.parametrize(
    ("settings", "crop", "mean"),
    [
        (None, (224 / 256, 224 / 256), (0.485, 0.456, 0.406)),
        ({"do_center_crop": False, "image_mean": 0.5, "image_std": 0.25}, None, (0.5, 0.5, 0.5)),
        (
            {"do_resize": False, "do_center_crop": False, "channels_last": True, "single_channel": False},
            None,
            (0.485, 0.456, 0.406),
        ),
    ],
)
def test_pictures_are_prepared_as_the_directory_says(
    tmp_path: Path, settings: dict[str, Any] | None, crop: Any, mean: tuple[float, ...]
) -> None:
    directory = write_directory("image", tmp_path / "model")
    if settings is not None:
        (directory / "preprocessor_config.json").write_text(json.dumps(settings))
    loaded = load_model(f"krasserm:{directory}")

    steps = loaded.preprocessing
    assert isinstance(steps, ImagePreprocessing)
    assert (steps.height, steps.width, steps.crop_fraction, steps.mean) == (5, 7, crop, mean)
    assert any("preprocessor_config.json" in note for note in loaded.notes) == (settings is None)


def test_texts_stand_between_special_tokens_unless_the_config_says_not(tmp_path: Path) -> None:
    directory = write_directory("text", tmp_path / "model")
    loaded = load_model(f"krasserm:{directory}")
    assert loaded.preprocessing == TextPreprocessing(10, special_tokens=True)
    assert "add_special_tokens" in loaded.notes[0]

    edit_config(directory, add_special_tokens=False)
    loaded = load_model(f"krasserm:{directory}")
    assert loaded.preprocessing == TextPreprocessing(10, special_tokens=False)
    assert loaded.notes == ()


@pytest.mark.parametrize("name", ["language", "text_several", "image_one_channel"])
def test_bundles_give_what_perceiver_io_gives(tmp_path: Path, name: str) -> None:
    arrays = read_vectors(name)[1]
    bundle = export(f"krasserm:{write_directory(name, tmp_path / 'model')}", tmp_path / "bundle", batch="1:2:4")

    feeds = (
        {"image": arrays["inputs"]}
        if "mask" not in arrays
        else {
            "tokens": arrays["inputs"],
            "tokens_mask": arrays["mask"],
        }
    )
    with open_task(bundle) as run:
        runtime = run.runtime
        found = runtime.run({key: one.numpy() for key, one in feeds.items()})["logits"]
    expected = arrays["logits"].numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_split_bundle_of_flow(tmp_path: Path) -> None:
    directory = write_directory("flow", tmp_path / "model")
    found, expected = outputs("flow", load_model(f"krasserm:{directory}"), torch.float32)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    bundle = export(f"krasserm:{directory}", tmp_path / "bundle", split=True)
    assert bundle.manifest.parts.keys() == {"encoder", "decoder"}
    assert max(check.difference for check in bundle.manifest.verification) <= 1e-5
