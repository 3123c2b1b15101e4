# SPDX-License-Identifier: Apache-2.0
"""Our models beside those of perceiver-pytorch, on the same inputs: shared by the tests and the parity benchmark."""

from __future__ import annotations

import json
import math
import re
import tempfile
from pathlib import Path
from typing import Any

import perceiver_pytorch
import torch
from msgspec.structs import replace
from torch import Tensor

from perceiver_export.exporter import load_model
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.perceiver.config import FourierPositions
from perceiver_export.exporter.perceiver.positions import fourier_features, grid_positions

_WIDTHS = {
    "num_latents": 5,
    "latent_dim": 14,
    "cross_heads": 2,
    "latent_heads": 3,
    "cross_dim_head": 4,
    "latent_dim_head": 5,
}
_OWN = {"class", "input_shape", "masked", "num_queries", "queries", "prefix", "task", "labels", "preprocessor"}
BATCH = 3


def arguments(name: str, **changes: Any) -> dict[str, Any]:
    """The content of a config: a small model of odd sizes, with what ``changes`` says."""
    if name == "Perceiver":
        sizes = {"input_shape": [7, 5], "depth": 3, "num_freq_bands": 3, "max_freq": 9.5, "num_classes": 7}
        sizes["input_channels"] = 2
    else:
        sizes = {"input_shape": [11], "depth": 2, "dim": 6, "queries_dim": 9, "logits_dim": 4, "num_queries": 13}
    return {"class": name, **_WIDTHS, **sizes, **changes}


def make_lucidrains_model(config: dict[str, Any]) -> Any:
    """lucidrains' model of a config, with every parameter away from its default, in evaluation mode."""
    torch.manual_seed(0)
    model = getattr(perceiver_pytorch, config["class"])(
        **{name: value for name, value in config.items() if name not in _OWN}
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def write_config(directory: Path, config: dict[str, Any]) -> Path:
    """The config as a file."""
    path = directory / "model.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    return path


def load(directory: Path, state: dict[str, Tensor], config: dict[str, Any]) -> LoadedModel:
    """Our model of a state dict, by way of files."""
    torch.save(state, directory / "model.pt")
    return load_model(f"lucidrains:{directory / 'model.pt'}", config=write_config(directory, config))


def assert_same(found: LoadedModel, expected: LoadedModel) -> None:
    """Both have the same weights, to the bit."""
    tensors = found.model.state_dict()
    assert tensors.keys() == expected.model.state_dict().keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.model.state_dict().items())


def make_feeds(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of our model. Of the masks one leaves out some, one nothing, and one everything."""
    generator = torch.Generator().manual_seed(1)
    shape = config["input_shape"]
    channels = config["dim"] if config["class"] == "PerceiverIO" else config.get("input_channels", 3)
    feeds = {"data": torch.randn(BATCH, *shape, channels, dtype=dtype, generator=generator)}
    if config.get("masked"):
        mask = (torch.rand(BATCH, math.prod(shape), generator=generator) > 0.4).int()
        mask[1], mask[2] = 1, 0
        feeds["data_mask"] = mask
    if config["class"] == "PerceiverIO":
        name = "outputs" if config.get("logits_dim") is None else "logits"
        queries = torch.randn(BATCH, config["num_queries"], config["queries_dim"], dtype=dtype, generator=generator)
        feeds[f"{name}_queries"] = queries
    return feeds


def run_lucidrains(model: Any, feeds: dict[str, Tensor]) -> Tensor:
    """lucidrains' output for our inputs."""
    data, mask = feeds["data"], feeds.get("data_mask")
    given = {} if mask is None else {"mask": mask.bool().reshape(data.shape[:-1])}
    for name, queries in feeds.items():
        if name.endswith("_queries"):
            given["queries"] = queries
    output: Tensor = model(data, **given)
    return output


def difference(config: dict[str, Any], dtype: torch.dtype) -> float:
    """Largest difference of our output from lucidrains', as a share of its scale."""
    theirs = make_lucidrains_model(config)
    with tempfile.TemporaryDirectory() as directory:
        loaded = load(Path(directory), theirs.state_dict(), config)
    ours, feeds = loaded.model.to(dtype), make_feeds(config, dtype)
    if dtype == torch.float64:
        use_float64_positions(loaded)
    with torch.no_grad():
        (found,) = ours(feeds).values()
        expected = run_lucidrains(theirs.to(dtype), feeds)
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def use_float64_positions(loaded: LoadedModel) -> None:
    """lucidrains computes positions in the precision of its data, an export in float32: here in float64."""
    ((name, one),) = loaded.config.inputs.items()
    positions = getattr(one, "positions", None)
    if isinstance(positions, FourierPositions):
        grid = grid_positions(one.shape, positions.endpoint, torch.float64)  # type: ignore[union-attr]
        table = fourier_features(grid, replace(positions, arithmetic="float64"))
        loaded.model.inputs[name].get_submodule("positions").register_buffer("table", table)


def old_names(name: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of 0.11 as perceiver-pytorch 0.8 to 0.10 wrote it: the same tensors under other names."""
    if name == "PerceiverIO":
        changes = [
            (r"^cross_attend_block\.cross_attn\.", "cross_attend_blocks.0."),
            (r"^cross_attend_block\.cross_ff\.", "cross_attend_blocks.1."),
            (r"^layers\.(\d+)\.self_attns\.0\.", r"layers.\1."),
        ]
    else:
        changes = [
            (r"^layers\.(\d+)\.cross_attn\.", r"layers.\1.0."),
            (r"^layers\.(\d+)\.cross_ff\.", r"layers.\1.1."),
            (r"^layers\.(\d+)\.self_attns\.", r"layers.\1.2."),
        ]
    renamed = {}
    for key, tensor in state.items():
        for pattern, new in changes:
            key = re.sub(pattern, new, key)
        renamed[key] = tensor
    return renamed
