# SPDX-License-Identifier: Apache-2.0
"""What `lint` judges, what a rule finds there, and the commands that mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from perceiver_export.runtimes.engines.tensorrt_capabilities import Capabilities

QUANTIZE = "quantize with `perceiver-export quantize`, whose int8 is the kind that it takes"


@dataclass(frozen=True)
class Finding:
    """``refused``: it would not parse or compile; ``slow``: it would run, without a fused kernel or without int8."""

    rule: str
    kind: Literal["refused", "slow"]
    node: str
    message: str
    fix: str


@dataclass(frozen=True)
class Subject:
    """What is judged: a graph, for a version, with the names of dimensions that have a range, and the functions that
    the graph calls.

    ``bundle`` is the one that it lies in, empty where it lies in none; ``lowered``: another graph of it is lowered for
    this version already.
    """

    graph: ir.Graph
    opset: int
    can: Capabilities
    ranges: frozenset[str]
    functions: tuple[ir.Function, ...] = ()
    bundle: str = ""
    lowered: bool = False


def lower(subject: Subject) -> str:
    """The command that rewrites a graph for the version; of a file that is in no bundle, where to get one."""
    library = subject.can.library
    if not subject.bundle:
        rewrite = f"perceiver-export build BUNDLE --target {library} --precision fp16 --lower-only"
        return f"only graphs of bundles can be rewritten: export the checkpoint, then {rewrite}"
    if subject.lowered:
        return f"it is lowered beside: perceiver-export lint {subject.bundle} --target {library} --precision fp16"
    return f"perceiver-export build {subject.bundle} --target {library} --precision fp16 --lower-only"


def refused(rule: str, node: ir.Node, message: str, fix: str) -> Finding:
    """It would not parse or compile."""
    return Finding(rule, "refused", node.name or node.op_type, message, fix)


def slow(rule: str, node: ir.Node, message: str, fix: str) -> Finding:
    """It would run, slower than it could."""
    return Finding(rule, "slow", node.name or node.op_type, message, fix)
