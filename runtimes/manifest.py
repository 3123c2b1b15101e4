# SPDX-License-Identifier: Apache-2.0
"""manifest.json: the one description of a bundle, which every other step reads.

msgspec validates it. A reader takes every schema version up to its own and refuses newer ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from perceiver_export.runtimes.errors import BundleError
from perceiver_export.runtimes.files import decode_json, encode_json, is_safe_name
from perceiver_export.runtimes.preprocessing import (
    CenterCropShare,
    ImagePreprocessing,
    ImageStep,
    Normalize,
    Preprocessing,
    Rescale,
    Resize,
    TextPreprocessing,
    check_preprocessing,
)

SCHEMA_VERSION = 2
ASSUMED = "written by an older version: output kinds are assumed"

_TENSOR = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}")
DType = Literal["float32", "int32", "int64", "uint8", "bool"]
# The meaning of an output's numbers: logits of classes that exclude each other (softmax), logits of labels that do not
# (sigmoid), plain values, or anything else.
OutputKind = Literal["single-label", "multi-label", "regression", "none"]


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An input or output.

    A dynamic dimension is a name in ``shape``, and ``ranges`` gives its (least, most). ``values`` is the (least, most)
    that an integer input may hold: the tokens of a vocabulary, 0 and 1 of a mask.
    """

    name: str
    dtype: DType
    shape: tuple[int | str, ...]
    meaning: str = ""
    ranges: dict[str, tuple[int, int]] = {}
    values: tuple[int, int] | None = None


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
    """The costs of both forms of a site for one sample, the form in the graph, and why."""

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
    """The quantization in short; calibration.json has the rest.

    ``integer_share`` is that of the linears' multiply-adds in integer kernels, by target, as its engine says.
    ``kept_float`` gives the reason for each requested part that stays float.
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
    """The whole of manifest.json. ``output_kinds`` has every output of the whole model by name."""

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
    outputs: tuple[TensorSpec, ...] = ()  # of a split bundle's parts together
    notes: tuple[str, ...] = ()  # assumptions of the export, for people
    quantization: Quantization | None = None
    output_kinds: dict[str, OutputKind] = {}


def interface(manifest: Manifest) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Inputs and outputs of the whole model, one graph or split into encoder and decoders."""
    if "encoder" not in manifest.parts:
        part = next(iter(manifest.parts.values()))
        return part.inputs, part.outputs
    # A decoder may take more than the encoder: queries that are given as an array.
    taken = {spec.name: spec for part in manifest.parts.values() for spec in part.inputs}
    own = [index_input(part.inputs) for part in manifest.parts.values()]
    return tuple(spec for name, spec in taken.items() if name != "latents" and spec not in own), manifest.outputs


def index_input(specs: Iterable[TensorSpec]) -> TensorSpec | None:
    """The input of a decoder that chooses queries by their indices; None for a decoder that computes all of them.

    It is called `queries`, but `query_indices` where the model itself has an input `queries`.
    """
    integers = {spec.name: spec for spec in specs if spec.dtype == "int32"}
    return integers.get("query_indices", integers.get("queries"))


class _Version(msgspec.Struct):
    schema_version: int


def decode_manifest(content: bytes) -> Manifest:
    """Parse and check manifest.json.

    Raises BundleError: not JSON, of a newer schema, a field missing or wrong, or a path that leaves the bundle.
    """
    try:
        version = decode_json(content, _Version).schema_version
        if version > SCHEMA_VERSION:
            raise BundleError(
                f"the manifest has schema version {version}, this reader knows versions up to {SCHEMA_VERSION}",
                "upgrade: pip install -U perceiver-export",
            )
        if version == 1:
            manifest = _upgraded(msgspec.convert(_with_steps(decode_json(content, dict[str, Any])), Manifest))
        else:
            manifest = decode_json(content, Manifest)
    except (ValueError, msgspec.ValidationError) as error:
        raise BundleError(f"manifest.json cannot be read: {error}", "export or copy the bundle again") from error
    _check(manifest)
    return manifest


def default_kinds(task: str, labels: tuple[str, ...], outputs: Iterable[str]) -> dict[str, OutputKind]:
    """The default kinds of a task's outputs, by name: a classifier's only output has the scores of its labels."""
    kinds: dict[str, OutputKind] = dict.fromkeys(outputs, "none")
    if task == "video-autoencoding" and "label" in kinds:
        kinds["label"] = "single-label"
    elif len(kinds) == 1 and task == "audio-classification":
        kinds = dict.fromkeys(kinds, "multi-label")
    elif len(kinds) == 1 and (
        task in ("image-classification", "point-cloud-classification") or (task == "text-classification" and labels)
    ):
        # Softmax of a single score is always 1, so sigmoid is used, as in transformers' pipelines.
        kinds = dict.fromkeys(kinds, "multi-label" if len(labels) == 1 else "single-label")
    return kinds


def assumed_note(manifest: Manifest) -> str:
    """The note of a manifest whose kinds of outputs were assumed, as an older version wrote it; empty for others."""
    return next((note for note in manifest.notes if note.startswith(ASSUMED)), "")


def judged_output(manifest: Manifest) -> tuple[str, OutputKind] | None:
    """The output that labels judge, and its kind: the only one whose kind is not "none".

    None if no output, or more than one, has such a kind.
    """
    kinds = manifest.output_kinds or _kinds_of(manifest)
    found = [(name, kind) for name, kind in kinds.items() if kind != "none"]
    return found[0] if len(found) == 1 else None


def _kinds_of(manifest: Manifest) -> dict[str, OutputKind]:
    """The default kinds of a manifest that says nothing of its outputs."""
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
    """A manifest of schema version 1, whose images were cropped, resized, scaled and normalised in this order."""
    given = manifest.get("preprocessing")
    if not isinstance(given, dict) or given.get("type") != "image":
        return manifest
    one = msgspec.convert(given, _Image)
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
    """A manifest of schema version 1, which had neither kinds of outputs nor values of inputs.

    A note says which kinds were assumed if a checkpoint could have said otherwise.
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
    """Indented JSON, one trailing newline."""
    return encode_json(manifest)


def _check(manifest: Manifest) -> None:
    if manifest.schema_version < 1 or not manifest.parts:
        raise BundleError("the manifest names no part, or no version", "export the bundle again")
    graphs = [graph for part in manifest.parts.values() for graph in (part.file, *part.lowered.values())]
    for name in (*manifest.files, *graphs, *manifest.parts, manifest.task):
        if not is_safe_name(name):
            raise BundleError(f"the manifest has the unsafe name {name!r}", "do not trust this bundle")
    for name, part in manifest.parts.items():
        for graph in (part.file, *part.lowered.values()):
            if graph not in manifest.files:
                raise BundleError(f"the manifest has no hash of {graph!r}, part {name!r}", "export the bundle again")
        for spec in (*part.inputs, *part.outputs):
            _check_spec(spec)
    steps = manifest.preprocessing
    if isinstance(steps, TextPreprocessing) and steps.tokenizer and steps.tokenizer.file not in manifest.files:
        raise BundleError(f"the manifest has no hash of {steps.tokenizer.file!r}", "export the bundle again")
    if steps is not None:
        check_preprocessing(steps)


def _check_spec(spec: TensorSpec) -> None:
    if not _TENSOR.fullmatch(spec.name) or ".." in spec.name:
        raise BundleError(
            f"the manifest has the tensor {spec.name!r}",
            "names of tensors are letters, digits and _ . : / -, at most 200 of them",
        )
    sizes = [spec.ranges.get(dim, (0, 0)) if isinstance(dim, str) else (dim, dim) for dim in spec.shape]
    if any(not 1 <= least <= most < 1 << 31 for least, most in sizes):
        raise BundleError(f"{spec.name!r} has the impossible shape {spec.shape}", "export the bundle again")
    if spec.values is not None and (spec.dtype not in ("int32", "int64", "uint8") or spec.values[0] > spec.values[1]):
        raise BundleError(f"{spec.name!r} ({spec.dtype}) is limited to {spec.values}", "export the bundle again")
