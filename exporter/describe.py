# SPDX-License-Identifier: Apache-2.0
"""`inspect_bundle`: the graphs of a bundle or an ONNX file, their costs, precision and certificates."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field
from pathlib import Path

from perceiver_export.calibration.quantization.record import Calibration, read_calibration
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import Certificate, certificates, precision_of
from perceiver_export.runtimes.errors import BundleError, MissingDependencyError, require
from perceiver_export.runtimes.external_data import external_files
from perceiver_export.runtimes.files import parsing
from perceiver_export.runtimes.manifest import Manifest, Part
from perceiver_export.runtimes.presence import certificates_for, choose_target


@dataclass(frozen=True)
class Inspection:
    """The parts with shapes and costs, and the manifest and the record of quantization, None if there is none.

    ``certificates`` hold on this machine with the defaults of `load`. ``certified_with`` maps command-line options to
    the certificates that hold with them. ``certified_elsewhere`` names the targets and engines of all others.
    """

    path: Path
    parts: dict[str, Part]
    manifest: Manifest | None
    bytes_on_disk: int
    calibration: Calibration | None = None
    certificates: tuple[Certificate, ...] = ()
    certified_with: dict[str, tuple[Certificate, ...]] = field(default_factory=dict)
    certified_elsewhere: tuple[str, ...] = ()


def inspect_bundle(path: str | os.PathLike[str]) -> Inspection:
    """Inspect a bundle, which needs neither onnx nor torch, or an ONNX file.

    Raises BundleError, MissingDependencyError.
    """
    source = Path(path)
    if source.is_file() and source.suffix == ".onnx":
        return _inspect_onnx(source)
    bundle = open_bundle(source, verify="never")
    manifest = bundle.manifest
    size = bundle.num_bytes
    held: dict[str, tuple[Certificate, ...]] = {}
    elsewhere = []
    for one in certificates(bundle):
        options = _options(bundle, one)
        if options is None:
            elsewhere.append(f"{one.target} with {one.engine} on {one.place}")
        else:
            held[options] = (*held.get(options, ()), one)
    by_default = held.pop("", ())
    found = read_calibration(bundle)
    return Inspection(source, manifest.parts, manifest, size, found, by_default, held, tuple(elsewhere))


def _options(bundle: Bundle, certificate: Certificate) -> str | None:
    """The options with which a certificate holds here, empty for the defaults; None if it does not hold."""
    target, precision = certificate.target, precision_of(certificate.engine)
    if certificate in certificates_for(bundle, target):
        with contextlib.suppress(MissingDependencyError):  # no engine is installed
            if choose_target(bundle) == target:
                return ""
        return f"--device {target}"
    if certificate in certificates_for(bundle, target, precision):
        return f"--device {target} --precision {precision}"
    return None


def _inspect_onnx(path: Path) -> Inspection:
    common = require("onnx_ir.passes.common", "inspecting an ONNX file", "export")
    from perceiver_export.calibration.graphs import read_graph, stage_costs
    from perceiver_export.runtimes.opening import open_engine

    model = read_graph(path)
    engine = open_engine(path, "ort-cpu", threads=None)
    with parsing(str(path), "is not a valid ONNX model", "copy or export it again", BundleError):
        common.ShapeInferencePass()(model)
        stages = stage_costs(model.graph)
    size = sum(file.stat().st_size for file in {path, *(path.parent / name for name in external_files(path))})
    return Inspection(path, {"model": Part(path.name, engine.inputs, engine.outputs, stages)}, None, size)
