# SPDX-License-Identifier: Apache-2.0
"""Hugging Face directories of any class of your installed transformers, with example inputs made from config.json.

The checkpoint's code never runs: a config that names code of its own, or a kernel to download, is refused.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from perceiver_export.exporter.checkpoints.huggingface_config import read_labels
from perceiver_export.exporter.checkpoints.origins import refuse_other_directories
from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing, image_shape, read_preprocessor
from perceiver_export.exporter.checkpoints.weights import SHARDED, read_index, read_object
from perceiver_export.exporter.own import OwnModel
from perceiver_export.exporter.trace import quiet
from perceiver_export.runtimes.errors import (
    CheckpointError,
    MissingDependencyError,
    UnsupportedModelError,
    UsageError,
    first_line,
)

Shape = Mapping[str, tuple[int, ...]]
_LONGEST_TEXT, _LONGEST_SIDE = 512, 1 << 13  # tokens, pixels
_PER_TOKEN = ("attention_mask", "token_type_ids")
_RGB = 3
_CLASSIFIERS = tuple(f"For{what}Classification" for what in ("Image", "Sequence", "Audio", "Video"))
_ELSEWHERE = ("auto_map", "configuration_files", "quantization_config", "transformers_weights")
_FUNCTION = "return (model, inputs) from a function of your own, and export module:function"


class ImageClassifier(nn.Module):
    """A classifier of transformers as `image` (B, 3, H, W) -> `logits` (B, labels)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        return {"logits": self.model(pixel_values=image).logits}


def load_installed(directory: Path, task: str | None, shape: Shape) -> tuple[OwnModel, tuple[str, ...]]:
    """The model of a Hugging Face directory as the installed transformers builds it, and notes, first its class.

    ``shape`` gives sizes of inputs, without the batch, that the config lacks, or overrides them. A class
    `…ForImageClassification` with the settings of an image processor becomes an image classifier, unless ``task`` is
    "arrays". Any other model takes and returns arrays.

    Raises MissingDependencyError; CheckpointError: unreadable, or tensors are missing; UnsupportedModelError: an
    unknown class, a config that needs code from elsewhere; UsageError: no example inputs can be made.
    """
    refuse_other_directories(directory)
    path = directory / "config.json"
    config = read_object(path, "a Hugging Face directory: config.json and weights")
    for name in _from_elsewhere(config):
        raise UnsupportedModelError(f"{path} has {name}, which may take code or weights from elsewhere", _FUNCTION)
    for index in filter(Path.is_file, (directory / name for name in SHARDED)):
        read_index(index)  # transformers opens any path that it names
    model, note = _loaded(directory, _class(path, config))
    name, processor = type(model).__name__, read_preprocessor(directory)
    named: dict[str, Any] = {}
    notes: tuple[str, ...] = (note,)
    if name.endswith(_CLASSIFIERS):
        labels = read_labels(config.get("id2label"), config.get("num_labels"), config.get("problem_type"), str(path))
        named = {"labels": labels.names, "output_kinds": {"logits": labels.kind}}
        notes += labels.notes
    if task == "arrays" or not (name.endswith("ForImageClassification") and processor):
        return OwnModel(model, _inputs(model, processor, shape), **named), notes
    if others := shape.keys() - {"image", "pixel_values"}:
        raise UsageError(f"--shape names {min(others)!r}, but this classifier takes image", "leave it out")
    given = {"pixel_values" if one == "image" else one: size for one, size in shape.items()}
    (image,) = _inputs(model, processor, given).values()
    try:
        steps = image_preprocessing(processor, *image.shape[-2:])
    except UnsupportedModelError as error:
        raise UnsupportedModelError(error.message, f"{error.hint}: --task arrays") from error
    classifier, task = ImageClassifier(model), "image-classification"
    return OwnModel(classifier, {"image": image}, task=task, preprocessing=steps, **named), notes


def _from_elsewhere(config: object) -> Iterator[str]:
    """Fields, at any depth, that make transformers run code that is not its own, or read other files."""
    if isinstance(config, dict):
        for name, value in config.items():
            chosen = value.values() if isinstance(value, dict) else [value]
            kernels = name.endswith(("_implementation", "_implementation_internal"))
            kernels = kernels and any(one not in (None, "eager", "sdpa") for one in chosen)  # others may be the hub's
            # timm's `hf-hub:`
            remote = name in ("architecture", "backbone") and isinstance(value, str) and ":" in value
            if kernels or remote or (value and name in _ELSEWHERE):
                yield name
            yield from _from_elsewhere(value)
    elif isinstance(config, list):
        for one in config:
            yield from _from_elsewhere(one)


def _class(path: Path, config: Mapping[str, Any]) -> Any:
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else ""
    try:
        import transformers

        found = getattr(transformers, name, None)
    except ImportError as error:
        raise MissingDependencyError(
            f"--use-transformers needs {name or 'transformers'}, which cannot be imported: {first_line(error)}",
            "pip install transformers",
        ) from error
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"{path} names the class {name!r}, which transformers {transformers.__version__} does not have",
            f"install the version that has it, or {_FUNCTION}",
        )
    return found


def _loaded(directory: Path, kind: Any) -> tuple[Any, str]:
    """The model in float32, without its cache of keys and values."""
    import transformers

    try:
        with quiet():
            model, found = kind.from_pretrained(
                directory,
                local_files_only=True,
                trust_remote_code=False,
                attn_implementation="eager",
                dtype=torch.float32,
                output_loading_info=True,
            )
    except Exception as error:  # transformers, on files that it did not write
        raise CheckpointError(
            f"transformers {transformers.__version__} cannot load {directory} as {kind.__name__}: {first_line(error)}",
            f"check it: {kind.__name__}.from_pretrained({str(directory)!r})",
        ) from error
    if missing := sorted(found["missing_keys"]):
        raise CheckpointError(
            f"{directory} lacks {len(missing)} tensors of {kind.__name__}, for example {missing[0]!r}",
            "set `architectures` to the class that was trained",
        )
    for one in model.modules():
        if isinstance(one, transformers.PreTrainedModel):
            one.config.use_cache = False
    return model, f"built by {kind.__name__} of transformers {transformers.__version__}"


def _inputs(model: Any, processor: dict[str, Any], shape: Shape) -> dict[str, Tensor]:
    """One random sample for each argument whose size is given or follows from the config, in forward's order."""
    takes = inspect.signature(model.forward).parameters
    for name in shape:
        if name not in takes:
            raise UsageError(
                f"--shape names {name!r}, which {type(model).__name__} does not take", f"use one of {', '.join(takes)}"
            )
    sizes = {**_sizes(model.config, processor), **shape}
    if "input_ids" in sizes and "input_ids" in takes:
        sizes = {**dict.fromkeys(_PER_TOKEN, sizes["input_ids"]), **sizes}
    main = model.main_input_name
    if main not in sizes:
        size = "3x224x224" if main == "pixel_values" else "128x64"
        raise UsageError(
            f"config.json does not say how large {main!r} of {type(model).__name__} is",
            f"give its size without the batch, for example --shape {main}={size}",
        )
    text = text_config(model.config)
    kinds = getattr(text, "type_vocab_size", 0)
    generator = torch.Generator().manual_seed(0)

    def sample(name: str) -> Tensor:
        size = (1, *sizes[name])
        if name.endswith("_mask"):
            return torch.ones(size, dtype=torch.int64)
        if name.endswith("_ids"):
            return torch.randint(
                kinds if name == "token_type_ids" else getattr(text, "vocab_size", 2), size, generator=generator
            )
        return torch.randn(size, generator=generator)

    return {name: sample(name) for name in takes if name in sizes and (kinds or name != "token_type_ids")}


def _sizes(config: Any, processor: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Sizes of images and texts, without the batch, where the config or the image processor gives them."""
    sizes: dict[str, tuple[int, ...]] = {}
    vision = getattr(config, "vision_config", config)
    side = getattr(vision, "image_size", None)
    sides = [side.get("height"), side.get("width")] if isinstance(side, dict) else side
    size = (getattr(vision, "num_channels", _RGB), *(sides if isinstance(sides, (list, tuple)) else (side, side)))
    if len(size) == 3 and all(isinstance(one, int) and 0 < one <= _LONGEST_SIDE for one in size):
        sizes["pixel_values"] = size
    elif processor:
        with contextlib.suppress(UnsupportedModelError):  # then the user must give the size
            found = image_shape(processor)
            sizes |= {} if found is None else {"pixel_values": (_RGB, *found)}
    length = getattr(text_config(config), "max_position_embeddings", None)
    if isinstance(length, int) and length > 0:
        sizes["input_ids"] = (min(length, _LONGEST_TEXT),)
    return sizes


def text_config(config: Any) -> Any:
    """The config of the text model; of several, the one that reads `input_ids`."""
    try:
        return config.get_text_config()
    except ValueError:
        return config.get_text_config(encoder=True)
