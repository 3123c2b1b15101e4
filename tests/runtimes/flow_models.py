# SPDX-License-Identifier: Apache-2.0
"""Made-up models of optical flow whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.preprocessing import FlowPreprocessing
from perceiver_export.runtimes.tasks.optical_flow import OpticalFlow

Array = npt.NDArray[Any]


class Fake:
    """A graph made of a function of its feeds; counts calls."""

    def __init__(self, part: Part, function: Callable[[dict[str, Array]], dict[str, Array]]) -> None:
        self.inputs, self.outputs, self.function = part.inputs, part.outputs, function
        self.calls: list[dict[str, Array]] = []
        self.closed = False

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        for spec in self.inputs:
            array = feeds[spec.name]
            assert array.dtype == np.dtype(spec.dtype)
            for size, found in zip(spec.shape, array.shape, strict=True):
                least, most = spec.ranges[size] if isinstance(size, str) else (size, size)
                assert least <= found <= most, spec.name
        assert feeds.keys() == {spec.name for spec in self.inputs}
        self.calls.append(dict(feeds))
        return self.function(dict(feeds))

    def describe(self) -> dict[str, Any]:
        return {"engine": "fake", "version": "1", "device": "none", "precision": "fp32"}

    def close(self) -> None:
        self.closed = True


def manifest(tile: tuple[int, int], batch: int | str = 1, split: bool = False, overlap: int = 4) -> Manifest:
    def spec(name: str, dtype: Any, *shape: int) -> TensorSpec:
        return TensorSpec(name, dtype, (batch, *shape), ranges={} if isinstance(batch, int) else {batch: (2, 3)})

    frames, flow = spec("frames", "float32", 2, 3, *tile), spec("flow", "float32", *tile, 2)
    latents, queries = spec("latents", "float32", 1, 2), spec("queries", "int32", 50)
    parts = {"model": Part("model.onnx", (frames,), (flow,))}
    if split:
        decoder = Part("d.onnx", (latents, frames, queries), (spec("flow", "float32", 50, 2),))
        parts = {
            "encoder": Part("e.onnx", (frames,), (latents,)),
            "decoder": msgspec.structs.replace(decoder, num_queries=tile[0] * tile[1]),
        }
    return Manifest(
        1, "fake", "optical-flow", "deepmind", "", {}, parts, FlowPreprocessing(*tile, overlap), (), "float32", (),
        {}, {}, outputs=(flow,) if split else (),
    )  # fmt: skip


def latents_of(feeds: dict[str, Array]) -> dict[str, Array]:
    """Something that depends on the whole tile."""
    return {"latents": feeds["frames"].mean(axis=(3, 4))[:, None, :, 0]}


def all_pixels(feeds: dict[str, Array]) -> dict[str, Array]:
    """(B, h, w, 2): red of both frames, and the latents."""
    red = feeds["frames"][:, :, 0].transpose(0, 2, 3, 1)
    return {"flow": red * 3 + latents_of(feeds)["latents"][:, :, None]}


def some_pixels(feeds: dict[str, Array]) -> dict[str, Array]:
    every = all_pixels({"frames": feeds["frames"]})["flow"].reshape(len(feeds["frames"]), -1, 2)
    np.testing.assert_array_equal(feeds["latents"], latents_of(feeds)["latents"])
    return {"flow": np.take_along_axis(every, feeds["queries"][:, :, None], axis=1)}


def open_fake(described: Manifest) -> tuple[OpticalFlow, dict[str | None, Fake]]:
    OpticalFlow.check(described)
    functions = {"encoder": latents_of, "decoder": some_pixels}
    fakes: dict[str | None, Fake] = {
        name: Fake(part, functions.get(name, all_pixels)) for name, part in described.parts.items()
    }
    frames = next(iter(described.parts.values())).inputs
    outputs = described.outputs or described.parts["model"].outputs
    fakes[None] = Fake(Part("", frames, outputs), all_pixels)
    return OpticalFlow(described, lambda name: fakes[name]), fakes  # type: ignore[arg-type, return-value]


def picture(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
