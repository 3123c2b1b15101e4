# SPDX-License-Identifier: Apache-2.0
"""Cut a graph at its latents into an encoder and one decoder per output, which computes only the requested rows.

Latents are one tensor; everything that it is computed from reaches the outputs only through it. Cutting and gathering
come before folding, because a folded grid has no row axis.
"""

from __future__ import annotations

import difflib
import functools
import math
import re
from collections.abc import Iterable

import onnx_ir as ir
import onnx_ir.passes.common as common

from perceiver_export.exporter.fold.nodes import VIEWS, Nodes, array_of, exits, made_by, operand, shape_of, sizes
from perceiver_export.exporter.fold.normalize import as_slices
from perceiver_export.exporter.fold.slicing import ELEMENTWISE, Region, copy_region, cuts, dependent, upstream
from perceiver_export.exporter.simplify import module_of
from perceiver_export.runtimes.errors import UnsupportedModelError, UsageError

LATENTS, QUERIES, INDICES = "latents", "queries", "query_indices"  # tensors of parts, see `manifest.index_input`
_SHOWN = 4  # names in an error
_OTHER_ROWS = "its rows are not queries"
_UNSAFE = r"[^A-Za-z0-9_.-]|[.](?=[.]|$)"  # in file names


def decoder_names(outputs: Iterable[str]) -> dict[str, str]:
    """The decoder's name by output: `decoder`, or of several `decoder_NAME`, a valid file name on any machine."""
    names: dict[str, str] = {}
    for output in (known := list(outputs)):
        name = f"decoder_{re.sub(_UNSAFE, '_', output[:150])}" if len(known) > 1 else "decoder"
        while name.lower() in map(str.lower, names.values()):
            name += "_"
        names[output] = name
    return names


def mark(graph: ir.Graph, name: str) -> None:
    """Make the tensor ``name``, or the only one that leaves the module ``name``, the graph's last output, so that no
    later pass removes it. Raises UsageError if there is no such tensor.
    """
    computed = dependent(graph, graph.inputs)
    tensors = {str(value.name): value for node in graph for value in node.outputs if value in computed}
    paths = {module_of(node) for node in graph}
    modules = {path.rsplit(".", depth)[0] for path in paths for depth in range(path.count(".") + 1)} - {"model"}
    found = [tensors[name]] if name in tensors else _leaving(graph, name, computed) if name in modules else []
    if len(found) != 1:
        near = difflib.get_close_matches(name, sorted({*modules, *tensors}), _SHOWN) or sorted(modules or tensors)
        shown = ", ".join(str(value.name) for value in found[:_SHOWN])
        none = f"no tensor or module {name!r} depends on the inputs"
        what = f"{len(found)} tensors leave {name!r}: {shown}" if found else none
        raise UsageError(what, f"give --latents one of: {shown or ', '.join(near[:_SHOWN])}")
    graph.outputs.append(_same(graph, found[0], f"{name}.{LATENTS}"))


def own_outputs(graph: ir.Graph, names: Iterable[str]) -> None:
    """Name the outputs, and copy those that are also inputs, constants or other outputs."""
    taken = set(graph.inputs)
    for index, (value, name) in enumerate(zip(tuple(graph.outputs), names, strict=True)):
        if value in taken or value.is_initializer():
            if value.is_initializer():
                value.name = f"{name}.value"
            graph.outputs[index] = _same(graph, value, name)
        else:
            value.name = name
            taken.add(value)


def _same(graph: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """A copy of the value under another name."""
    node = ir.node("Identity", [value], name=f"{name}/Identity")
    node.outputs[0].name, node.outputs[0].type, node.outputs[0].shape = name, value.type, value.shape
    graph.append(node)
    return node.outputs[0]


def _leaving(graph: ir.Graph, module: str, computed: set[ir.Value]) -> list[ir.Value]:
    inside = dict.fromkeys(node for node in graph if f"{module_of(node)}.".startswith(f"{module}."))
    return [value for value in exits(inside) if value in computed]


def latents_of(graph: ir.Graph, name: str | None, samples: int) -> ir.Value:
    """The tensor that `mark` made the last output, which is removed from the outputs; without ``name``, the one that
    is found.

    Raises UsageError if the graph cannot be cut there; UnsupportedModelError if none is found.
    """
    if name is None:
        return _found(graph, samples)
    latents = graph.outputs.pop()
    while (node := latents.producer()) is not None and node.op_type == "Identity":
        latents = operand(node)
    shape = shape_of(latents)
    if latents.dtype != ir.DataType.FLOAT or shape is None or len(shape) < 2 or shape[0] != samples:
        kind = "untyped" if latents.dtype is None else latents.dtype.name.lower()
        raise UsageError(
            f"{name!r} is {kind} {list(shape or ())}; latents are float32 with the batch first", "name another tensor"
        )
    if past := _past(graph, latents):
        raise UsageError(
            f"the model cannot be split at {name!r}: {' and '.join(past)}",
            "name a tensor that lies on every path to the outputs, or leave --latents out to find one",
        )
    return latents


def _past(graph: ir.Graph, latents: ir.Value) -> list[str]:
    """Inputs of the encoder that also reach outputs past the latents, and outputs that do not depend on the latents."""
    encoded, decoded = set(upstream([latents])), set(upstream(graph.outputs, latents))
    inputs = [f"{value.name} bypasses it" for value in graph.inputs if value in encoded and value in decoded]
    alone = [f"{value.name} does not use it" for value in graph.outputs if latents not in upstream([value], latents)]
    return inputs + alone


def _found(graph: ir.Graph, samples: int) -> ir.Value:
    """A tensor between two attentions: one makes it, and the last one whose queries do not depend on it reads it.

    Of all such tensors where the graph can be cut, the smallest; of equal ones, the last.
    """
    computed = dependent(graph, graph.inputs)
    for softmax in reversed([node for node in graph if node.op_type == "Softmax"]):
        scores = _scores(softmax)
        if scores is None:
            continue
        queries = set(upstream([operand(scores)]))
        found = [
            value
            for value in _before(graph, operand(scores, 1), computed)
            if value not in queries and value.dtype == ir.DataType.FLOAT and sizes(value)[0] == samples
            if not _past(graph, value)
        ]
        if found:
            return min(found, key=lambda value: math.prod(sizes(value)))  # the first of equals, which is computed last
    raise UnsupportedModelError(
        "no latents were found: attention must make them, cross-attention read them, and nothing may bypass them",
        "name a tensor or module with --latents, or leave --split out",
    )


def _scores(softmax: ir.Node) -> ir.Node | None:
    """The product of queries and keys before a softmax; only the queries may be constant."""
    left = [softmax.inputs[0]]
    while left:
        value = left.pop()
        node = None if value is None else value.producer()
        if node is not None and node.op_type == "MatMul":
            return node if array_of(node.inputs[1]) is None else None
        if node is not None and (node.op_type in ELEMENTWISE | VIEWS or node.op_type == "Transpose"):
            left += reversed(node.inputs)
    return None


def _before(graph: ir.Graph, keys: ir.Value, computed: set[ir.Value]) -> list[ir.Value]:
    """Tensors between an attention and later keys, the last first; empty if no attention precedes the keys."""
    reached, found = computed.intersection(upstream([keys])), list[ir.Value]()
    for node in reversed(list(graph)):
        if node.outputs[0] not in reached:
            continue
        if node.op_type == "Softmax":
            return found
        found += [value for value in node.outputs if len(shape_of(value) or ()) > 1]
    return []


def cut(model: ir.Model, latents: ir.Value) -> tuple[ir.Model, dict[str, ir.Model]]:
    """The encoder, whose output is `latents`, and the decoders by output, whose first input is `latents`."""
    graph = model.graph
    values = [*graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    taken = {value.name for value in values}
    for value in values:
        if value.name in (LATENTS, QUERIES, INDICES) and not value.is_graph_output():
            name = f"{value.name}.value"
            while name in taken:
                name += ".value"
            value.name = name
    for index, output in enumerate(graph.outputs):
        if output is latents:  # a graph cannot return its input directly
            name, output.name = str(output.name), f"{output.name}.{LATENTS}"
            graph.outputs[index] = _same(graph, output, name)

    def part(first: list[ir.Value], output: ir.Value) -> ir.Model:
        reached = set(upstream([output], *first))
        inputs = first + [value for value in graph.inputs if value in reached]
        extracted = ir.convenience.extract(graph, inputs, [output])
        weights = extracted.initializers  # `extract` has no fixed order; the graph's gives the same bytes each time
        weights.update({name: weights.pop(name) for name in list(graph.initializers) if name in weights})
        return ir.Model(extracted, ir_version=model.ir_version)

    encoder, decoders = part([], latents), {str(one.name): part([latents], one) for one in graph.outputs}
    encoder.graph.outputs[0].name = LATENTS
    for decoder in decoders.values():
        decoder.graph.inputs[0].name = LATENTS
    return encoder, decoders


def independent_rows(graph: ir.Graph, samples: int) -> Region | str:
    """The region that computes a decoder's output (B, rows, …) row by row from the latents, and from rows of values
    that do not depend on them; else the reason why there is none.
    """
    for node in list(graph):
        if node.op_type == "Split" and all(shape_of(value) for value in (*node.inputs[:1], *node.outputs)):
            as_slices(node)
    value, why = graph.outputs[0], _OTHER_ROWS
    while True:
        shape = shape_of(value) or ()
        if len(shape) > 1 and shape[0] == samples and shape[1] > 1:
            region = _region(graph, value)
            if isinstance(region, Region):
                return region
            why = region
        maker = made_by(value, *VIEWS)
        if maker is None:
            return why
        value = operand(maker)


def _region(graph: ir.Graph, result: ir.Value) -> Region | str:
    latents, *inputs = graph.inputs
    changing = dependent(graph, [latents])  # including the latents
    rows, axes, nodes = sizes(result)[1], {result: 1}, dict[ir.Node, None]()
    whole, twice = set[ir.Value](), set[ir.Value]()  # read whole, and read at a second axis
    for node in reversed(list(graph)):
        value = node.outputs[0]
        if value not in axes:
            continue
        found = cuts(node, axes[value]) if len(node.outputs) == 1 and value not in whole else None
        wanted = [(one, axis) for one, axis in zip(node.inputs, found or (), strict=False) if one is not None]
        # If the rows are only the outer part of an axis, blocks of it are taken.
        if found is not None and all(axis is None or sizes(one)[axis] % rows == 0 for one, axis in wanted):
            nodes[node] = None
            twice |= {one for one, axis in wanted if axis is not None and axes.setdefault(one, axis) != axis}
            whole |= {one for one, axis in wanted if axis is None} | twice
        elif value in changing:
            return f"{node.name} needs all rows"
    read = axes.keys() - {node.outputs[0] for node in nodes}
    if read & (changing | twice) or any(sizes(value)[axes[value]] != rows for value in read):
        return _OTHER_ROWS
    mixed = dependent(graph, [node.outputs[0] for node in nodes]) & changing & whole
    if mixed:
        return next(f"{node.name} needs all rows" for node in nodes if mixed & set(node.inputs))
    if not any(node.op_type == "Softmax" for node in nodes) and set(inputs).isdisjoint(upstream(read)):
        return _OTHER_ROWS
    return Region(list(nodes)[::-1], axes, [result])


def gather_rows(model: ir.Model, region: Region, name: str, size: int) -> tuple[int, ...]:
    """Give a decoder the int32 input ``name`` (1, ``size``): the rows to compute, the same for all samples.

    Returns the new shape of its output.
    """
    graph, (result,) = model.graph, region.results
    queries = ir.Value(name=name, shape=ir.Shape([1, size]), type=ir.TensorType(ir.DataType.INT32))
    graph.inputs.insert(1, queries)
    nodes, output = Nodes(region.nodes[-1]), graph.outputs[0].name
    chosen = nodes.reshape(queries, [size])

    @functools.cache
    def take(value: ir.Value, axis: int) -> ir.Value:
        return nodes.look_up(value, chosen, axis)

    rows = sizes(result)[1]
    made = copy_region(nodes, region, take, lambda extent: extent // rows * size)[result]
    graph.outputs[0].name, made.name = f"{output}.all", output
    graph.outputs[0] = made
    common.RemoveUnusedNodesPass()(model)
    return sizes(made)
