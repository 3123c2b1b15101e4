# SPDX-License-Identifier: Apache-2.0
"""Our own Perceiver IO in PyTorch, and the parts of a model of your own (`own_model`, the classes of its config).

Each name is imported on first use; only the model brings torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.exporter.model.architectures import EncoderSizes as EncoderSizes
    from perceiver_export.exporter.model.architectures import own_model as own_model
    from perceiver_export.exporter.model.config import ArrayInput as ArrayInput
    from perceiver_export.exporter.model.config import AttentionConfig as AttentionConfig
    from perceiver_export.exporter.model.config import AverageDecoder as AverageDecoder
    from perceiver_export.exporter.model.config import EncoderConfig as EncoderConfig
    from perceiver_export.exporter.model.config import FourierPositions as FourierPositions
    from perceiver_export.exporter.model.config import FramePairInput as FramePairInput
    from perceiver_export.exporter.model.config import GivenQueries as GivenQueries
    from perceiver_export.exporter.model.config import ImageInput as ImageInput
    from perceiver_export.exporter.model.config import InputQueries as InputQueries
    from perceiver_export.exporter.model.config import LearnedPositions as LearnedPositions
    from perceiver_export.exporter.model.config import LearnedQueries as LearnedQueries
    from perceiver_export.exporter.model.config import MaskedInput as MaskedInput
    from perceiver_export.exporter.model.config import OutputConfig as OutputConfig
    from perceiver_export.exporter.model.config import PerceiverConfig as PerceiverConfig
    from perceiver_export.exporter.model.config import PositionQueries as PositionQueries
    from perceiver_export.exporter.model.config import QueryDecoder as QueryDecoder
    from perceiver_export.exporter.model.config import TokenInput as TokenInput
    from perceiver_export.exporter.model.perceiver import PerceiverIO as PerceiverIO

# Public names by module. Each module is imported on first use.
_NAMES = {
    "architectures": "EncoderSizes own_model",
    "config": "ArrayInput AttentionConfig AverageDecoder EncoderConfig FourierPositions FramePairInput GivenQueries "
    "ImageInput InputQueries LearnedPositions LearnedQueries MaskedInput OutputConfig PerceiverConfig PositionQueries "
    "QueryDecoder TokenInput",
    "perceiver": "PerceiverIO",
}
_MODULES = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
