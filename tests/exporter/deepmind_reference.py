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


def sizes(folder: Path) -> dict[str, Any]:
    """config.json as our loader wants it: what differs from the released model."""
    config = facts(folder)
    encoder, decoder, inputs = config["encoder"], config["decoder"], config["preprocessor"]
    found: dict[str, Any] = {
        "num_input_channels": encoder["input_channels"],
        "encoder": {
            "num_latents": encoder["num_latents"],
            "num_latent_channels": encoder["latent_channels"],
            "num_blocks": encoder["num_blocks"],
            "num_self_attentions_per_block": encoder["num_self_attends_per_block"],
            "cross_attention": _attention(encoder, "cross_", "cross_attend_", encoder["num_cross_attend_heads"]),
            "self_attention": _attention(encoder, "self_", "self_attend_", encoder["num_self_attend_heads"]),
        },
        "decoder": {
            "num_query_channels": decoder["query_channels"],
            "cross_attention": _attention(decoder, "", "", decoder["num_heads"]),
            "num_output_channels": decoder["output_num_channels"] or 0,
        },
    }
    kind = config["name"].partition("_")[0]
    found["inputs"], found["decoder"]["outputs"] = _INPUTS_AND_OUTPUTS[kind](inputs, decoder, config["postprocessor"])
    return found


def _attention(part: dict[str, Any], widths: str, factor: str, num_heads: int) -> dict[str, Any]:
    return {
        "num_heads": num_heads,
        "num_qk_channels": part[f"{widths}qk_channels"],
        "num_v_channels": part[f"{widths}v_channels"],
        "widening_factor": part[f"{factor}widening_factor"],
    }


Parts = tuple[dict[str, Any], dict[str, Any]]


def _image(inputs: dict[str, Any], decoder: dict[str, Any], outputs: None) -> Parts:
    height, width = inputs["image_size"]
    if inputs["position_encoding"] == "trainable":
        table = {"num_table_channels": inputs["position_channels"], "num_projected_channels": inputs["project_pos_dim"]}
        positions = {"shape": [height, width], **table}
    else:
        positions = {"num_bands": inputs["num_bands"], "max_resolution": inputs["max_resolution"]}
    features = inputs.get("conv1x1_channels", inputs.get("conv_channels", 3))
    image = {"height": height, "width": width, "num_feature_channels": features, "positions": positions}
    queries, classes = {"num_channels": decoder["query_channels"]}, [decoder["num_classes"]]
    return {"image": image}, {"logits": {"queries": queries, "shape": classes}}


def _language(inputs: dict[str, Any], decoder: dict[str, Any], outputs: dict[str, Any]) -> Parts:
    length, width, vocabulary = inputs["max_seq_len"], inputs["d_model"], inputs["vocab_size"]
    tokens = {"vocabulary_size": vocabulary, "length": length, "num_input_channels": width}
    queries = {"num_queries": length, "num_channels": width}
    return {"tokens": tokens}, {"logits": {"queries": queries, "shape": [length, vocabulary]}}


def _flow(inputs: dict[str, Any], decoder: dict[str, Any], outputs: dict[str, Any]) -> Parts:
    height, width = inputs["train_size"]
    positions = {"num_bands": inputs["num_bands"], "max_resolution": inputs["max_resolution"]}
    features = {"num_feature_channels": inputs["patches_linear_channels"], "positions": positions}
    queries = {"num_queries": decoder["num_queries"], "num_channels": decoder["query_channels"]}
    return (
        {"frames": {"height": height, "width": width, **features}},
        {"flow": {"queries": queries, "shape": [height, width, 2]}},
    )


def _video(inputs: dict[str, Any], decoder: dict[str, Any], outputs: dict[str, Any]) -> Parts:
    def fourier(part: dict[str, Any]) -> dict[str, Any]:
        return {"positions": {"num_bands": part["num_bands"], "max_resolution": part["max_resolution"]}}

    audio, image, label = (inputs[kind] for kind in ("audio", "image", "label"))
    samples, patch, side = audio["num_samples"], audio["samples_per_patch"], image["spatial_downsample"]
    shape = [image["num_frames"], *image["image_size"]]
    width = inputs["padding_channels"]["label"] + label["num_classes"]
    grids = {kind: {"shape": decoder[kind]["index_dims"], **fourier(decoder[kind])} for kind in ("audio", "image")}
    classes = label["num_classes"]
    return (
        {
            "audio": {"shape": [samples], "patch": [patch], **fourier(audio)},
            "frames": {"shape": shape, "patch": [1, side, side], **fourier(image)},
            "label": {"num_input_channels": width},
        },
        {
            "sound": {"queries": grids["audio"], "shape": [samples, 1], "num_channels": patch},
            "video": {"queries": grids["image"], "shape": [*shape, 3], "num_channels": outputs["image"]["channels"]},
            "label": {
                "queries": {"num_channels": decoder["label"]["channels"]},
                "shape": [classes],
                "num_channels": classes,
            },
        },
    )


_INPUTS_AND_OUTPUTS: dict[str, Callable[[Any, Any, Any], Parts]] = {
    "imagenet": _image,
    "language": _language,
    "optical": _flow,
    "video": _video,
}


def load(folder: Path, image_size: tuple[int, int] | None = None, parity: str | None = None) -> LoadedModel:
    """The folder's pickle, loaded as a user loads one whose sizes differ from the released model's."""
    shape = {"image": (3, *image_size)} if image_size is not None else {}
    with tempfile.TemporaryDirectory() as directory:
        config = Path(directory) / "sizes.json"
        config.write_text(json.dumps(sizes(folder)), encoding="utf-8")
        source = f"deepmind:{facts(folder)['name']}:{folder / 'checkpoint.pickle'}"
        return load_model(source, config=config, shape=shape, parity=parity)


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
