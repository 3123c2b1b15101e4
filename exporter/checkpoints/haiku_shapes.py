# SPDX-License-Identifier: Apache-2.0
"""What the shapes of a Haiku checkpoint's parameters say of its sizes."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from perceiver_export.exporter.checkpoints import haiku_names
from perceiver_export.exporter.checkpoints.haiku_names import HaikuModel, haiku_sources
from perceiver_export.exporter.perceiver.config import AttentionConfig
from perceiver_export.runtimes.errors import CheckpointError

_NOT_OF_ONE_MODEL = (
    "the checkpoint is of another model, its parameters were renamed,"
    " or it was trained with other sizes: say them in --config FILE.json"
)


@dataclass(frozen=True)
class Shapes:
    """Shapes by name, and the sizes that follow from them. Everything here raises CheckpointError where they do not
    fit together.
    """

    model: HaikuModel
    shapes: Mapping[str, tuple[int, ...]]

    @property
    def cross(self) -> str:
        """The encoder's cross-attention."""
        return f"{haiku_names.encoder_module(self.model)}/cross_attention"

    @property
    def self_attention(self) -> str:
        """The first of a block's self-attentions."""
        return f"{haiku_names.encoder_module(self.model)}/self_attention"

    @property
    def decoder(self) -> str:
        """The decoder's cross-attention."""
        return f"{haiku_names.decoder_module(self.model)}/cross_attention"

    @property
    def output(self) -> str:
        """The decoder's last layer."""
        return f"{haiku_names.decoder_module(self.model)}/output"

    @property
    def num_input_channels(self) -> int:
        return self.of(f"{self.cross}/attention/linear_1/w", 2)[0]

    @property
    def num_query_channels(self) -> int:
        return self.of(f"{self.decoder}/attention/linear/w", 2)[0]

    @property
    def num_self_attentions(self) -> int:
        """How many layers a block has; all blocks share them."""
        layer = re.compile(re.escape(self.self_attention) + r"(_\d+)?/")
        return len({found.group() for name in self.shapes if (found := layer.match(name))})

    def of(self, name: str, rank: int) -> tuple[int, ...]:
        """The shape of one parameter, which has so many axes."""
        if name not in self.shapes:
            near = difflib.get_close_matches(name, self.shapes, n=1, cutoff=0.8)
            raise CheckpointError(
                f"the checkpoint has no parameter {name!r}" + (f" (nearest: {near[0]})" if near else ""),
                _NOT_OF_ONE_MODEL,
            )
        shape = self.shapes[name]
        if len(shape) != rank or 0 in shape:
            raise CheckpointError(f"parameter {name!r} has shape {shape}, not {rank} axes", _NOT_OF_ONE_MODEL)
        return shape

    def attention(self, module: str, num_heads: int, flag: str) -> AttentionConfig:
        """Widths of one layer; ``flag`` is what the config calls its number of heads."""
        num_qk_channels, num_v_channels = (
            self.of(f"{module}/attention/{linear}/w", 2)[1] for linear in ("linear", "linear_2")
        )
        for width in (num_qk_channels, num_v_channels):
            if width % num_heads:
                raise CheckpointError(
                    f"the {width} channels of {module!r} cannot be split into {num_heads} heads",
                    f"set {flag} of the config to what the model was trained with",
                )
        num_channels, hidden = self.of(f"{module}/mlp/linear/w", 2)
        return AttentionConfig(num_heads, num_qk_channels, num_v_channels, max(1, hidden // num_channels))

    def bands(self, width: int, num_features: int, axes: int, padding: str = "") -> int:
        """How many Fourier bands there are in rows of ``width`` channels: features, positions, padding.

        ``padding`` is our name of its trained vector. Positions of A axes and K bands have A·(2K+1) channels.
        """
        padded = self._padding(padding) if padding else 0
        channels = width - padded - num_features
        bands, rest = divmod(channels - axes, 2 * axes)
        if rest or bands < 1:
            beside = f"{num_features} of features" + (f" and {padded} of padding" if padded else "")
            raise CheckpointError(
                f"{width} channels less {beside} leave {channels} for Fourier positions on {axes} axes,"
                f" which have {axes} + {2 * axes} a band",
                _NOT_OF_ONE_MODEL,
            )
        return bands

    def spatial_patch(self, num_bands: int) -> int:
        """The side of a patch of a video's frames, whose positions have so many bands."""
        values = self.num_input_channels - self._padding("input_paddings.frames") - 3 * (2 * num_bands + 1)
        side = math.isqrt(max(values, 0) // 3)
        if side < 1 or 3 * side**2 != values:
            raise CheckpointError(
                f"a patch of a frame has {values} values beside positions of {num_bands} bands, which is no square of"
                " RGB pixels",
                "if the encoder has other bands than the decoder, set spatial_patch in --config FILE.json;"
                " else the checkpoint is of another model",
            )
        return side

    def _padding(self, own: str) -> int:
        return self.of(haiku_sources(self.model)(own).name, 2)[1]
