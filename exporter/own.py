# SPDX-License-Identifier: Apache-2.0
"""``module:function``: a model of your own, built from our parts by your own code."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.runtimes.errors import UnsupportedModelError, UsageError


def load_own(spec: str, task: str | None) -> LoadedModel:
    """Call ``module:function``, seen from the current directory; it gives a `PerceiverIO` or a `LoadedModel`.

    A bare model becomes a bundle of ``task``, by default ``arrays``: arrays in, arrays out.

    Raises UsageError: it cannot be imported, or wants arguments; UnsupportedModelError: it gives something else.
    """
    from perceiver_export.exporter.perceiver.model import PerceiverIO

    module, _, function = spec.partition(":")
    factory = _factory(spec, module, function)
    try:
        inspect.signature(factory).bind()
    except TypeError as error:
        raise UsageError(f"{spec} wants arguments: {error}", "give a function without arguments") from error
    made = factory()
    if isinstance(made, LoadedModel):
        return made
    if not isinstance(made, PerceiverIO):
        raise UnsupportedModelError(
            f"{spec} gave a {type(made).__name__}, not a PerceiverIO",
            "build it from a PerceiverConfig: perceiver_export.exporter.perceiver, and see examples/your_own.py",
        )
    model = made.eval()
    return LoadedModel(model=model, config=model.config, task=task or "arrays", parity="own", source=spec)


def _factory(spec: str, module: str, function: str) -> Callable[[], Any]:
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's module lies where the command is typed
    try:
        factory = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise UsageError(
            f"{spec} cannot be imported: {error}", "give module:function, seen from this directory"
        ) from error
    if not callable(factory):
        raise UsageError(f"{spec} is a {type(factory).__name__}", "give a function without arguments")
    made: Callable[[], Any] = factory
    return made
