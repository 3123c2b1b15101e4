# SPDX-License-Identifier: Apache-2.0
"""The report of a validation and its bundle, as one HTML file that opens offline, as Markdown, or as JUnit XML."""

from __future__ import annotations

import contextlib
import html
import importlib.metadata
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import msgspec

from perceiver_export.calibration.data.sources import Data
from perceiver_export.calibration.quantization.record import Calibration, read_calibration
from perceiver_export.calibration.report.tables import Report, Table, tables
from perceiver_export.calibration.validation.gates import advice
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.calibration.validation.validation import machine
from perceiver_export.runtimes.benchmark import Bench, bench
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.certificates import certificates, engine_of, precision_of
from perceiver_export.runtimes.errors import DataError, DeviceError, EngineError, UsageError, printable, require


def check_report_file(path: Path) -> None:
    """Raise UsageError unless ``path`` ends in .html or .md, and MissingDependencyError if jinja2 is missing."""
    if path.suffix not in (".html", ".md"):
        raise UsageError(f"cannot write a report as {path.suffix or path.name}", "use a name that ends in .html or .md")
    require("jinja2", "a report", "report")


def write_report(path: Path, report: Report) -> None:
    """Write to ``path``, as HTML or Markdown by its suffix. Raises UsageError, MissingDependencyError, OSError."""
    check_report_file(path)
    path.write_text(render(report, path.suffix), encoding="utf-8")


def render(report: Report, ending: str = ".html") -> str:
    """One HTML document with inline images and bars, in light or dark by the reader's setting, without scripts.

    ``.md`` gives Markdown for a pull request, without images, because such pages do not accept them inline.
    """
    return str(_environment(ending).get_template(f"report{ending}.j2").render(report=report))


def page(table: Table) -> str:
    """One table as an HTML document like `render`'s. Raises MissingDependencyError."""
    require("jinja2", "a page", "report")
    return str(_environment(".html").get_template("page.html.j2").render(table=table))


def _environment(ending: str) -> Any:
    import jinja2

    def finalize(value: Any) -> Any:
        """Escape control characters, which may come from a file; in Markdown, escape HTML too."""
        text = "\n".join(map(printable, value.split("\n"))) if type(value) is str else value
        return html.escape(text, quote=False) if ending == ".md" and isinstance(text, str) else text

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=ending == ".html",
        finalize=finalize,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["anchor"] = lambda text: re.sub(r"[^\w-]+", "-", str(text).lower())
    environment.filters["cell"] = lambda text: str(text).replace("|", "\\|").replace("\n", " ")
    return environment


_ELEMENTS = {"not held": "failure", "undecided": "error", "vacuous": "error"}


def junit(results: Sequence[Validation]) -> bytes:
    """One test suite per validation, with one test case for finite outputs and one per gate.

    A gate that does not hold is a failure; an undecided or vacuous one is an error.
    """
    root = ElementTree.Element("testsuites", name="perceiver-export validate")
    for result in results:
        name = f"{result.candidate['name']} on {result.candidate.get('target', 'its target')}"
        failure = result.failure
        # Name, element, type, message and hint of each case.
        cases = [("outputs are finite", "", "", "", "")]
        if failure is not None:
            cases = [("outputs are finite", "failure", "not-finite", failure.message, failure.hint)]
        for gate in result.gates:
            element = _ELEMENTS.get(gate.outcome, "")
            hint = advice(gate) if element else ""
            cases.append((gate.wanted.typed, element, gate.outcome.replace(" ", "-"), str(gate), hint))
        elements = [case[1] for case in cases]
        counts = {"tests": len(cases), "failures": elements.count("failure"), "errors": elements.count("error")}
        attributes = {key: str(value) for key, value in counts.items()}
        suite = ElementTree.SubElement(root, "testsuite", {"name": name} | attributes)
        holder = ElementTree.SubElement(suite, "properties")
        for key, value in _properties(result):
            ElementTree.SubElement(holder, "property", name=key, value=value)
        for title, element, kind, said, hint in cases:
            case = ElementTree.SubElement(suite, "testcase", classname=name, name=title)
            if element:
                ElementTree.SubElement(case, element, type=kind, message=said).text = hint
            elif said:
                ElementTree.SubElement(case, "system-out").text = said
    for one in root.iter():  # XML does not allow control characters
        one.text = one.text and printable(one.text)
        one.attrib = {key: printable(value) for key, value in one.attrib.items()}
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _properties(result: Validation) -> list[tuple[str, str]]:
    values = {"samples": str(result.samples), "data": result.data.source, "fingerprint": result.data.fingerprint}
    for metric in result.metrics:
        values[metric.name] = f"{metric.candidate.value:.6g} {metric.unit}".strip()
    for role, side in (("candidate", result.candidate), ("reference", result.reference or {})):
        described = {key: side[key] for key in ("name", "target", "device", "version") if key in side}
        values |= {f"{role} {key}": str(value) for key, value in (described | side.get("graphs", {})).items()}
    return [*(values | result.machine).items(), *(("warning", warning) for warning in result.warnings)]


_RUNS = 50
_LAYERS = 15  # rows of a profile
_MEASURED = "Each layer's product against the reference's, on the first samples; the worst run of each layer."
_RECORDED = "Each layer's own product against fp32's, at calibration; the worst run of each layer."
_MOST_MOVED = 4 << 30  # bytes: the products of both graphs are in memory at once, and a report must not exhaust it

Layers = list[tuple[str, float]]


def gather(
    bundle: BundleLike,
    validations: Sequence[Validation],
    reference: str | os.PathLike[str] | None = None,
    command: str = "",
    threads: int | None = None,
    data: Data | None = None,
) -> Report:
    """A report on a validated bundle. Each target is timed, alternating with ``reference`` if that is a bundle.

    Targets of merged shards that ran on another machine are neither timed nor profiled.

    With a reference and ``data``, each layer's sensitivity is measured on them; otherwise it is the value that
    `quantize` recorded at calibration. Raises the errors of `bench`.
    """
    opened, here = open_bundle(bundle), machine()
    ran_here = [one for one in validations if one.machine == here]
    manifest, record = opened.manifest, read_calibration(opened)
    other = Path(reference) if reference is not None and (Path(reference) / "manifest.json").is_file() else None
    layers, note = _measured(opened, other, data, threads), _MEASURED
    if layers is None:
        layers, note = _recorded(record), _RECORDED
    timed = [_timed(opened.path, other, one, threads) for one in ran_here]
    tools = {f"{name} (at export)": version for name, version in manifest.tools.items()}
    return Report(
        f"{manifest.name}: {manifest.task}, {manifest.precision}",
        tuple(validations),
        tuple(speed for one in timed for speed in one.measurements),
        tuple(layers),
        (*_profiles(opened, ran_here, threads), *tables(manifest, record)),
        note if layers else "",
        tuple(_certified(opened, validations)),
        command,
        {"perceiver-export": importlib.metadata.version("perceiver-export"), **tools},
        "; ".join(one.unsteady for one in timed if one.unsteady),
    )


def _profiles(bundle: Bundle, validations: Sequence[Validation], threads: int | None) -> Iterator[Table]:
    """The slowest layers on each target, in the validated precision; none for a target that reports no kernels."""
    for validation in validations:
        target, precision = str(validation.candidate.get("target")), precision_of(engine_of(validation.candidate))
        with contextlib.suppress(ImportError, DeviceError, EngineError):  # onnx is missing, or no kernels are reported
            from perceiver_export.calibration.report.profile import profile

            found = profile(bundle, device=target, precision=precision, threads=threads)
            # Without times, because those of a report come from `bench`, and a second measurement would differ.
            table = replace(found.table(most=_LAYERS), title=f"Slowest layers on {target}")
            yield table.without("ms>", "GFLOP/s>", "GB/s>")


def _certified(bundle: Bundle, validations: Sequence[Validation]) -> Iterator[str]:
    """The certificates that these validations support; none if a gate did not hold."""
    for validation in validations if all(validation.held for validation in validations) else ():
        limits = {(gate.wanted.subject, gate.wanted.limit) for gate in validation.gates}
        side, instructions = validation.candidate, validation.machine.get("instruction set", "")
        place = (side.get("target"), engine_of(side), tuple(instructions.split()), side.get("graphs"))
        for one in certificates(bundle):
            same = (one.target, one.engine, one.instruction_set, one.graphs) == place
            same &= one.data == validation.data.fingerprint
            if same and {(claim.what, claim.limit) for claim in one.claims} <= limits:
                yield str(one)


def _timed(path: Path, other: Path | None, validation: Validation, threads: int | None) -> Bench:
    """Time the validated engines. The candidate gets a ratio to the reference only if both times are steady."""
    target = str(validation.candidate.get("target", ""))
    precision = precision_of(engine_of(validation.candidate))
    how: dict[str, Any] = {"device": target, "runs": _RUNS, "threads": threads, "precision": precision}
    found = bench(path, against=other, against_precision="fp32", **how)
    first, *others = (msgspec.structs.replace(one, ratio=None, ratio_quartiles=None) for one in found.measurements)
    if not found.unsteady:
        first = msgspec.structs.replace(first, ratio=found.ratio, ratio_quartiles=found.ratio_quartiles)
    return msgspec.structs.replace(found, measurements=(first, *others))


def _measured(bundle: Bundle, reference: Path | None, data: Data | None, threads: int | None) -> Layers | None:
    """Each layer's error in the bundle's current files, so that damage shows; None if it cannot be measured."""
    if reference is None or data is None or bundle.manifest.quantization is None:
        return None
    exact = open_bundle(reference, "never").manifest
    moved = sum(stage.activation_bytes for part in exact.parts.values() for stage in part.stages)
    if exact.quantization is not None or moved > _MOST_MOVED:
        return None
    try:
        from perceiver_export.calibration.quantization.sensitivity import measure_layer_errors

        found = measure_layer_errors(bundle, reference, data, threads=threads)
    except (ImportError, UsageError, DataError):  # onnx is missing, the layers differ, or the data contains targets
        return None
    return [(error.group, error.sqnr) for error in found]


def _recorded(record: Calibration | None) -> Layers:
    """Each group's worst run at calibration, worst first."""
    parts = record.parts.values() if record is not None else ()
    linears = [(one.sqnr, one.group) for part in parts for one in part.linears if one.sqnr is not None]
    worst = {group: sqnr for sqnr, group in sorted(linears, reverse=True)}
    return sorted(worst.items(), key=lambda item: item[1])
