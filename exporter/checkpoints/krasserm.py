# SPDX-License-Identifier: Apache-2.0
"""Models of krasserm/perceiver-io: its directories on the hub, and state dicts with such a config.json.

Source: perceiver-io 0.11.0 (Apache-2.0). Its numerics are transformers': the exact GELU, float32 positions.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from perceiver_export.exporter.checkpoints.huggingface_config import read_preprocessor
from perceiver_export.exporter.checkpoints.krasserm_architecture import architecture, task_of, text_length
from perceiver_export.exporter.checkpoints.krasserm_config import (
    ClassDecoder,
    ImageClassifier,
    KrassermConfig,
    KrassermModel,
    MaskedLanguageModel,
    OpticalFlow,
    read_krasserm,
)
from perceiver_export.exporter.checkpoints.krasserm_names import (
    DECODER,
    LATENTS,
    POSITIONS,
    QUERIES,
    TOKEN_POSITIONS,
    krasserm_sources,
)
from perceiver_export.exporter.checkpoints.origins import check_origin, prefixes
from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing
from perceiver_export.exporter.checkpoints.state import load_model_state
from perceiver_export.exporter.checkpoints.tensors import read_state_dict, read_state_file
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.exporter.perceiver.model import PerceiverIO
from perceiver_export.exporter.perceiver.positions import FourierPositionEncoding
from perceiver_export.runtimes.errors import CheckpointError, UsageError
from perceiver_export.runtimes.preprocessing import FlowPreprocessing, Preprocessing, TextPreprocessing

# Two machines' float32 differ by 1e-4 at high frequencies; a buffer in bfloat16 by this; other positions by 1.
_POSITION_ROUNDING = 4e-3


def load_krasserm(source: Path, config: Path | None = None) -> LoadedModel:
    """The model of a directory, or of a state dict (.pt, .bin, .safetensors), with its weights.

    ``config`` is its config.json; by default the one in the directory, or beside the file.

    Raises CheckpointError (unreadable, or config and weights that differ), UnsupportedModelError, UsageError.
    """
    directory = source if source.is_dir() else source.parent
    config = config or directory / "config.json"
    if not config.is_file() and not source.is_dir():
        if not source.exists():
            raise CheckpointError(f"{source} does not exist", "give a state dict, or a directory with config.json")
        raise UsageError(
            f"a state dict does not say its sizes, and there is no {config}",
            "give the model's config.json: --config FILE.json",
        )
    described, model = read_krasserm(config)
    state = _of_the_model(source, read_state_dict(source) if source.is_dir() else read_state_file(source))
    residual = model.decoder.cross_attention_residual
    _check_residual(state, residual)
    sizes = architecture(model)
    positions = state.pop(POSITIONS, None) if isinstance(model, (ImageClassifier, OpticalFlow)) else None
    network = load_model_state(sizes, state, krasserm_sources(residual, _shortened(model)))
    if positions is not None:
        _take_positions(network, positions)
    task = task_of(model)
    labels = described.labels(model.decoder.num_classes) if isinstance(model.decoder, ClassDecoder) else ()
    processor = _processor(config.parent)
    return LoadedModel(
        model=network,
        config=sizes,
        task=task,
        parity="huggingface",
        source=source.resolve().name,
        labels=labels,
        preprocessing=None if task == "arrays" else _preprocessing(described, model, processor),
        notes=_notes(task, described, model, processor),
    )


def _of_the_model(source: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without what stands before their names: ``model.`` of Lightning, ``backend_model.`` on the hub."""
    check_origin(source, state, "krasserm")
    prefix = prefixes(state, LATENTS)[0]
    return {name.removeprefix(prefix): tensor for name, tensor in state.items()}


def _check_residual(state: dict[str, Tensor], residual: bool) -> None:
    found = any(name.startswith(f"{DECODER}.0.module.") for name in state)
    if found != residual and any(name.startswith(f"{DECODER}.0.") for name in state):
        raise CheckpointError(
            f"cross_attention_residual of the decoder is {str(residual).lower()} in the config, the checkpoint is of "
            f"a model {'with' if found else 'without'} it",
            f"set it to {str(found).lower()}",
        )


def _shortened(model: KrassermModel) -> dict[str, Callable[[Tensor], Tensor]]:
    """How positions and queries of a language model are cut to the shorter of both: longer texts it cannot read."""
    if not isinstance(model, MaskedLanguageModel):
        return {}
    length = text_length(model)

    def cut(whole: int) -> Callable[[Tensor], Tensor]:
        def rows(table: Tensor) -> Tensor:
            if table.shape[:1] != (whole,):
                raise ValueError("another number of rows than the config says")  # `load_model_state` tells
            return table[:length]

        return rows

    return {TOKEN_POSITIONS: cut(model.encoder.max_seq_len), QUERIES: cut(model.decoder.max_seq_len)}


def _take_positions(network: PerceiverIO, stored: Tensor) -> None:
    """Use the table that the checkpoint holds, if it is the one that its config gives but for rounding."""
    (adapter,) = network.inputs.values()
    encoding = adapter.get_submodule("positions")
    assert isinstance(encoding, FourierPositionEncoding)
    table = encoding.table
    if stored.shape != table.shape or not torch.allclose(stored.to(table), table, rtol=0, atol=_POSITION_ROUNDING):
        raise CheckpointError(
            f"{POSITIONS!r}, {tuple(stored.shape)}, is not the table of positions, {tuple(table.shape)}, that the "
            "config's image_shape and num_frequency_bands give",
            "config and weights are not of one model",
        )
    table.copy_(stored)


def _processor(directory: Path) -> dict[str, Any]:
    """preprocessor_config.json, or an empty dict."""
    processor = read_preprocessor(directory)
    for name in ("image_mean", "image_std"):
        if isinstance(processor.get(name), (int, float)):  # the same for each channel
            processor[name] = [processor[name]] * 3
    return processor


def _preprocessing(config: KrassermConfig, model: KrassermModel, processor: dict[str, Any]) -> Preprocessing:
    if isinstance(model, OpticalFlow):
        return FlowPreprocessing.of_tile(*model.encoder.image_shape)
    if isinstance(model, ImageClassifier):
        height, width, _ = model.encoder.image_shape
        # Where pictures come in the right size, resizing does nothing; others the model could not take.
        return image_preprocessing({**processor, "do_resize": True}, height, width)
    return TextPreprocessing(text_length(model), special_tokens=config.add_special_tokens)


def _notes(task: str, config: KrassermConfig, model: KrassermModel, processor: dict[str, Any]) -> tuple[str, ...]:
    """What the checkpoint did not say, and what was taken instead."""
    notes = []
    if task == "image-classification" and not processor:
        notes.append(
            "no preprocessor_config.json: pictures, cropped and normalised as for ImageNet, are assumed; a model"
            " trained otherwise will be wrong"
        )
    if task in ("fill-mask", "text-classification") and config.add_special_tokens:
        notes.append(
            "texts go in between [CLS] and [SEP], as transformers' pipelines give them; perceiver-io trains without,"
            ' unless it is told to: where the model was, add "add_special_tokens": false to config.json'
        )
    if isinstance(model.decoder, ClassDecoder):
        labels = config.labels(model.decoder.num_classes)
        if all(label == f"LABEL_{index}" for index, label in enumerate(labels)):
            notes.append("config.json names no labels: they are LABEL_0, LABEL_1, …")
    return tuple(notes)
