# SPDX-License-Identifier: Apache-2.0
"""What TensorRT made of a graph, by its own report: the inspector's JSON, or the build log of TensorRT for RTX.

Neither format is documented. It is read tolerantly, and what cannot be read counts as not there: a precision that was
asked for and is not found fails the build.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

# Longest first: "Half" also stands in "Row major linear FP16 format" as FP16.
_TYPES = (
    ("Int8", "int8"),
    ("INT8", "int8"),
    ("BFloat16", "bf16"),
    ("BF16", "bf16"),
    ("Half", "fp16"),
    ("FP16", "fp16"),
    ("FP8", "fp8"),
    ("Float", "fp32"),
    ("FP32", "fp32"),
)
_ORDER = ("int8", "fp8", "fp16", "bf16", "fp32")
# A fused kernel is named after what it does: one that casts before its product (Fc) dequantizes, and multiplies floats.
_UNPACKS = re.compile(r"^__myl_\w*Cast\w*Fc")
# They only move numbers, also those of a product that is named in their metadata.
_MOVES = ("Reformat", "NoOp", "Constant")
_ONNX = re.compile(r"\[ONNX Layer: ([^\]]*)\]")


@dataclass(frozen=True)
class Layer:
    """One kernel of an engine. ``inputs`` and ``constants`` are types (`int8`, `fp16`); ``nodes`` are the graph's."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    constants: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: frozenset[str]

    @property
    def fused_attention(self) -> bool:
        """Whether it is a whole attention in one kernel."""
        return "mha" in self.name.lower() or "mha" in self.kind.lower()


@dataclass(frozen=True)
class Difference:
    """A product that does not run in the precision that was asked for; ``found`` is empty where it is not reported."""

    node: str
    asked: str
    found: str

    def __str__(self) -> str:
        return f"{self.node}: {self.asked} asked, {self.found or 'nothing'} found"


def layers_from_log(lines: Iterable[str]) -> tuple[Layer, ...]:
    """From the build log of TensorRT for RTX, with detailed profiling: one `Name: …, LayerType: …` line a layer."""
    text = "\n".join(lines)
    return tuple(
        _from_line(line) for line in text.splitlines() if line.startswith("Name: ") and ", LayerType: " in line
    )


def layers_from_inspector(report: str) -> tuple[Layer, ...]:
    """From the JSON of `IEngineInspector`. Layers that are only a name (profiling was not detailed) tell nothing."""
    try:
        layers = json.loads(report).get("Layers", [])
    except (ValueError, AttributeError):
        return ()
    return tuple(_from_json(layer) for layer in layers if isinstance(layer, dict))


def count_attentions(layers: Iterable[Layer]) -> int:
    """Attentions that became one kernel."""
    return sum(layer.fused_attention for layer in layers)


def count_precisions(layers: Iterable[Layer], products: Iterable[str]) -> dict[str, int]:
    """How many of the named products run in each type; those that are in no layer's report count nowhere."""
    found = _precisions(layers)
    return dict(Counter(found[node] for node in products if node in found))


def differences(asked: Mapping[str, str], layers: Iterable[Layer]) -> tuple[Difference, ...]:
    """Products (by node name) that run in another type than was asked for, or are in no layer's report.

    A narrower one is as wrong as a wider one: what was to stay fp32 would overflow.
    """
    found = _precisions(layers)
    return tuple(
        Difference(node, precision, found.get(node, ""))
        for node, precision in asked.items()
        if found.get(node) != precision
    )


def _precisions(layers: Iterable[Layer]) -> dict[str, str]:
    """Of each node the narrowest type that one of its kernels computes in: the product's own, beside its epilogues."""
    found: dict[str, str] = {}
    for layer in layers:
        precision = "" if layer.kind.startswith(_MOVES) else _precision(layer)
        for node in layer.nodes if precision else ():
            if node not in found or _ORDER.index(precision) < _ORDER.index(found[node]):
                found[node] = precision
    return found


def _precision(layer: Layer) -> str:
    """What a kernel computes in: what it reads, unless it converts that first; empty where nothing is reported.

    Constants count little: int8 ones beside wider inputs are weights that the kernel unpacks.
    """
    types = [kind for kind in layer.inputs if kind in _ORDER]
    halves = [kind for kind in (*layer.constants, *layer.outputs) if kind in ("fp16", "bf16")]
    narrowest = min(types, key=_ORDER.index, default="")
    if narrowest == "int8" and _UNPACKS.search(layer.name):
        return halves[0] if halves else "fp32"
    if narrowest == "fp32":  # a kernel that begins with a cast, and multiplies by weights that are halves
        return next((kind for kind in layer.constants if kind in ("fp16", "bf16")), narrowest)
    return narrowest


def _from_line(line: str) -> Layer:
    sections = {name: _section(line, name) for name in ("Inputs", "Constants", "Outputs")}
    kind = re.search(r", LayerType: ([^,]*)", line)
    return Layer(
        name=line.removeprefix("Name: ").split(", LayerType: ", 1)[0],
        kind=kind[1] if kind else "",
        inputs=_types(re.findall(r"Datatype: (\w+)", sections["Inputs"])),
        constants=_types(re.findall(r"Datatype: (\w+)", sections["Constants"])),
        outputs=_types(re.findall(r"Datatype: (\w+)", sections["Outputs"])),
        nodes=frozenset(_ONNX.findall(line)),
    )


def _section(line: str, name: str) -> str:
    """What stands between `NAME: [` and the bracket that closes it."""
    start = line.find(f", {name}: [")
    if start < 0:
        return ""
    start += len(f", {name}: [")
    depth = 1
    for place in range(start, len(line)):
        depth += (line[place] == "[") - (line[place] == "]")
        if depth == 0:
            return line[start:place]
    return line[start:]


def _from_json(layer: Mapping[str, Any]) -> Layer:
    name, metadata = str(layer.get("Name", "")), str(layer.get("Metadata", ""))
    nodes = frozenset(_ONNX.findall(metadata))
    return Layer(
        name=name,
        kind=" ".join(str(layer.get(key, "")) for key in ("LayerType", "TacticName")),
        inputs=_types(map(_type_text, layer.get("Inputs", ()))),
        constants=_types(map(_type_text, layer.get("Constants", ()))),
        outputs=_types(map(_type_text, layer.get("Outputs", ()))),
        # 8.x has no metadata: there names of layers are names of nodes, joined where they were fused
        nodes=nodes or frozenset(part.strip() for part in re.split(r" \+ |\+", name)),
    )


def _type_text(tensor: Any) -> str:
    if not isinstance(tensor, dict):
        return ""
    return " ".join(str(tensor.get(key, "")) for key in ("Datatype", "Format/Datatype", "Format"))


def _types(texts: Iterable[str]) -> tuple[str, ...]:
    return tuple(next((ours for theirs, ours in _TYPES if theirs in text), "") for text in texts)
