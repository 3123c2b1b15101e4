# SPDX-License-Identifier: Apache-2.0
"""engine.json: what an engine was built from and for, read before anything of the engine itself is."""

from __future__ import annotations

import platform
from pathlib import Path

import msgspec

from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.engines.backend import Backend, EngineOptions, Platform, Source
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.manifest import FileEntry, Manifest, Part

SCHEMA_VERSION = 1
RECORD = "engine.json"


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything that an engine depends on; its hash is the engine's key."""

    target: str
    part: str
    model: str  # hash over the graph's and the weights' hashes
    precision: str  # of the bundle
    options: EngineOptions
    platform: Platform

    @property
    def key(self) -> str:
        """Name of the engine's directory: 16 hexadecimal digits."""
        import hashlib

        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:16]


class Record(msgspec.Struct, frozen=True):
    """The whole of engine.json. Unknown fields are let through: a newer writer may say more of the same engine."""

    schema_version: int
    identity: Identity
    files: dict[str, FileEntry]
    seconds: float  # that compiling took


def files_of(manifest: Manifest, graph: str) -> dict[str, str]:
    """SHA-256 of a graph and of the weights beside it, by file, from those in the manifest."""
    return {
        name: entry.sha256
        for name, entry in manifest.files.items()
        if name == graph or (not name.endswith((".onnx", ".npz", ".json")) and _is_read_by(graph, name))
    }


def graphs_of(manifest: Manifest, target: str, precision: str) -> dict[str, str]:
    """SHA-256, by file, of all that a target runs in that precision: each part's graph, the one that was rewritten for
    the target where there is one, and weights. Raises DeviceError: there is no such target.
    """
    found: dict[str, str] = {}
    for part in manifest.parts.values():
        found |= files_of(manifest, graph_for(part, target, precision))
    return dict(sorted(found.items()))


def graph_for(part: Part, target: str, precision: str) -> str:
    """The file of a part that an engine of this target, in this precision, is made from."""
    return part.graph_for(_lowering(part, find_target(target).lowering(precision)))


def model_hash(bundle: Bundle, graph: str) -> str:
    """One hash for a graph and the weights beside it, from those in the manifest."""
    import hashlib

    return hashlib.sha256(msgspec.json.encode(files_of(bundle.manifest, graph), order="sorted")).hexdigest()


def _is_read_by(graph: str, weights: str) -> bool:
    """Whether a graph may read a file of weights: the bundle's own, or those of its own lowering."""
    return weights == "model.weights" or graph.endswith(f".{weights.removesuffix('.weights')}.onnx")


def identify(bundle: Bundle, part: str, source: Source, here: Platform) -> Identity:
    """What an engine of this part, compiled here and now, would be."""
    graph = source.graph.relative_to(bundle.path).as_posix()
    return Identity(
        target=source.target,
        part=part,
        model=model_hash(bundle, graph),
        precision=source.precision,
        options=source.options,
        platform=here,
    )


def make_source(bundle: Bundle, part: Part, target: str, options: EngineOptions) -> Source:
    """The graph of a part that this target runs, with its dynamic dimensions' ranges among the options.

    Raises BundleError: the bundle is quantized, and its form for this target is not there.
    """
    precision, quantized = bundle.manifest.precision, bundle.manifest.quantization
    lowering = _lowering(part, find_target(target).lowering(options.precision))
    floats = precision == "fp32" or (quantized is not None and not quantized.int8_activations)
    if target.startswith("ort-") and not floats and lowering not in part.lowered:
        raise BundleError(
            f"{bundle.path} is {precision}, and {target} needs its graph rewritten for it, which is not in the bundle",
            "quantize the fp32 bundle again: it writes that graph too",
        )
    ranges = {name: sizes for spec in part.inputs for name, sizes in spec.ranges.items()}
    shapes = {name: options.shapes.get(name, (least, least, most)) for name, (least, most) in ranges.items()}
    return Source(
        target=target,
        graph=bundle.file(part.graph_for(lowering)),
        options=msgspec.structs.replace(options, shapes=shapes),
        precision=precision,
        inputs=part.inputs,
        outputs=part.outputs,
        plan=part.plan,
    )


def _lowering(part: Part, wanted: str) -> str:
    """Which of a target's lowerings this machine takes: ONNX Runtime's integer kernels on ARM want another form."""
    own = f"{wanted}-arm64"
    return own if own in part.lowered and platform.machine().lower() in ("aarch64", "arm64") else wanted


def read_record(directory: Path) -> Record | None:
    """engine.json of a directory; None where it is missing, damaged or of a newer schema."""
    try:
        record = msgspec.json.decode((directory / RECORD).read_bytes(), type=Record)
    except (OSError, msgspec.DecodeError, UnicodeDecodeError):
        return None
    return record if record.schema_version <= SCHEMA_VERSION else None


def mismatches(bundle: Bundle, built: Identity, here: Identity, backend: Backend) -> tuple[str, ...]:
    """Why an engine is not what would be built here, one phrase each. Options are compared by the caller's wish, and
    the model is that of the engine's own precision, which may have a graph of its own.
    """
    found = []
    part = bundle.manifest.parts.get(built.part)
    graph = "" if part is None else graph_for(part, here.target, built.options.precision)
    if built.part != here.part or built.model != model_hash(bundle, graph):
        found.append("it was built from another model")
    if built.options.shapes != here.options.shapes:
        found.append(f"it was built for the shapes {built.options.shapes}, the bundle has {here.options.shapes}")
    return (*found, *backend.differences(built.platform, here.platform))
