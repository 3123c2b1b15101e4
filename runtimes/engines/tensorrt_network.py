# SPDX-License-Identifier: Apache-2.0
"""A graph as TensorRT's network: read, given precision where flags decide it, and asked what it wants of the engine."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.engines.backend import EngineOptions, Precision, Source
from perceiver_export.runtimes.engines.tensorrt_capabilities import Capabilities
from perceiver_export.runtimes.errors import BuildError, BundleError, MissingDependencyError

# How lowering marks nodes that overflow in 16 bits, where types are not in the graph (TensorRT 8).
KEEP_FP32 = ":fp32"
SHARED_WEIGHTS = "products of one input whose weights alone are integers, and shared by blocks, crash its compiler"
SHARED_WEIGHTS_FIX = "int8 weights compile with --precision bf16; int4 weights do not: quantize with --scheme int8"
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


def parse(trt: Any, can: Capabilities, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and its parser, which owns weights that the network refers to.

    Raises BundleError: not readable, or with what this version does not know; MissingDependencyError: no parser.
    """
    if not hasattr(trt, "OnnxParser"):
        raise MissingDependencyError(
            f"this {can.name} has no ONNX parser", "install it: apt install libnvonnxparsers-dev python3-libnvinfer"
        )
    network = builder.create_network(_creation_flags(trt, can))
    parser = trt.OnnxParser(network, logger)
    if not graph.is_file():
        raise BundleError(f"{graph} does not exist", "export the bundle again")
    if not parser.parse_from_file(str(graph)):
        problems = [_problem(can, parser.get_error(index)) for index in range(parser.num_errors)]
        raise BundleError(
            f"{can.name} cannot read {graph.name}: {problems[0] if problems else 'it gives no reason'}",
            f"perceiver-export lint {graph.parent} --target {can.library} --version"
            f" {can.version[0]}.{can.version[1]} says what does not fit; build --lower-only writes a graph that does",
        )
    return network, parser


def _creation_flags(trt: Any, can: Capabilities) -> int:
    if can.typing == "weak":
        return 1 << int(trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH)
    if can.typing == "strong-flag":
        return 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    return 0


def _problem(can: Capabilities, error: Any) -> str:
    where = f"{error.node_operator()} {error.node_name()}: " if can.typing != "weak" else f"node {error.node()}: "
    return f"{where}{' '.join(str(error.desc()).split())}"


def asked_precisions(trt: Any, network: Any, can: Capabilities, options: EngineOptions) -> dict[str, str]:
    """By node, the precision that each matrix product must have: from the graph's types, or on 8.x from the option."""
    producers, constants = _producers(network), _constants(trt, network)
    asked = {}
    for layer in _layers(network):
        if layer.type != trt.LayerType.MATRIX_MULTIPLY or layer.get_output(0).name in constants:
            continue
        if _is_int8(trt, producers, layer):
            asked[node_name(layer, can)] = "int8"
        elif can.typing == "weak":
            asked[node_name(layer, can)] = "fp32" if layer.name.endswith(KEEP_FP32) else options.precision
        else:
            asked[node_name(layer, can)] = _type_name(trt, layer.get_input(0).dtype)
    return asked


def check_types(asked: dict[str, str], source: Source) -> None:
    """Raise BuildError where the graph is not of the precision that was asked for: no flag could change it."""
    wanted = source.options.precision
    found = {precision for precision in asked.values() if precision != "int8"}
    wrong = found - {"fp32"} if wanted == "fp32" else set() if wanted in found or not found else found
    if wrong:
        raise BuildError(
            f"{wanted} was asked for, and the products of {source.graph.name} are {', '.join(sorted(wrong))}",
            f"perceiver-export build {source.graph.parent} --target {source.target} --precision {wanted} --lower-only"
            " writes the graph for it, where onnx is installed",
        )


def constrain(trt: Any, network: Any, config: Any, precision: Precision) -> None:
    """On 8.x: flags, and each layer's precision as a constraint, so that the fastest wrong one is not taken."""
    if precision == "bf16":
        raise BuildError("TensorRT 8 has no bf16", "give --precision fp16, or fp32")
    config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
    kinds = trt.LayerType
    if any(layer.type in (kinds.QUANTIZE, kinds.DEQUANTIZE) for layer in _layers(network)):
        config.set_flag(trt.BuilderFlag.INT8)
    if precision != "fp16":
        return
    config.set_flag(trt.BuilderFlag.FP16)
    producers = _producers(network)
    for layer in _layers(network):
        if layer.type == kinds.NORMALIZATION:
            layer.compute_precision = trt.float32  # sums of squares
        int8 = layer.type == kinds.MATRIX_MULTIPLY and _is_int8(trt, producers, layer)
        if layer.name.endswith(KEEP_FP32):
            if not int8:  # which only its sums and its output leave
                layer.precision = trt.float32
            for index in range(layer.num_outputs):
                if layer.get_output(index).dtype == trt.float32:  # not those of indices and comparisons
                    layer.set_output_type(index, trt.float32)
        elif layer.type in (kinds.SOFTMAX, kinds.MATRIX_MULTIPLY) and not int8:
            layer.precision = trt.float16


def check_shared_weights(trt: Any, network: Any, can: Capabilities, graph: Path) -> None:
    """Raise BuildError where TensorRT for RTX 1.7 would take the process down, or fail with words about vectors."""
    if not can.shared_weights_crash:
        return
    producers = _producers(network)
    uses: dict[str, int] = {}
    weights: dict[str, dict[str, Any]] = {}  # of each input, by the weight's name a product of the two
    for layer in _layers(network):
        if layer.type != trt.LayerType.MATRIX_MULTIPLY or _is_int8(trt, producers, layer):
            continue
        shaped = (trt.LayerType.SHUFFLE, trt.LayerType.CAST)  # a scale too small for 16 bits stays fp32, and is cast
        left, right = layer.get_input(0), _source(producers, layer.get_input(1), shaped)
        if right is None or right.type != trt.LayerType.DEQUANTIZE:
            continue
        if left.dtype == trt.bfloat16 and right.get_input(0).dtype == trt.int8:
            continue
        name = right.get_output(0).name
        uses[name] = uses.get(name, 0) + 1
        weights.setdefault(left.name, {})[name] = layer
    for products in weights.values():
        shared = [layer for name, layer in products.items() if uses[name] > 1]
        if len(shared) > 1:
            where = f"{graph.name}, {node_name(shared[0], can)}"
            raise BuildError(f"{can.name} cannot compile {where}: {SHARED_WEIGHTS}", SHARED_WEIGHTS_FIX)


def weight_bytes(trt: Any, network: Any) -> tuple[int, int]:
    """Bytes of all constants, as the graph has them: stored once, and a copy for each layer that uses one.

    Which of the two an engine is nearer to is known after it was built: TensorRT for RTX stores weights once.
    """
    kinds = trt.LayerType
    shaped = (kinds.DEQUANTIZE, kinds.SHUFFLE, kinds.CAST, kinds.IDENTITY)  # computed when the engine is built
    readers: dict[str, list[Any]] = {}
    for layer in _layers(network):
        for tensor in _inputs(layer):
            readers.setdefault(tensor.name, []).append(layer)

    def uses(tensor: Any) -> int:
        found = readers.get(tensor.name, ())
        return sum(uses(layer.get_output(0)) if layer.type in shaped else 1 for layer in found)

    constants = [layer.get_output(0) for layer in _layers(network) if layer.type == kinds.CONSTANT]
    sizes = [(tensor, math.ceil(math.prod(tensor.shape) * tensor.dtype.itemsize)) for tensor in constants]
    return sum(size for _, size in sizes), sum(size * uses(tensor) for tensor, size in sizes)


def node_name(layer: Any, can: Capabilities) -> str:
    """Of the ONNX node that a layer was made from: in its metadata, on 8.x its own name."""
    found = _ONNX.search(layer.metadata) if can.typing != "weak" else None
    return found[1] if found else str(layer.name)


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _inputs(layer: Any) -> list[Any]:
    """Those that are given; optional ones may be None."""
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor for tensor in found if tensor is not None]


def _producers(network: Any) -> dict[str, Any]:
    """The layer that each tensor comes from, by the tensor's name."""
    return {layer.get_output(index).name: layer for layer in _layers(network) for index in range(layer.num_outputs)}


def _is_int8(trt: Any, producers: dict[str, Any], product: Any) -> bool:
    """Whether both sides of a product are dequantized, so that it is to run in int8."""
    sources = [_source(producers, product.get_input(index), (trt.LayerType.SHUFFLE,)) for index in range(2)]
    return all(source is not None and source.type == trt.LayerType.DEQUANTIZE for source in sources)


def _constants(trt: Any, network: Any) -> set[str]:
    """Names of tensors that no input changes: they are computed when the engine is built."""
    found: set[str] = set()
    for layer in _layers(network):  # producers come before their users
        given = [one.name in found for one in _inputs(layer)]
        if layer.type == trt.LayerType.CONSTANT or (given and all(given)):
            found.update(layer.get_output(index).name for index in range(layer.num_outputs))
    return found


def _source(producers: dict[str, Any], tensor: Any, past: tuple[Any, ...]) -> Any:
    """The layer that a tensor comes from, behind those of the types ``past``."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in past:
        layer = producers.get(layer.get_input(0).name)
    return layer


def _type_name(trt: Any, dtype: Any) -> str:
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16", trt.int8: "int8"}
    return names.get(dtype, str(dtype))
