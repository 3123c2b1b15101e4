# SPDX-License-Identifier: Apache-2.0
"""What a version of TensorRT would refuse, not fuse, or not run in int8: told from the graph, without a GPU."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from perceiver_export.calibration.write import enclosing_bundle
from perceiver_export.runtimes.bundle import open_bundle, read_manifest
from perceiver_export.runtimes.engines.backend import Precision
from perceiver_export.runtimes.engines.tensorrt_capabilities import NEWEST, Capabilities, capabilities
from perceiver_export.runtimes.errors import BundleError, MissingDependencyError, UsageError, check_choice

if TYPE_CHECKING:
    import onnx_ir as ir

    from perceiver_export.calibration.lint_findings import Finding


@dataclass(frozen=True)
class Lint:
    """One graph's findings. ``attentions``: how many it has, in as many pieces as it computes them in; ``unfused``:
    those that do not become one kernel, by the name of their softmax, each with the reason. ``weight_bytes`` of the
    graph's constants, and ``bytes_each_use`` if an engine had a copy of each for every node that uses it.
    """

    graph: str
    version: str
    findings: tuple[Finding, ...]
    attentions: int
    unfused: dict[str, str]
    weight_bytes: int
    bytes_each_use: int

    @property
    def fusable(self) -> int:
        """How many attentions become one kernel."""
        return self.attentions - len(self.unfused)

    @property
    def refused(self) -> bool:
        """Whether this version would not compile it."""
        return any(finding.kind == "refused" for finding in self.findings)


def lint(
    path: str | os.PathLike[str], target: str = "tensorrt", version: str | None = None, precision: str | None = None
) -> tuple[Lint, ...]:
    """Judge the graphs of a bundle that this version would get, or an ONNX file.

    Of a bundle: those that were lowered for the version (in ``precision``, or in every one that is there), else the
    canonical ones. ``version`` defaults to the newest that is known. Weights are not read.

    Raises BundleError, DeviceError (no such version), MissingDependencyError (onnx-ir), UsageError.
    """
    if target not in NEWEST:
        raise UsageError(f"there is nothing to lint for {target}", f"targets with rules: {', '.join(NEWEST)}")
    if precision is not None:
        check_choice("precision", precision, get_args(Precision))
    can = capabilities(target, version or NEWEST[target])
    try:
        import onnx_ir as ir
    except ImportError as error:
        raise MissingDependencyError("lint needs onnx-ir", "pip install 'perceiver-export[quantize]'") from error
    found = []
    for file, ranges in _graphs(Path(path), can, precision):
        try:
            model = ir.load(file)
        except Exception as error:  # protobuf and onnx-ir each have their own for a damaged file
            raise BundleError(f"{file} is not an ONNX model that can be read", "copy or export it again") from error
        found.append(_judge(model, file, can, ranges))
    return tuple(found)


def _graphs(path: Path, can: Capabilities, precision: str | None) -> Iterator[tuple[Path, frozenset[str]]]:
    if path.is_file() and path.suffix == ".onnx":
        yield path, frozenset()
        return
    bundle = open_bundle(path, verify="never")
    for part in bundle.manifest.parts.values():
        ranges = frozenset(name for spec in part.inputs for name in spec.ranges)
        prefix = f"{can.lowering}-"
        lowered = {key.removeprefix(prefix): file for key, file in part.lowered.items() if key.startswith(prefix)}
        if can.typing == "weak" and precision == "bf16":
            raise UsageError(f"{can.name} has no bf16", "give --precision fp16 or fp32")
        if precision is not None and precision not in lowered and (lowered or precision != "fp32"):
            hint = f"perceiver-export build {path} --target {can.library} --precision {precision} --lower-only"
            if can.typing == "weak" and "int4" in bundle.manifest.precision:
                hint = "it has no int4: quantize with --scheme int8-weights"
            raise UsageError(f"{path} has no {precision} graph for {can.name}", hint)
        files = [lowered[precision]] if precision in lowered else list(lowered.values())
        yield from ((bundle.file(file), ranges) for file in files or [part.file])


def _place(file: Path, can: Capabilities) -> tuple[str, bool]:
    """The bundle that a graph lies in, if any, and whether another graph of it is lowered to fp16 for this version."""
    if enclosing_bundle(file) != file.parent.resolve():
        return "", False
    parts = read_manifest(file.parent).parts.values()
    lowered = [part.lowered.get(f"{can.lowering}-fp16", file.name) for part in parts]
    return str(file.parent), file.name not in lowered


def _judge(model: object, file: Path, can: Capabilities, ranges: frozenset[str]) -> Lint:
    import onnx_ir as ir
    import onnx_ir.passes.common as common

    from perceiver_export.calibration.lint_attention import attentions
    from perceiver_export.calibration.lint_findings import Subject
    from perceiver_export.calibration.lint_rules import RULES
    from perceiver_export.calibration.lint_weights import weight_bytes

    assert isinstance(model, ir.Model)
    _check_nodes(model, file)
    if any(value.shape is None or value.dtype is None for node in model.graph for value in node.outputs):
        with _quiet(common.ShapeInferencePass.__module__):
            common.ShapeInferencePass()(model)
    functions = tuple(model.functions.values())
    subject = Subject(model.graph, model.opset_imports.get("", 0), can, ranges, functions, *_place(file, can))
    findings = tuple(finding for rule in RULES for finding in rule(subject))
    reasons = attentions(model.graph, can)
    unfused = {node: reason for node, reason in reasons.items() if reason}
    return Lint(file.name, can.name, findings, len(reasons), unfused, *weight_bytes(model.graph))


def _check_nodes(model: ir.Model, file: Path) -> None:
    """Raise BundleError where a file is no ONNX: it names no opset, or a node lacks what its operator must have."""
    import onnx.defs
    import onnx_ir as ir

    broken = "" if model.opset_imports else "it names no opset"
    graphs: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for graph in graphs:
        for node in ir.traversal.RecursiveGraphIterator(graph):
            least = onnx.defs.get_schema(node.op_type).min_input if onnx.defs.has(node.op_type) else 0
            if node.domain:  # the name of one of ONNX's operators, which may take less there
                least = min(least, 2)
            if len(node.inputs) < least:
                broken = f"{node.name or node.op_type} has {len(node.inputs)} inputs, {node.op_type} has {least}"
            elif not node.outputs:
                broken = f"{node.name or node.op_type} has no outputs"
    if broken:
        raise BundleError(f"{file} is not valid ONNX: {broken}", "copy or export it again")


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without a library's warnings with traces: what is wrong with a graph, the rules say."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
