# SPDX-License-Identifier: Apache-2.0
"""What a bundle or an ONNX file holds, what it costs, and what runs in integer kernels."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from perceiver_export.calibration.record import Calibration, read_calibration
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.certificates import applies, certificates, on_cpu
from perceiver_export.runtimes.errors import BundleError, MissingDependencyError
from perceiver_export.runtimes.manifest import Manifest, Part
from perceiver_export.runtimes.presence import devices


@dataclass(frozen=True)
class Inspection:
    """Parts with shapes and costs; the manifest where there is one; how it was quantized where it was."""

    path: Path
    parts: dict[str, Part]
    manifest: Manifest | None
    bytes_on_disk: int
    calibration: Calibration | None = None
    certificates: tuple[str, ...] = ()  # that hold on a target of this machine
    certified_elsewhere: tuple[str, ...] = ()  # targets and engines of those that do not


def inspect_bundle(path: str | os.PathLike[str]) -> Inspection:
    """Inspect a bundle (from its manifest: neither onnx nor torch is needed) or an ONNX file.

    Raises BundleError, MissingDependencyError.
    """
    source = Path(path)
    if source.is_file() and source.suffix == ".onnx":
        return _inspect_onnx(source)
    bundle = open_bundle(source, verify="never")
    manifest = bundle.manifest
    size = sum(entry.size for entry in manifest.files.values())
    return Inspection(source, manifest.parts, manifest, size, read_calibration(bundle), *_certificates(bundle))


def _certificates(bundle: Bundle) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Certificates that hold on a target of this machine, and where the others do."""
    held, elsewhere = [], []
    for one in certificates(bundle):
        engine = one.engine.partition(", in ")[0]  # one that was built in another precision is here all the same
        here = any((device.target, device.engine) == (one.target, engine) for device in devices())
        if here and applies(one, bundle, one.target, one.engine):
            held.append(str(one))
        else:
            where = one.device if one.device and not on_cpu(one.target) else " ".join(one.instruction_set)
            elsewhere.append(f"{one.target} with {one.engine} on {where}")
    return tuple(held), tuple(elsewhere)


def _inspect_onnx(path: Path) -> Inspection:
    try:
        import onnx_ir as ir
        import onnx_ir.passes.common as common
    except ImportError as error:
        raise MissingDependencyError(
            "inspecting an ONNX file needs onnx-ir", "pip install 'perceiver-export[export]'"
        ) from error
    from perceiver_export.calibration.costs import stage_costs
    from perceiver_export.runtimes.loading import open_engine

    try:
        model = ir.load(path)
        common.ShapeInferencePass()(model)
        engine = open_engine(path, "ort-cpu", threads=None)
        stages = stage_costs(model.graph)
    except MissingDependencyError:
        raise
    except Exception as error:
        # protobuf, onnx-ir and onnx each have their own errors for a damaged file.
        raise BundleError(
            f"{path} is not an ONNX model that can be read", "copy it again, with its weights (model.weights) beside it"
        ) from error
    tensors = [value.const_value for value in model.graph.initializers.values()]
    beside = {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    size = sum(file.stat().st_size for file in {path, *beside})
    return Inspection(path, {"model": Part(path.name, engine.inputs, engine.outputs, stages)}, None, size)
