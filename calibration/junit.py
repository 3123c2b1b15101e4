# SPDX-License-Identifier: Apache-2.0
"""Gates as JUnit XML, which CI systems show as tests: held passes, not held fails, undecided is an error.

That outputs are finite is a test too: where they are not, it fails, and no gate was come to.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from perceiver_export.calibration.gates import Gate, advice
from perceiver_export.calibration.validated import Validation

_ELEMENT = {"not held": "failure", "undecided": "error"}


def junit(results: Sequence[Validation]) -> bytes:
    """One test suite a validation; a test case that says whether outputs were finite, and one a gate."""
    root = ElementTree.Element("testsuites", name="perceiver-export validate")
    for result in results:
        name = f"{result.candidate['name']} on {result.candidate.get('target', 'its target')}"
        outcomes = [gate.outcome for gate in result.gates]
        failed = result.failure is not None
        counts = {
            "tests": 1 + len(outcomes),
            "failures": outcomes.count("not held") + failed,
            "errors": outcomes.count("undecided"),
        }
        attributes = {key: str(value) for key, value in counts.items()}
        suite = ElementTree.SubElement(root, "testsuite", {"name": name} | attributes)
        _properties(suite, result)
        case = ElementTree.SubElement(suite, "testcase", classname=name, name="outputs are finite")
        if result.failure is not None:
            found = ElementTree.SubElement(case, "failure", type="not-finite", message=result.failure.message)
            found.text = result.failure.hint
        for gate in result.gates:
            _case(suite, name, gate)
    ElementTree.indent(root)
    document: bytes = ElementTree.tostring(root, encoding="utf-8", xml_declaration=True)
    return document + b"\n"


def _properties(suite: ElementTree.Element, result: Validation) -> None:
    holder = ElementTree.SubElement(suite, "properties")
    values = {"samples": str(result.samples), "data": result.data.source, "fingerprint": result.data.fingerprint}
    for metric in result.metrics:
        values[metric.name] = f"{metric.candidate.value:.6g} {metric.unit}".strip()
    for role, side in (("candidate", result.candidate), ("reference", result.reference or {})):
        values |= {f"{role} {key}": str(side[key]) for key in ("name", "target", "device", "version") if key in side}
        values |= {f"{role} {file}": digest for file, digest in side.get("graphs", {}).items()}
    pairs = [*(values | result.machine).items(), *(("warning", warning) for warning in result.warnings)]
    for key, value in pairs:
        ElementTree.SubElement(holder, "property", name=key, value=value)


def _case(suite: ElementTree.Element, name: str, gate: Gate) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=name, name=gate.wanted.typed)
    if gate.outcome in _ELEMENT:
        kind = gate.outcome.replace(" ", "-")
        found = ElementTree.SubElement(case, _ELEMENT[gate.outcome], type=kind, message=str(gate))
        found.text = advice(gate)
    else:
        ElementTree.SubElement(case, "system-out").text = str(gate)
