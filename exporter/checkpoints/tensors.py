# SPDX-License-Identifier: Apache-2.0
"""Reading weight files into a state dict. Nothing in a file is ever executed.

safetensors hold no code. ``.bin`` files are pickles and are read with torch's restricted unpickler
(``weights_only=True``), which refuses every class but tensors and containers.
"""

from __future__ import annotations

import json
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from perceiver_export.runtimes.errors import CheckpointError

_SINGLE = ("model.safetensors", "pytorch_model.bin")
# Under which name checkpoints of a training hold the model's state dict.
_NESTED = ("state_dict", "model_state_dict", "model")
_SHARDED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")


def read_state_dict(directory: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face directory, safetensors first, sharded or not; floats as float32.

    Raises CheckpointError: no weight file, a broken one, or one that wants to execute code.
    """
    for name in _SINGLE:
        if (directory / name).is_file():
            return _checked(_read_file(directory / name))
    for name in _SHARDED:
        if (directory / name).is_file():
            return _checked(_read_shards(directory, directory / name))
    raise CheckpointError(
        f"no weights in {directory}",
        f"a Hugging Face directory holds one of {', '.join((*_SINGLE, *_SHARDED))}",
    )


def read_state_file(path: Path) -> dict[str, Tensor]:
    """All tensors of one file, ``.safetensors`` or a PyTorch file of any name; floats as float32 or float64.

    A training's checkpoint (Lightning's and others) is read too: the state dict in it. Shared tensors that
    `safetensors.torch.save_model` wrote once are there under all of their names.

    Raises CheckpointError: no such file, a broken one, or one that wants to execute code.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is not a file", "give a state dict: a .safetensors, .pt, .pth or .bin file")
    if path.suffix == ".safetensors":
        return _with_shared(path, _checked(_read_safetensors(path)))
    return _checked(_read_pickle(path, _NESTED))


def _with_shared(path: Path, state: dict[str, Tensor]) -> dict[str, Tensor]:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        names = file.metadata() or {}
    return {**{name: state[kept] for name, kept in names.items() if kept in state}, **state}


def _read_shards(directory: Path, index: Path) -> dict[str, Tensor]:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted({str(shard) for shard in weight_map.values()})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not an index of shards: {error}", "copy the checkpoint again") from error
    state: dict[str, Tensor] = {}
    for shard in shards:
        if Path(shard).name != shard:
            raise CheckpointError(f"{index} names a file outside the checkpoint: {shard}", "do not trust this file")
        if not (directory / shard).is_file():
            raise CheckpointError(
                f"shard {shard} is missing from {directory}", f"{index.name} lists {len(shards)} shards"
            )
        state.update(_read_file(directory / shard))
    if set(weight_map) != set(state):
        differing = sorted(set(weight_map) ^ set(state))
        raise CheckpointError(
            f"{index.name} and its shards disagree about {len(differing)} of the tensors, first {differing[0]!r}",
            "copy the checkpoint again: shards and index are not of one piece",
        )
    return state


def _read_file(path: Path) -> dict[str, Tensor]:
    return _read_safetensors(path) if path.suffix == ".safetensors" else _read_pickle(path)


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{path} is not a readable safetensors file: {error}", "it is truncated or damaged: copy it again"
        ) from error


def _read_pickle(path: Path, nested: tuple[str, ...] = ()) -> dict[str, Tensor]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what cannot be read raises
            state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} was refused: it holds more than tensors, or is damaged", _refusal_hint(path)
        ) from error
    except Exception as error:  # a damaged pickle makes torch raise anything, AssertionError and IndexError included
        raise CheckpointError(
            f"{path} is not a readable PyTorch file", "it is truncated or damaged: copy it again"
        ) from error
    if isinstance(state, dict):
        state = next((state[key] for key in nested if isinstance(state.get(key), dict)), state)
    if not isinstance(state, dict) or not all(_is_plain(name, tensor) for name, tensor in state.items()):
        raise CheckpointError(f"{path} does not hold a state dict", "save `model.state_dict()`, not the model")
    return state


def _refusal_hint(path: Path) -> str:
    if path.suffix != ".ckpt":
        return "it could execute code when read; ask its author for a safetensors file"
    return (
        "a checkpoint of Lightning often holds its training's own objects. Where you trust it, take the tensors out: "
        f"torch.save(torch.load({path.name!r}, map_location='cpu', weights_only=False)['state_dict'], 'model.pt')"
    )


def _is_plain(name: object, tensor: object) -> bool:
    dense = isinstance(tensor, Tensor) and tensor.layout == torch.strided and tensor.device.type == "cpu"
    return isinstance(name, str) and dense


def _checked(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Half precision widened to float32; a NaN or an infinity anywhere is an error."""
    for name, tensor in state.items():
        if not tensor.is_floating_point():
            continue
        if tensor.dtype != torch.float64:
            state[name] = tensor = tensor.float()
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"tensor {name!r} holds NaN or infinite values", "the checkpoint is of a diverged training"
            )
    return state
