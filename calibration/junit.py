# SPDX-License-Identifier: Apache-2.0
"""Gates as JUnit XML, which CI systems show as tests: held passes, not held fails, undecided is an error."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree

from perceiver_export.calibration.gates import Gate, advice
from perceiver_export.calibration.validation import Validation

_ELEMENT = {"not held": "failure", "undecided": "error"}


def junit(results: Sequence[Validation]) -> bytes:
    """One test suite a validation, one test case a gate; without gates the case says that outputs were finite."""
    root = ElementTree.Element("testsuites", name="perceiver-export validate")
    for result in results:
        name = f"{result.candidate['name']} on {result.candidate.get('target', 'its target')}"
        outcomes = [gate.outcome for gate in result.gates]
        counts = {
            "tests": max(1, len(outcomes)),
            "failures": outcomes.count("not held"),
            "errors": outcomes.count("undecided"),
        }
        attributes = {key: str(value) for key, value in counts.items()}
        suite = ElementTree.SubElement(root, "testsuite", {"name": name} | attributes)
        _properties(suite, result)
        if not result.gates:
            ElementTree.SubElement(suite, "testcase", classname=name, name="outputs are finite")
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
    for key, value in (values | result.machine).items():
        ElementTree.SubElement(holder, "property", name=key, value=value)


def _case(suite: ElementTree.Element, name: str, gate: Gate) -> None:
    case = ElementTree.SubElement(suite, "testcase", classname=name, name=gate.wanted.typed)
    if gate.outcome in _ELEMENT:
        kind = gate.outcome.replace(" ", "-")
        found = ElementTree.SubElement(case, _ELEMENT[gate.outcome], type=kind, message=str(gate))
        found.text = advice(gate)
    else:
        ElementTree.SubElement(case, "system-out").text = str(gate)
