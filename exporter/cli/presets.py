# SPDX-License-Identifier: Apache-2.0
"""`perceiver-export presets`."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from perceiver_export.exporter.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from perceiver_export.exporter.perceiver.config import Input, PerceiverConfig
    from perceiver_export.exporter.presets import Preset

_TITLE = "systems of the papers, to export as preset:NAME"
_NOTE = (
    "Of one sample, with all queries of the model; a multiply-add is two FLOPs. Then what the paper says, and how far"
    " this model is from it."
)
_WIDE = 150  # columns from which on a preset fits into one line


def presets(json: JsonFlag = False) -> None:
    """List the papers' systems, which `export preset:NAME` builds with random weights to size a device."""
    from perceiver_export.exporter.presets import PRESETS

    rows = [_listed(name, preset) for name, preset in PRESETS.items()]
    note = "\n".join([_NOTE, *(f"{row.name}: {row.remark}" for row in rows if row.remark)])
    if json:
        print_json({row.name: row.document() for row in rows})
    elif _columns() >= _WIDE:
        columns = ["preset", "task", "inputs", "latents", "parameters>", "paper>", "FLOPs>", "paper>"]
        print_table(_TITLE, columns, [row.line() for row in rows], note)
    else:
        columns = ["preset\n  task", "inputs\nlatents", "parameters\npaper>", "FLOPs\npaper>"]
        print_table(_TITLE, columns, [row.lines() for row in rows], note)


def _columns() -> int:
    """The width that `print_table` has."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else 160


@dataclass(frozen=True)
class _Listed:
    """A preset and its counts."""

    name: str
    preset: Preset
    config: PerceiverConfig
    parameters: int
    flops: int
    flops_of_one_query: int

    @property
    def remark(self) -> str:
        if self.preset.task not in ("fill-mask", "arrays"):
            return self.preset.remark
        return f"{self.preset.remark} One query: {_amount(self.flops_of_one_query)}FLOP."

    @property
    def inputs(self) -> list[str]:
        sizes = {name: _size(one) for name, one in self.config.inputs.items()}
        return [f"{name} {size}" for name, size in sizes.items() if size]

    @property
    def latents(self) -> str:
        return f"{self.config.encoder.num_latents}×{self.config.encoder.num_latent_channels}"

    def line(self) -> list[str]:
        """Cells for a wide terminal."""
        counts = [cell for ours, *paper in self._counts() for cell in (ours, " ".join(paper))]
        return [self.name, self.preset.task, "\n".join(self.inputs), self.latents, *counts]

    def lines(self) -> list[str]:
        """Cells for a narrow one: what belongs together below each other."""
        sizes = "\n".join([*self.inputs, f"latents {self.latents}"])
        return [f"{self.name}\n  {self.preset.task}", sizes, *("\n".join(counts) for counts in self._counts())]

    def _counts(self) -> list[list[str]]:
        """Parameters and FLOPs: ours, and where the paper has them the paper's and how far ours are from those."""
        pairs = ((self.parameters, self.preset.parameters), (self.flops, self.preset.flops))
        return [[_amount(ours), *_published(paper, ours)] for ours, paper in pairs]

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "task": self.preset.task,
            "parameters": self.parameters,
            "flops": self.flops,
            "flops_of_one_query": self.flops_of_one_query,
            "paper": {
                "reference": self.preset.reference,
                "parameters": self.preset.parameters,
                "flops": self.preset.flops,
            },
            "remark": self.preset.remark,
            "architecture": self.config,
        }


def _listed(name: str, preset: Preset) -> _Listed:
    from perceiver_export.exporter.preset_counts import count

    config = preset.build("deepmind")
    counts = count(config)
    return _Listed(name, preset, config, counts.parameters, counts.flops, count(config, num_queries=1).flops)


def _size(one: Input) -> str:
    """3×224×224; nothing where a model takes nothing."""
    from perceiver_export.exporter.perceiver.config import ArrayInput, FramePairInput, ImageInput, TokenInput

    shape: tuple[int, ...] = ()
    if isinstance(one, ImageInput):
        shape = (one.num_channels, one.height, one.width)
    elif isinstance(one, FramePairInput):
        shape = (2, 3, one.height, one.width)
    elif isinstance(one, TokenInput):
        shape = (one.length,)
    elif isinstance(one, ArrayInput):
        shape = (*one.shape, one.num_channels)
    return "×".join(map(str, shape))


def _amount(number: float) -> str:
    """62,255,848 as 62.26 M."""
    power, unit = _unit(number)
    return f"{number / power:.4g} {unit}"


def _published(paper: float | None, ours: float) -> list[str]:
    """407 G, +17.5%: the paper's number in the unit of ours, and how far ours is from it."""
    if paper is None:
        return []
    power, unit = _unit(ours)
    return [f"{paper / power:.4g} {unit}", f"{ours / paper - 1:+.1%}"]


def _unit(number: float) -> tuple[float, str]:
    return next((power, unit) for power, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M")) if number >= power)
