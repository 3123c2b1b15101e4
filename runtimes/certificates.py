# SPDX-License-Identifier: Apache-2.0
"""Certificates in calibration.json: proven claims about a bundle, with the reference, the engine and the device.

A certificate holds only for the engine and device where it was measured. Another engine, another version or precision
of it, a CPU with other instructions, another GPU or a rewritten graph round and sum differently: there it is not shown
as valid. An engine that was compiled again from the same graph counts as the same. `calibration.certify` writes them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import cast

import msgspec

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.engines.backend import TARGETS, EngineOptions, Precision, find_target
from perceiver_export.runtimes.engines.cache import graphs_of
from perceiver_export.runtimes.files import read_json
from perceiver_export.runtimes.machine import cpu_features

FILE = "calibration.json"
_SHOWN = 10  # labels that are named with their counts


class Claim(msgspec.Struct, frozen=True):
    """``what`` is at most, or at least, ``limit`` (in ``unit``) with ``confidence``; ``bound`` was measured."""

    what: str
    sense: str
    limit: float
    unit: str
    bound: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.what} {'≤' if self.sense == 'at most' else '≥'} {self.limit:.4g} {self.unit}".rstrip()


class Certificate(msgspec.Struct, frozen=True):
    """``graphs``: SHA-256 of the candidate, by file (`graphs_of`); ``device``: the CPU's or the GPU's name.

    The reference has its name, its target and engine, and the SHA-256 of its graphs (for a checkpoint: its weights).
    ``data`` is the fingerprint of the samples and their labels or targets, ``labels`` counts each label. ``caveats``
    weaken the claims: samples that ``--allow-overlap`` accepted, inputs out of range, unseen labels, a very wide
    margin, and bounds that are not exact. ``sequential``: where a run stopped that ended once its gates were decided.
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
    labels: dict[str, int] = {}
    sequential: str = ""

    def __str__(self) -> str:
        claims = " and ".join(map(str, self.claims))
        device = "" if on_cpu(self.target) else f" on {self.device}"
        where = f"{self.target}{device}, {self.engine}, {' '.join(self.instruction_set) or 'no instructions of note'}"
        confidence = f"{100 * self.claims[0].confidence:g} %" if self.claims else "no"
        caveats = "".join(f"; but {caveat}" for caveat in self.caveats)
        each = " each" if len(self.claims) > 1 else ""
        samples = f"{self.samples:,} samples of {self.data[:16]}{_counted(self.labels)}"
        stopped = f", {self.sequential}" if self.sequential else ""
        return (
            f"{claims} against {self.reference} ({self.reference_target}, {self.reference_engine}) with {confidence}"
            f" confidence{each}, {samples}{stopped}, {where}{caveats}"
        )


def _counted(labels: Mapping[str, int]) -> str:
    """The counts of labels, in words."""
    if not labels:
        return ""
    if len(labels) <= _SHOWN:
        return f" ({', '.join(f'{name} {count:,}' for name, count in labels.items())})"
    return f" ({len(labels):,} labels, {min(labels.values()):,} to {max(labels.values()):,} of each)"


class _Record(msgspec.Struct):
    """The certificates of calibration.json."""

    certificates: tuple[Certificate, ...] = ()


def certificates(bundle: Bundle) -> tuple[Certificate, ...]:
    """All certificates of a bundle, valid here or not. Raises BundleError: a calibration.json that cannot be read."""
    if FILE not in bundle.manifest.files:
        return ()
    return read_json(bundle.file(FILE), _Record, hint="copy or quantize the bundle again").certificates


def applies(certificate: Certificate, bundle: Bundle, target: str, engine: str) -> bool:
    """Whether it was measured on the graphs that would run here, on this target, engine and version, with this CPU's
    instructions, and for targets other than the CPU on this device. One without a reference never applies.

    Raises DeviceError, MissingDependencyError: a target that is not here.
    """
    found = (certificate.target, certificate.engine, certificate.instruction_set)
    if found != (target, engine, cpu_features()) or not certificate.reference_graphs:
        return False
    if certificate.graphs != graphs_of(bundle.manifest, target, precision_of(engine)):
        return False
    return on_cpu(target) or certificate.device == device_of(target)


def valid_certificates(bundle: Bundle, target: str, engine: str) -> tuple[Certificate, ...]:
    """The certificates that apply here."""
    return tuple(one for one in certificates(bundle) if applies(one, bundle, target, engine))


def engine_of(described: Mapping[str, object]) -> str:
    """A name for the engine of `Runtime.describe`: library and version; the precision of the build and the types that
    it computes in, if they differ; and flags. Engines of one name compute alike.
    """
    precision, arithmetic, flags = str(described.get("precision")), described.get("arithmetic"), described.get("flags")
    halves = precision in ("fp16", "bf16") or " with " in precision
    parts = [f"{described.get('engine')} {described.get('version')}"]
    parts += [f"in {precision}"] * halves
    if arithmetic and arithmetic != (precision if halves else "fp32"):
        parts.append(f"computing in {arithmetic}")
    return ", ".join(parts) + (_flagged(flags) if isinstance(flags, Mapping) else "")


def precision_of(engine: str) -> Precision:
    """The precision of an engine's build, from its name by `engine_of`."""
    found = re.search(r", in (?:\S+ with )?(fp16|bf16)(?:,|$)", engine)
    return cast(Precision, found[1]) if found else "fp32"


def may_be(engine: str, library: str, options: EngineOptions) -> bool:
    """Whether an engine's name by `engine_of` has that library and version and these options. The rest of the name is
    known only when the engine is loaded.
    """
    flags = "".join(engine.partition(", with ")[1:])
    found = (engine.partition(",")[0], precision_of(engine), flags)
    return found == (library, options.precision, _flagged(options.flags))


def _flagged(flags: Mapping[str, object]) -> str:
    return "".join(f", with {name}={value}" for name, value in sorted(flags.items()))


def device_of(target: str) -> str:
    """Name of the CPU, GPU or NPU that a target runs on here. Raises DeviceError, MissingDependencyError."""
    return find_target(target).backend().platform(target, EngineOptions()).device


def on_cpu(target: str) -> bool:
    """Whether a target runs on the CPU: there the instructions decide how sums round, not the CPU's name."""
    return target in TARGETS and TARGETS[target].hardware == "CPU"
