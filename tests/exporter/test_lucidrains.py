# SPDX-License-Identifier: Apache-2.0
"""Our torch models are lucidrains' to rounding, from every file that holds their state dict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import Tensor, nn

from perceiver_export.exporter import export, load_model
from perceiver_export.runtimes.tasks import open_task

from .lucidrains_reference import (
    BATCH,
    arguments,
    assert_same,
    difference,
    load,
    make_feeds,
    make_lucidrains_model,
    old_names,
    run_lucidrains,
    write_config,
)

PERCEIVERS: dict[str, dict[str, Any]] = {
    "two axes": {},
    "one axis": {"input_shape": [23], "input_axis": 1},
    "three axes": {"input_shape": [3, 5, 4], "input_axis": 3, "input_channels": 1},
    "tied": {"weight_tie_layers": True, "depth": 4, "self_per_cross_attn": 2},
    "tied, two layers": {"weight_tie_layers": True, "depth": 2},
    "tied, one layer": {"weight_tie_layers": True, "depth": 1},
    "no self-attention": {"self_per_cross_attn": 0},
    "three self-attentions": {"self_per_cross_attn": 3, "depth": 2},
    "no positions": {"fourier_encode_data": False},
    "one band": {"num_freq_bands": 1, "max_freq": 1},
    "high frequencies": {"max_freq": 224, "num_freq_bands": 6},
    "one head": {"cross_heads": 1, "latent_heads": 1, "cross_dim_head": 7, "latent_dim_head": 11},
    "wider than its heads": {"cross_heads": 5, "cross_dim_head": 8, "latent_dim_head": 16},
    "dropout in training": {"attn_dropout": 0.5, "ff_dropout": 0.5},
}
IOS: dict[str, dict[str, Any]] = {
    "plain": {},
    "MLP in the decoder": {"decoder_ff": True},
    "tied": {"weight_tie_layers": True, "depth": 4},
    "no logits": {"logits_dim": None},
    "no logits, MLP in the decoder": {"logits_dim": None, "decoder_ff": True},
    "one head": {"cross_heads": 1, "latent_heads": 1, "cross_dim_head": 7, "latent_dim_head": 11},
    "one query, one element": {"num_queries": 1, "input_shape": [1]},
    "dropout in training": {"seq_dropout_prob": 0.5},
}
CASES = [("Perceiver", name) for name in PERCEIVERS] + [("PerceiverIO", name) for name in IOS]


def variant(model: str, name: str, **changes: Any) -> dict[str, Any]:
    return arguments(model, **(PERCEIVERS if model == "Perceiver" else IOS)[name], **changes)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("model", "name"), CASES)
def test_outputs_are_lucidrains(model: str, name: str, masked: bool) -> None:
    config = variant(model, name, masked=masked)
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        assert difference(config, dtype) <= tolerance


def test_defaults_are_lucidrains(tmp_path: Path) -> None:
    for model, sizes in (
        ("Perceiver", {"num_freq_bands": 2, "max_freq": 4.0, "depth": 1, "input_shape": [3, 4]}),
        ("PerceiverIO", {"dim": 5, "queries_dim": 3, "depth": 1, "input_shape": [4], "num_queries": 2}),
    ):
        config = {"class": model, **sizes}
        theirs, feeds = make_lucidrains_model(config), make_feeds(config, torch.float32)
        with torch.no_grad():
            (found,) = load(tmp_path, theirs.state_dict(), config).model(feeds).values()
            expected = run_lucidrains(theirs, feeds)
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_pictures_go_in_channels_first(tmp_path: Path) -> None:
    config = arguments("Perceiver", input_channels=3, task="image-classification", labels=list("abcdefg"))
    theirs = make_lucidrains_model(config)
    loaded = load(tmp_path, theirs.state_dict(), config)
    image = torch.randn(2, 7, 5, 3, generator=torch.Generator().manual_seed(1))

    with torch.no_grad():
        expected = theirs(image)
        found = loaded.model({"image": image.permute(0, 3, 1, 2)})["logits"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert (loaded.task, loaded.parity, loaded.labels) == ("image-classification", "own", tuple("abcdefg"))
    assert loaded.preprocessing is not None
    assert "preprocessor" in loaded.notes[0]


@pytest.mark.parametrize(("model", "name"), CASES)
def test_names_of_older_versions(tmp_path: Path, model: str, name: str) -> None:
    config = variant(model, name)
    state = make_lucidrains_model(config).state_dict()
    renamed = old_names(model, state)
    assert renamed.keys() != state.keys()

    assert_same(load(tmp_path, renamed, config), load(tmp_path, state, config))


@pytest.mark.parametrize("model", ["Perceiver", "PerceiverIO"])
@pytest.mark.parametrize("old", [False, True])
def test_files_that_hold_tied_layers_once(tmp_path: Path, model: str, old: bool) -> None:
    config = arguments(model, depth=12, weight_tie_layers=True)
    theirs = make_lucidrains_model(config)
    state = old_names(model, theirs.state_dict()) if old else theirs.state_dict()
    expected = load(tmp_path, state, config)

    distinct = {data: name for name, data in reversed([(name, one.data_ptr()) for name, one in state.items()])}
    once = {name: tensor.clone() for name, tensor in state.items() if name in distinct.values()}
    assert len(once) < len(state)
    save_file(once, tmp_path / "once.safetensors")
    if not old:
        save_model(theirs, str(tmp_path / "model.safetensors"))
        assert len(load_file(tmp_path / "model.safetensors")) == len(once)
        assert_same(
            load_model(f"lucidrains:{tmp_path / 'model.safetensors'}", config=tmp_path / "model.json"), expected
        )
    assert_same(load_model(f"lucidrains:{tmp_path / 'once.safetensors'}", config=tmp_path / "model.json"), expected)
    assert_same(load(tmp_path, once, config), expected)


def test_tied_layers_that_are_loaded_as_if_they_were_not(tmp_path: Path) -> None:
    tied = arguments("Perceiver", weight_tie_layers=True)
    theirs = make_lucidrains_model(tied)
    save_model(theirs, str(tmp_path / "model.safetensors"))
    config = write_config(tmp_path, {**tied, "weight_tie_layers": False})
    loaded = load_model(f"lucidrains:{tmp_path / 'model.safetensors'}", config=config)
    feeds = make_feeds(tied, torch.float32)

    with torch.no_grad():
        expected = run_lucidrains(theirs, feeds)
        found = loaded.model(feeds)["logits"]
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


class Wrapped(nn.Module):
    """How models with trained queries are written."""

    def __init__(self, config: dict[str, Any], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.io = make_lucidrains_model(config)
        self.queries = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(2)))
        self.head = nn.Linear(4, 2)

    def forward(self, data: Tensor, mask: Tensor) -> Tensor:
        queries = self.queries.expand(len(data), -1, -1)
        output: Tensor = self.io(data, mask=mask, queries=queries)
        return output


@pytest.mark.parametrize("shape", [(13, 9), (1, 13, 9)])
@pytest.mark.parametrize("apart", [False, True])
def test_trained_queries(tmp_path: Path, shape: tuple[int, ...], apart: bool) -> None:
    config = arguments("PerceiverIO", masked=True)
    feeds = make_feeds(config, torch.float32)
    del feeds["logits_queries"], config["num_queries"]
    theirs = Wrapped(config, shape).eval()
    state = theirs.state_dict()
    if apart:
        torch.save({"queries": state.pop("queries")}, tmp_path / "queries.pt")
        config["queries_file"] = "queries.pt"
    loaded = load(tmp_path, state, {**config, "queries": "queries", "prefix": "io."})

    with torch.no_grad():
        found = loaded.model(feeds)["logits"]
        expected = theirs(feeds["data"], feeds["data_mask"].bool())
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert loaded.notes == (
        "what lies outside of io. is no part of the model, and was left out (2): head.bias, head.weight",
    )


def test_trained_queries_of_a_subclass(tmp_path: Path) -> None:
    config = arguments("PerceiverIO")
    del config["num_queries"]
    state = make_lucidrains_model(config).state_dict()
    state["my_queries"] = torch.randn(13, 9)

    loaded = load(tmp_path, state, {**config, "queries": "my_queries"})
    assert torch.equal(loaded.model.state_dict()["decoder.queries.logits.table"], state["my_queries"])


@pytest.mark.parametrize("model", ["Perceiver", "PerceiverIO"])
def test_bundles_give_what_lucidrains_gives(tmp_path: Path, model: str) -> None:
    config = arguments(model, masked=True, weight_tie_layers=True)
    theirs = make_lucidrains_model(config)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    feeds = make_feeds(config, torch.float32)
    feeds["data_mask"][2, :4] = 1  # the runtime refuses a sample that is masked as a whole
    with torch.no_grad():
        expected = run_lucidrains(theirs, feeds).numpy()

    for split in (False, True):
        bundle = export(
            f"lucidrains:{tmp_path / 'model.pt'}",
            tmp_path / f"bundle-{split}",
            config=write_config(tmp_path, config),
            batch=f"1:{BATCH}:4",
            split=split,
        )
        with open_task(bundle) as run:
            found = run({name: tensor.numpy() for name, tensor in feeds.items()})["logits"]
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_a_bundle_of_pictures(tmp_path: Path) -> None:
    config = arguments(
        "Perceiver",
        input_channels=3,
        input_shape=[12, 10],
        task="image-classification",
        preprocessor={"do_center_crop": False, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]},
    )
    theirs = make_lucidrains_model(config)
    torch.save(theirs.state_dict(), tmp_path / "model.pt")
    picture = np.random.default_rng(0).integers(0, 256, (12, 10, 3), dtype=np.uint8)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(picture).float()[None] / 127.5 - 1)[0].softmax(0)

    bundle = export(f"lucidrains:{tmp_path / 'model.pt'}", tmp_path / "bundle", config=write_config(tmp_path, config))
    with open_task(bundle) as classify:
        best = classify(picture, top=7)
    assert [one.index for one in best] == expected.argsort(descending=True).tolist()
    np.testing.assert_allclose([one.probability for one in best], expected.sort(descending=True).values, atol=1e-5)
