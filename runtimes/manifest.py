# SPDX-License-Identifier: Apache-2.0
"""manifest.json: the description of a bundle that every other step reads.

msgspec validates it. A reader accepts every schema version up to its own and rejects newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.files import converted, decode_json, encode_json, is_safe_name
from perceiver_export.runtimes.preprocessing import (
    CenterCropShare,
    ImagePreprocessing,
    ImageStep,
    Normalize,
    Preprocessing,
    Rescale,
    Resize,
    TextPreprocessing,
    unusable,
)

SCHEMA_VERSION = 2
ASSUMED = "written by an older version: output kinds are assumed"

_MOST = (1 << 31) - 1  # of a dimension
_TENSOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}")
NAMING = "name tensors with at most 200 letters, digits and _ . : / -"
DType = Literal["float32", "int32", "int64", "uint8", "bool"]
# The meaning of an output: logits of exclusive classes (softmax), logits of labels of which several may apply
# (sigmoid), plain values, or anything else.
OutputKind = Literal["single-label", "multi-label", "regression", "none"]


def misfit(message: str) -> BundleError:
    """The error for an inconsistent manifest."""
    return BundleError(message, "export the bundle again")


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output.

    A dynamic dimension is a name in ``shape``, and ``ranges`` gives its (smallest, largest) size. ``values`` is the
    (smallest, largest) value of an integer input: tokens of a vocabulary, or 0 and 1 in a mask.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    meaning: str = ""
    ranges: dict[str, tuple[int, int]] = {}
    values: tuple[int, int] | None = None

    def limits(self, axis: int) -> tuple[int, int]:
        """The smallest and largest size of a dimension. A named dimension of a plain ONNX file has no range."""
        size = self.shape[axis]
        return (size, size) if isinstance(size, int) else self.ranges.get(size, (1, _MOST))


class Stage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A graph stage's cost for one sample: FLOPs (2 per multiply-add), parameters, bytes read and written."""

    name: str
    flops: int
    parameters: int
    weight_bytes: int
    activation_bytes: int


class Cost(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """FLOPs (2 per multiply-add), and bytes of large arrays, counted each time that they are read or written."""

    flops: int
    bytes: int


class FoldDecision(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The costs of both forms of a site for one sample, the form chosen for the graph, and the reason."""

    site: str
    plain: Cost
    folded: Cost
    chosen: Literal["plain", "folded"]
    why: str


class PlannedStage(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How many of ``count`` units a stage processes at a time, and the bytes of activations that it then needs."""

    stage: str
    unit: str
    at_a_time: int
    count: int
    bytes: int


class MemoryPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``budget`` is the requested limit in bytes of activations; ``peak`` is the need of the largest stage."""

    budget: int
    peak: int
    stages: tuple[PlannedStage, ...]


class Part(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One graph of a bundle."""

    file: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    stages: tuple[Stage, ...] = ()
    num_queries: int | None = None  # in a decoder: the number of queries to choose from
    folds: tuple[FoldDecision, ...] = ()
    plan: MemoryPlan | None = None
    lowered: dict[str, str] = {}  # by lowering, the graph rewritten for it; other targets run `file`

    def graph_for(self, lowering: str) -> str:
        """The graph file for targets that use this lowering."""
        return self.lowered.get(lowering, self.file)


class Quantization(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A summary of the quantization; calibration.json has the details.

    ``integer_share`` is, by target, the share of the linear layers' multiply-adds in integer kernels, as reported by
    the engine. ``kept_float`` gives the reason for each part that was to be quantized but stays float.
    """

    scheme: str
    method: str
    weight_bits: int
    int8_activations: bool
    integer_share: dict[str, float]
    kept_float: dict[str, str] = {}
    random_data: bool = False


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One comparison of the exported graph with PyTorch; ``difference`` and ``tolerance`` are shares of ``scale``."""

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
    """The contents of manifest.json. ``output_kinds`` has the kind of every output of the whole model, by name."""

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
    outputs: tuple[TensorSpec, ...] = ()  # in a split bundle: outputs of all parts together
    notes: tuple[str, ...] = ()  # assumptions of the export, for the reader
    quantization: Quantization | None = None
    output_kinds: dict[str, OutputKind] = {}


def interface(manifest: Manifest) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the whole model, whether it is one graph or split into encoder and decoders."""
    if "encoder" not in manifest.parts:
        part = next(iter(manifest.parts.values()))
        return part.inputs, part.outputs
    # A decoder may have an input that the encoder lacks: queries given as an array.
    taken = {spec.name: spec for part in manifest.parts.values() for spec in part.inputs}
    own = [index_input(part.inputs) for part in manifest.parts.values()]
    return tuple(spec for name, spec in taken.items() if name != "latents" and spec not in own), manifest.outputs


def index_input(specs: Iterable[TensorSpec]) -> TensorSpec | None:
    """The input with which a decoder selects queries by index; None if the decoder computes all of them.

    It is named `queries`, or `query_indices` if the model itself has an input `queries`.
    """
    integers = {spec.name: spec for spec in specs if spec.dtype == "int32"}
    return integers.get("query_indices", integers.get("queries"))


class _Version(msgspec.Struct):
    schema_version: int


def decode_manifest(content: bytes) -> Manifest:
    """Parse and check manifest.json.

    Raises BundleError: not JSON, a newer schema, a missing or wrong field, or a path that leaves the bundle.
    """
    try:
        version = decode_json(content, _Version).schema_version
        if version > SCHEMA_VERSION:
            said = f"the manifest has schema version {version}, but this reader supports up to {SCHEMA_VERSION}"
            raise BundleError(said, "install a newer version of perceiver-export")
        if version == 1:
            manifest = _upgraded(converted(_with_steps(decode_json(content, dict[str, Any])), Manifest))
        else:
            manifest = decode_json(content, Manifest)
    except (ValueError, msgspec.ValidationError) as error:
        raise BundleError(f"manifest.json cannot be read: {error}", "copy or export the bundle again") from error
    _check(manifest)
    return manifest


def default_kinds(task: str, labels: tuple[str, ...], outputs: Iterable[str]) -> dict[str, OutputKind]:
    """The default kinds of a task's outputs, by name. A classifier's only output holds the scores of its labels."""
    kinds: dict[str, OutputKind] = dict.fromkeys(outputs, "none")
    if task == "video-autoencoding" and "label" in kinds:
        kinds["label"] = "single-label"
    elif len(kinds) == 1 and task == "audio-classification":
        kinds = dict.fromkeys(kinds, "multi-label")
    elif len(kinds) == 1 and (
        task in ("image-classification", "point-cloud-classification") or (task == "text-classification" and labels)
    ):
        # The softmax of a single score is always 1, so sigmoid is used, as in transformers' pipelines.
        kinds = dict.fromkeys(kinds, "multi-label" if len(labels) == 1 else "single-label")
    return kinds


def assumed_note(manifest: Manifest) -> str:
    """The note that an older version wrote the manifest and its output kinds are assumed; empty if there is none."""
    return next((note for note in manifest.notes if note.startswith(ASSUMED)), "")


def judged_output(manifest: Manifest) -> tuple[str, OutputKind] | None:
    """The output that is compared with labels, and its kind: the only output whose kind is not "none".

    None if there is no such output, or more than one.
    """
    kinds = manifest.output_kinds or _kinds_of(manifest)
    found = [(name, kind) for name, kind in kinds.items() if kind != "none"]
    return found[0] if len(found) == 1 else None


def _kinds_of(manifest: Manifest) -> dict[str, OutputKind]:
    """The default kinds for a manifest that does not state them."""
    outputs = manifest.outputs or tuple(spec for part in manifest.parts.values() for spec in part.outputs)
    return default_kinds(manifest.task, manifest.labels, (spec.name for spec in outputs))


class _Image(msgspec.Struct, forbid_unknown_fields=True):
    """Schema version 1's preprocessing of images."""

    type: Literal["image"]
    height: int
    width: int
    crop_fraction: tuple[float, float] | None
    resample: Literal["bilinear", "bicubic", "lanczos", "opencv-bicubic"]
    scale: float
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def _with_steps(manifest: dict[str, Any]) -> dict[str, Any]:
    """Convert image preprocessing of schema version 1, which cropped, resized, scaled and normalized in this order."""
    given = manifest.get("preprocessing")
    if not isinstance(given, dict) or given.get("type") != "image":
        return manifest
    one = converted(given, _Image)
    steps: list[ImageStep] = []
    if one.crop_fraction is not None:
        steps.append(CenterCropShare(*one.crop_fraction, round_up=one.resample == "opencv-bicubic"))
    steps.append(Resize(one.height, one.width, one.resample))
    if one.scale != 1:
        steps.append(Rescale(one.scale))
    if (one.mean, one.std) != ((0, 0, 0), (1, 1, 1)):
        steps.append(Normalize(one.mean, one.std))
    return {**manifest, "preprocessing": msgspec.to_builtins(ImagePreprocessing(one.height, one.width, tuple(steps)))}


def _upgraded(manifest: Manifest) -> Manifest:
    """Convert a manifest of schema version 1, which had neither kinds of outputs nor values of inputs.

    If the checkpoint could have specified other kinds, a note lists the assumed ones.
    """
    kinds = _kinds_of(manifest)
    notes = manifest.notes
    if manifest.task == "arrays" or manifest.task.endswith("classification"):
        named = ", ".join(f"{name}: {kind}" for name, kind in kinds.items())
        notes = (*notes, f"{ASSUMED} ({named}); export it again")
    inputs = manifest.architecture.get("inputs")
    vocabularies = {
        name: one["vocabulary_size"]
        for name, one in (inputs.items() if isinstance(inputs, dict) else ())
        if isinstance(one, dict) and isinstance(one.get("vocabulary_size"), int)
    }

    def with_values(spec: TensorSpec, part: Part) -> TensorSpec:
        count = part.num_queries if spec.name == "queries" else vocabularies.get(spec.name)
        if spec.dtype == "int32" and spec.name.endswith("_mask"):
            count = 2
        return spec if count is None else msgspec.structs.replace(spec, values=(0, count - 1))

    parts = {
        name: msgspec.structs.replace(part, inputs=tuple(with_values(spec, part) for spec in part.inputs))
        for name, part in manifest.parts.items()
    }
    return msgspec.structs.replace(
        manifest, schema_version=SCHEMA_VERSION, parts=parts, output_kinds=kinds, notes=notes
    )


def encode_manifest(manifest: Manifest) -> bytes:
    """Indented JSON with a trailing newline."""
    return encode_json(manifest)


def _check(manifest: Manifest) -> None:
    if manifest.schema_version < 1 or not manifest.parts:
        raise misfit("the manifest has no parts or no version")
    graphs = [graph for part in manifest.parts.values() for graph in (part.file, *part.lowered.values())]
    for name in (*manifest.files, *graphs, *manifest.parts, manifest.task):
        if not is_safe_name(name):
            raise BundleError(f"the manifest has the unsafe name {name!r}", "do not trust this bundle")
    for name, part in manifest.parts.items():
        for graph in (part.file, *part.lowered.values()):
            if graph not in manifest.files:
                raise misfit(f"the manifest has no hash of {graph!r}, part {name!r}")
        for spec in (*part.inputs, *part.outputs):
            _check_spec(spec)
    steps = manifest.preprocessing
    if isinstance(steps, TextPreprocessing) and steps.tokenizer and steps.tokenizer.file not in manifest.files:
        raise misfit(f"the manifest has no hash of {steps.tokenizer.file!r}")
    if steps is not None and (found := unusable(steps)):
        raise misfit(f"the manifest's preprocessing is unusable: {found}")


def is_tensor_name(name: str) -> bool:
    """Whether a tensor of a bundle may have this name."""
    return _TENSOR.fullmatch(name) is not None and ".." not in name


def _check_spec(spec: TensorSpec) -> None:
    if not is_tensor_name(spec.name):
        raise BundleError(f"the manifest has the invalid tensor name {spec.name!r}", NAMING)
    sizes = [spec.ranges.get(dim, (0, 0)) if isinstance(dim, str) else (dim, dim) for dim in spec.shape]
    if any(not 1 <= least <= most <= _MOST for least, most in sizes):
        raise misfit(f"{spec.name!r} has the invalid shape {spec.shape}")
    if spec.values is not None and (spec.dtype not in ("int32", "int64", "uint8") or spec.values[0] > spec.values[1]):
        raise misfit(f"{spec.name!r} ({spec.dtype}) has the invalid limits {spec.values}")
