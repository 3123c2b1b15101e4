# SPDX-License-Identifier: Apache-2.0
"""SOURCE -> torch model: a Hugging Face directory, or ``preset:NAME`` with random weights."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from perceiver_export.exporter.checkpoints.preprocessor import MAX_SIDE, image_preprocessing
from perceiver_export.exporter.perceiver.config import PerceiverConfig
from perceiver_export.exporter.presets import PRESETS
from perceiver_export.runtimes.errors import CheckpointError, MissingDependencyError, UnsupportedModelError, UsageError
from perceiver_export.runtimes.manifest import ImagePreprocessing
from perceiver_export.runtimes.runtime import Array

if TYPE_CHECKING:
    from perceiver_export.exporter.perceiver.model import PerceiverIO

Parity = Literal["huggingface", "deepmind"]
TASK = "image-classification"


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with all that the bundle says about it. ``parity``: whose numerics it follows."""

    model: PerceiverIO
    config: PerceiverConfig
    task: str
    parity: Parity
    source: str
    labels: tuple[str, ...]
    preprocessing: ImagePreprocessing
    notes: tuple[str, ...] = ()

    def run(self, inputs: Array) -> Array:
        """Logits (n, labels) of preprocessed inputs (n, channels, height, width), in torch: a reference to judge by."""
        import torch

        with torch.inference_mode():
            logits: Array = self.model(torch.from_numpy(inputs)).numpy()
        return logits


def load_model(
    source: str | os.PathLike[str],
    *,
    task: str | None = None,
    parity: str | None = None,
    shape: Mapping[str, tuple[int, ...]] | None = None,
) -> LoadedModel:
    """Load a checkpoint for export.

    ``shape`` maps the input's name to its size without the batch, e.g. ``{"image": (3, 224, 224)}``.

    Raises CheckpointError, UnsupportedModelError, UsageError, MissingDependencyError.
    """
    _need_torch()
    if task not in (None, TASK):
        raise UnsupportedModelError(f"unknown task {task!r}", f"this version exports: {TASK}")
    if parity not in (None, "huggingface"):
        raise UnsupportedModelError(f"parity {parity!r} is not there yet", "this version follows: huggingface")
    image_shape = _image_shape(shape or {})
    text = os.fspath(source)
    if text.startswith("preset:"):
        return _preset(text.removeprefix("preset:"), image_shape)
    return _huggingface(Path(text), image_shape)


def _preset(name: str, image_shape: tuple[int, int, int] | None) -> LoadedModel:
    import torch

    from perceiver_export.exporter.perceiver.model import PerceiverIO

    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        raise UsageError(
            f"there is no preset {name!r}", f"did you mean {near[0]}?" if near else f"presets: {', '.join(PRESETS)}"
        )
    config = PRESETS[name]
    if image_shape is not None:
        channels, height, width = image_shape
        if channels != config.input.num_channels:
            raise UsageError(f"preset {name} reads 3 channels, not {channels}", "give --shape image=3xHxW")
        config = msgspec.structs.replace(
            config, input=msgspec.structs.replace(config.input, height=height, width=width)
        )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = PerceiverIO(config).eval()
    return LoadedModel(
        model=model,
        config=config,
        task=TASK,
        parity="huggingface",
        source=f"preset:{name} (random weights)",
        labels=tuple(f"LABEL_{i}" for i in range(config.decoder.num_output_channels)),
        preprocessing=image_preprocessing({}, config.input.height, config.input.width),
    )


def _huggingface(directory: Path, image_shape: tuple[int, int, int] | None) -> LoadedModel:
    from perceiver_export.exporter.checkpoints.huggingface import load_huggingface, read_preprocessor

    if not directory.is_dir():
        looks_like_hub_id = directory.parts and len(directory.parts) <= 2 and not directory.suffix
        raise CheckpointError(
            f"{directory} is not a directory",
            f"if it is a hub id, download it first: hf download {directory} --local-dir {directory.name}"
            if looks_like_hub_id and not directory.exists()
            else "give a Hugging Face directory (config.json and weights) or preset:NAME",
        )
    model, labels = load_huggingface(directory, image_shape)
    config, processor = model.config, read_preprocessor(directory)
    return LoadedModel(
        model=model,
        config=config,
        task=TASK,
        parity="huggingface",
        source=directory.resolve().name,
        labels=labels,
        preprocessing=image_preprocessing(processor, config.input.height, config.input.width),
        notes=_notes(directory, model, image_shape, bool(processor), labels),
    )


def _notes(
    directory: Path,
    model: PerceiverIO,
    image_shape: tuple[int, int, int] | None,
    has_processor: bool,
    labels: tuple[str, ...],
) -> tuple[str, ...]:
    """What the checkpoint did not say, and what was taken instead."""
    from perceiver_export.exporter.checkpoints.huggingface import default_image_shape, read_config

    notes = []
    image = model.config.input
    if not has_processor:
        notes.append(
            f"no preprocessor_config.json: pictures of {image.height} × {image.width}, cropped and normalised as for"
            " ImageNet, are assumed; a model trained otherwise will be wrong"
        )
    usual = default_image_shape(read_config(directory), directory)
    if image_shape is not None and image_shape != usual:
        notes.append(
            f"pictures of {image.height} × {image.width}, where the checkpoint says {usual[1]} × {usual[2]}:"
            " its accuracy there is another; measure it with `validate`"
        )
    if all(label == f"LABEL_{index}" for index, label in enumerate(labels)):
        notes.append("config.json names no labels: they are LABEL_0, LABEL_1, …")
    return tuple(notes)


def _image_shape(shape: Mapping[str, tuple[int, ...]]) -> tuple[int, int, int] | None:
    for name in shape:
        if name != "image":
            raise UsageError(f"there is no input {name!r}", "this model's input is `image`: --shape image=3x224x224")
    if "image" not in shape:
        return None
    sizes = shape["image"]
    if len(sizes) != 3 or not 1 <= min(sizes) <= max(sizes) <= MAX_SIDE:
        raise UsageError(
            f"the shape of `image` is {list(sizes)}", "give channels, height, width: --shape image=3x224x224"
        )
    return sizes[0], sizes[1], sizes[2]


def _need_torch() -> None:
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"export needs {error.name}, which is not installed", "pip install 'perceiver-export[export]'"
        ) from error
