# SPDX-License-Identifier: Apache-2.0
"""Read weight files and JSON configs, and fill a model. Missing or unused keys and differing shapes are errors.

Nothing in a file is ever executed: safetensors hold no code, and ``.bin`` files are read by torch's restricted
unpickler (``weights_only=True``), which refuses every class but tensors and containers.
"""

from __future__ import annotations

import difflib
import os
import pickle
import re
import warnings
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from perceiver_export.exporter.model.config import PerceiverConfig
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.runtimes import files
from perceiver_export.runtimes.errors import CheckpointError
from perceiver_export.runtimes.files import read_json

_SHOWN = 5
_LONGEST = 200  # characters of a name that is shown as it is
_DAMAGED = "copy it again: it is truncated or damaged"


@dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: the checkpoint's name for it, and how its layout becomes ours."""

    name: str
    convert: Callable[[Tensor], Tensor] = lambda tensor: tensor


# Our parameter's name -> where it comes from.
Sources = Callable[[str], Source]


def load_model_state(
    config: PerceiverConfig, state: Mapping[str, Tensor], sources: Sources, ignored: Collection[str] = ()
) -> PerceiverIO:
    """The model of ``config`` with the tensors of ``state``, in evaluation mode.

    ``ignored`` names tensors of the checkpoint that inference never reads, such as an unused mask token.

    Raises CheckpointError: keys missing or left over (with the nearest match), or a shape that differs.
    """
    with torch.device("meta"):  # nothing is allocated until names and shapes are known to fit
        expected = {name: tensor for name, tensor in PerceiverIO(config).state_dict().items() if not _is_counter(name)}
    wanted = {own: sources(own) for own in expected}
    _check_names({source.name for source in wanted.values()}, set(state), set(ignored))
    for own, source in wanted.items():
        _check_tensor(source, state[source.name], expected[own])
    model = PerceiverIO(config)
    found = {own: source.convert(state[source.name]) for own, source in wanted.items()}
    model.load_state_dict(found, strict=False)  # all but the counters
    return model.eval()


def _is_counter(name: str) -> bool:
    """Batch norm's count of updates, which inference does not read and some checkpoints lack."""
    return name.endswith("num_batches_tracked")


def _check_names(wanted: set[str], there: set[str], ignored: set[str]) -> None:
    missing = sorted(wanted - there)
    unknown = sorted(name for name in there - wanted - ignored if not _is_counter(name))
    lists = (("missing from the checkpoint", missing, unknown), ("unknown to the model", unknown, missing))
    parts = [
        f"{len(names)} {'tensors are' if len(names) > 1 else 'tensor is'} {what}: {_listed(names, others)}"
        for what, names, others in lists
        if names
    ]
    if parts:
        raise CheckpointError("; ".join(parts), "give config and weights of one model, under their original names")


def _check_tensor(source: Source, found: Tensor, expected: Tensor) -> None:
    what, hint = f"tensor {source.name!r} has shape {tuple(found.shape)}", "give config and weights of one model"
    try:
        converted = source.convert(torch.empty(found.shape, device="meta"))
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(f"{what}, which does not fit its layer", hint) from error
    if converted.shape != expected.shape:
        as_ours = "" if found.shape == converted.shape else f" ({tuple(converted.shape)} in our layout)"
        raise CheckpointError(f"{what}{as_ours}, but the config asks for {tuple(expected.shape)}", hint)
    if found.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(
            f"tensor {source.name!r} has dtype {found.dtype}", "give a checkpoint that is neither quantized nor damaged"
        )


def _listed(names: list[str], candidates: list[str]) -> str:
    # Comparing long names would take hours.
    short = [candidate for candidate in candidates if len(candidate) <= _LONGEST]
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, short, n=1, cutoff=0.8) if len(name) <= _LONGEST else []
        shown.append(f"{_shown(name)} (nearest: {_shown(near[0])})" if near else _shown(name))
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _shown(name: str) -> str:
    """A name from a file, which may be a page long or hold control characters."""
    if len(name) <= _LONGEST:
        return name if name.isprintable() else repr(name)
    return f"{name[:_LONGEST]!r}…"


_SINGLE = ("model.safetensors", "pytorch_model.bin")
# Names of the model's state dict in training checkpoints.
_NESTED = ("state_dict", "model_state_dict", "model")
SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


class _Index(msgspec.Struct):
    """Which shard has which tensor."""

    weight_map: dict[str, str]


def read_state_dict(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, safetensors first, sharded or not; floats as float32 or float64.

    Of a training checkpoint, only the model's state dict is read. Shared tensors that `safetensors.torch.save_model`
    wrote once appear under all of their names.

    Raises CheckpointError if there is no weight file, or it is broken or needs to execute code.
    """
    for path in (directory / name for name in (*_SINGLE, *SHARDED)):
        if path.is_file():
            return valid(path, _read_shards(path) if path.name in SHARDED else _read_file(path))
    raise CheckpointError(
        f"no weights in {directory}", f"give a Hugging Face directory with one of {', '.join((*_SINGLE, *SHARDED))}"
    )


def read_index(index: Path) -> dict[str, str]:
    """Each tensor's shard beside ``index``. Raises CheckpointError if the index is broken or names another folder."""
    # Resolve links: the hub's cache keeps contents elsewhere.
    weight_map = read_json(index.resolve(), _Index, CheckpointError, "copy the checkpoint again").weight_map
    for shard in weight_map.values():
        if Path(shard).name != shard or shard == "..":
            raise CheckpointError(
                f"{index} names a file outside the checkpoint: {shard}",
                "do not trust this file: ask its author for another",
            )
    return weight_map


def _read_shards(index: Path) -> dict[str, Tensor]:
    weight_map, directory = read_index(index), index.parent
    shards = sorted(set(weight_map.values()))
    state: dict[str, Tensor] = {}
    for shard in shards:
        if not os.path.isfile(directory / shard):  # unlike Path.is_file, it accepts a name of any length
            raise CheckpointError(
                f"shard {shard} is missing from {directory}", f"copy all {len(shards)} shards that {index.name} lists"
            )
        state.update(_read_file(directory / shard))
    if set(weight_map) != set(state):
        differing = sorted(set(weight_map) ^ set(state))
        raise CheckpointError(
            f"{index.name} and its shards disagree about {len(differing)} of the tensors, first {differing[0]!r}",
            "copy the checkpoint again: shards and index do not belong together",
        )
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import safe_open
    from safetensors.torch import load_file

    with files.parsing(str(path), "is not a readable safetensors file", _DAMAGED, CheckpointError):
        state = load_file(path)
        with safe_open(path, framework="pt") as file:
            shared = file.metadata() or {}
        return {**{name: state[kept] for name, kept in shared.items() if kept in state}, **state}


def _read_pickle(path: Path) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        hint = "ask its author for a safetensors file: this one could execute code when read"
        raise CheckpointError(f"{path} was refused: it holds more than tensors, or is damaged", hint) from error
    except Exception as error:  # a damaged pickle makes torch raise anything, AssertionError and IndexError included
        raise CheckpointError(f"{path} is not a readable PyTorch file", _DAMAGED) from error
    if isinstance(state, dict):
        state = next((state[key] for key in _NESTED if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(_is_plain(name, tensor) for name, tensor in state.items()):
        raise CheckpointError(f"{path} does not hold a state dict", "save `model.state_dict()`, not the model")
    return state


def _is_plain(name: object, tensor: object) -> bool:
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return isinstance(name, str) and dense


def valid(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Widen half precision to float32 in place. Raises CheckpointError for NaN or infinite values."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float64:
            state[name] = tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{path}: {name!r} holds NaN or infinite values", "give a checkpoint from before the training diverged"
            )
    return state


_T = TypeVar("_T")
_LONGEST_JSON = 100  # characters of a value that are shown


def read_object(path: Path, what: str) -> dict[str, Any]:
    """The JSON object of ``path``, which should be ``what``. Raises CheckpointError."""
    with files.reading(path, CheckpointError, f"give {what}"):
        content = files.read_bytes(path.resolve())  # resolves links: see read_index
    try:
        return files.decode_json(content, dict[str, Any])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", "copy the checkpoint again") from error


def convert(values: Mapping[str, Any], kind: type[_T], where: str) -> _T:
    """Decoded JSON as ``kind``. Raises CheckpointError that names the field and its value."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        path = re.search(r"`\$\.([\w.]+)", str(error))
        value: Any = values
        for key in path[1].split(".") if path else ():
            value = value.get(key) if isinstance(value, dict) else None
        found = f"{path[1]} is {repr(value)[:_LONGEST_JSON]}: " if path and not isinstance(value, dict) else ""
        raise CheckpointError(f"{where}: {found}{error}", "correct the field, or leave it out") from error
