# SPDX-License-Identifier: Apache-2.0
"""One graph of a bundle: float in, canonical Q/DQ and its lowerings out, with a record of what was decided."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

import onnx_ir as ir

from perceiver_export.calibration.activations import Statistics
from perceiver_export.calibration.collect import load_graph
from perceiver_export.calibration.costs import stage_costs
from perceiver_export.calibration.linears import Exclusion, Linear, find_linears
from perceiver_export.calibration.lowering.ort import LOWERINGS
from perceiver_export.calibration.plan import Scheme, make_plans, product_sqnr, schemes_of
from perceiver_export.calibration.qdq import LinearPlan, write_qdq
from perceiver_export.calibration.ranges import LEVELS, Method
from perceiver_export.calibration.record import Excluded, Fp16Hazard, LinearRecord, PartRecord, Range
from perceiver_export.calibration.smoothing import smooth
from perceiver_export.runtimes.manifest import Part, Stage

_TELLING = 0.02  # exclusions above this share of the multiply-adds are told in the manifest, with their reason


@dataclass(frozen=True)
class PartOptions:
    """How to quantize; the arguments of `quantize` by the same names. ``raised``: layers that a search put back."""

    scheme: Scheme
    method: Method = "mse"
    smooth: bool = True
    correct_bias: bool = True
    weight_bits: int = 8
    precision: Mapping[str, Scheme] = field(default_factory=dict)
    raised: frozenset[str] = frozenset()


@dataclass(frozen=True)
class QuantizedPart:
    """``models`` by file name: the canonical graph first. ``linears`` are those that should run in integer kernels."""

    models: dict[str, ir.Model]
    lowered: dict[str, str]
    integer_linears: tuple[Linear, ...]
    record: PartRecord
    kept_float: dict[str, str]
    stages: tuple[Stage, ...]


@dataclass(frozen=True)
class PlannedPart:
    """A float graph, smoothed, and what is to become of its linears."""

    model: ir.Model
    linears: tuple[Linear, ...]
    exclusions: tuple[Exclusion, ...]
    schemes: dict[str, Scheme]
    alphas: dict[str, float]
    plans: tuple[LinearPlan, ...]


def plan_part(path: Path, statistics: Statistics, options: PartOptions) -> PlannedPart:
    """Read a graph, fold smoothing into it (and into ``statistics``), and decide on integers."""
    model = load_graph(path)
    linears, exclusions = find_linears(model.graph)
    schemes = schemes_of(linears, options.scheme, options.precision)
    alphas: dict[str, float] = {}
    if options.smooth:
        chosen = [linear for linear in linears if schemes[linear.group] == "int8"]
        alphas = smooth(model.graph, chosen, statistics, options.weight_bits)
    plans = make_plans(linears, schemes, statistics, options.method, options.weight_bits, options.correct_bias)
    return PlannedPart(model, tuple(linears), tuple(exclusions), schemes, alphas, tuple(plans))


def quantize_part(path: Path, part: Part, statistics: Statistics, options: PartOptions) -> QuantizedPart:
    """All of it. ``statistics`` change with smoothing."""
    planned = plan_part(path, statistics, options)
    record = _record(planned, statistics)  # before the graph changes under the linears
    integer = tuple(linear for linear in planned.linears if planned.schemes[linear.group] == "int8")
    write_qdq(planned.model, planned.plans)
    models, lowered = {part.file: planned.model}, {}
    stem = PurePosixPath(part.file).stem
    for target, lower in LOWERINGS.items() if integer else ():
        file = f"{stem}.{target}.onnx"
        models[file], lowered[target] = planned.model.clone(), file
        lower(models[file])
    stages = stage_costs(planned.model.graph)
    return QuantizedPart(models, lowered, integer, record, _kept_float(planned, options.raised), stages)


def _record(planned: PlannedPart, statistics: Statistics) -> PartRecord:
    plans = {plan.linear.name: plan for plan in planned.plans}
    total = sum(linear.macs for linear in planned.linears) + sum(one.macs for one in planned.exclusions) or 1
    linears = []
    for linear in planned.linears:
        plan = plans.get(linear.name)
        clip = None if plan is None or plan.scale is None else plan.scale * LEVELS
        sqnr = None if plan is None else product_sqnr(linear, plan.weight, clip, statistics)
        scheme, alpha = planned.schemes[linear.group], planned.alphas.get(linear.group)
        linears.append(LinearRecord(linear.name, linear.group, scheme, linear.macs, sqnr, alpha))
    scales = {str(plan.linear.activation.name): plan.scale for plan in planned.plans if plan.scale is not None}
    ranges = tuple(
        Range(name, float(one.low.min()), float(one.high.max()), scales.get(name))
        for name, one in statistics.activations.items()
    )
    hazards = tuple(
        Fp16Hazard(name, one.largest, one.depth) for name, one in statistics.hazards.items() if one.overflows
    )
    excluded = tuple(Excluded(one.name, one.macs / total, one.reason) for one in planned.exclusions)
    return PartRecord(tuple(linears), ranges, hazards, excluded)


def _kept_float(planned: PlannedPart, raised: frozenset[str]) -> dict[str, str]:
    """Layers that were to stay float, and what policy keeps float where it is much."""
    floats = [linear.group for linear in planned.linears if planned.schemes[linear.group] == "float"]
    kept = {group: "found by a search" if group in raised else "asked for" for group in floats}
    total = sum(linear.macs for linear in planned.linears) + sum(one.macs for one in planned.exclusions) or 1
    by_reason: dict[str, list[Exclusion]] = {}
    for one in planned.exclusions:
        by_reason.setdefault(one.reason, []).append(one)
    for reason, group in by_reason.items():
        share = sum(one.macs for one in group) / total
        if share > _TELLING:
            kept |= {one.name: f"{reason} ({one.macs / total:.1%} of the multiply-adds)" for one in group}
    return kept
