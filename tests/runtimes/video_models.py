# SPDX-License-Identifier: Apache-2.0
"""Made-up models of video and sound whose answers are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from perceiver_export.runtimes.manifest import Manifest, Part, TensorSpec
from perceiver_export.runtimes.preprocessing import VideoPreprocessing
from perceiver_export.runtimes.runtime import Array, Feeds
from perceiver_export.runtimes.tasks.video import VideoAutoencoding
from tests.runtimes import models
from tests.runtimes.models import opened, spec
from tests.runtimes.numpy_engine import NumpyEngine

T, H, W, SAMPLES, PATCH, LABELS = 3, 4, 5, 24, 8, 6


RATE = 48000


FRAMES = np.random.default_rng(0).integers(0, 256, (T + 2, 9, 7, 3), dtype=np.uint8)


SOUND = (np.random.default_rng(1).random(SAMPLES + 10) * 2 - 1).astype(np.float32)


def manifest(parts: dict[str, Part] | NumpyEngine, outputs: tuple[TensorSpec, ...] = (), **changes: Any) -> Manifest:
    given = {"preprocessing": VideoPreprocessing(T, H, W, SAMPLES, RATE), **changes}
    return models.manifest("video-autoencoding", parts, outputs=outputs, **given)


def interface(batch: int | str, **ranges: tuple[int, int]) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    inputs = (spec("frames", batch, T, H, W, 3, **ranges), spec("audio", batch, SAMPLES, 1, **ranges))
    outputs = (
        spec("video", batch, T, H, W, 3, **ranges),
        spec("sound", batch, SAMPLES, 1, **ranges),
        spec("label", batch, LABELS, **ranges),
    )
    return inputs, outputs


def answers(feeds: Feeds) -> dict[str, Any]:
    """Twice the video minus a half leaves [0, 1]; the label's scores are fixed."""
    scores = np.tile(np.array([0, 3, 1, 5, 2, 4], np.float32), (len(feeds["frames"]), 1))
    return {"video": feeds["frames"] * 2 - 0.5, "sound": feeds["audio"] * 3, "label": scores}


def whole(batch: int | str = 1, **ranges: tuple[int, int]) -> tuple[Manifest, NumpyEngine]:
    engine = NumpyEngine(answers, *interface(batch, **ranges))
    return manifest(engine), engine


def split(batch: int = 1, queries: int | str = 7, most: int = 1000) -> tuple[Manifest, dict[str, NumpyEngine]]:
    """Latents carry both inputs; each decoder computes its rows from them."""
    (inputs, outputs), size = interface(batch), T * H * W * 3
    latents = spec("latents", batch, 1, size + SAMPLES)
    some = {"queries": (1, most)} if isinstance(queries, str) else {}
    asked = spec("queries", batch, queries, dtype="int32", **some)
    video, sound = spec("video", batch, queries, 3, **some), spec("sound", batch, queries, PATCH, **some)

    def encode(feeds: Feeds) -> dict[str, Array]:
        flat = [feeds["frames"].reshape(batch, -1), feeds["audio"].reshape(batch, -1)]
        return {"latents": np.concatenate(flat, axis=1)[:, None]}

    def rows(feeds: Feeds, begin: int, width: int, change: Callable[[Array], Array]) -> Array:
        table = change(feeds["latents"][:, 0, begin:][:, : size if begin == 0 else SAMPLES]).reshape(batch, -1, width)
        return np.stack([one[row] for one, row in zip(table, feeds["queries"], strict=True)])

    def show(feeds: Feeds) -> dict[str, Array]:
        return {"video": rows(feeds, 0, 3, lambda x: x * 2 - 0.5)}

    def hear(feeds: Feeds) -> dict[str, Array]:
        return {"sound": rows(feeds, size, PATCH, lambda x: x * 3)}

    def score(feeds: Feeds) -> dict[str, Array]:
        return {"label": answers({"frames": feeds["latents"], "audio": feeds["latents"]})["label"]}

    engines = {
        "encoder": NumpyEngine(encode, inputs, (latents,)),
        "decoder_video": NumpyEngine(show, (latents, asked), (video,)),
        "decoder_sound": NumpyEngine(hear, (latents, asked), (sound,)),
        "decoder_label": NumpyEngine(score, (latents,), (outputs[2],)),
    }
    count = {"decoder_video": T * H * W, "decoder_sound": SAMPLES // PATCH}
    parts = {
        name: Part(f"{name}.onnx", engine.inputs, engine.outputs, num_queries=count.get(name))
        for name, engine in engines.items()
    }
    return manifest(parts, outputs), engines


def task_of(described: Manifest, engines: NumpyEngine | dict[str, NumpyEngine]) -> VideoAutoencoding:
    return opened(VideoAutoencoding, described, engines)


def write_frames(directory: Path, frames: Any = FRAMES) -> Path:
    directory.mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(directory / f"f{number + 8}.png")  # f10 comes after f9, not before
    return directory
