# SPDX-License-Identifier: Apache-2.0
"""Our own Perceiver IO in PyTorch, and the parts of a model of your own (`own_model`, the classes of its config).

Each name is imported on first use; only the model brings torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from perceiver_export.exporter.model.architectures import EncoderSizes, own_model
    from perceiver_export.exporter.model.config import (
        ArrayInput,
        AttentionConfig,
        AverageDecoder,
        EncoderConfig,
        FourierPositions,
        FramePairInput,
        GivenQueries,
        ImageInput,
        InputQueries,
        LearnedPositions,
        LearnedQueries,
        MaskedInput,
        OutputConfig,
        PerceiverConfig,
        PositionQueries,
        QueryDecoder,
        TokenInput,
    )
    from perceiver_export.exporter.model.perceiver import PerceiverIO

__all__ = [
    "ArrayInput",
    "AttentionConfig",
    "AverageDecoder",
    "EncoderConfig",
    "EncoderSizes",
    "FourierPositions",
    "FramePairInput",
    "GivenQueries",
    "ImageInput",
    "InputQueries",
    "LearnedPositions",
    "LearnedQueries",
    "MaskedInput",
    "OutputConfig",
    "PerceiverConfig",
    "PerceiverIO",
    "PositionQueries",
    "QueryDecoder",
    "TokenInput",
    "own_model",
]

_ELSEWHERE = {"EncoderSizes": "architectures", "PerceiverIO": "perceiver", "own_model": "architectures"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'config')}"), name)


def __dir__() -> list[str]:
    return __all__
