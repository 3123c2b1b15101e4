# SPDX-License-Identifier: Apache-2.0
"""The figures that `bench --save` keeps in a bundle's report.json, by CPU model and target.

Figures from another engine version, device, driver, instruction set or number of cores are ignored here, and a new
measurement replaces them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.runtimes.bundle import NOT_SAVED, REPORT, Bundle, change_report, read_report
from perceiver_export.runtimes.engines.backend import EngineOptions, Platform, find_target
from perceiver_export.runtimes.errors import BundleError, PerceiverExportError
from perceiver_export.runtimes.files import check_writable, converted
from perceiver_export.runtimes.machine import available_cores, cpu_features, cpu_name
from perceiver_export.runtimes.runtime import Array, quartiles

Times = dict[str, tuple[float, float, float]]  # by precision, quartiles of the time relative to fp32's


class Measured(msgspec.Struct, frozen=True):
    """A target's figures (milliseconds per call, samples per second, samples per call) and how they were measured."""

    p50: float
    throughput: float = 0.0
    batch: int = 1
    precision: str = ""
    threads: str = ""
    platform: str = ""
    unsteady: str = ""


class Relative(msgspec.Struct, frozen=True):
    """Times of a target's precisions relative to fp32's, and the platform where they were measured."""

    platform: str
    times: Times


def platform_of(target: str) -> str:
    """Everything besides the CPU model that affects times on a target here. CPU targets import no library.

    Raises DeviceError, MissingDependencyError.
    """
    known = find_target(target)
    here = Platform(known.module, known.version(), cpu_name(), features=cpu_features())
    if known.hardware != "CPU":
        here = known.backend().platform(target, EngineOptions())
    facts = (f"{here.library} {here.version}", here.device, here.driver, f"{available_cores()} cores")
    return ", ".join(filter(None, (*facts, *here.features)))


def timed_as(target: str, threads: int | None) -> str:
    """The key of a target's relative times in the report; it includes the number of threads, if given."""
    return target if threads is None else f"{target}, {threads} threads"


def measurements(bundle: Path) -> dict[str, dict[str, Measured]]:
    """The figures by CPU model and target, from any platform. Raises BundleError: the section is malformed."""
    try:
        return converted(read_report(bundle).get("bench", {}), dict[str, dict[str, Measured]])
    except msgspec.ValidationError as error:
        raise BundleError(f"`bench` in {bundle / REPORT} is unusable: {error}", "run `bench --save` again") from error


def median_latency(bundle: Bundle, target: str, threads: int | None) -> float | None:
    """Milliseconds per call, in the bundle's precision with these threads; None without steady figures for here."""
    with contextlib.suppress(PerceiverExportError):
        found = measurements(bundle.path).get(cpu_name(), {}).get(target)
        if found is not None and found.platform == platform_of(target):
            alike = (found.precision, found.threads) == (bundle.manifest.precision, str(threads or "all cores"))
            return found.p50 if alike and not found.unsteady else None
    return None


def relative_times(bundle: Path, target: str, threads: int | None = None) -> Times:
    """The relative times that `bench --precision auto --save` measured here; empty if there are none."""
    with contextlib.suppress(PerceiverExportError, msgspec.ValidationError):
        saved = converted(read_report(bundle).get("precisions", {}), dict[str, dict[str, Any]])
        if own := saved.get(cpu_name(), {}).get(timed_as(target, threads)):
            found = converted(own, Relative)
            return found.times if found.platform == platform_of(target) else {}
    return {}


def check_report(bundle: Path) -> None:
    """Raise BundleError if figures cannot be saved: the report is damaged, or the directory cannot be written."""
    read_report(bundle)
    check_writable(bundle / REPORT, BundleError, NOT_SAVED)


def save_figures(bundle: Path, section: str, new: Mapping[str, Any]) -> None:
    """Add figures by target to those of this CPU model in a section of the report. Raises BundleError."""

    def added(machines: Any) -> Any:
        before: dict[str, Any] = machines if isinstance(machines, dict) else {}
        here = before.get(cpu_name(), {})
        return {**before, cpu_name(): {**(here if isinstance(here, dict) else {}), **msgspec.to_builtins(new)}}

    change_report(bundle, section, added)


def save_relative(
    bundle: Path, targets: Iterable[str], threads: int | None, timed: Sequence[tuple[str, str, Array]]
) -> None:
    """Save times relative to fp32's; ``timed`` has (target, precision, times). Raises BundleError.

    A target without fp32 times gets an empty entry, so that older figures do not survive an inconclusive measurement.
    """
    found = {target: Relative("", {}) for target in targets}
    exact = {target: times for target, precision, times in timed if precision == "fp32"}
    for target, own in exact.items():
        times = {precision: quartiles(times / own) for name, precision, times in timed if name == target}
        found[target] = Relative(platform_of(target), times)
    save_figures(bundle, "precisions", {timed_as(target, threads): one for target, one in found.items()})
