# SPDX-License-Identifier: Apache-2.0
"""Writes certificates into a bundle: gates that held on samples that played no part in choosing the bundle."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from perceiver_export.calibration.bundles import copy_tree, new_bundle, write_record
from perceiver_export.calibration.validation.gates import AT_LEAST, CAVEAT
from perceiver_export.calibration.validation.reference import check_reference
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.calibration.validation.statistics import CONFIDENCE
from perceiver_export.runtimes.bundle import Bundle, BundleLike, open_bundle
from perceiver_export.runtimes.certificates import FILE, Certificate, Claim, certificates, engine_of
from perceiver_export.runtimes.errors import DataError, ExportError, UsageError
from perceiver_export.runtimes.files import check_writable, read_json

_REFUSED = {
    "one label": "certify on data with all the labels that the model will see",
    "chance": "check the data's labels, or give another reference: one that guesses shows nothing",
}
_ELSEWHERE = "copy the bundle to a writable place, and certify it there"


def certify(
    bundle: BundleLike, validations: Sequence[Validation], searched: Sequence[str] = ()
) -> tuple[Certificate, ...]:
    """Write one certificate per validated target into the bundle, replacing earlier ones for the same place.

    ``searched`` are digests of the samples that the bundle was chosen on: no later certificate may use them. The bundle
    is replaced as a whole: readers see the old one or the new one.

    Raises GateError or one of its kinds if a gate did not hold; UsageError if there was no gate, if another bundle was
    validated, or if the reference cannot support a certificate; DataError if the samples cannot.
    """
    opened = open_bundle(bundle)
    made = tuple(_certificate(opened, validation) for validation in validations)
    kept = tuple(one for one in certificates(opened) if _place(one) not in map(_place, made))
    _write(opened, (*kept, *made), searched)
    return made


def check_certifiable(bundle: BundleLike) -> None:
    """Raise ExportError, before models run for minutes, if no certificate can be written into the bundle."""
    check_writable(bundle.path if isinstance(bundle, Bundle) else Path(bundle), ExportError, _ELSEWHERE)


def _certificate(bundle: Bundle, validation: Validation) -> Certificate:
    if not validation.gates:
        raise UsageError("a certificate needs a gate", "give --max-drop or --min-agreement")
    validation.require()
    warnings = dict(zip(validation.warning_kinds, validation.warnings, strict=True))
    for kind, hint in _REFUSED.items():
        if kind in warnings:
            raise DataError(warnings[kind], hint)
    check_reference(validation.candidate, validation.reference)
    target, engine = str(validation.candidate["target"]), engine_of(validation.candidate)
    graphs: dict[str, str] = validation.candidate.get("graphs", {})
    files = {name: entry.sha256 for name, entry in bundle.manifest.files.items()}
    if not graphs or not graphs.items() <= files.items():
        raise UsageError(f"{bundle.path} does not have the graphs that were validated", "validate this bundle again")
    reference, claims = validation.reference or {}, []
    for gate in validation.gates:  # a claim is the requested limit, because that was fixed before the samples were seen
        wanted, bound = gate.wanted, gate.lower if gate.wanted.what == AT_LEAST else gate.upper
        claims.append(Claim(wanted.subject, wanted.what, wanted.limit, wanted.unit, bound, CONFIDENCE))
    means = " and of ".join(gate.wanted.subject for gate in validation.gates if gate.bounds == "bootstrap")
    caveat = [f"the bound of {means} is {CAVEAT}"] if means else []  # readers of a certificate may not have the manual
    return Certificate(
        claims=tuple(claims),
        samples=validation.samples,
        data=validation.data.fingerprint,
        reference=str(reference.get("name")),
        target=target,
        engine=engine,
        instruction_set=tuple(validation.machine["instruction set"].split()),
        graphs=graphs,
        date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        caveats=(*validation.gates[0].reservations, *caveat),
        device=str(validation.candidate.get("device", "")),
        reference_target=str(reference.get("target")),
        reference_engine=engine_of(reference),
        reference_graphs=dict(reference.get("graphs", {})),
        labels=validation.data.labels,
        sequential=validation.data.sequential,
    )


def _place(one: Certificate) -> tuple[object, ...]:
    """The subjects, place and reference of a certificate; a newer one with the same replaces it."""
    where = (one.target, one.engine, one.instruction_set, one.device)
    against = (one.reference_target, one.reference_engine, one.reference_graphs)
    return *where, *against, {claim.what for claim in one.claims}


def _write(bundle: Bundle, made: Sequence[Certificate], searched: Sequence[str]) -> None:
    with new_bundle(bundle.path, overwrite=True, elsewhere=_ELSEWHERE) as directory:
        copy_tree(bundle.path, directory)
        record = read_json(directory / FILE, dict[str, Any]) if FILE in bundle.manifest.files else {}
        record["certificates"] = made
        record["searched"] = sorted({*record.get("searched", ()), *searched})
        for name in (FILE, "manifest.json"):
            (directory / name).unlink(missing_ok=True)  # a link to the old one's content
        write_record(directory, bundle.manifest, record)
