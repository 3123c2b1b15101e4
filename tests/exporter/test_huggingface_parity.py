# SPDX-License-Identifier: Apache-2.0
"""Our torch models are transformers' to rounding, from every file layout that transformers writes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from perceiver_export.exporter import LoadedModel, load_model
from perceiver_export.exporter.model.config import ImageInput
from perceiver_export.runtimes.preprocessing import CenterCropShare, ImagePreprocessing, Resize, ResizeEdge

from .conftest import PICTURES, MakeCheckpoint, make_transformers_model
from .transformers_reference import differences, rounding

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "qk and v channels": {"qk_channels": 16, "v_channels": 24},
    "shape of the queries": {"cross_attention_shape_for_attention": "q"},
    "no residual, wider": {
        "use_query_residual": False,
        "cross_attention_widening_factor": 2,
        "self_attention_widening_factor": 3,
    },
    "tanh gelu, one block": {"hidden_act": "gelu_new", "num_blocks": 1},
    "more cross heads": {"num_cross_attention_heads": 2, "qk_channels": 8, "v_channels": 24},
}


TEXT_VARIANTS: list[dict[str, Any]] = [
    {},
    {"qk_channels": 8, "v_channels": 24},
    {"cross_attention_shape_for_attention": "q"},
    {"num_blocks": 1},
]


CASES = [
    *itertools.product(PICTURES, VARIANTS.values()),
    *itertools.product(("language", "text", "flow", "video"), TEXT_VARIANTS),
]


@pytest.mark.parametrize(("kind", "changes"), CASES)
def test_outputs_are_transformers(kind: str, changes: dict[str, Any]) -> None:
    """Equal in float64; in float32 at 1e-5, or where transformers' own rounding is larger, at twice that."""
    found = differences(kind, **changes)
    assert found[torch.float64] <= 1e-10
    single = found[torch.float32]
    assert single <= 1e-5 or single <= 2 * rounding(kind, **changes)  # the second is slow


def test_learned_positions_are_resized_as_transformers_does(make_checkpoint: MakeCheckpoint) -> None:
    directory = make_checkpoint("learned")
    ours = load_model(directory, shape={"image": (3, 9, 15)}).model
    image = torch.randn(1, 3, 9, 15, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        expected = make_transformers_model("learned")(image, interpolate_pos_encoding=True).logits
        found = ours({"image": image})["logits"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_sharded_safetensors_and_bin_files_hold_the_same(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    whole = make_checkpoint("fourier")
    sharded = tmp_path / "sharded"
    make_transformers_model("fourier").save_pretrained(sharded, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    (pickled / "config.json").write_bytes((whole / "config.json").read_bytes())
    torch.save(make_transformers_model("fourier").state_dict(), pickled / "pytorch_model.bin")

    expected = load_model(whole).model.state_dict()
    for directory in (sharded, pickled):
        found = load_model(directory).model.state_dict()
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_a_directory_of_transformers_4(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    """Fields that version 5 no longer has, sizes as plain numbers, weights as a pickle."""
    new, old = make_checkpoint("fourier"), tmp_path / "old"
    old.mkdir()
    config = json.loads((new / "config.json").read_text())
    config |= {
        "_label_trainable_num_channels": 1024,
        "hidden_dropout_prob": 0.1,
        "seq_len": 2048,
        "torch_dtype": "float32",
    }
    config.pop("dtype", None)
    (old / "config.json").write_text(json.dumps(config))
    torch.save(make_transformers_model("fourier").state_dict(), old / "pytorch_model.bin")
    processor = {"feature_extractor_type": "PerceiverFeatureExtractor", "size": 20, "crop_size": 23, "resample": 3}
    (old / "preprocessor_config.json").write_text(json.dumps(processor))

    loaded, expected = load_model(old), load_model(new).model.state_dict()
    assert isinstance(loaded.preprocessing, ImagePreprocessing)
    assert loaded.preprocessing.steps[:2] == (CenterCropShare(20 / 23, 20 / 23), Resize(20, 20, "bicubic"))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.model.state_dict().items())


def rename(state: dict[str, torch.Tensor], before: str, within: str = "") -> dict[str, torch.Tensor]:
    """Names as wrappers make them: ``before`` in front, ``within`` after the first part."""
    names = {name: f"{before}{name.split('.')[0]}.{within}{name.split('.', 1)[1]}" for name in state}
    return {names[name]: tensor for name, tensor in state.items()}


@pytest.mark.parametrize(
    ("before", "within", "taken_off"),
    [
        ("module.", "", "module."),
        ("_orig_mod.", "", "_orig_mod."),
        ("model.", "", "model."),
        ("base_model.model.", "", "base_model.model."),
        ("model._orig_mod.module.", "", "module. and _orig_mod. and model."),
        ("", "_orig_mod.", "_orig_mod."),
    ],
)
@pytest.mark.parametrize("kind", ["fourier", "language"])
def test_what_wrappers_put_before_names_is_taken_off_and_noted(
    make_checkpoint: MakeCheckpoint, kind: str, before: str, within: str, taken_off: str
) -> None:
    directory = make_checkpoint(kind)
    expected = load_model(directory)
    state = rename(load_file(directory / "model.safetensors"), before, within)
    save_file(state, directory / "model.safetensors")

    found = load_model(directory)

    assert all(
        torch.equal(found.model.state_dict()[name], value) for name, value in expected.model.state_dict().items()
    )
    assert expected.notes == tuple(note for note in found.notes if taken_off not in note)
    assert len(found.notes) == len(expected.notes) + 1


@pytest.mark.parametrize("kind", ["fourier", "language"])
def test_a_bare_perceivers_names_are_taken_as_transformers_takes_them(
    make_checkpoint: MakeCheckpoint, kind: str
) -> None:
    directory = make_checkpoint(kind)
    expected = load_model(directory).model.state_dict()
    state = load_file(directory / "model.safetensors")
    save_file({name.removeprefix("perceiver."): one for name, one in state.items()}, directory / "model.safetensors")

    found = load_model(directory).model.state_dict()

    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_half_precision_checkpoints_are_widened(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    half = tmp_path / "half"
    make_transformers_model("fourier").to(torch.float16).save_pretrained(half)

    assert {parameter.dtype for parameter in load_model(half).model.parameters()} == {torch.float32}


def image_input(loaded: LoadedModel) -> ImageInput:
    image = loaded.config.inputs["image"]
    assert isinstance(image, ImageInput)
    return image


def test_labels_and_picture_size_come_from_the_directory(make_checkpoint: MakeCheckpoint) -> None:
    directory = make_checkpoint("fourier", id2label=dict(enumerate("abcde")))
    assert load_model(directory).labels == tuple("abcde")
    assert image_input(load_model(directory)).height == 224

    (directory / "preprocessor_config.json").write_text(json.dumps({"size": {"height": 20, "width": 30}}))
    image = image_input(load_model(directory))
    assert (image.height, image.width) == (20, 30)

    clip = {"image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40}, "do_center_crop": False}
    (directory / "processor_config.json").write_text(json.dumps({"image_processor": clip}))
    loaded = load_model(directory)
    assert isinstance(loaded.preprocessing, ImagePreprocessing)
    assert loaded.preprocessing.steps[0] == ResizeEdge(40, 0, "bicubic")
    assert (image_input(loaded).height, image_input(loaded).width) == (40, 40)
