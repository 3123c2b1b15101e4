# SPDX-License-Identifier: Apache-2.0
"""Read a graph as TensorRT's network, and read the types in which its engine computes.

The types come from TensorRT's own report: the inspector's JSON, or the build log of TensorRT for RTX. Neither format is
documented. Text that cannot be parsed counts as missing, and a missing precision fails the build.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from perceiver_export.runtimes.engines.backend import Source
from perceiver_export.runtimes.engines.tensorrt_versions import Capabilities
from perceiver_export.runtimes.errors import BuildError, BundleError, MissingDependencyError

# The words for each type in a report, in the order in which they are tried: "BFloat16" contains "Float".
_TYPES = {
    **dict.fromkeys(("Int8", "INT8"), "int8"),
    **dict.fromkeys(("BFloat16", "BF16"), "bf16"),
    **dict.fromkeys(("Half", "FP16"), "fp16"),
    "FP8": "fp8",
    **dict.fromkeys(("Float", "FP32"), "fp32"),
}
_HALVES = ("fp16", "bf16")
_ORDER = ("int8", "fp8", "fp16", "bf16", "fp32")
# A fused kernel's name lists its operations. After a cast, which dequantizes, the product (Fc) multiplies floats.
_UNPACKS = re.compile(r"^__myl_\w*Cast\w*Fc")
# These only move numbers, even if their metadata names a product.
_MOVES = ("Reformat", "NoOp", "Constant")
# Kernels that multiply, by tactic, layer type or fused operation.
_PRODUCTS = re.compile(r"gemm|mha|convolution|matrix_?multiply|fully_?connected|(?-i:__myl_\w*Fc)", re.IGNORECASE)
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


class Layer(NamedTuple):
    """One kernel. ``inputs``, ``constants`` and ``outputs`` are types (`int8`, `fp16`), ``nodes`` the graph's nodes."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def fused_attention(self) -> bool:
        """Whether the kernel computes a whole attention."""
        return "mha" in f"{self.name} {self.kind}".lower()

    @property
    def multiplies(self) -> bool:
        """Whether it is known to be a product, by its name or its type."""
        return bool(_PRODUCTS.search(self.name) or _PRODUCTS.search(self.kind))

    @property
    def precision(self) -> str:
        """The type in which it computes: that of its inputs, unless it converts them first; empty if not reported.

        int8 constants with wider inputs are weights that the kernel unpacks, so they do not decide the type.
        """
        if self.kind.startswith(_MOVES):
            return ""
        narrowest = min((kind for kind in self.inputs if kind in _ORDER), key=_ORDER.index, default="")
        if narrowest == "int8" and _UNPACKS.search(self.name):
            return next((kind for kind in (*self.constants, *self.outputs) if kind in _HALVES), "fp32")
        if narrowest == "fp32":  # the kernel may cast first and multiply by 16-bit weights
            return next((kind for kind in self.constants if kind in _HALVES), narrowest)
        return narrowest


def layers_from_log(lines: Iterable[str]) -> tuple[Layer, ...]:
    """Read TensorRT for RTX's detailed build log, which has one line `Name: …, LayerType: …` per layer."""
    found = []
    for line in "\n".join(lines).splitlines():
        if line.startswith("Name: ") and ", LayerType: " in line:
            head, *sections = re.split(r", (Inputs|Constants|Outputs): \[", line)
            texts = dict(zip(sections[::2], sections[1::2], strict=True))
            types = {name: re.findall(r"Datatype: (\w+)", text) for name, text in texts.items()}
            name, kind = head.removeprefix("Name: ").split(", LayerType: ", 1)
            found.append(_layer(name, kind.partition(",")[0], types, line))
    return tuple(found)


def layers_from_inspector(report: str) -> tuple[Layer, ...]:
    """Read the JSON of `IEngineInspector`. Layers given only as a name (no detailed profiling) are skipped."""
    try:
        layers = [layer for layer in json.loads(report).get("Layers", []) if isinstance(layer, dict)]
    except (ValueError, AttributeError):
        return ()
    found = []
    for layer in layers:
        types = {name: map(_type_text, layer.get(name, ())) for name in ("Inputs", "Constants", "Outputs")}
        kind = f"{layer.get('LayerType', '')} {layer.get('TacticName', '')}"
        found.append(_layer(str(layer.get("Name", "")), kind, types, str(layer.get("Metadata", ""))))
    return tuple(found)


def _layer(name: str, kind: str, types: Mapping[str, Iterable[str]], metadata: str) -> Layer:
    inputs, constants, outputs = (
        tuple(next((ours for theirs, ours in _TYPES.items() if theirs in text), "") for text in types.get(section, ()))
        for section in ("Inputs", "Constants", "Outputs")
    )
    return Layer(name, kind, inputs, constants, outputs, frozenset(_ONNX.findall(metadata)))


def _type_text(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return ""
    return " ".join(str(tensor.get(key, "")) for key in ("Datatype", "Format/Datatype", "Format"))


def precisions(layers: Iterable[Layer]) -> dict[str, str]:
    """By node, the narrowest type in which one of its kernels computes, so that an epilogue does not hide the product.

    Kernels that are known to multiply take precedence, because a kernel that slices an attention's padded heads may
    move int8.
    """
    found: dict[str, tuple[bool, int]] = {}
    for layer in layers:
        if precision := layer.precision:
            this = (not layer.multiplies, _ORDER.index(precision))
            for node in layer.nodes:
                found[node] = min(found.get(node, this), this)
    return {node: _ORDER[place] for node, (_, place) in found.items()}


SHARED_WEIGHTS = "its compiler crashes on weight-only quantized products of one input if blocks share their weights"
SHARED_WEIGHTS_FIX = "use --precision bf16 for int8 weights; instead of int4 weights, quantize with --scheme int8"


def parse(trt: Any, can: Capabilities, builder: Any, logger: Any, graph: Path) -> tuple[Any, Any]:
    """The network of an ONNX file, and its parser, which owns weights to which the network refers.

    Raises BundleError: the file is not readable or has unknown operators; MissingDependencyError: no parser.
    """
    if not hasattr(trt, "OnnxParser"):
        install = "sudo apt install libnvonnxparsers-dev python3-libnvinfer"
        raise MissingDependencyError(f"this {can.name} has no ONNX parser", install)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED) if can.typed_by_flag else 0
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not graph.is_file():
        raise BundleError(f"{graph} does not exist", "export the bundle again")
    if not parser.parse_from_file(str(graph)):
        said = "it gives no reason"
        if parser.num_errors:
            error = parser.get_error(0)
            said = f"{error.node_operator()} {error.node_name()}: {' '.join(str(error.desc()).split())}"
        hint = f"run {lint_command(can, graph)} to see why, or write a graph for it with build --lower-only"
        raise BundleError(f"{can.name} cannot read {graph.name}: {said}", hint)
    return network, parser


def lint_command(can: Capabilities, graph: Path) -> str:
    """The command that lints a graph for this version."""
    version = f"{can.version[0]}.{can.version[1]}"
    return f"perceiver-export lint {graph.parent} --target {can.library} --version {version}"


def asked_precisions(trt: Any, network: Any) -> dict[str, str]:
    """By node, the precision that each matrix product must have according to the graph's types."""
    producers, constants = _producers(network), _constants(trt, network)
    asked = {}
    for layer in _layers(network):
        if layer.type != trt.LayerType.MATRIX_MULTIPLY or layer.get_output(0).name in constants:
            continue
        int8 = _is_int8(trt, producers, layer)
        asked[node_name(layer)] = "int8" if int8 else _type_name(trt, layer.get_input(0).dtype)
    return asked


def check_types(asked: dict[str, str], source: Source) -> None:
    """Raise BuildError if the graph's products do not have the build's precision, which no flag could change."""
    wanted = source.options.precision
    found = {precision for precision in asked.values() if precision != "int8"}
    if wrong := found - {"fp32"} if wanted == "fp32" else set() if wanted in found else found:
        raise BuildError(
            f"the build is {wanted}, but the products of {source.graph.name} are {', '.join(sorted(wrong))}",
            f"write a {wanted} graph, with onnx installed: perceiver-export build {source.graph.parent}"
            f" --target {source.target} --precision {wanted} --lower-only",
        )


def check_shared_weights(trt: Any, network: Any, can: Capabilities, graph: Path) -> None:
    """Raise BuildError if TensorRT for RTX 1.7 would end the process or fail with an unclear message."""
    if not can.shared_weights_crash:
        return
    producers = _producers(network)
    uses: dict[str, int] = {}
    weights: dict[str, dict[str, Any]] = {}  # input name -> weight name -> a product of the two
    for layer in _layers(network):
        if layer.type != trt.LayerType.MATRIX_MULTIPLY or _is_int8(trt, producers, layer):
            continue
        shaped = (trt.LayerType.SHUFFLE, trt.LayerType.CAST)  # a scale too small for 16 bits stays fp32 and is cast
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
            where = f"{graph.name}, {node_name(shared[0])}"
            raise BuildError(f"{can.name} cannot compile {where}: {SHARED_WEIGHTS}", SHARED_WEIGHTS_FIX)


def weight_bytes(trt: Any, network: Any) -> tuple[int, int]:
    """Bytes of all constants, first each counted once, then once for each layer that uses it.

    An engine's size is close to one of the two: TensorRT for RTX stores weights once.
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


def node_name(layer: Any) -> str:
    """The ONNX node of a layer, from its metadata; without metadata, the layer's own name."""
    found = _ONNX.search(layer.metadata)
    return found[1] if found else str(layer.name)


def _layers(network: Any) -> Iterator[Any]:
    return (network.get_layer(index) for index in range(network.num_layers))


def _inputs(layer: Any) -> list[Any]:
    """The layer's inputs without missing optional ones."""
    found = (layer.get_input(index) for index in range(layer.num_inputs))
    return [tensor for tensor in found if tensor is not None]


def _producers(network: Any) -> dict[str, Any]:
    """By tensor name, the layer that produces it."""
    return {layer.get_output(index).name: layer for layer in _layers(network) for index in range(layer.num_outputs)}


def _is_int8(trt: Any, producers: dict[str, Any], product: Any) -> bool:
    """Whether both operands of a product are dequantized, so that it must run in int8."""
    sources = [_source(producers, product.get_input(index), (trt.LayerType.SHUFFLE,)) for index in range(2)]
    return all(source is not None and source.type == trt.LayerType.DEQUANTIZE for source in sources)


def _constants(trt: Any, network: Any) -> set[str]:
    """Names of tensors that depend on no input, so they are computed when the engine is built."""
    found: set[str] = set()
    for layer in _layers(network):  # producers come before their users
        given = [one.name in found for one in _inputs(layer)]
        if layer.type == trt.LayerType.CONSTANT or (given and all(given)):
            found.update(layer.get_output(index).name for index in range(layer.num_outputs))
    return found


def _source(producers: dict[str, Any], tensor: Any, past: tuple[Any, ...]) -> Any:
    """The layer that produces a tensor, skipping layers of the types ``past``."""
    layer = producers.get(tensor.name)
    while layer is not None and layer.type in past:
        layer = producers.get(layer.get_input(0).name)
    return layer


def _type_name(trt: Any, dtype: Any) -> str:
    names = {trt.float32: "fp32", trt.float16: "fp16", trt.bfloat16: "bf16", trt.int8: "int8"}
    return names.get(dtype, str(dtype))
