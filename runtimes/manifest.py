# SPDX-License-Identifier: Apache-2.0
"""What manifest.json says: the one description of a bundle that every other step reads.

Validation is msgspec's. A reader takes every schema version up to its own and refuses newer ones.
"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any, Literal

import msgspec

from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.preprocessing import Preprocessing, check_preprocessing

SCHEMA_VERSION = 1

DType = Literal["float32", "int32", "int64", "uint8", "bool"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output. A dynamic dimension is a name in ``shape``, and ``ranges`` gives its (least, most)."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    meaning: str = ""
    ranges: dict[str, tuple[int, int]] = {}


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Cost of one stage of a graph for one sample: FLOPs (2 a multiply-add), parameters, bytes read and written."""

    name: str
    flops: int
    parameters: int
    weight_bytes: int
    activation_bytes: int


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FLOPs (2 a multiply-add) and bytes of the large arrays at each time that they are read or written."""

    flops: int
    bytes: int


class FoldDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What both forms of a site cost for one sample, which one the graph has, and why."""

    site: str
    plain: Cost
    folded: Cost
    chosen: Literal["plain", "folded"]
    why: str


class PlannedStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many of ``count`` units a stage takes at a time, and the bytes of activations that it then needs."""

    stage: str
    unit: str
    at_a_time: int
    count: int
    bytes: int


class MemoryPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``peak``: the bytes of activations that the largest stage needs; a ``budget`` was asked for."""

    budget: int
    peak: int
    stages: tuple[PlannedStage, ...]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of a bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stages: tuple[Stage, ...] = ()
    num_queries: int | None = None  # of a decoder: how many queries there are to choose from
    folds: tuple[FoldDecision, ...] = ()
    plan: MemoryPlan | None = None
    lowered: dict[str, str] = {}  # by target, the graph that was rewritten for it; others run `file`

    def graph_for(self, lowering: str) -> str:
        """The file that an engine of the target that wants this lowering is made from."""
        return self.lowered.get(lowering, self.file)


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What was made integers, in short; calibration.json has the rest.

    ``integer_share`` is that of the linears' multiply-adds in integer kernels, by target, as its engine says.
    ``kept_float`` gives a reason for what was asked for but stays float.
    """

    scheme: str
    method: str
    weight_bits: int
    int8_activations: bool
    integer_share: dict[str, float]
    kept_float: dict[str, str] = {}
    random_data: bool = False


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One comparison of the exported graph with torch; ``difference`` and ``tolerance`` are shares of ``scale``."""

    output: str
    inputs: str
    difference: float
    tolerance: float
    scale: float


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Size and hash of a file that export or quantize wrote."""

    sha256: str
    size: int


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole of manifest.json."""

    schema_version: int
    name: str
    task: str
    parity: Literal["huggingface", "deepmind", "own"]
    source: str
    architecture: dict[str, Any]
    parts: dict[str, Part]
    preprocessing: Preprocessing | None
    labels: tuple[str, ...]
    precision: str
    verification: tuple[Check, ...]
    tools: dict[str, str]
    files: dict[str, FileEntry]
    outputs: tuple[TensorSpec, ...] = ()  # of a split bundle: what its parts give together
    notes: tuple[str, ...] = ()  # what was assumed at export, for a person to know
    quantization: Quantization | None = None


class _Version(msgspec.Struct):
    schema_version: int


def decode_manifest(content: bytes) -> Manifest:
    """Parse and check manifest.json.

    Raises BundleError: not JSON, of a newer schema, a field missing or wrong, or a path that leaves the bundle.
    """
    try:
        version = msgspec.json.decode(content, type=_Version).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"the manifest has schema version {version}, this reader knows versions up to {SCHEMA_VERSION}",
                "upgrade: pip install -U perceiver-export",
            )
        manifest = msgspec.json.decode(content, type=Manifest)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BundleError(
            f"manifest.json cannot be read: {error}", "export the bundle again, or copy it again"
        ) from error
    _check(manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Indented JSON, one trailing newline."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _check(manifest: Manifest) -> None:
    if manifest.schema_version < 1 or not manifest.parts:
        raise BundleError("the manifest names no part, or no version", "export the bundle again")
    graphs = [graph for part in manifest.parts.values() for graph in (part.file, *part.lowered.values())]
    for path in (*manifest.files, *graphs):
        pure = PurePosixPath(path)
        if pure.is_absolute() or ".." in pure.parts or "\\" in path or "\0" in path or not pure.parts:
            raise BundleError(f"the manifest names a path outside the bundle: {path!r}", "do not trust this bundle")
    for name, part in manifest.parts.items():
        for graph in (part.file, *part.lowered.values()):
            if graph not in manifest.files:
                raise BundleError(
                    f"part {name!r} is in {graph!r}, which the manifest does not hash", "export the bundle again"
                )
        for spec in (*part.inputs, *part.outputs):
            _check_spec(spec)
    if manifest.preprocessing is not None:
        check_preprocessing(manifest.preprocessing)


def _check_spec(spec: TensorSpec) -> None:
    sizes = [spec.ranges.get(dim, (0, 0)) if isinstance(dim, str) else (dim, dim) for dim in spec.shape]
    if any(not 1 <= least <= most < 1 << 31 for least, most in sizes):
        raise BundleError(
            f"the manifest gives {spec.name!r} a shape that cannot be: {spec.shape}", "export the bundle again"
        )
