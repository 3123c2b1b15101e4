# SPDX-License-Identifier: Apache-2.0
"""DeepMind's Haiku pickles of the six released models, without jax, Haiku, or anything in the file being executed."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.haiku_config import (
    Flags,
    FlowFlags,
    ImageFlags,
    LanguageFlags,
    architecture,
    read_flags,
    trained_image_size,
)
from perceiver_export.exporter.checkpoints.haiku_names import HaikuModel, haiku_sources, ignored_names, released_model
from perceiver_export.exporter.checkpoints.haiku_pickle import read_haiku
from perceiver_export.exporter.checkpoints.preprocessor import as_deepmind, image_preprocessing
from perceiver_export.exporter.checkpoints.weights import load_model_state
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.model.config import (
    ImageInput,
    PerceiverConfig,
    QueryDecoder,
    TokenInput,
)
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.runtimes.errors import CheckpointError, UsageError
from perceiver_export.runtimes.preprocessing import (
    FlowPreprocessing,
    Preprocessing,
    TextPreprocessing,
    VideoPreprocessing,
)

_TASKS: dict[HaikuModel, str] = {
    "language": "fill-mask",
    "imagenet-learned": "image-classification",
    "imagenet-fourier": "image-classification",
    "imagenet-conv": "image-classification",
    "optical-flow": "optical-flow",
    "video-autoencoding": "video-autoencoding",
}
# The models by their own names, by those of DeepMind's notebooks, and by their task.
_NAMES: dict[str, HaikuModel] = {
    **{model: model for model in _TASKS},
    "fill-mask": "language",
    "masked-language-modelling": "language",
    "imagenet-learned-position-encoding": "imagenet-learned",
    "imagenet-fourier-position-encoding": "imagenet-fourier",
    "imagenet-conv-preprocessing": "imagenet-conv",
}


def load_haiku(
    spec: str,
    parity: Literal["deepmind", "huggingface"] = "deepmind",
    config: Path | None = None,
    image_shape: tuple[int, int, int] | None = None,
) -> LoadedModel:
    """The model of a Haiku pickle with its weights. ``spec`` is TASK:FILE, e.g. ``optical-flow:flow.pystate``.

    ``config`` is a JSON file of what no parameter's shape tells (`haiku_config`), where the checkpoint differs from
    the released one. ``image_shape`` (channels, height, width) is the picture that an image classifier will see.
    With ``parity`` "huggingface" the weights are run with transformers' numerics.

    Raises CheckpointError (unreadable, or parameters of another model), UsageError.
    """
    model, path = _parse(spec)
    if image_shape is not None and _TASKS[model] != "image-classification":
        raise UsageError(f"the input sizes of {model} are those that it was trained with", "leave --shape out")
    flags = read_flags(model, config)
    checkpoint = read_haiku(path)
    found = released_model(checkpoint.params)
    if found is not None and found != model:
        raise CheckpointError(f"{path} holds a model of {found}, not of {model}", f"give deepmind:{found}:{path}")
    state = {name: torch.from_numpy(array) for name, array in {**checkpoint.params, **checkpoint.state}.items()}
    network = load_haiku_state(model, state, flags, parity, image_shape)
    return LoadedModel(
        model=network,
        config=network.config,
        task=_TASKS[model],
        parity=parity,
        source=path.name,
        labels=_labels(network.config),
        preprocessing=_preprocessing(network.config, flags, parity),
        split=model == "video-autoencoding",
        notes=_notes(model, state, flags, network.config),
    )


def load_haiku_state(
    model: HaikuModel,
    state: Mapping[str, Tensor],
    flags: Flags,
    parity: Literal["deepmind", "huggingface"] = "deepmind",
    image_shape: tuple[int, int, int] | None = None,
) -> PerceiverIO:
    """The model of parameters and state by Haiku's names. Raises CheckpointError where they are not of one model."""
    sizes = architecture(model, _shapes(state), flags, parity, image_shape)
    sources = haiku_sources(model, swap_kernel=parity == "huggingface")
    return load_model_state(sizes, state, sources, ignored=ignored_names(state))


def _parse(spec: str) -> tuple[HaikuModel, Path]:
    name, _, file = spec.partition(":")
    plain = name.lower().replace("_", "-")
    model = _NAMES.get(plain)
    if model is None:
        near = difflib.get_close_matches(plain, _NAMES, n=1)
        tasks = f"give deepmind:TASK:FILE, TASK one of {', '.join(_TASKS)}"
        raise UsageError(f"there is no released model {name!r}", (f"did you mean {near[0]}? " if near else "") + tasks)
    if not file:
        raise UsageError("no checkpoint file is given", f"give deepmind:{model}:FILE")
    return model, Path(file)


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _labels(config: PerceiverConfig) -> tuple[str, ...]:
    """LABEL_i for each class, where there are classes: pickles name none."""
    assert isinstance(config.decoder, QueryDecoder)
    outputs = config.decoder.outputs
    if "label" in outputs:
        count = outputs["label"].num_channels
    else:
        count = config.decoder.num_output_channels if "image" in config.inputs else 0
    return tuple(f"LABEL_{index}" for index in range(count))


def _preprocessing(config: PerceiverConfig, flags: Flags, parity: str) -> Preprocessing:
    if isinstance(flags, ImageFlags):
        image = config.inputs["image"]
        assert isinstance(image, ImageInput)
        steps = image_preprocessing({}, image.height, image.width)
        return as_deepmind(steps) if parity == "deepmind" else steps
    if isinstance(flags, LanguageFlags):
        tokens = config.inputs["tokens"]
        assert isinstance(tokens, TokenInput)
        return TextPreprocessing(tokens.length, special_tokens=parity == "huggingface")
    if isinstance(flags, FlowFlags):
        if flags.min_overlap is None:
            return FlowPreprocessing.of_tile(*flags.train_size)
        return FlowPreprocessing(*flags.train_size, flags.min_overlap)
    return VideoPreprocessing(flags.num_frames, *flags.image_size, flags.num_samples, flags.sample_rate)


def _notes(model: HaikuModel, state: Mapping[str, Tensor], flags: Flags, config: PerceiverConfig) -> tuple[str, ...]:
    """What the checkpoint did not say, and what was taken instead."""
    notes = []
    image = config.inputs.get("image")
    if isinstance(image, ImageInput) and isinstance(flags, ImageFlags):
        trained = trained_image_size(model, _shapes(state), flags)
        if (image.height, image.width) != trained:
            notes.append(
                f"pictures of {image.height} × {image.width}, where the model was trained on {trained[0]} ×"
                f" {trained[1]}: its accuracy there is another; measure it with `validate`"
            )
    if _labels(config):
        notes.append("Haiku's pickles name no labels: they are LABEL_0, LABEL_1, …")
    return tuple(notes)
