# SPDX-License-Identifier: Apache-2.0
"""Certificates in calibration.json: what was shown of a bundle, against what, on which engine and device.

A certificate holds where it was measured. Another engine, another version or precision of it, a CPU with other
instructions or another GPU rounds and sums otherwise, and so does a graph that was rewritten since: there it is not
shown as valid. An engine that was compiled again from the same graph counts as the same. `calibration.certificate`
writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.engines.backend import EngineOptions, Precision
from perceiver_export.runtimes.engines.records import graphs_of
from perceiver_export.runtimes.engines.targets import TARGETS, find_target
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
    """``graphs``: SHA-256 of what ran, by file (`graphs_of`), on a ``device`` (the CPU's or the GPU's name).

    The reference is told by its name, where it ran, and the SHA-256 of its graphs, of a checkpoint its weights';
    ``data`` is the fingerprint of the samples and of what they were judged by; ``caveats`` what makes it say less:
    what ``--allow-overlap`` let through, inputs out of range, and bounds that are not exact.
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
    device: str = ""
    reference_target: str = ""
    reference_engine: str = ""
    reference_graphs: dict[str, str] = {}

    def __str__(self) -> str:
        claims = " and ".join(map(str, self.claims))
        device = "" if on_cpu(self.target) else f" on {self.device}"
        where = f"{self.target}{device}, {self.engine}, {' '.join(self.instruction_set) or 'no instructions of note'}"
        confidence = f"{100 * self.claims[0].confidence:g} %" if self.claims else "no"
        caveats = "".join(f"; but {caveat}" for caveat in self.caveats)
        each = " each" if len(self.claims) > 1 else ""
        return (
            f"{claims} against {self.reference} ({self.reference_target}, {self.reference_engine}) with {confidence}"
            f" confidence{each}, {self.samples:,} samples of {self.data[:16]}, {where}{caveats}"
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
    """Whether it was measured on the graphs that would run here, on this target, engine and version, with this CPU's
    instructions, and where the target is no CPU on this very device. One that does not tell its reference never is.

    Raises DeviceError, MissingDependencyError: a target that is not here.
    """
    found = (certificate.target, certificate.engine, certificate.instruction_set)
    if found != (target, engine, cpu_features()) or not certificate.reference_graphs:
        return False
    if certificate.graphs != graphs_of(bundle.manifest, target, precision_of(engine)):
        return False
    return on_cpu(target) or certificate.device == device_of(target)


def valid_certificates(bundle: Bundle, target: str, engine: str) -> tuple[Certificate, ...]:
    """Those that apply here."""
    return tuple(one for one in certificates(bundle) if applies(one, bundle, target, engine))


def engine_of(described: Mapping[str, object]) -> str:
    """Name and version of what `Runtime.describe` describes, and the precision where it was built in another."""
    precision = str(described.get("precision"))
    built = f", in {precision}" if precision in ("fp16", "bf16") or " with " in precision else ""
    return f"{described.get('engine')} {described.get('version')}{built}"


def precision_of(engine: str) -> Precision:
    """The precision that an engine was built in, from what `engine_of` calls it."""
    last = engine.rpartition(" ")[2]
    return "fp16" if last == "fp16" else "bf16" if last == "bf16" else "fp32"


def device_of(target: str) -> str:
    """Name of the CPU, GPU or NPU that a target runs on here. Raises DeviceError, MissingDependencyError."""
    return find_target(target).backend().platform(target, EngineOptions()).device


def on_cpu(target: str) -> bool:
    """Whether a target runs on the CPU, where instructions and not the model's name decide about sums."""
    return target in TARGETS and TARGETS[target].hardware == "CPU"
