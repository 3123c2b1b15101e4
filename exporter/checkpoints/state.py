# SPDX-License-Identifier: Apache-2.0
"""Filling a model with the tensors of a checkpoint: every key used, every shape right, or an error that lists."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from perceiver_export.exporter.perceiver.config import PerceiverConfig
from perceiver_export.exporter.perceiver.model import PerceiverIO
from perceiver_export.runtimes.errors import CheckpointError

_SHOWN = 5
_LONGEST = 200  # characters of a name that is shown as it is


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Source:
    """Where one of our parameters comes from: the checkpoint's name for it, and how its layout becomes ours."""

    name: str
    convert: Callable[[Tensor], Tensor] = _as_it_is


# Our parameter's name -> where it comes from.
Sources = Callable[[str], Source]


def load_model_state(
    config: PerceiverConfig, state: Mapping[str, Tensor], sources: Sources, ignored: Collection[str] = ()
) -> PerceiverIO:
    """The model of ``config`` with the tensors of ``state``, in evaluation mode.

    ``ignored`` names tensors of the checkpoint that no inference reads (a mask token that is never used).

    Raises CheckpointError: keys missing or left over (with the nearest match), or a shape that differs.
    """
    with torch.device("meta"):  # nothing is allocated until names and shapes are known to fit
        expected = {name: tensor for name, tensor in PerceiverIO(config).state_dict().items() if not _is_counter(name)}
    wanted = {own: sources(own) for own in expected}
    _check_names({source.name for source in wanted.values()}, set(state), set(ignored))
    for own, source in wanted.items():
        _check_tensor(source, state[source.name], expected[own])
    model = PerceiverIO(config)
    _fill(model, {own: source.convert(state[source.name]) for own, source in wanted.items()})
    return model.eval()


def _fill(model: nn.Module, state: Mapping[str, Tensor]) -> None:
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert all(_is_counter(name) for name in missing)


def _is_counter(name: str) -> bool:
    """Batch norm counts its updates; inference does not read that, and not every checkpoint has it."""
    return name.endswith("num_batches_tracked")


def _check_names(wanted: set[str], there: set[str], ignored: set[str]) -> None:
    missing = sorted(wanted - there)
    unknown = sorted(name for name in there - wanted - ignored if not _is_counter(name))
    if missing or unknown:
        raise CheckpointError(
            _describe(missing, unknown), "config and weights are not of one model, or keys were renamed"
        )


def _check_tensor(source: Source, found: Tensor, expected: Tensor) -> None:
    try:
        converted = source.convert(torch.empty(found.shape, device="meta"))
    except (RuntimeError, IndexError, ValueError) as error:
        raise CheckpointError(
            f"tensor {source.name!r} has shape {tuple(found.shape)}, which is not that of its layer",
            "config and weights are not of one model",
        ) from error
    if converted.shape != expected.shape:
        as_ours = "" if found.shape == converted.shape else f" ({tuple(converted.shape)} in our layout)"
        raise CheckpointError(
            f"tensor {source.name!r} has shape {tuple(found.shape)}{as_ours}, "
            f"the config asks for {tuple(expected.shape)}",
            "config and weights are not of one model",
        )
    if found.is_floating_point() != expected.is_floating_point():
        raise CheckpointError(
            f"tensor {source.name!r} has dtype {found.dtype}", "the checkpoint is quantized or damaged"
        )


def _describe(missing: list[str], unknown: list[str]) -> str:
    parts = []
    if missing:
        parts.append(f"{_tensors(missing)} missing from the checkpoint: {_listed(missing, unknown)}")
    if unknown:
        parts.append(f"{_tensors(unknown)} unknown to the model: {_listed(unknown, missing)}")
    return "; ".join(parts)


def _tensors(names: list[str]) -> str:
    return f"{len(names)} tensors are" if len(names) > 1 else "1 tensor is"


def _listed(names: Iterable[str], candidates: list[str]) -> str:
    names = list(names)
    short = [candidate for candidate in candidates if len(candidate) <= _LONGEST]  # long ones are compared for hours
    shown = []
    for name in names[:_SHOWN]:
        near = difflib.get_close_matches(name, short, n=1, cutoff=0.8) if len(name) <= _LONGEST else []
        shown.append(f"{_shown(name)} (nearest: {_shown(near[0])})" if near else _shown(name))
    return ", ".join(shown) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _shown(name: str) -> str:
    """A name from a file may be a page long, or hold what steers a terminal."""
    if len(name) <= _LONGEST:
        return name if name.isprintable() else repr(name)
    return f"{name[:_LONGEST]!r}…"
