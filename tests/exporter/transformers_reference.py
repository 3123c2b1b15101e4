# SPDX-License-Identifier: Apache-2.0
"""Our models beside transformers' own, on the same inputs: shared by the tests and the parity benchmark."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver_export.exporter import load_model

from .conftest import PICTURES, make_transformers_model


def differences(kind: str, **changes: Any) -> dict[torch.dtype, float]:
    """Largest difference of our outputs from transformers', as a share of each output's scale, in each precision."""
    theirs = make_transformers_model(kind, **changes)
    with tempfile.TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        shape = {"image": (3, *PICTURES[kind])} if kind in PICTURES else {}
        ours = load_model(Path(directory), shape=shape).model
    found = {}
    for dtype in (torch.float32, torch.float64):
        feeds = make_feeds(kind, dtype)
        with torch.no_grad():
            outputs, expected = ours.to(dtype)(feeds), run_transformers(theirs.to(dtype), feeds)
        assert outputs.keys() == expected.keys()
        found[dtype] = _distance(outputs, expected)
    return found


def rounding(kind: str, **changes: Any) -> float:
    """The same of transformers' outputs in float32 from its own in float64."""
    theirs, feeds = make_transformers_model(kind, **changes), make_feeds(kind, torch.float32)
    doubles = {name: one.double() if one.is_floating_point() else one for name, one in feeds.items()}
    with torch.no_grad():
        single = run_transformers(theirs, feeds)
        return _distance(single, run_transformers(theirs.double(), doubles))


def _distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(
        float((found[name] - expected[name].reshape(found[name].shape)).abs().max() / expected[name].abs().max())
        for name in expected
    )


def make_feeds(kind: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Inputs of our models: two samples, or four texts: of two lengths, one with holes in its mask, one all masked."""
    generator = torch.Generator().manual_seed(1)
    if kind in PICTURES:
        return {"image": torch.randn(2, 3, *PICTURES[kind], dtype=dtype, generator=generator)}
    if kind == "flow":
        return {"frames": torch.randn(2, 2, 3, 11, 14, dtype=dtype, generator=generator)}
    if kind == "video":
        return {
            "audio": torch.randn(2, 144, 1, dtype=dtype, generator=generator),
            "frames": torch.rand(2, 3, 20, 20, 3, dtype=dtype, generator=generator),
        }
    length = {"language": 19, "text": 13}[kind]
    tokens = torch.randint(0, 262, (4, length), generator=generator, dtype=torch.int32)
    mask = torch.ones(4, length, dtype=torch.int32)
    mask[1, 9:] = 0
    mask[2, ::3] = 0
    mask[3] = 0
    return {"tokens": tokens, "tokens_mask": mask}


def run_transformers(model: Any, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers' outputs for our inputs, under our names; of a video all points, by their indices: without indices
    transformers fails, and its positions would be others.
    """
    if "image" in feeds:
        return {"logits": model(feeds["image"]).logits}
    if "tokens" in feeds:
        return {"logits": model(inputs=feeds["tokens"], attention_mask=feeds["tokens_mask"]).logits}
    if feeds.keys() == {"frames"}:
        return {"flow": model(patches(feeds["frames"])).logits * 20}
    frames, audio, config = feeds["frames"], feeds["audio"], model.config
    label = torch.zeros(len(frames), config.num_labels, dtype=frames.dtype)
    points = {
        "image": torch.arange(math.prod(config.output_shape)),
        "audio": torch.arange(audio.shape[1] // config.samples_per_patch),
        "label": None,
    }
    inputs = {"image": frames.permute(0, 1, 4, 2, 3), "audio": audio, "label": label}
    found = model(inputs=inputs, subsampled_output_points=points).logits
    return {"video": found["image"], "sound": found["audio"], "label": found["label"]}


def patches(frames: Tensor) -> Tensor:
    """3×3 zero-padded patches of each frame: (B, 2, 3, H, W) -> (B, 2, 27, H, W), channels fastest."""
    batch, pair, channels, height, width = frames.shape
    columns = torch.nn.functional.unfold(frames.flatten(0, 1), kernel_size=3, padding=1)
    columns = columns.reshape(batch, pair, channels, 9, height, width).transpose(2, 3)
    return columns.reshape(batch, pair, 27, height, width)
