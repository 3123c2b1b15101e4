# SPDX-License-Identifier: Apache-2.0
"""Names that say where a node comes from."""

from __future__ import annotations

import ast
from collections import Counter

import onnx_ir as ir

_NETWORK = "model."  # what `parts` calls the network inside of each graph
_SCOPES = "pkg.torch.onnx.name_scopes"


class NameNodesPass(ir.passes.InPlacePass):
    """Names every node after the torch module it was traced from, and every weight as its model does.

    Given:  node_MatMul_57, from encoder.self_attentions.0.attention, second block
    Result: encoder.self_attentions.0.attention/MatMul_7
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for name in [name for name in model.graph.initializers if name.startswith(_NETWORK)]:
            value = model.graph.initializers.pop(name)
            value.name = name.removeprefix(_NETWORK)
            model.graph.initializers.add(value)
        seen: Counter[str] = Counter()
        for node in model.graph:
            prefix = f"{_module(node)}/{node.op_type}"
            seen[prefix] += 1
            node.name = f"{prefix}_{seen[prefix]}"
        return ir.passes.PassResult(model, modified=True)


def _module(node: ir.Node) -> str:
    """Path of the innermost module, `model` where the exporter recorded none."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
    except (ValueError, SyntaxError):
        scopes = []
    # The last scope is the operation itself; names with an underscore in front are torch's own, not modules.
    named = (str(scope) for scope in reversed(scopes[:-1]) if scope and not str(scope).startswith("_"))
    return next(named, "model").removeprefix(_NETWORK)
