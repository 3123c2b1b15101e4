# SPDX-License-Identifier: Apache-2.0
"""Models of optical flow with known answers."""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.manifest import Manifest, Part
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.runtime import Feeds
from perceiver_export.runtimes.tasks.flow import OpticalFlow
from tests.runtimes import models
from tests.runtimes.models import opened, spec
from tests.runtimes.numpy_engine import NumpyEngine

Array = npt.NDArray[Any]


def manifest(tile: tuple[int, int], batch: int | str = 1, split: bool = False, overlap: int = 4) -> Manifest:
    ranges = {} if isinstance(batch, int) else {batch: (2, 3)}
    frames, flow = spec("frames", batch, 2, 3, *tile, **ranges), spec("flow", batch, *tile, 2, **ranges)
    latents, queries = spec("latents", batch, 1, 2, **ranges), spec("queries", batch, 50, dtype="int32", **ranges)
    parts = {"model": Part("model.onnx", (frames,), (flow,))}
    if split:
        decoder = Part("d.onnx", (latents, frames, queries), (spec("flow", batch, 50, 2, **ranges),))
        parts = {
            "encoder": Part("e.onnx", (frames,), (latents,)),
            "decoder": msgspec.structs.replace(decoder, num_queries=tile[0] * tile[1]),
        }
    steps = FlowPreprocessing(*tile, overlap)
    return models.manifest("optical-flow", parts, steps, outputs=(flow,) if split else ())


def latents_of(feeds: Feeds) -> dict[str, Array]:
    """Something that depends on the whole tile."""
    return {"latents": feeds["frames"].mean(axis=(3, 4))[:, None, :, 0]}


def all_pixels(feeds: Feeds) -> dict[str, Array]:
    """(B, h, w, 2): red of both frames, and the latents."""
    red = feeds["frames"][:, :, 0].transpose(0, 2, 3, 1)
    return {"flow": red * 3 + latents_of(feeds)["latents"][:, :, None]}


def some_pixels(feeds: Feeds) -> dict[str, Array]:
    every = all_pixels({"frames": feeds["frames"]})["flow"].reshape(len(feeds["frames"]), -1, 2)
    np.testing.assert_array_equal(feeds["latents"], latents_of(feeds)["latents"])
    return {"flow": np.take_along_axis(every, feeds["queries"][:, :, None], axis=1)}


def open_fake(described: Manifest) -> tuple[OpticalFlow, dict[str, NumpyEngine]]:
    functions = {"encoder": latents_of, "decoder": some_pixels}
    engines = {
        name: NumpyEngine(functions.get(name, all_pixels), part.inputs, part.outputs)
        for name, part in described.parts.items()
    }
    frames = next(iter(described.parts.values())).inputs
    outputs = described.outputs or described.parts["model"].outputs
    engines["whole"] = NumpyEngine(all_pixels, frames, outputs)
    return opened(OpticalFlow, described, engines), engines


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
