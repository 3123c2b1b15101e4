# SPDX-License-Identifier: Apache-2.0
"""Certificates in calibration.json: what was shown of a bundle, on which engine, on which instructions.

A certificate holds where it was measured. Another engine, another version or precision of it, or a CPU with other
instructions rounds and sums otherwise, so there it is not shown as valid. `calibration.certificate` writes them.
"""

from __future__ import annotations

import msgspec

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.machine import cpu_features

FILE = "calibration.json"


class Claim(msgspec.Struct, frozen=True):
    """``what`` is at most, or at least, ``limit`` (in ``unit``) with ``confidence``; ``bound`` is what was measured."""

    what: str
    sense: str
    limit: float
    unit: str
    bound: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.what} {'≤' if self.sense == 'at most' else '≥'} {self.limit:.4g} {self.unit}".rstrip()


class Certificate(msgspec.Struct, frozen=True):
    """``graphs``: SHA-256 of what ran, by file; ``reference`` what it was held against; ``data`` its fingerprint;
    ``caveats`` what was let through (``--allow-overlap``) and makes it say less.
    """

    claims: tuple[Claim, ...]
    samples: int
    data: str
    reference: str
    target: str
    engine: str
    instruction_set: tuple[str, ...]
    graphs: dict[str, str]
    date: str
    caveats: tuple[str, ...] = ()

    def __str__(self) -> str:
        claims = " and ".join(map(str, self.claims))
        where = f"{self.target}, {self.engine}, {' '.join(self.instruction_set) or 'no instructions of note'}"
        confidence = f"{100 * self.claims[0].confidence:g} %" if self.claims else "no"
        caveats = "".join(f"; but {caveat}" for caveat in self.caveats)
        return (
            f"{claims} against {self.reference} with {confidence} confidence each,"
            f" {self.samples:,} samples of {self.data[:16]}, {where}{caveats}"
        )


class _Record(msgspec.Struct):
    """The part of calibration.json that is read here."""

    certificates: tuple[Certificate, ...] = ()


def certificates(bundle: Bundle) -> tuple[Certificate, ...]:
    """All of a bundle, wherever they hold. Raises BundleError: a calibration.json that cannot be read."""
    if FILE not in bundle.manifest.files:
        return ()
    try:
        return msgspec.json.decode(bundle.file(FILE).read_bytes(), type=_Record).certificates
    except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(f"{FILE} cannot be read: {error}", "copy or quantize the bundle again") from error


def applies(certificate: Certificate, bundle: Bundle, target: str, engine: str) -> bool:
    """Whether it was measured on these graphs, on this target, engine and version, with this CPU's instructions."""
    files = bundle.manifest.files
    same = all(name in files and files[name].sha256 == digest for name, digest in certificate.graphs.items())
    return same and (certificate.target, certificate.engine, certificate.instruction_set) == (
        target,
        engine,
        cpu_features(),
    )


def valid_certificates(bundle: Bundle, target: str, engine: str) -> tuple[Certificate, ...]:
    """Those that apply here."""
    return tuple(one for one in certificates(bundle) if applies(one, bundle, target, engine))


def engine_of(described: dict[str, object]) -> str:
    """Name and version of what `Runtime.describe` describes, and the precision where it was built in another."""
    precision = str(described.get("precision"))
    built = f", in {precision}" if precision in ("fp16", "bf16") or " with " in precision else ""
    return f"{described.get('engine')} {described.get('version')}{built}"
