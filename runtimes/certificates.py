# SPDX-License-Identifier: Apache-2.0
"""Certificates in calibration.json: proven claims about a bundle, with the reference, the engine and the device.

A certificate is valid only for the engine and device where it was measured, because another engine, version or
precision, a CPU with other instructions, another GPU or a rewritten graph round and sum differently. An engine compiled
again from the same graph counts as the same. `calibration.certify` writes certificates.
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


class Claim(msgspec.Struct, frozen=True):
    """``what`` is at most or at least (``sense``) ``limit`` (``unit``) with ``confidence``; ``bound`` was measured."""

    what: str
    sense: str
    limit: float
    unit: str
    bound: float
    confidence: float

    def __str__(self) -> str:
        return f"{self.what} {'≤' if self.sense == 'at most' else '≥'} {self.limit:.4g} {self.unit}".rstrip()


class Certificate(msgspec.Struct, frozen=True):
    """A certificate: claims, and where and on which data they were measured.

    ``graphs`` has the candidate's SHA-256 by file name (`graphs_of`); ``device`` is the name of the CPU or GPU. The
    reference is given by its name, target, engine and the SHA-256 of its graphs (for a checkpoint, of its weights).
    ``data`` is the fingerprint of the samples and their labels or targets; ``labels`` counts each label. ``caveats``
    weaken the claims: samples accepted by ``--allow-overlap``, inputs out of range, unseen labels, a very wide margin,
    and bounds that are not exact. If the run ended as soon as its gates were decided, ``sequential`` says where.
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
        """Short; `inspect --json` and calibration.json have all instructions, digests and labels."""
        claims = " and ".join(map(str, self.claims))
        *others, last = self.instruction_set or ("",)
        short = f"a CPU with {last} and {len(others)} more instruction sets"
        ours, theirs = f"{self.target}, {self.engine}", f"{self.reference_target}, {self.reference_engine}"
        where = f"on {short if on_cpu(self.target) and len(others) > 1 else self.place}"
        where = where if ours == theirs else f"{ours}, {where}"
        confidence = f"{100 * self.claims[0].confidence:g} %" if self.claims else "no"
        caveats = "".join(f"; but {caveat}" for caveat in self.caveats)
        each = "each " if len(self.claims) > 1 else ""
        samples = f"{self.samples:,} samples{_counted(self.labels)}, fingerprint {self.data[:16]}"
        stopped = f", {self.sequential}" if self.sequential else ""
        return (
            f"{claims} against {self.reference} ({theirs}), {each}with {confidence} confidence, {samples}{stopped}, "
            f"{where}{caveats}"
        )

    @property
    def place(self) -> str:
        """The device; for a CPU, also the instruction sets that affect its results."""
        instructions = ", ".join(self.instruction_set) or "no special instructions"
        return f"a CPU with {instructions}" if on_cpu(self.target) else self.device or "an unknown device"


def _counted(labels: Mapping[str, int]) -> str:
    """The counts of labels in words."""
    if not labels:
        return ""
    counts = dict.fromkeys(f"{number:,}" for number in (min(labels.values()), max(labels.values())))
    return f" ({len(labels):,} labels, {' to '.join(counts)} of each)"


class _Record(msgspec.Struct):
    """The part of calibration.json that holds certificates."""

    certificates: tuple[Certificate, ...] = ()


def certificates(bundle: Bundle) -> tuple[Certificate, ...]:
    """All certificates of a bundle, valid here or not. Raises BundleError: calibration.json cannot be read."""
    if FILE not in bundle.manifest.files:
        return ()
    return read_json(bundle.file(FILE), _Record, hint="copy or quantize the bundle again").certificates


def applies(certificate: Certificate, bundle: Bundle, target: str, engine: str) -> bool:
    """Whether a certificate was measured on the graphs that would run here, on this target, engine and version, with
    this CPU's instructions, and (except on a CPU) on this device. A certificate without a reference never applies.

    Raises DeviceError, MissingDependencyError: the target is not available.
    """
    found = (certificate.target, certificate.engine, certificate.instruction_set)
    if found != (target, engine, cpu_features()) or not certificate.reference_graphs:
        return False
    if certificate.graphs != graphs_of(bundle.manifest, target, precision_of(engine)):
        return False
    return on_cpu(target) or certificate.device == device_of(target)


def engine_of(described: Mapping[str, object]) -> str:
    """A name for the engine in `Runtime.describe`: its library and version, the precision of the build, the types in
    which it computes if they differ, and its flags. Engines of the same name compute alike.
    """
    precision, arithmetic, flags = str(described.get("precision")), described.get("arithmetic"), described.get("flags")
    # A joined engine whose parts differ has "bf16, fp32".
    halves = "fp16" in precision or "bf16" in precision or " with " in precision
    parts = [f"{described.get('engine')} {described.get('version')}"]
    parts += [f"in {precision}"] * halves
    if arithmetic and arithmetic != (precision if halves else "fp32"):
        parts.append(f"computing in {arithmetic}")
    return ", ".join(parts) + (flagged(flags) if isinstance(flags, Mapping) else "")


def precision_of(engine: str) -> Precision:
    """The precision of an engine's build, from its name by `engine_of`."""
    found = re.search(r", in (?:\S+ with )?(fp16|bf16)(?:,|$)", engine)
    return cast(Precision, found[1]) if found else "fp32"


def may_be(engine: str, library: str, options: EngineOptions) -> bool:
    """Whether an engine's name from `engine_of` has that library with its version, and these options. The rest of the
    name is known only when the engine is loaded.
    """
    flags = "".join(engine.partition(", with ")[1:])
    found = (engine.partition(",")[0], precision_of(engine), flags)
    return found == (library, options.precision, flagged(options.flags))


def flagged(flags: Mapping[str, object]) -> str:
    """The flags, as they end an engine's name."""
    return "".join(f", with {name}={value}" for name, value in sorted(flags.items()))


def device_of(target: str) -> str:
    """The name of the CPU, GPU or NPU on which a target runs here. Raises DeviceError, MissingDependencyError."""
    return find_target(target).backend().platform(target, EngineOptions()).device


def on_cpu(target: str) -> bool:
    """Whether a target runs on the CPU, where the instruction set and not the CPU's name decides how sums round."""
    return target in TARGETS and TARGETS[target].hardware == "CPU"
