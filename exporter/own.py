# SPDX-License-Identifier: Apache-2.0
"""``module:function``: a model of your own, built from our parts by your own code."""

from __future__ import annotations

import inspect

from perceiver_export.calibration.user_code import current_directory_importable, find_function
from perceiver_export.exporter.loaded import LoadedModel
from perceiver_export.runtimes.errors import PerceiverExportError, UnsupportedModelError, UsageError


def load_own(spec: str, task: str | None) -> LoadedModel:
    """Call ``module:function``, seen from the current directory; it gives a `PerceiverIO` or a `LoadedModel`.

    A bare model becomes a bundle of ``task``, by default ``arrays``: arrays in, arrays out.

    Raises UsageError: it cannot be imported, wants arguments, or fails; UnsupportedModelError: it gives something else.
    """
    from perceiver_export.exporter.perceiver.model import PerceiverIO

    with current_directory_importable():
        factory = find_function(spec)
        try:
            inspect.signature(factory).bind()
        except TypeError as error:
            raise UsageError(f"{spec} wants arguments: {error}", "give a function without arguments") from error
        try:
            made = factory()
        except PerceiverExportError:
            raise
        except (Exception, SystemExit) as error:
            module, _, name = spec.partition(":")
            hint = f'python -c "import {module}; {module}.{name}()" shows where'
            raise UsageError(f"{spec} failed: {error!r}", hint) from error
    if isinstance(made, LoadedModel):
        return made
    if not isinstance(made, PerceiverIO):
        raise UnsupportedModelError(
            f"{spec} gave a {type(made).__name__}, not a PerceiverIO",
            "build it of what perceiver_export.exporter.perceiver gives: see examples/your_own.py",
        )
    model = made.eval()
    return LoadedModel(model=model, config=model.config, task=task or "arrays", parity="own", source=spec)
