# SPDX-License-Identifier: Apache-2.0
"""Filling a model with the tensors of a checkpoint: every key used once, every shape right, or an error that lists."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable

from torch import Tensor, nn

from perceiver_export.runtimes.errors import CheckpointError

_SHOWN = 5


def load_state(model: nn.Module, state: dict[str, Tensor], name_in_checkpoint: Callable[[str], str]) -> None:
    """Copy ``state``, which `check_state` found right, into ``model``."""
    model.load_state_dict({own: state[name_in_checkpoint(own)] for own in model.state_dict()})


def check_state(model: nn.Module, state: dict[str, Tensor], name_in_checkpoint: Callable[[str], str]) -> None:
    """Does ``state`` fit ``model``? ``name_in_checkpoint`` gives the checkpoint's name of one of our parameters.

    Raises CheckpointError: keys missing or left over (with the nearest match), or a shape that differs.
    """
    names = {name_in_checkpoint(own): own for own in model.state_dict()}
    missing = sorted(set(names) - set(state))
    unknown = sorted(set(state) - set(names))
    if missing or unknown:
        raise CheckpointError(
            _describe(missing, unknown), "config.json and weights are not of one model, or keys were renamed"
        )
    own_state = model.state_dict()
    for theirs, own in names.items():
        expected, found = tuple(own_state[own].shape), tuple(state[theirs].shape)
        if expected != found:
            raise CheckpointError(
                f"tensor {theirs!r} has shape {found}, the config asks for {expected}",
                "config.json and weights are not of one model",
            )
        if own_state[own].is_floating_point() != state[theirs].is_floating_point():
            raise CheckpointError(
                f"tensor {theirs!r} has dtype {state[theirs].dtype}", "the checkpoint is quantized or damaged"
            )


def _describe(missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{len(missing)} tensors are missing from the checkpoint: {_listed(missing, unknown)}")
    if unknown:
        parts.append(f"{len(unknown)} tensors of the checkpoint are unknown: {_listed(unknown, missing)}")
    return "; ".join(parts)


def _listed(names: Iterable[str], candidates: list[str]) -> str:
    names = list(names)
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, candidates, n=1, cutoff=0.8)
        shown.append(f"{name} (nearest: {near[0]})" if near else name)
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
