# SPDX-License-Identifier: Apache-2.0
"""Models of your own: any `torch.nn.Module`, called with example inputs.

    def policy() -> OwnModel:
        model = Policy(...)
        model.load_state_dict(torch.load("policy.pt", weights_only=True))
        return OwnModel(model, {"image": torch.rand(1, 3, 96, 96), "state": torch.rand(1, 14)}, outputs=("actions",))

`examples/your_own.py` is a complete example.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from torch import Tensor, nn

from perceiver_export.exporter.loaded import texts
from perceiver_export.runtimes.errors import UnsupportedModelError, UsageError, check_kind, first_line
from perceiver_export.runtimes.manifest import NAMING, DType, OutputKind, is_tensor_name
from perceiver_export.runtimes.preprocessing import Preprocessing
from perceiver_export.runtimes.runtime import Array

Inputs = Tensor | Mapping[str, Tensor] | Sequence[Tensor]


@dataclass(frozen=True)
class OwnModel:
    """A module of your own, example inputs, and the description for its bundle.

    ``inputs``: tensors by the names of forward's arguments, a tuple in their order, or one tensor; the first dimension
    is the batch. ``outputs``: names of forward's results, in order; by default the keys of a dict, else `output`,
    `output_1`, …. ``labels``, ``preprocessing`` and ``output_kinds`` as in `LoadedModel.own`.
    """

    module: nn.Module
    inputs: Inputs
    outputs: Sequence[str] = ()
    task: str = "arrays"
    labels: Sequence[str] = ()
    preprocessing: Preprocessing | None = None
    output_kinds: Mapping[str, OutputKind] = field(default_factory=dict)


class NamedModule(nn.Module):
    """A module that takes and returns tensors by name: {input: (B, …)} -> {output: (B, …)}.

    ``examples``: the example inputs as arrays. Raises UsageError for inputs that forward does not take, and
    UnsupportedModelError for a forward that fails on them, returns no tensors, or is not deterministic.
    """

    def __init__(self, module: nn.Module, inputs: Inputs, outputs: Sequence[str] = ()) -> None:
        super().__init__()
        inputs = (inputs,) if isinstance(inputs, (Tensor, np.ndarray)) else inputs
        check_kind("the module", module, nn.Module, "a torch.nn.Module")
        check_kind("inputs", inputs, (Mapping, Sequence), "example tensors: a tuple, or a dict by argument name")
        self.model = _evaluated(module)
        self._positional = not isinstance(inputs, Mapping)
        named = dict(inputs) if isinstance(inputs, Mapping) else _by_position(module, inputs)
        self.examples: dict[str, Array] = {name: _array(name, value) for name, value in named.items()}
        self.outputs: tuple[str, ...] = ()
        first_call = self._named(self._called(self._call, self.examples), texts("outputs", outputs))
        again = self.run(self.examples)
        for name, first in first_call.items():
            if not np.array_equal(first, again[name], equal_nan=first.dtype.kind == "f"):
                raise UnsupportedModelError(
                    f"two calls with the same inputs give different values of {name!r}",
                    "remove random numbers and dropout that eval() leaves on, or make them an input",
                )

    def forward(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = self._call(feeds)
        return dict(zip(self.outputs, (tensor for _, tensor in _tensors(found)), strict=True))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """`forward` with numpy arrays. Raises UnsupportedModelError if it fails on them."""
        found = self._called(self.forward, feeds)
        return {name: _array(name, tensor) for name, tensor in found.items()}

    def _called(self, function: Callable[[Mapping[str, Tensor]], Any], feeds: Mapping[str, Array]) -> Any:
        try:
            with torch.no_grad():
                return function({name: torch.from_numpy(array) for name, array in feeds.items()})
        except (Exception, SystemExit) as error:  # the user's own code
            takes = ", ".join(one.name for one in _arguments(self.model))
            given = ", ".join(f"{name} {array.dtype} {list(array.shape)}" for name, array in feeds.items())
            raise UnsupportedModelError(
                f"forward fails on {given}: {type(error).__name__}: {first_line(error)}",
                f"give inputs, and a --batch, that forward({takes}) accepts",
            ) from error

    def _call(self, feeds: Mapping[str, Tensor]) -> Any:
        given = {name: feeds[name].clone() for name in self.examples}  # forward may change its inputs in place
        return self.model(*given.values()) if self._positional else self.model(**given)

    def _named(self, found: Any, asked: tuple[str, ...]) -> dict[str, Array]:
        """The results of forward, under the names ``asked`` or their own keys."""
        tensors = list(_tensors(found))
        if not tensors:
            raise UnsupportedModelError(
                f"forward returns a {type(found).__name__} without tensors",
                "return a tensor, a tuple or a dict of them",
            )
        if asked and len(asked) != len(tensors):
            raise UsageError(
                f"outputs has {len(asked)} names, forward returns {len(tensors)} tensors", "name each tensor, in order"
            )
        self.outputs = asked or tuple(name for name, _ in tensors)
        if len(set(self.outputs) | set(self.examples)) < len(self.outputs) + len(self.examples):
            raise UsageError(
                f"a name is used twice among the inputs {list(self.examples)} and outputs {list(self.outputs)}",
                "give outputs=(…) other names",
            )
        return {name: _array(name, tensor) for name, (_, tensor) in zip(self.outputs, tensors, strict=True)}


def _evaluated(module: nn.Module) -> nn.Module:
    """The module in evaluation mode. Raises UnsupportedModelError for one that torch derived from another."""
    try:
        if isinstance(module, torch.jit.ScriptModule):
            raise NotImplementedError("it is TorchScript")
        module.eval()  # returns None in some modules
    except (Exception, SystemExit) as error:  # from exported programs, or the user's own code
        raise UnsupportedModelError(
            f"the module is a {type(module).__name__} that cannot be exported: {first_line(error)}",
            "give the module that it was made from",
        ) from error
    return module


def _arguments(module: nn.Module) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(module.forward).parameters.values())
    except (TypeError, ValueError):  # forward is written in C
        return [inspect.Parameter("inputs", inspect.Parameter.VAR_POSITIONAL)]


def _by_position(module: nn.Module, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    takes = _arguments(module)
    names = [one.name for one in takes if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    if len(inputs) > len(names) and not any(one.kind is one.VAR_POSITIONAL for one in takes):
        raise UsageError(
            f"{len(inputs)} inputs for a forward of {len(names)} arguments", "give a dict of names to tensors"
        )
    names += [f"input_{index}" for index in range(len(names), len(inputs))]
    return dict(zip(names, inputs, strict=False))


def _array(name: str, value: object) -> Array:
    """A copy, which later calls cannot change."""
    if isinstance(value, np.ndarray):
        return value.copy()
    if not isinstance(value, Tensor):
        raise UsageError(
            f"{name!r} is of type {type(value).__name__}, not a tensor",
            "give tensors only, and set other arguments in a module that wraps yours",
        )
    try:
        return value.detach().cpu().numpy().copy()
    except (TypeError, RuntimeError) as error:  # bfloat16, a sparse tensor
        raise UnsupportedModelError(
            f"{name!r} is a tensor of {value.dtype}, which cannot become an array: {first_line(error)}",
            "take and return dense float32 tensors: .float()",
        ) from error


def _tensors(found: Any, name: str = "output") -> Iterator[tuple[str, Tensor]]:
    """The tensors among forward's results, each with a name; None and numbers are left out."""
    if isinstance(found, Tensor):
        yield name, found
    elif isinstance(found, Mapping):
        for key, value in found.items():
            yield from _tensors(value, str(key) if name == "output" else f"{name}_{key}")
    elif dataclasses.is_dataclass(found) and not isinstance(found, type):
        yield from _tensors({one.name: getattr(found, one.name) for one in dataclasses.fields(found)}, name)
    elif isinstance(found, (tuple, list)):
        for index, value in enumerate(found):
            yield from _tensors(value, f"{name}_{index}" if index else name)


def check_tensor(name: str, array: Array) -> None:
    """Raise UnsupportedModelError for a tensor that bundles do not support."""
    if not is_tensor_name(name):
        raise UnsupportedModelError(f"the model has the invalid tensor name {name!r}", NAMING)
    if not array.size:
        raise UnsupportedModelError(f"{name!r} is empty: its shape is {array.shape}", "fix that size to 1 or more")
    if str(array.dtype) not in get_args(DType):
        raise UnsupportedModelError(
            f"{name!r} is {array.dtype}; bundles support {', '.join(get_args(DType))}", "convert the model: .float()"
        )


def repeated(array: Array, samples: int) -> Array:
    """``samples`` samples: the given ones, repeated in turn."""
    found: Array = np.ascontiguousarray(array[np.arange(samples) % array.shape[0]])
    return found
