# SPDX-License-Identifier: Apache-2.0
"""What DeepMind's own code computed (`tests/vectors`), and our models of the same pickles.

Every folder with a config.json and a params.npz is a model; where they are searched, `tests.vector_folders` says.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from perceiver_export.exporter import load_model
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model.config import PerceiverConfig
from perceiver_export.exporter.model.perceiver import PerceiverIO
from tests.vector_folders import vector_folders

Array = npt.NDArray[Any]
Change = Callable[[PerceiverConfig], PerceiverConfig]


def model_folders() -> list[Path]:
    """Every reference model, those of `tests/vectors` first."""
    return [folder for folder in vector_folders("params.npz") if (folder / "config.json").is_file()]


def function_folders() -> list[Path]:
    """Every folder of values of single functions."""
    return vector_folders("cases.json")


@functools.cache
def facts(folder: Path) -> dict[str, Any]:
    """config.json: all sizes and flags."""
    content: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return content


@functools.cache
def arrays(folder: Path, file: str = "io.npz") -> dict[str, Array]:
    """What was recorded: ``in/…``, ``mid/…`` and ``out/…``."""
    with np.load(folder / file) as content:
        return dict(content)


def tolerance(folder: Path, key: str) -> float:
    """Largest difference allowed in float32: five times that of DeepMind's own float32 from its float64, plus 1e-6.

    It is what the vectors' README suggests; every single mistake that it lists is at least four times above.
    """
    noise = json.loads((folder.parent / "f64.json").read_text(encoding="utf-8"))
    return float(5 * noise[folder.name][key]["f32_vs_f64"] + 1e-6)


def flags(folder: Path) -> dict[str, Any]:
    """Of config.json what no parameter's shape tells, as our loader wants it."""
    config = facts(folder)
    encoder, decoder, inputs = config["encoder"], config["decoder"], config["preprocessor"]
    common = {
        "num_blocks": encoder["num_blocks"],
        "num_cross_attention_heads": encoder["num_cross_attend_heads"],
        "num_self_attention_heads": encoder["num_self_attend_heads"],
        "num_decoder_heads": decoder["num_heads"],
    }
    name = config["name"]
    if name == "optical_flow":
        assert inputs["max_resolution"] == inputs["train_size"]
        return {**common, "train_size": inputs["train_size"], "min_overlap": config["tiling"]["min_overlap"]}
    if name == "imagenet_learned":
        return {**common, "image_size": inputs["image_size"]}
    if name.startswith("imagenet"):
        return {**common, "image_size": inputs["image_size"], "max_resolution": inputs["max_resolution"]}
    if name == "video_autoencoding":
        for kind in ("audio", "image"):
            assert inputs[kind]["max_resolution"] == decoder[kind]["max_resolution"]
        return {
            **common,
            "num_frames": inputs["image"]["num_frames"],
            "image_size": inputs["image"]["image_size"],
            "spatial_patch": inputs["image"]["spatial_downsample"],
            "num_samples": inputs["audio"]["num_samples"],
            "image_resolution": inputs["image"]["max_resolution"],
            "audio_resolution": inputs["audio"]["max_resolution"][0],
        }
    return common


def load(folder: Path, image_size: tuple[int, int] | None = None, parity: str | None = None) -> LoadedModel:
    """The folder's pickle, loaded as a user loads one whose sizes differ from the released model's."""
    shape = {"image": (3, *image_size)} if image_size is not None else {}
    with tempfile.TemporaryDirectory() as directory:
        sizes = Path(directory) / "sizes.json"
        sizes.write_text(json.dumps(flags(folder)), encoding="utf-8")
        source = f"deepmind:{facts(folder)['name']}:{folder / 'checkpoint.pickle'}"
        return load_model(source, config=sizes, shape=shape, parity=parity)


@contextlib.contextmanager
def precision(dtype: torch.dtype) -> Iterator[None]:
    """Models are built, and their position tables computed, in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def changed(model: PerceiverIO, change: Change) -> PerceiverIO:
    """The same parameters under another config."""
    other = PerceiverIO(change(model.config))
    other.load_state_dict(model.state_dict())
    return other.eval()
