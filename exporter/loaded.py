# SPDX-License-Identifier: Apache-2.0
"""A model, ready for export, with all that a bundle says about it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from perceiver_export.exporter.perceiver.config import PerceiverConfig
from perceiver_export.runtimes.preprocessing import Preprocessing
from perceiver_export.runtimes.runtime import Array

if TYPE_CHECKING:
    from perceiver_export.exporter.perceiver.architectures import Parity
    from perceiver_export.exporter.perceiver.model import PerceiverIO


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode, with all that the bundle says about it.

    ``parity``: whose numerics it follows; ``own`` are those of no released model. ``split``: whether it is exported
    as encoder and decoder where nothing else is asked for.
    """

    model: PerceiverIO
    config: PerceiverConfig
    task: str
    parity: Parity | Literal["own"]
    source: str
    labels: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    split: bool = False
    notes: tuple[str, ...] = ()

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """All outputs by name for preprocessed inputs by name, in torch: a reference to judge by."""
        import torch

        with torch.inference_mode():
            outputs = self.model({name: torch.from_numpy(array) for name, array in feeds.items()})
        return {name: output.numpy() for name, output in outputs.items()}
