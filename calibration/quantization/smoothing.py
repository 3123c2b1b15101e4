# SPDX-License-Identifier: Apache-2.0
"""SmoothQuant (arXiv 2211.10438) with every factor folded into a weight, so that the graph gets no new products.

    x W = (x / s) (s W),   s_j = max|x_j|^α / max_n|W_jn|^(1 − α)

A large channel of x makes the tensor's only scale coarse. Dividing the channel by s_j moves its spread into W, which
has one scale per output channel. The division is folded into the node that produces x: into the scale and shift of a
LayerNorm, or, if x is an attention's output, into the columns of the value projection. A GELU has no such parameters.

Blocks that share weights also share a LayerNorm, so all runs of a layer get the same vector. α is chosen for the least
error of the products on the sampled rows. "No smoothing" is among the choices, so no layer gets worse.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from perceiver_export.calibration.graphs import array_of, constant, dims, made_by, remove_unused
from perceiver_export.calibration.quantization.integers import fake_quantize, quantize_channels
from perceiver_export.calibration.quantization.linears import Linear
from perceiver_export.calibration.quantization.statistics import Statistics
from perceiver_export.runtimes.runtime import Array

_ALPHAS = (0.3, 0.5, 0.7, 0.85, 1.0)
_ROWS = 64  # sampled rows of each run on which α is searched
_LEAST_FACTOR, _MOST_FACTOR = 1e-2, 1e2


@dataclass(frozen=True)
class Site:
    """Linear layers that share one vector (``readers``), and the nodes into which it is folded.

    ``norms`` are LayerNormalizations that share their scale and shift. ``values`` are linear layers whose output
    channels are the readers' input channels.
    """

    readers: tuple[Linear, ...]
    norms: tuple[ir.Node, ...] = ()
    values: tuple[Linear, ...] = ()


def smooth(graph: ir.Graph, linears: Sequence[Linear], statistics: Statistics, bits: int) -> dict[str, float]:
    """Fold smoothing into the graph's float weights and the statistics, in place. Returns α by group where it helps."""
    chosen: dict[str, float] = {}
    for site in find_sites(linears):
        alpha, factors = _search(site, statistics, bits)
        if not alpha:
            continue
        _fold(graph, site, factors)
        for name in {str(linear.activation.name) for linear in site.readers}:
            statistics.activations[name] = statistics.activations[name].scaled(1 / factors)
        chosen |= {linear.group: alpha for linear in site.readers}
    remove_unused(graph)
    return chosen


def find_sites(linears: Sequence[Linear]) -> list[Site]:
    """The sites where a vector can be folded: into LayerNorms read only by linear layers, and value projections."""
    sites, done = [], set[ir.Value]()
    for linear in linears:
        if linear.weight in done:
            continue
        readers = _connected(linear, linears)
        done |= {reader.weight for reader in readers}
        makers = dict.fromkeys(reader.activation for reader in readers)
        nodes = {reader.node for reader in readers}
        if any(value.is_graph_output() or not set(value.consumers()) <= nodes for value in makers):
            continue  # another node would read the divided value
        norms = [node for value in makers if (node := made_by(value, "LayerNormalization"))]
        if len(norms) == len(makers):
            if len({tuple(norm.inputs[1:]) for norm in norms}) == 1:
                sites.append(Site(readers, norms=tuple(norms)))
        elif values := _value_projections(makers, linears):
            sites.append(Site(readers, values=values))
    return sites


def _connected(start: Linear, linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """All linear layers that share a weight or an activation with ``start``, directly or through others."""
    found: dict[ir.Node, Linear] = {}
    waiting = [start]
    while waiting:
        linear = waiting.pop()
        if linear.node not in found:
            found[linear.node] = linear
            waiting += [one for one in linears if one.weight is linear.weight or one.activation is linear.activation]
    return tuple(found.values())


def _value_projections(makers: Collection[ir.Value], linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """The value projections of attention outputs, if channels keep their order and nothing else reads them."""
    by_output = {linear.output: linear for linear in linears}
    found = {one.node: one for value in makers if (one := _projection(value, by_output))}
    weights = {one.weight for one in found.values()}
    # Every run of a shared value projection must lead here, each to its own attention.
    runs = {one.node for one in linears if one.weight in weights}
    return tuple(found.values()) if len(found) == len(makers) and runs == found.keys() else ()


def _projection(value: ir.Value, by_output: Mapping[ir.Value, Linear]) -> Linear | None:
    """The linear layer whose output, as an attention's values, becomes ``value`` with channels in the same order."""
    chain: list[ir.Node] = []
    current: ir.Value | None = value
    while current is not None and current not in by_output:
        node = current.producer()
        alone = current is value or (len(current.uses()) == 1 and not current.is_graph_output())
        if node is None or node.op_type not in ("Reshape", "Transpose", "MatMul") or not alone:
            return None
        chain.append(node)
        current = node.inputs[1 if node.op_type == "MatMul" else 0]
    if current is None or len(current.uses()) != 1 or current.is_graph_output():
        return None
    one_attention = [node.op_type for node in chain].count("MatMul") == 1
    return by_output[current] if one_attention and _keeps_channels(current, chain[::-1]) else None


def _keeps_channels(source: ir.Value, chain: Sequence[ir.Node]) -> bool:
    """Whether channel j of ``source`` is channel j after ``chain``, found by sending channel numbers through it."""
    numbers = np.arange(dims(source)[-1], dtype=np.int16)  # a small type, because inputs may have 180,000 rows
    array = np.broadcast_to(numbers, dims(source))
    for node in chain:
        shape = dims(node.outputs[0])
        if node.op_type == "Transpose":
            array = array.transpose(node.attributes.get_ints("perm", tuple(range(array.ndim))[::-1]))
        elif node.op_type == "Reshape" and np.prod(shape) == array.size:
            array = array.reshape(shape)
        elif array.ndim == len(shape) and (*array.shape[:-2], array.shape[-1]) == (*shape[:-2], shape[-1]):
            first = array[..., :1, :]  # each row of probabilities × values mixes all rows of values
            if (array != first).any():
                return False
            array = np.broadcast_to(first, shape)
        else:
            return False
    return array.shape[-1:] == numbers.shape and bool((array == numbers).all())


def _search(site: Site, statistics: Statistics, bits: int) -> tuple[float, Array]:
    """The α with the least error of the products, and its factors; α is 0 if no smoothing is best."""
    largest = np.max([statistics.of(linear).largest for linear in site.readers], axis=0)
    weights = {linear.weight: array_of(linear.weight) for linear in site.readers}
    widest = np.max([np.abs(weight).reshape(-1, *weight.shape[-2:]).max(axis=(0, 2)) for weight in weights.values()], 0)
    tried = [(0.0, np.ones_like(largest))]
    for alpha in _ALPHAS:
        factors = np.maximum(largest, 1e-5) ** alpha / np.maximum(widest, 1e-5) ** (1 - alpha)
        # Only ratios matter. A common factor would only move values towards the limits of fp16.
        factors = factors / np.exp(np.mean(np.log(factors)))
        tried.append((alpha, np.clip(factors, _LEAST_FACTOR, _MOST_FACTOR).astype(np.float32)))
    return tried[int(np.argmin([_error(site, statistics, weights, factors, bits) for _, factors in tried]))]


def _error(site: Site, statistics: Statistics, weights: Mapping[ir.Value, Array], factors: Array, bits: int) -> float:
    """The squared error of all products on sampled rows, each as a share of the product's squared size."""
    restored = {
        value: quantize_channels(weight * factors[:, None], bits).dequantized() for value, weight in weights.items()
    }
    total = 0.0
    for linear in site.readers:
        activation = statistics.of(linear)
        rows = activation.sample[:_ROWS]
        clip = float((activation.largest / factors).max())
        exact = rows @ weights[linear.weight]
        found = fake_quantize(rows / factors, clip or 1.0) @ restored[linear.weight]
        total += float(np.square(found - exact).sum()) / (float(np.square(exact).sum()) or 1.0)
    return total


def _fold(graph: ir.Graph, site: Site, factors: Array) -> None:
    """Multiply the readers' weights by ``factors``, and divide the parameters that produce their input by them.

    Only these nodes get the new parameters, because equal arrays of different layers are stored once.
    """
    folded: list[tuple[Iterable[ir.Value | None], Collection[ir.Node | None], Array]] = [
        ([one.weight for one in site.readers], [one.node for one in site.readers], factors[:, None]),
        ([value for norm in site.norms for value in norm.inputs[1:]], site.norms, 1 / factors),
        ([one.weight for one in site.values], [one.node for one in site.values], 1 / factors),
        ([one.bias for one in site.values], [one.bias_add for one in site.values], 1 / factors),
    ]
    for values, readers, times in folded:
        for value in dict.fromkeys(value for value in values if value is not None):
            array = (array_of(value) * times).astype(np.float32)
            replacement = constant(graph, f"{value.name}.smoothed", array)
            for node, index in list(value.uses()):
                if node in readers:
                    node.replace_input_with(index, replacement)
