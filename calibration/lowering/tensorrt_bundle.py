# SPDX-License-Identifier: Apache-2.0
"""Adding TensorRT's graphs to a bundle: rewritten, run once beside the canonical ones, and named in the manifest."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import msgspec
import numpy as np

from perceiver_export.runtimes.bundle import Bundle, open_bundle, sha256
from perceiver_export.runtimes.engines.backend import Array, Feeds, Precision
from perceiver_export.runtimes.errors import (
    BundleError,
    GateError,
    MissingDependencyError,
    UnsupportedModelError,
    check_choice,
)
from perceiver_export.runtimes.manifest import FileEntry, Manifest, encode_manifest

if TYPE_CHECKING:
    import onnx_ir as ir

_SMALLEST = 256  # bytes; smaller arrays stay in the graph
# Of the rewritten graph against the canonical one; below this something is wrong, not merely rounded. The demo's
# trained model has 63 dB in fp16 and 47 in bf16; rounding before Q moves some codes of an int8 model by one step.
_LEAST_SQNR = {"fp32": 60.0, "fp16": 30.0, "bf16": 12.0, "int8": 12.0}


@dataclass(frozen=True)
class Lowered:
    """One form of a bundle. ``kept``: by part, the nodes that stay fp32 and why; ``sqnr``: of each output, in dB, on
    ONNX Runtime's CPU kernels (`emulation`) against the canonical graph.
    """

    name: str
    files: tuple[str, ...]
    kept: dict[str, dict[str, str]]
    sqnr: dict[str, float]


def lower_bundle(path: str | os.PathLike[str] | Bundle, target: str, precision: Precision) -> tuple[Lowered, ...]:
    """Write the graphs that ``target`` (tensorrt, tensorrt-rtx) builds from into the bundle: for TensorRT 10 and later,
    and for `tensorrt` also for 8.6, whose graph has the canonical one's weights and which has no bf16 and no int4.

    What overflows 16 bits is found by running the canonical graph on golden.npz, and in calibration.json. Weights that
    stay as they are are not stored again.

    Raises BundleError, GateError (NaN, or too far from the canonical graph), MissingDependencyError,
    UnsupportedModelError, UsageError (no such precision).
    """
    check_choice("precision", precision, get_args(Precision))
    bundle = open_bundle(path)
    try:
        import onnx_ir  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            "rewriting a graph needs onnx-ir and onnxruntime", "pip install 'perceiver-export[quantize]'"
        ) from error
    weak = target == "tensorrt" and precision != "bf16" and not _has_int4(bundle)
    families = ("tensorrt", "tensorrt8") if weak else ("tensorrt",)
    hazards = {name: _hazards(bundle, name) for name in bundle.manifest.parts} if precision != "fp32" else {}
    return tuple(_lower(bundle, family, precision, hazards) for family in families)


def _has_int4(bundle: Bundle) -> bool:
    import onnx_ir as ir

    from perceiver_export.calibration.lowering.tensorrt import has_int4

    return any(has_int4(ir.load(bundle.file(part.file)).graph) for part in bundle.manifest.parts.values())


def _lower(bundle: Bundle, family: str, precision: Precision, hazards: Mapping[str, Mapping[str, float]]) -> Lowered:
    import onnx_ir as ir

    from perceiver_export.calibration.lowering.tensorrt import lower_for_tensorrt

    name = f"{family}-{precision}"
    kept: dict[str, dict[str, str]] = {}
    sqnr: dict[str, float] = {}
    models: dict[str, ir.Model] = {}
    files = {part: f"{part}.{name}.onnx" for part in bundle.manifest.parts}
    for part, described in bundle.manifest.parts.items():
        models[files[part]] = ir.load(bundle.file(described.file))
        kept[part] = lower_for_tensorrt(models[files[part]], family, precision, hazards.get(part))
    # Beside the bundle's own files under names that nothing looks for, until all of it is right.
    mark = f".{secrets.token_hex(4)}.partial"
    weights = f"{name}.weights"
    written = [f"{file}{mark}" for file in files.values()]
    try:
        stored = _save(models, bundle.path, f"{weights}{mark}", weights, mark)
        written += [f"{weights}{mark}"] if stored else []
        for part in files:
            sqnr |= _compare(bundle, part, models[files[part]], precision)
        entries = {file.removesuffix(mark): _entry(bundle.path / file) for file in written}
        for file in written:
            (bundle.path / file).rename(bundle.path / file.removesuffix(mark))
        _publish(bundle, name, files, entries)
    except OSError as error:
        raise BundleError(f"{bundle.path} cannot be written: {error.strerror or error}", "copy it elsewhere") from error
    finally:
        for file in written:
            with contextlib.suppress(OSError):  # of a read-only file system nothing is removed either
                (bundle.path / file).unlink()
    return Lowered(name, tuple(sorted(entries)), kept, sqnr)


def _save(models: Mapping[str, ir.Model], directory: Path, temporary: str, weights: str, mark: str) -> bool:
    """Write graphs under temporary names, and new weights in one file beside them; whether there were any."""
    import onnx_ir as ir

    values = [
        value
        for model in models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None
        and not isinstance(value.const_value, ir.ExternalTensor)
        and value.const_value.nbytes >= _SMALLEST
    ]
    tensors = [value.const_value for value in values if value.const_value is not None]
    external = ir.external_data.convert_tensors_to_external(tensors, directory, temporary) if tensors else []
    for value, tensor in zip(values, external, strict=True):
        value.const_value = ir.ExternalTensor(
            weights,
            tensor.offset,
            tensor.length,
            tensor.dtype,
            shape=tensor.shape,
            name=value.name or "",
            base_dir=directory,
        )
    for file, model in models.items():
        ir.save(model, directory / f"{file}{mark}")
    for value, tensor in zip(values, external, strict=True):
        value.const_value = tensor  # under the name that it has until it is published
    return bool(values)


def _publish(bundle: Bundle, name: str, files: Mapping[str, str], entries: Mapping[str, FileEntry]) -> None:
    manifest = bundle.manifest
    parts = {
        part: msgspec.structs.replace(described, lowered={**described.lowered, name: files[part]})
        for part, described in manifest.parts.items()
    }
    changed: Manifest = msgspec.structs.replace(manifest, parts=parts, files={**manifest.files, **entries})
    temporary = bundle.path / f"manifest.json.{secrets.token_hex(4)}.partial"
    temporary.write_bytes(encode_manifest(changed))
    temporary.replace(bundle.path / "manifest.json")
    bundle.manifest = changed


def _hazards(bundle: Bundle, part: str) -> dict[str, float]:
    """The largest |x| of each tensor, on the golden inputs and where it overflowed in calibration."""
    from perceiver_export.calibration.lowering.magnitudes import calibrated, magnitudes

    seen = magnitudes(bundle.file(bundle.manifest.parts[part].file), golden_inputs(bundle, part))
    told = calibrated(bundle.file("calibration.json"), part)
    return {name: max(seen.get(name, 0.0), told.get(name, 0.0)) for name in {*seen, *told}}


def golden_inputs(bundle: Bundle, part: str) -> Feeds:
    """What golden.npz holds as a part's inputs. Raises BundleError."""
    prefix = f"{part}/input/" if len(bundle.manifest.parts) > 1 else "input/"
    try:
        with np.load(bundle.file("golden.npz"), allow_pickle=False) as arrays:
            return {name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)}
    except (OSError, ValueError) as error:
        raise BundleError(f"golden.npz of {bundle.path} cannot be read: {error}", "export the bundle again") from error


def _compare(bundle: Bundle, part: str, model: ir.Model, precision: Precision) -> dict[str, float]:
    """SQNR of a rewritten graph's outputs against the canonical graph's, both on ONNX Runtime. Uses the graph up."""
    from perceiver_export.calibration.lowering.emulation import emulate
    from perceiver_export.calibration.sessions import open_session

    emulate(model)

    feeds = golden_inputs(bundle, part)
    names = [spec.name for spec in bundle.manifest.parts[part].outputs]
    expected = _run(lambda: open_session(_canonical(bundle, part), bundle.path, None), feeds, names)
    found = _run(lambda: open_session(model, bundle.path, None), feeds, names)
    result: dict[str, float] = {}
    for name, ours, theirs in zip(names, found, expected, strict=True):
        if not np.isfinite(ours).all():
            raise GateError(
                f"{part}'s output {name!r} has NaN or infinite values in 16 bits", "try --precision bf16, or fp32"
            )
        result[f"{part}/{name}"] = sqnr(theirs, ours)
    least = _LEAST_SQNR[precision if bundle.manifest.precision == "fp32" else "int8"]
    worst = min(result, key=lambda name: result[name])
    if result[worst] < least:
        raise GateError(
            f"{worst} is {result[worst]:.1f} dB from the canonical graph's in {precision}, less than {least:.0f}",
            "try --precision bf16, or fp32; quantize with data that shows the model's range",
        )
    return result


def _canonical(bundle: Bundle, part: str) -> ir.Model:
    import onnx_ir as ir

    return ir.load(bundle.file(bundle.manifest.parts[part].file))


def _run(open_: Callable[[], object], feeds: Feeds, names: list[str]) -> list[Array]:
    session = open_()
    try:
        outputs: list[Array] = session.run(names, dict(feeds))  # type: ignore[attr-defined]
    except Exception as error:  # onnxruntime has a class for each code
        raise UnsupportedModelError(
            f"onnxruntime cannot run the rewritten graph: {str(error).splitlines()[0]}", "report it with the config"
        ) from error
    return outputs


def sqnr(expected: Array, found: Array) -> float:
    """Signal to noise in dB; 200 where they are equal."""
    signal = float(np.sum(np.square(expected, dtype=np.float64)))
    noise = float(np.sum(np.square(expected.astype(np.float64) - found)))
    return 200.0 if noise == 0 else 10 * float(np.log10(max(signal, 1e-300) / noise))


def _entry(path: Path) -> FileEntry:
    return FileEntry(sha256=sha256(path), size=path.stat().st_size)
