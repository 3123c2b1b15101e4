# SPDX-License-Identifier: Apache-2.0
"""State dicts of lucidrains/perceiver-pytorch, with the model's arguments in a JSON file.

Source: perceiver-pytorch 0.11.0 (MIT), and 0.8 to 0.10, which differ in the names alone.
"""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from perceiver_export.exporter.checkpoints.lucidrains_config import (
    Arguments,
    Perceiver,
    PerceiverIO,
    architecture,
    read_arguments,
)
from perceiver_export.exporter.checkpoints.lucidrains_names import QUERIES, layout_of, lucidrains_sources, without_tied
from perceiver_export.exporter.checkpoints.lucidrains_shapes import check_sizes
from perceiver_export.exporter.checkpoints.origins import check_origin, prefixes
from perceiver_export.exporter.checkpoints.preprocessor import image_preprocessing
from perceiver_export.exporter.checkpoints.state import load_model_state
from perceiver_export.exporter.checkpoints.tensors import read_state_file
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.runtimes.errors import CheckpointError


def load_lucidrains(file: Path, config: Path) -> LoadedModel:
    """The model of a state dict, a .pt, .pth, .bin or .safetensors file, with its weights.

    ``config`` is a JSON file of the arguments of ``Perceiver`` or ``PerceiverIO`` by their names, and of what they do
    not say (`lucidrains_config`): ``class``, ``input_shape``, queries.

    Raises CheckpointError (unreadable, or config and weights that differ), UnsupportedModelError.
    """
    arguments = read_arguments(config)
    everything = read_state_file(file)
    check_origin(file, everything, "lucidrains")
    queries = _trained_queries(file, config, everything, arguments)
    state = _of_the_model(file, everything, arguments)
    layout = layout_of(state)
    name = type(arguments).__name__
    if layout.model != name:
        raise CheckpointError(
            f"{file} holds a {layout.model}, the config says {name}", f'set "class": "{layout.model}"'
        )
    check_sizes(arguments, state, layout)
    if arguments.weight_tie_layers:
        first = 0 if layout.model == "PerceiverIO" else 1
        state = without_tied(state, first, arguments.depth)
    sizes = architecture(arguments, 0 if queries is None else queries.shape[0])
    if queries is not None:
        state[QUERIES] = queries
    model = load_model_state(sizes, state, lucidrains_sources(layout))
    image = arguments if isinstance(arguments, Perceiver) and arguments.task == "image-classification" else None
    return LoadedModel(
        model=model,
        config=sizes,
        task=arguments.task,
        parity="own",
        source=file.name,
        labels=_labels(arguments),
        preprocessing=None if image is None else image_preprocessing(image.preprocessor, *image.input_shape),
        notes=_notes(arguments, everything),
    )


def _of_the_model(file: Path, state: dict[str, Tensor], arguments: Arguments) -> dict[str, Tensor]:
    """The tensors whose names start with the prefix, without it, and without the trained queries."""
    prefix, queries = arguments.prefix, arguments.queries if isinstance(arguments, PerceiverIO) else None
    if f"{prefix}latents" not in state:
        others = [f'"prefix": "{other}"' for other in prefixes(state, "latents")]
        raise CheckpointError(
            f"{file} has no tensor {prefix + 'latents'!r}", f"the model is inside of another: set {' or '.join(others)}"
        )
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state.items()
        if name.startswith(prefix) and name != queries
    }


def _trained_queries(file: Path, config: Path, state: dict[str, Tensor], arguments: Arguments) -> Tensor | None:
    """The trained queries (O, queries_dim), where there are any."""
    if not isinstance(arguments, PerceiverIO) or arguments.queries is None:
        return None
    if arguments.queries_file is not None:
        file = config.parent / arguments.queries_file
        state = read_state_file(file)
    queries = state.get(arguments.queries)
    if queries is None:
        raise CheckpointError(
            f"{file} has no tensor {arguments.queries!r}", f"queries is one of {', '.join(sorted(state)[:5])}"
        )
    if queries.ndim == 3 and len(queries) == 1:
        queries = queries[0]
    if queries.ndim != 2 or queries.shape[1] != arguments.queries_dim or not len(queries):
        raise CheckpointError(
            f"queries {arguments.queries!r} have shape {tuple(queries.shape)}",
            f"with queries_dim {arguments.queries_dim} they are (number, {arguments.queries_dim})",
        )
    return queries


def _labels(arguments: Arguments) -> tuple[str, ...]:
    if not isinstance(arguments, Perceiver):
        return ()
    if arguments.labels or arguments.task == "arrays":
        return arguments.labels
    return tuple(f"LABEL_{index}" for index in range(arguments.num_classes))


def _notes(arguments: Arguments, state: dict[str, Tensor]) -> tuple[str, ...]:
    """What the config did not say, and what was taken instead; what was left out."""
    notes = []
    if isinstance(arguments, Perceiver) and arguments.task == "image-classification":
        if not arguments.preprocessor:
            notes.append(
                "the config has no preprocessor: pictures, cropped and normalised as for ImageNet, are assumed; a model"
                " trained otherwise will be wrong"
            )
        if not arguments.labels:
            notes.append("the config names no labels: they are LABEL_0, LABEL_1, …")
    outside = sorted(name for name in state if not name.startswith(arguments.prefix))
    if isinstance(arguments, PerceiverIO) and arguments.queries in outside:
        outside.remove(arguments.queries)
    if outside:
        notes.append(
            f"what lies outside of {arguments.prefix} is no part of the model, and was left out ({len(outside)}): "
            + ", ".join(outside[:5])
            + (", …" if len(outside) > 5 else "")
        )
    return tuple(notes)
