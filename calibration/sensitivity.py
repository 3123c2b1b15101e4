# SPDX-License-Identifier: Apache-2.0
"""What each layer costs by itself: one layer quantized, all others float, the worst first.

Of each: the SQNR of its own products on sampled rows, and that of the model's outputs, in dB. The second decides, for a
layer may be exact and its output still be blown up by a softmax of large scores.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from perceiver_export.calibration.activations import Statistics
from perceiver_export.calibration.feeds import Data
from perceiver_export.calibration.linears import find_linears
from perceiver_export.calibration.observe import Call, Observation, Report, observe
from perceiver_export.calibration.pipeline import check_numbers, part_options
from perceiver_export.calibration.plan import Scheme, decibels, product_sqnr
from perceiver_export.calibration.qdq import LinearPlan, write_qdq
from perceiver_export.calibration.quantize_part import PartOptions, PlannedPart, plan_part
from perceiver_export.calibration.ranges import LEVELS
from perceiver_export.calibration.sessions import open_session
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import ExportError, MissingDependencyError, UsageError

_SAMPLES = 32
_FORMATS = (".json", ".svg", ".png")
_NO_MATPLOTLIB = ("a plot needs matplotlib", "pip install matplotlib, or give a .json")


class GroupSensitivity(msgspec.Struct, frozen=True):
    """A layer: the least SQNR of its products, that of its part's outputs (dB), its share of the multiply-adds, and the
    scheme that it was measured in.
    """

    part: str
    group: str
    product_sqnr: float
    output_sqnr: float
    share: float
    scheme: Scheme = "int8"


def measure_sensitivity(
    bundle: str | os.PathLike[str] | Bundle,
    data: Data,
    *,
    samples: int = _SAMPLES,
    threads: int | None = None,
    progress: Report | None = None,
    **wishes: Any,
) -> tuple[GroupSensitivity, ...]:
    """Sensitivity of every layer of an fp32 bundle, the worst output first. Costs one short run a layer.

    ``wishes`` are those of `pipeline.part_options`: scheme, method, smooth, …; layers that stay float are left out.
    Raises what `quantize` raises.
    """
    report = progress or (lambda what, done, total: None)
    check_numbers(samples, 0.0, threads)
    source = open_bundle(bundle)
    options = part_options(source, **wishes)
    return group_sensitivity(source, observe(source, data, samples, threads, report), options, threads, report)


def group_sensitivity(
    source: Bundle, observation: Observation, options: PartOptions, threads: int | None, report: Report
) -> tuple[GroupSensitivity, ...]:
    """The same of an observation, whose statistics smoothing changes."""
    found: list[GroupSensitivity] = []
    for name, part in source.manifest.parts.items():
        statistics = observation.statistics[name]
        planned = plan_part(source.file(part.file), statistics, options)
        total = sum(linear.macs for linear in planned.linears)
        groups = list(dict.fromkeys(plan.linear.group for plan in planned.plans))
        products = {plan.linear.name: _product_sqnr(plan, statistics) for plan in planned.plans}
        for index, group in enumerate(groups):
            report(f"sensitivity of {name}", index, len(groups))
            own = [plan.linear for plan in planned.plans if plan.linear.group == group]
            output = _output_sqnr(planned, group, source.path, name, observation.calls, threads)
            share = sum(linear.macs for linear in own) / total
            product = min(products[one.name] for one in own)
            found.append(GroupSensitivity(name, group, product, output, share, planned.schemes[group]))
    return tuple(sorted(found, key=lambda one: one.output_sqnr))


def _product_sqnr(plan: LinearPlan, statistics: Statistics) -> float:
    clip = None if plan.scale is None else plan.scale * LEVELS
    return product_sqnr(plan.linear, plan.weight, clip, statistics)


def _output_sqnr(
    planned: PlannedPart, group: str, folder: Path, part: str, calls: tuple[Call, ...], threads: int | None
) -> float:
    """The least SQNR of the part's outputs with this group alone quantized."""
    model = planned.model.clone()
    linears = {linear.name: linear for linear in find_linears(model.graph)[0]}
    write_qdq(
        model,
        [
            LinearPlan(linears[plan.linear.name], plan.weight, plan.scale, plan.bias)
            for plan in planned.plans
            if plan.linear.group == group
        ],
    )
    session = open_session(model, folder, threads)
    names = [output.name for output in session.get_outputs()]
    results = [dict(zip(names, session.run(None, call.feeds[part]), strict=True)) for call in calls]
    return min(
        decibels(
            np.concatenate([call.outputs[part][name] for call in calls]), np.concatenate([one[name] for one in results])
        )
        for name in names
    )


def check_file(path: Path) -> None:
    """Raise UsageError or MissingDependencyError, before minutes of work, where the file could not be written."""
    if path.suffix not in _FORMATS:
        raise UsageError(f"{path} is no file that sensitivities are written to", f"it ends in {', '.join(_FORMATS)}")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise UsageError(f"{path} cannot be written", "its folder is not there, or it is a folder itself")
    if path.suffix != ".json" and importlib.util.find_spec("matplotlib") is None:
        raise MissingDependencyError(*_NO_MATPLOTLIB)


def write_sensitivity(path: Path, groups: tuple[GroupSensitivity, ...]) -> None:
    """As JSON, or as a plot. Raises ExportError, MissingDependencyError (plots need matplotlib)."""
    temporary = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        if path.suffix == ".json":
            temporary.write_bytes(msgspec.json.format(msgspec.json.encode(groups), indent=2) + b"\n")
        else:
            _plot(temporary, groups)
        temporary.replace(path)
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror or error}", "choose another file") from error
    finally:
        with contextlib.suppress(OSError):  # of a read-only file system nothing is removed either
            temporary.unlink()


def _plot(path: Path, groups: tuple[GroupSensitivity, ...]) -> None:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError(*_NO_MATPLOTLIB) from error
    shown = groups[:60][::-1]
    figure = Figure(figsize=(9, 1.2 + 0.2 * len(shown)), layout="constrained")
    axes = figure.subplots()
    axes.barh([one.group for one in shown], [one.output_sqnr for one in shown], color="#4477aa", label="outputs")
    axes.plot([one.product_sqnr for one in shown], range(len(shown)), "o", ms=3, color="#cc6677", label="own product")
    schemes = " or ".join(sorted({one.scheme for one in groups}))
    axes.set_xlabel(f"SQNR in dB with this layer alone in {schemes}: the shorter, the more it costs")
    axes.tick_params(labelsize=7)
    axes.margins(y=0.01)
    figure.legend(loc="outside upper right", ncols=2)
    figure.savefig(path)
