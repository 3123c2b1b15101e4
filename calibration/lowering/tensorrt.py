# SPDX-License-Identifier: Apache-2.0
"""Add TensorRT's graph to a bundle: its types give the precision, and its attention heads have widths that fuse.

The graph is checked by one run on ONNX Runtime against the canonical graph, as an fp32 graph that rounds to 16 bits
after every node. With the 16-bit graph itself, ONNX Runtime's CPU kernels would compute whole chains in fp32 (they drop
the casts in between), which hides overflows, and they do not support bf16. Sums inside a node stay fp32, as in
TensorRT's kernels. TensorRT itself rounds in other places, because it fuses other nodes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from perceiver_export.calibration.bundles import file_entry
from perceiver_export.calibration.graphs import Behind, is_large, read_graph, run_graph, sqnr, store_weights
from perceiver_export.calibration.lowering.attention import pad_heads
from perceiver_export.calibration.lowering.half import DTYPES, to_half
from perceiver_export.calibration.lowering.schemas import check_types
from perceiver_export.runtimes.bundle import Bundle, BundleLike, golden_arrays, open_bundle
from perceiver_export.runtimes.engines.backend import Feeds, Precision
from perceiver_export.runtimes.errors import BundleError, GateError, UnsupportedModelError, check_choice
from perceiver_export.runtimes.files import read_json, replacing, writing
from perceiver_export.runtimes.manifest import FileEntry, encode_manifest

# The smallest accepted SQNR in dB of the rewritten graph against the canonical one. Rounding alone costs less.
# The demo's trained model has 63 dB in fp16 and 47 in bf16; in int8, rounding before Q moves some integers by one step.
_LEAST_SQNR = {"fp32": 60.0, "fp16": 30.0, "bf16": 12.0, "int8": 12.0}
_HALF = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True)
class Lowered:
    """One lowered form of a bundle. ``kept`` has, by part, the nodes that stay fp32 and the reasons. ``sqnr`` is each
    output's SQNR in dB against the canonical graph, on ONNX Runtime's CPU kernels.
    """

    name: str
    files: tuple[str, ...]
    kept: dict[str, dict[str, str]]
    sqnr: dict[str, float]


def lower_bundle(path: BundleLike, precision: Precision) -> Lowered:
    """Write into the bundle the graphs from which TensorRT and TensorRT for RTX build engines.

    Overflows of 16 bits are found by running the canonical graph on golden.npz, and from calibration.json. Only changed
    weights are stored.

    Raises BundleError, GateError for NaN or too large a difference from the canonical graph, UnsupportedModelError, and
    UsageError for an unknown precision.
    """
    check_choice("precision", precision, get_args(Precision))
    bundle = open_bundle(path)
    name = f"tensorrt-{precision}"
    kept: dict[str, dict[str, str]] = {}
    sqnrs: dict[str, float] = {}
    models: dict[str, ir.Model] = {}
    files = {part: f"{part}.{name}.onnx" for part in bundle.manifest.parts}
    for part, file in files.items():
        models[file] = read_graph(bundle.file(bundle.part(part).file))
        kept[part] = lower_for_tensorrt(models[file], precision, _hazards(bundle, part) if precision != "fp32" else {})
        sqnrs |= _compare(bundle, part, models[file].clone(), precision)
    with writing(bundle.path, BundleError, "copy the bundle to a writable directory"):
        written = _write(bundle, models, f"{name}.weights")
        _publish(bundle, name, files, written)
    return Lowered(name, tuple(sorted(written)), kept, sqnrs)


def lower_for_tensorrt(
    model: ir.Model, precision: Precision, hazards: Mapping[str, float] | None = None
) -> dict[str, str]:
    """Rewrite a canonical graph, fp32 or with Q/DQ, in place. Returns the nodes that stay fp32, each with the reason.

    ``hazards`` has the largest observed |x| of each tensor.
    """
    pad_heads(model)
    return {} if precision == "fp32" else to_half(model, precision, hazards)


def _write(bundle: Bundle, models: Mapping[str, ir.Model], weights: str) -> dict[str, FileEntry]:
    """Write the graphs, and any new weights in one more file. All files are renamed into place at the end."""
    constants = [value for model in models.values() for value in model.graph.initializers.values()]
    inline = [value for value in constants if not isinstance(value.const_value, ir.ExternalTensor)]
    new = [value for value in inline if is_large(value.const_value)]
    with contextlib.ExitStack() as temporaries:
        written = {
            file: temporaries.enter_context(replacing(bundle.path / file))
            for file in (*models, *([weights] * bool(new)))
        }
        if new:
            store_weights(new, bundle.path, written[weights].name, weights)
        for file, model in models.items():
            ir.save(model, written[file])
        return {file: file_entry(temporary) for file, temporary in written.items()}


def _publish(bundle: Bundle, name: str, files: Mapping[str, str], entries: Mapping[str, FileEntry]) -> None:
    manifest = bundle.manifest
    parts = {
        part: msgspec.structs.replace(described, lowered={**described.lowered, name: files[part]})
        for part, described in manifest.parts.items()
    }
    changed = msgspec.structs.replace(manifest, parts=parts, files={**manifest.files, **entries})
    with replacing(bundle.path / "manifest.json") as temporary:
        temporary.write_bytes(encode_manifest(changed))
    bundle.manifest = changed


def _compare(bundle: Bundle, part: str, model: ir.Model, precision: Precision) -> dict[str, float]:
    """The SQNR in dB of a rewritten graph's outputs against the canonical graph's, both on ONNX Runtime.

    It changes the rewritten graph. Raises GateError, UnsupportedModelError.
    """
    check_types(model, DTYPES.get(precision, ir.DataType.FLOAT))
    emulate(model)
    feeds, canonical = _golden_inputs(bundle, part), read_graph(bundle.file(bundle.part(part).file))
    try:
        expected, found = (run_graph(one, bundle.path, feeds) for one in (canonical, model))
    except Exception as error:  # onnxruntime has one class per error code
        if type(error).__module__.startswith("perceiver_export"):
            raise
        said = f"onnxruntime cannot run the rewritten graph: {str(error).splitlines()[0]}"
        raise UnsupportedModelError(said, "report it with the config") from error
    outputs = [spec.name for spec in bundle.part(part).outputs]
    for name in outputs:
        if not np.isfinite(found[name]).all():
            said = f"{part}'s output {name!r} contains NaN or infinite values in 16 bits"
            raise GateError(said, "use --precision bf16 or fp32")
    result = {f"{part}/{name}": sqnr(expected[name], found[name]) for name in outputs}
    least = _LEAST_SQNR[precision if bundle.manifest.precision == "fp32" else "int8"]
    worst = min(result, key=lambda name: result[name])
    if result[worst] < least:
        hint = "use --precision bf16 or fp32, or quantize with data that covers the model's range"
        raise GateError(f"the SQNR of {worst} in {precision} is {result[worst]:.1f} dB, below {least:.0f} dB", hint)
    return result


def _hazards(bundle: Bundle, part: str) -> dict[str, float]:
    """The largest |x| of each tensor on the golden inputs and, for tensors that overflow, in calibration."""
    seen = magnitudes(bundle.file(bundle.part(part).file), _golden_inputs(bundle, part))
    told = calibrated(bundle.file("calibration.json"), part)
    return {name: max(seen.get(name, 0.0), told.get(name, 0.0)) for name in sorted({*seen, *told})}


def _golden_inputs(bundle: Bundle, part: str) -> dict[str, npt.NDArray[Any]]:
    """The golden inputs of a part. Raises BundleError if one is missing."""
    golden = golden_arrays(bundle, part, "input")
    if missing := [spec.name for spec in bundle.part(part).inputs if spec.name not in golden]:
        raise BundleError(f"{bundle.path} has no golden input for {', '.join(missing)}", "export the bundle again")
    return golden


class _Hazard(msgspec.Struct):
    name: str
    largest: float


class _Part(msgspec.Struct):
    hazards: tuple[_Hazard, ...] = ()


class _Calibration(msgspec.Struct):
    """The fields of calibration.json that this module reads."""

    parts: dict[str, _Part]


def calibrated(path: Path, part: str) -> dict[str, float]:
    """The largest |x| of tensors that overflow fp16, from calibration.json; empty without that file."""
    try:
        parts = read_json(path, _Calibration).parts
    except BundleError:
        return {}
    return {one.name: one.largest for one in parts[part].hazards} if part in parts else {}


def magnitudes(path: Path, feeds: Feeds) -> dict[str, float]:
    """The largest |x| of every float tensor of an fp32 graph in one run; reductions run inside the graph."""
    model = read_graph(path)
    values = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    for value in values:
        behind = Behind(model.graph, value)
        for operator in ("ReduceMin", "ReduceMax"):
            behind.output(operator, [value], operator, keepdims=0)
    bounds = run_graph(model, path.parent, feeds)
    return {
        str(value.name): max(float(abs(bounds[f"{value.name}.{end}"])) for end in ("ReduceMin", "ReduceMax"))
        for value in values
    }


def emulate(model: ir.Model) -> None:
    """Rewrite a 16-bit graph in place as an fp32 graph that rounds after every node.

    Given:  y16 = MatMul(x16, w16)
    Result: y = Cast32(Cast16(MatMul(x, w)))      with w rounded to 16 bits
    """
    graph = model.graph
    for value in graph.initializers.values():
        if value.dtype in _HALF and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy().astype("float32"), name=value.name)
            value.type = ir.TensorType(ir.DataType.FLOAT)  # a new object, because clones share the old one
    for node in list(graph):
        for output in node.outputs:
            if output.dtype in _HALF:
                _round(graph, output, output.dtype)
        if node.op_type == "Cast" and node.attributes.get_int("to") in _HALF:
            node.attributes["to"] = ir.AttrInt64("to", int(ir.DataType.FLOAT))


def _round(graph: ir.Graph, output: ir.Value, dtype: ir.DataType) -> None:
    users, behind = list(output.uses()), Behind(graph, output)
    output.type = ir.TensorType(ir.DataType.FLOAT)
    narrow = behind.add("Cast", [output], "narrow", to=int(dtype))
    wide = behind.add("Cast", [narrow], "rounded", to=int(ir.DataType.FLOAT))
    for user, index in users:
        user.replace_input_with(index, wide)
