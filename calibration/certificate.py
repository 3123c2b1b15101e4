# SPDX-License-Identifier: Apache-2.0
"""Writing certificates: from gates that held on samples that nothing was chosen by, into the bundle."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from perceiver_export.calibration.gates import CAVEAT, Gate
from perceiver_export.calibration.references import check_reference
from perceiver_export.calibration.statistics import CONFIDENCE
from perceiver_export.calibration.validated import Validation
from perceiver_export.calibration.write import file_entry, new_bundle
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import FILE, Certificate, Claim, certificates, engine_of, precision_of
from perceiver_export.runtimes.engines.records import graphs_of
from perceiver_export.runtimes.errors import DataError, UsageError
from perceiver_export.runtimes.machine import cpu_features
from perceiver_export.runtimes.manifest import encode_manifest

_REFUSED = {
    "one label": "certify on data with all the labels that the model will see",
    "chance": "a reference that guesses shows nothing: check the data's labels, or take another reference",
}
_ELSEWHERE = "copy the bundle to where it can be written, and certify it there"
_CAVEATS = ("overlap", "repeated", "range")  # the first two only where --allow-overlap lets them through


def certify(
    bundle: str | os.PathLike[str] | Bundle, validations: Sequence[Validation], searched: Sequence[str] = ()
) -> tuple[Certificate, ...]:
    """Write a certificate for each target that was validated into the bundle, in place of earlier ones for it.

    ``searched`` are digests of the samples that the bundle was chosen on: no later certificate may use them. The bundle
    is replaced as a whole: readers see the old one or the new one.

    Raises GateError or UndecidedError where a gate did not hold; UsageError where none was asked, where something else
    than this bundle was validated, or where the reference can bear no certificate (`references.check_reference`);
    DataError where the samples cannot.
    """
    opened = open_bundle(bundle)
    made = tuple(_certificate(opened, validation) for validation in validations)
    kept = tuple(one for one in certificates(opened) if not any(_same_place(one, new) for new in made))
    _write(opened, (*kept, *made), searched)
    return made


def _certificate(bundle: Bundle, validation: Validation) -> Certificate:
    if not validation.gates:
        raise UsageError("a certificate says that a gate held", "ask for one: --max-drop, --min-agreement")
    validation.require()
    warnings = dict(zip(validation.warning_kinds, validation.warnings, strict=True))
    for kind, hint in _REFUSED.items():
        if kind in warnings:
            raise DataError(warnings[kind], hint)
    check_reference(validation.candidate, validation.reference)
    target, engine = str(validation.candidate["target"]), engine_of(validation.candidate)
    graphs = graphs_of(bundle.manifest, target, precision_of(engine))
    if validation.candidate.get("graphs") != graphs:
        raise UsageError(
            f"other graphs were validated than those that {bundle.path} has for {target}", "validate this bundle again"
        )
    reference = validation.reference or {}
    return Certificate(
        claims=tuple(map(_claim, validation.gates)),
        samples=validation.samples,
        data=validation.data.fingerprint,
        reference=str(reference.get("name")),
        target=target,
        engine=engine,
        instruction_set=cpu_features(),
        graphs=graphs,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        caveats=(*(warnings[kind] for kind in _CAVEATS if kind in warnings), *_of_means(validation.gates)),
        device=str(validation.candidate.get("device", "")),
        reference_target=str(reference.get("target")),
        reference_engine=engine_of(reference),
        reference_graphs=dict(reference.get("graphs", {})),
    )


def _of_means(gates: Sequence[Gate]) -> Iterator[str]:
    """What makes a bound less sure than the exact ones: a certificate goes further than the page that says it."""
    names = [gate.wanted.subject for gate in gates if gate.bounds == "bootstrap"]
    if names:
        yield f"the bound of {' and of '.join(names)} is {CAVEAT}"


def _claim(gate: Gate) -> Claim:
    """What was asked, not what was measured: the margin was fixed before the samples were seen."""
    name = gate.wanted.subject
    if gate.wanted.option == "--min-agreement":
        return Claim(name, "at least", gate.wanted.limit, gate.wanted.unit, gate.lower, CONFIDENCE)
    return Claim(name, "at most", gate.wanted.limit, gate.wanted.unit, gate.upper, CONFIDENCE)


def _same_place(one: Certificate, other: Certificate) -> bool:
    """Whether one takes the other's place: the same things claimed, in the same place, against the same reference."""
    places = [
        (
            (c.target, c.engine, c.instruction_set, c.device),
            (c.reference_target, c.reference_engine, c.reference_graphs),
            {claim.what for claim in c.claims},
        )
        for c in (one, other)
    ]
    return places[0] == places[1]


def _write(bundle: Bundle, made: Sequence[Certificate], searched: Sequence[str]) -> None:
    with new_bundle(bundle.path, overwrite=True, elsewhere=_ELSEWHERE) as directory:
        shutil.copytree(bundle.path, directory, copy_function=_link, dirs_exist_ok=True)
        record: dict[str, Any] = {}
        if FILE in bundle.manifest.files:
            record = msgspec.json.decode((directory / FILE).read_bytes())
        record["certificates"] = made
        record["searched"] = sorted({*record.get("searched", ()), *searched})
        for name in (FILE, "manifest.json"):
            (directory / name).unlink(missing_ok=True)  # a link to the old one's content
        (directory / FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=2) + b"\n")
        files = {**bundle.manifest.files, FILE: file_entry(directory / FILE)}
        manifest = msgspec.structs.replace(bundle.manifest, files=files)
        (directory / "manifest.json").write_bytes(encode_manifest(manifest))


def _link(source: str, target: str) -> None:
    """Weights of hundreds of MB need no second copy."""
    with contextlib.suppress(OSError):
        os.link(source, target)
        return
    shutil.copyfile(source, target)
