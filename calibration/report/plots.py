# SPDX-License-Identifier: Apache-2.0
"""Plots as SVG that takes the page's colours: matplotlib draws in four stand-ins, which become CSS variables."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from perceiver_export.calibration.report.content import Speed, sides
from perceiver_export.calibration.validated import Validation
from perceiver_export.runtimes.errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What matplotlib draws with, and what the page's style sheet calls it.
_TEXT, _ACCENT, _OTHER, _BAD = "#010203", "#010204", "#010205", "#010206"
_COLOURS = {_TEXT: "var(--text)", _ACCENT: "var(--accent)", _OTHER: "var(--muted)", _BAD: "var(--bad)"}
_WIDTH = 4.5  # inches: text stays readable on a telephone
_ROW = 0.42  # inches a row, of which the bar takes a share
_BAR = 0.38
_LAYERS = 15
_LONGEST = 54  # characters of a name that fit into the width in any font


def drop_plot(validations: Sequence[Validation]) -> str:
    """Each target's gate on a worsening: the measured value, its bounds, and what was allowed."""
    gates = [next((gate for gate in v.gates if gate.wanted.option != "--min-agreement"), None) for v in validations]
    shown = [(name, gate) for name, gate in zip(sides(validations), gates, strict=True) if gate is not None]
    if not shown:
        return ""
    figure, axes = _axes([name for name, _ in shown])
    for row, (_, gate) in enumerate(shown):
        colour = _ACCENT if gate.held else _BAD
        axes.plot([gate.lower, gate.upper], [row, row], color=colour, linewidth=3, solid_capstyle="butt")
        axes.plot([gate.measured], [row], "o", color=colour)
        axes.plot(
            [gate.wanted.limit, gate.wanted.limit], [row - 0.2, row + 0.2], color=_TEXT, linewidth=1.5, linestyle="--"
        )
    unit = shown[0][1].wanted.unit
    axes.set_xlabel(f"worse by{f', {unit}' if unit else ''}: measured, 95 % bounds\n(dashed: what is allowed)")
    axes.axvline(0, color=_OTHER, linewidth=0.8)
    return _svg(figure, "How much worse the candidate is on each target, with bounds")


def latency_plot(speeds: Sequence[Speed]) -> str:
    """Median latency of each side on each target."""
    if not speeds:
        return ""
    figure, axes = _axes([f"{speed.name}, {speed.target}" for speed in speeds])
    axes.barh(range(len(speeds)), [speed.p50 for speed in speeds], color=_ACCENT, height=_BAR)
    axes.set_xlabel("milliseconds a call, median")
    return _svg(figure, "Latency of each side on each target")


def sensitivity_plot(layers: Sequence[tuple[str, float]]) -> str:
    """The layers that lose most when quantized, worst first."""
    worst = layers[:_LAYERS]
    if not worst:
        return ""
    figure, axes = _axes([name for name, _ in worst])
    axes.barh(range(len(worst)), [decibels for _, decibels in worst], color=_ACCENT, height=_BAR)
    axes.set_xlabel("signal to quantization noise, dB\n(short bars: sensitive layers)")
    return _svg(figure, "The most sensitive layers")


def _axes(names: Sequence[str]) -> tuple[Figure, Axes]:
    """A row a name, from the top. Names stand above their rows: beside them there is no room for a layer's."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("plots need matplotlib", "pip install 'perceiver-export[report]'") from error
    figure = Figure(figsize=(_WIDTH, 0.7 + _ROW * max(len(names), 2)), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(_OTHER)
    axes.tick_params(colors=_TEXT, labelsize=9)
    axes.set_yticks([])
    axes.set_ylim(len(names) - 1 + _BAR, -0.7)
    for row, name in enumerate(names):
        short = name if len(name) <= _LONGEST else f"…{name[1 - _LONGEST :]}"
        axes.annotate(short, (0, row - _BAR / 2 - 0.12), xycoords=("axes fraction", "data"), color=_TEXT, fontsize=9)
    axes.xaxis.label.set_color(_TEXT)
    axes.xaxis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: Figure, title: str) -> str:
    """An <svg> element without size, identifiers or date, with a title for screen readers."""
    import matplotlib

    content = io.StringIO()
    # Text stays text; a name with $ in it is no formula; the same plot is the same file.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = content.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", text, count=1)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for colour, variable in _COLOURS.items():
        text = text.replace(colour, variable)
    text = re.sub(r"font: ([0-9.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", text)
    return text.replace(">", f' role="img" aria-label="{title}">', 1)
