# SPDX-License-Identifier: Apache-2.0
"""Manifests of every kind of model that DATA is read for; nothing of them runs."""

from __future__ import annotations

from perceiver_export.runtimes.manifest import FileEntry, Manifest, OutputKind, Part, TensorSpec
from perceiver_export.runtimes.preprocessing import (
    FlowPreprocessing,
    ImagePreprocessing,
    Normalize,
    Preprocessing,
    Rescale,
    Resize,
    TextPreprocessing,
    VideoPreprocessing,
)

TOKENS = TensorSpec("tokens", "int32", (1, 32), values=(0, 261))
TOKENS_MASK = TensorSpec("tokens_mask", "int32", (1, 32), values=(0, 1))
ANIMALS = ("cat", "dog", "T-shirt/top")


def spec(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", (1, *shape))


def manifest(
    task: str,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing | None = None,
    labels: tuple[str, ...] = (),
    kinds: dict[str, OutputKind] | None = None,
) -> Manifest:
    part = Part("model.onnx", inputs, outputs)
    return Manifest(
        *(2, "m", task, "own", "", {}, {"model": part}, preprocessing, labels, "fp32", (), {}),
        {"model.onnx": FileEntry("", 1)},
        output_kinds=kinds or {},
    )


def judged(kind: OutputKind, labels: tuple[str, ...] = (), *shape: int) -> Manifest:
    """A model of rows ``x`` (4,) with one output of that kind."""
    return manifest("arrays", (spec("x", 4),), (spec("scores", *shape),), None, labels, {"scores": kind})


_VALUES = (Rescale(1 / 255), Normalize((0.5,) * 3, (0.25,) * 3))
_STEPS = ImagePreprocessing(28, 28, (Resize(28, 28, "bilinear"), *_VALUES))
_TEXT = TextPreprocessing(32, special_tokens=True)
images = manifest("image-classification", (spec("image", 3, 28, 28),), (spec("logits", 3),), _STEPS, ANIMALS)
texts = manifest("text-classification", (TOKENS, TOKENS_MASK), (spec("logits", 2),), _TEXT, ("bad", "good"))
language = manifest("fill-mask", (TOKENS, TOKENS_MASK), (spec("logits", 32, 262),), _TEXT)
flow = manifest(
    "optical-flow", (spec("frames", 2, 3, 16, 24),), (spec("flow", 16, 24, 2),), FlowPreprocessing(16, 24, 4)
)
video = manifest(
    "video-autoencoding",
    (spec("frames", 2, 16, 16, 3), spec("audio", 480, 1)),
    (spec("video", 2, 16, 16, 3), spec("sound", 480, 1), spec("label", 1, 5)),
    VideoPreprocessing(2, 16, 16, 480, 48_000),
)
sets = manifest(
    "sets",
    (spec("entities", 12, 16), TensorSpec("entities_mask", "int32", (1, 12), values=(0, 1))),
    (spec("outputs", 12, 8),),
)
points = manifest("point-cloud-classification", (spec("points", 20, 3),), (spec("logits", 4),), None, tuple("abcd"))
