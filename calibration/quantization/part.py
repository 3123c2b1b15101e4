# SPDX-License-Identifier: Apache-2.0
"""Quantize one graph of a bundle: float in, canonical Q/DQ and its lowered forms out, with a record of decisions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx_ir as ir
from msgspec import structs

from perceiver_export.calibration.graphs import load_graph, stage_costs
from perceiver_export.calibration.lowering.onnxruntime import LOWERINGS
from perceiver_export.calibration.quantization.integers import LinearPlan, make_plans, schemes_of, write_qdq
from perceiver_export.calibration.quantization.linears import Exclusion, Linear, find_linears
from perceiver_export.calibration.quantization.options import QuantizeOptions
from perceiver_export.calibration.quantization.record import Excluded, Fp16Hazard, LinearRecord, PartRecord, Range
from perceiver_export.calibration.quantization.smoothing import smooth
from perceiver_export.calibration.quantization.statistics import Statistics
from perceiver_export.runtimes.manifest import Part

_TELLING = 0.02  # the manifest lists exclusions above this share of the multiply-adds


@dataclass(frozen=True)
class PlannedPart:
    """A smoothed float graph with a plan for each linear layer. ``alphas`` has smoothing's α by group."""

    model: ir.Model
    plans: tuple[LinearPlan, ...]
    exclusions: tuple[Exclusion, ...]
    alphas: dict[str, float]

    @property
    def integer(self) -> tuple[Linear, ...]:
        """The linear layers that integer kernels should run."""
        return tuple(plan.linear for plan in self.plans if plan.scheme == "int8")


@dataclass(frozen=True)
class QuantizedPart:
    """A quantized part: ``models`` by file name, ``part`` for the manifest; ``kept_float``: reasons by layer."""

    part: Part
    models: dict[str, ir.Model]
    integer_linears: tuple[Linear, ...]
    record: PartRecord
    kept_float: dict[str, str]


def plan_part(path: Path, statistics: Statistics, options: QuantizeOptions) -> PlannedPart:
    """Read a graph, fold smoothing into it and into ``statistics``, and choose the integers."""
    model = load_graph(path)
    linears, exclusions = find_linears(model.graph)
    schemes = schemes_of(linears, options.scheme, options.schemes)
    integer = [linear for linear in linears if schemes[linear.group] == "int8"]
    alphas = smooth(model.graph, integer, statistics, options.bits) if options.smooth else {}
    plans = make_plans(linears, schemes, statistics, options)
    return PlannedPart(model, tuple(plans), tuple(exclusions), alphas)


def quantize_part(
    path: Path, part: Part, statistics: Statistics, options: QuantizeOptions, raised: Collection[str] = ()
) -> QuantizedPart:
    """Quantize the graph at ``path``. Smoothing changes ``statistics``; ``raised`` has groups that a search raised."""
    planned = plan_part(path, statistics, options)
    total = sum(one.linear.macs for one in planned.plans) + sum(one.macs for one in planned.exclusions) or 1
    record = _record(planned, statistics, total)  # before the graph changes
    write_qdq(planned.model, planned.plans)
    models, lowered = {part.file: planned.model}, {}
    for target, lower in LOWERINGS.items() if planned.integer else ():
        lowered[target] = f"{PurePosixPath(part.file).stem}.{target}.onnx"
        models[lowered[target]] = planned.model.clone()
        lower(models[lowered[target]])
    described = structs.replace(part, lowered=lowered, stages=stage_costs(planned.model.graph))
    return QuantizedPart(described, models, planned.integer, record, _kept_float(planned, raised, total))


def _record(planned: PlannedPart, statistics: Statistics, total: int) -> PartRecord:
    linears = tuple(
        LinearRecord(
            *(one.linear.name, one.linear.group, one.scheme, one.linear.macs),
            one.product_sqnr(statistics),
            planned.alphas.get(one.linear.group),
        )
        for one in planned.plans
    )
    scales = {str(one.linear.activation.name): one.scale for one in planned.plans if one.scale is not None}
    ranges = tuple(
        Range(name, float(one.low.min()), float(one.high.max()), scales.get(name))
        for name, one in statistics.activations.items()
    )
    hazards = tuple(
        Fp16Hazard(name, one.largest, one.depth) for name, one in statistics.hazards.items() if one.overflows
    )
    return PartRecord(
        linears, ranges, hazards, tuple(Excluded(one.name, one.macs / total, one.reason) for one in planned.exclusions)
    )


def _kept_float(planned: PlannedPart, raised: Collection[str], total: int) -> dict[str, str]:
    """Layers that stay float by request or search, and products that policy keeps float if they are a large share."""
    floats = [one.linear.group for one in planned.plans if one.scheme == "float"]
    kept = {group: "chosen by the search" if group in raised else "requested" for group in floats}
    for one in planned.exclusions:
        if sum(other.macs for other in planned.exclusions if other.reason == one.reason) > _TELLING * total:
            kept[one.name] = f"{one.reason} ({one.macs / total:.1%} of the multiply-adds)"
    return kept
