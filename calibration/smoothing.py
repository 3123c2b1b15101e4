# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (arXiv 2211.10438), with every factor folded into a weight: no product is left in the graph.

    x W = (x / s) (s W),   s_j = max|x_j|^α / max_n|W_jn|^(1 − α)

A channel of x that is large spoils the one scale of the tensor; dividing it by s_j moves the spread into W, whose scale
is by output channel. The division goes into what made x: the scale and shift of a LayerNorm, or, where x is an
attention's output, the columns of the value projection. What follows a GELU has no such place and stays as it is.

Blocks that share weights share a LayerNorm too, so all runs of a layer get one vector. α is chosen by the error of the
products themselves on the sampled rows; "not at all" is among the choices, so it cannot make a layer worse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.activations import Activation, Statistics
from perceiver_export.calibration.gemm import constant, remove_unused
from perceiver_export.calibration.linears import Linear
from perceiver_export.calibration.ranges import fake_quantize
from perceiver_export.calibration.weights import quantize_channels
from perceiver_export.runtimes.runtime import Array

_ALPHAS = (0.3, 0.5, 0.7, 0.85, 1.0)
_ROWS = 64  # of each run that the search looks at
_LEAST_FACTOR, _MOST_FACTOR = 1e-2, 1e2


@dataclass(frozen=True)
class Site:
    """Linears that one vector serves, and what it is folded into.

    ``norms``: LayerNormalizations that share their scale and shift. ``values``: linears whose output channels are the
    readers' input channels.
    """

    readers: tuple[Linear, ...]
    norms: tuple[ir.Node, ...] = ()
    values: tuple[Linear, ...] = ()


def smooth(graph: ir.Graph, linears: Sequence[Linear], statistics: Statistics, bits: int) -> dict[str, float]:
    """Fold smoothing into the graph's float weights, in place, and into the statistics; α by group, where it helps."""
    chosen: dict[str, float] = {}
    for site in find_sites(linears):
        alpha, factors = _search(site, statistics, bits)
        if factors is None:
            continue
        _fold(graph, site, factors)
        for name in {str(linear.activation.name) for linear in site.readers}:
            statistics.activations[name] = statistics.activations[name].scaled(1 / factors)
        chosen |= {linear.group: alpha for linear in site.readers}
    remove_unused(graph)
    return chosen


def find_sites(linears: Sequence[Linear]) -> list[Site]:
    """Where a vector can be folded: behind LayerNorms all of whose readers are linears, and behind values."""
    by_weight: dict[ir.Value, list[Linear]] = {}
    for linear in linears:
        by_weight.setdefault(linear.weight, []).append(linear)
    sites, done = [], set[ir.Value]()
    for linear in linears:
        if linear.weight in done:
            continue
        readers = _connected(linear, by_weight)
        done |= {reader.weight for reader in readers}
        makers = {reader.activation for reader in readers}
        if any(_read_by_others(value, {reader.node for reader in readers}) for value in makers):
            continue  # it would be seen divided
        norms = [value.producer() for value in makers]
        if all(norm is not None and norm.op_type == "LayerNormalization" for norm in norms):
            if len({tuple(norm.inputs[1:]) for norm in norms if norm is not None}) == 1:
                sites.append(Site(readers, norms=tuple(norm for norm in norms if norm is not None)))
        elif (values := _value_projections(readers, by_weight)) is not None:
            sites.append(Site(readers, values=values))
    return sites


def _connected(start: Linear, by_weight: dict[ir.Value, list[Linear]]) -> tuple[Linear, ...]:
    """All linears that share a weight or an activation with it, by any number of steps."""
    by_activation: dict[ir.Value, list[Linear]] = {}
    for linears in by_weight.values():
        for linear in linears:
            by_activation.setdefault(linear.activation, []).append(linear)
    found: dict[ir.Node, Linear] = {}
    waiting = [start]
    while waiting:
        linear = waiting.pop()
        if linear.node not in found:
            found[linear.node] = linear
            waiting += by_weight[linear.weight] + by_activation[linear.activation]
    return tuple(found.values())


def _read_by_others(value: ir.Value, readers: set[ir.Node]) -> bool:
    """Whether anything but these nodes, or whoever calls the graph, sees a value."""
    return value.is_graph_output() or not set(value.consumers()) <= readers


def _has_one_reader(value: ir.Value) -> bool:
    return len(value.uses()) == 1 and not value.is_graph_output()


def _value_projections(
    readers: tuple[Linear, ...], by_weight: dict[ir.Value, list[Linear]]
) -> tuple[Linear, ...] | None:
    """The value projections behind attention outputs, if channels keep their order and nobody else reads them."""
    by_output = {linear.output: linear for linears in by_weight.values() for linear in linears}
    found = {}
    for reader in readers:
        value = _through_attention(reader.activation, by_output)
        if value is None:
            return None
        found[value.node] = value
    weights = {value.weight for value in found.values()}
    runs = {linear.node for weight in weights for linear in by_weight[weight]}
    if runs != set(found) or len(found) != len({reader.activation for reader in readers}):
        return None  # a shared value projection, one of whose runs goes elsewhere
    return tuple(found.values())


def _through_attention(value: ir.Value, by_output: dict[ir.Value, Linear]) -> Linear | None:
    """From an attention's output back through probabilities × values to the projection that made the values."""
    outer, product = _back_through_shapes(value)
    if product is None or product.op_type != "MatMul" or product.inputs[1] is None:
        return None
    if outer and not _has_one_reader(product.outputs[0]):
        return None  # without shapes behind it, it is what the readers read
    inner, _ = _back_through_shapes(product.inputs[1])
    source = inner[-1].inputs[0] if inner else product.inputs[1]
    linear = by_output.get(source) if source is not None else None
    if linear is None or not _keeps_channels(linear.output, inner, product, outer):
        return None
    return linear


def _back_through_shapes(value: ir.Value) -> tuple[list[ir.Node], ir.Node | None]:
    """Reshapes and Transposes that lead to a value with no other reader, last first, and the node before them."""
    nodes: list[ir.Node] = []
    current: ir.Value | None = value
    while current is not None and (node := current.producer()) is not None:
        if node.op_type not in ("Reshape", "Transpose") or not _has_one_reader(node.outputs[0]):
            return nodes, node
        nodes.append(node)
        current = node.inputs[0]
    return nodes, None


def _keeps_channels(source: ir.Value, inner: list[ir.Node], product: ir.Node, outer: list[ir.Node]) -> bool:
    """Whether channel j of ``source`` ends up as channel j of the attention's output: tried on channel numbers."""
    shape = _static(source)
    if shape is None or not _has_one_reader(source):
        return False
    numbers = np.arange(shape[-1], dtype=np.int16)  # of a small type: inputs may be 180,000 rows
    channels = _reshaped(np.broadcast_to(numbers, shape), inner)
    rows = _static(product.outputs[0])
    if channels is None or rows is None or channels.ndim != len(rows):
        return False
    first = channels[..., :1, :]
    if not (channels == first).all() or first.shape[:-2] != rows[:-2] or first.shape[-1] != rows[-1]:
        return False
    result = _reshaped(np.broadcast_to(first, rows), outer)
    return result is not None and result.shape[-1] == shape[-1] and bool((result == numbers).all())


def _reshaped(array: Array, nodes: list[ir.Node]) -> Array | None:
    for node in reversed(nodes):
        if node.op_type == "Transpose":
            array = array.transpose(node.attributes.get_ints("perm", tuple(range(array.ndim))[::-1]))
        else:
            shape = _static(node.outputs[0])
            if shape is None or np.prod(shape) != array.size:
                return None
            array = array.reshape(shape)
    return array


def _static(value: ir.Value) -> tuple[int, ...] | None:
    """The shape with dynamic sizes taken as 1 (a batch), None where there is no shape."""
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else 1 for dim in value.shape)


def _search(site: Site, statistics: Statistics, bits: int) -> tuple[float, Array | None]:
    """The α with the least error of the products, and its factors; None where no smoothing is best."""
    largest = np.max([_activation(linear, statistics).largest for linear in site.readers], axis=0)
    weights = {linear.weight: _array(linear.weight) for linear in site.readers}
    widest = np.max([np.abs(weight).reshape(-1, *weight.shape[-2:]).max(axis=(0, 2)) for weight in weights.values()], 0)
    best = _error(site, statistics, weights, np.ones_like(largest), bits)
    alpha, found = 0.0, None
    for tried in _ALPHAS:
        factors = np.maximum(largest, 1e-5) ** tried / np.maximum(widest, 1e-5) ** (1 - tried)
        # Only ratios matter; a common factor would do nothing but move numbers towards fp16's ends.
        factors = factors / np.exp(np.mean(np.log(factors)))
        factors = np.clip(factors, _LEAST_FACTOR, _MOST_FACTOR).astype(np.float32)
        error = _error(site, statistics, weights, factors, bits)
        if error < best:
            best, alpha, found = error, tried, factors
    return alpha, found


def _error(site: Site, statistics: Statistics, weights: dict[ir.Value, Array], factors: Array, bits: int) -> float:
    """Squared error of all products on sampled rows, each as a share of the product's size."""
    restored = {
        value: quantize_channels(weight * factors[:, None], bits).dequantized() for value, weight in weights.items()
    }
    total = 0.0
    for linear in site.readers:
        activation = _activation(linear, statistics)
        rows = activation.sample[:_ROWS]
        clip = float((activation.largest / factors).max())
        exact = rows @ weights[linear.weight]
        found = fake_quantize(rows / factors, clip or 1.0) @ restored[linear.weight]
        total += float(np.square(found - exact).sum()) / (float(np.square(exact).sum()) or 1.0)
    return total


def _fold(graph: ir.Graph, site: Site, factors: Array) -> None:
    for weight in {linear.weight for linear in site.readers}:
        _replace(graph, weight, _array(weight) * factors[:, None], {linear.node for linear in site.readers})
    if site.norms:
        norms = set(site.norms)
        for parameter in [value for value in site.norms[0].inputs[1:] if value is not None]:
            _replace(graph, parameter, _array(parameter) / factors, norms)
    for weight in {linear.weight for linear in site.values}:
        _replace(graph, weight, _array(weight) / factors, {linear.node for linear in site.values})
    adds = {linear.bias_add for linear in site.values if linear.bias_add is not None}
    for bias in {linear.bias for linear in site.values if linear.bias is not None}:
        _replace(graph, bias, _array(bias) / factors, adds)


def _replace(graph: ir.Graph, value: ir.Value, array: Array, readers: set[ir.Node]) -> None:
    """Give these readers another array. Others keep theirs: equal arrays of different layers are stored once."""
    replacement = constant(graph, f"{value.name}.smoothed", array.astype(np.float32))
    for node, index in list(value.uses()):
        if node in readers:
            node.replace_input_with(index, replacement)


def _activation(linear: Linear, statistics: Statistics) -> Activation:
    return statistics.activations[str(linear.activation.name)]


def _array(value: ir.Value) -> Array:
    assert value.const_value is not None
    return value.const_value.numpy()
