# SPDX-License-Identifier: Apache-2.0
"""From a bundle, or a bare ONNX file, to a `Runtime` on a target."""

from __future__ import annotations

import os
from pathlib import Path

from perceiver_export.runtimes.bundle import Bundle, Verify, open_bundle
from perceiver_export.runtimes.errors import BundleError, DeviceError, UsageError
from perceiver_export.runtimes.manifest import Part, TensorSpec
from perceiver_export.runtimes.runtime import Engine, Runtime

# Every target, in the order of `device="auto"`, and the module that runs it (`open(path, threads) -> Engine`).
TARGETS = {"ort-cpu": "perceiver_export.runtimes.ort"}


def load(
    bundle: str | os.PathLike[str] | Bundle,
    device: str = "auto",
    part: str | None = None,
    threads: int | None = None,
    verify: Verify = "auto",
) -> Runtime:
    """Load a bundle for running.

    A split bundle's ``part`` is one of its parts; None joins them behind one `run`, which decodes every query.
    ``device`` is a target (`TARGETS`) or ``auto``, which takes the first that is present; a named device is used or
    refused, never replaced. ``threads`` are the engine's; None leaves the choice to it.

    Raises BundleError, DeviceError, MissingDependencyError, UsageError.
    """
    if threads is not None and threads < 1:
        raise UsageError(f"threads is {threads}", "give 1 or more, or leave it out")
    opened = open_bundle(bundle, verify)
    if part is None and opened.split:
        return _load_joined(opened, device, threads)
    described = opened.part(part)
    target = next(iter(TARGETS)) if device == "auto" else device
    _check_arithmetic(opened)
    engine = open_engine(opened.file(described.graph_for(_lowering(described, target))), device, threads)
    for ours, theirs in ((described.inputs, engine.inputs), (described.outputs, engine.outputs)):
        if [_signature(spec) for spec in ours] != [_signature(spec) for spec in theirs]:
            raise BundleError(
                f"{described.file} takes or gives other tensors than the manifest says", "export the bundle again"
            )
    shown = _certificates(opened, engine)
    return Runtime(engine, described.inputs, described.outputs, opened.manifest.precision, described.num_queries, shown)


def _load_joined(bundle: Bundle, device: str, threads: int | None) -> Runtime:
    from perceiver_export.runtimes.joined import JoinedEngine

    engine = JoinedEngine(
        bundle.manifest,
        {name: load(bundle, device, name, threads, verify="never") for name in bundle.manifest.parts},
    )
    shown = _certificates(bundle, engine)
    return Runtime(engine, engine.inputs, engine.outputs, bundle.manifest.precision, certificates=shown)


def _certificates(bundle: Bundle, engine: Engine) -> tuple[str, ...]:
    """What was certified and holds on this engine and CPU."""
    if "calibration.json" not in bundle.manifest.files:
        return ()
    from perceiver_export.runtimes.certificates import engine_of, valid_certificates

    described = engine.describe()
    return tuple(map(str, valid_certificates(bundle, described["target"], engine_of(described))))


def load_onnx(path: str | os.PathLike[str], device: str = "auto", threads: int | None = None) -> Runtime:
    """Load a bare ONNX file, to compare with it. Its own description of inputs and outputs is believed."""
    engine = open_engine(Path(path), device, threads)
    return Runtime(engine, engine.inputs, engine.outputs, "unknown")


def open_engine(path: Path, device: str, threads: int | None) -> Engine:
    """Compile a graph for a target. Raises DeviceError, MissingDependencyError."""
    import importlib

    target = next(iter(TARGETS)) if device == "auto" else device
    if target not in TARGETS:
        raise DeviceError(
            f"there is no target {device!r}", f"the device is one of the targets auto, {', '.join(TARGETS)}"
        )
    engine: Engine = importlib.import_module(TARGETS[target]).open(path, threads)
    return engine


def _lowering(part: Part, target: str) -> str:
    """The lowering that this machine takes of a target: ONNX Runtime's kernels on ARM want another form."""
    import platform

    own = f"{target}-arm64"
    return own if own in part.lowered and platform.machine().lower() in ("aarch64", "arm64") else target


def _check_arithmetic(bundle: Bundle) -> None:
    """Refuse 8-bit weights where sums of int8 products saturate. Raises DeviceError."""
    quantized = bundle.manifest.quantization
    if quantized is None or not quantized.int8_activations or quantized.weight_bits < 8:
        return
    from perceiver_export.runtimes.machine import saturates

    if saturates():
        raise DeviceError(
            "this CPU has no VNNI: it adds int8 products in 16 bits, and weights of 8 bits overflow them",
            "quantize again with --weight-bits 7",
        )


def _signature(spec: TensorSpec) -> tuple[str, str, tuple[int | None, ...]]:
    """Name, dtype and fixed dimensions: what a manifest and a graph must agree on."""
    return spec.name, spec.dtype, tuple(dim if isinstance(dim, int) else None for dim in spec.shape)
