# SPDX-License-Identifier: Apache-2.0
"""Bundles of every task whose one layer is linear: quick to write, to run, to judge by, and to ruin."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from onnx import helper, numpy_helper

from perceiver_export.calibration.bundles import file_entries
from perceiver_export.runtimes import preprocessing as steps
from perceiver_export.runtimes.manifest import OutputKind, TensorSpec, default_kinds, encode_manifest
from perceiver_export.runtimes.runtime import Array
from tests.calibration.manifests import manifest

SAMPLES = 80
WORDS = 262
Arrays = dict[str, Array]
Weights = Arrays
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Case:
    """A task: its inputs and outputs without the batch, and what makes targets of a good model's outputs."""

    name: str
    task: str
    inputs: Shapes
    outputs: Shapes
    targets: Callable[[Arrays, Arrays, np.random.Generator], Arrays]
    preprocessing: steps.Preprocessing | None = None
    kinds: dict[str, OutputKind] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    sources: dict[str, str] = field(default_factory=dict)  # of outputs, the input that each is made of

    def weights(self) -> Weights:
        """A matrix and an offset for each output; the identity where a model gives back what it took."""
        generator, found = np.random.default_rng(1), Weights()
        for name, shape in self.outputs.items():
            rows, columns = self._rows(name), int(np.prod(shape)) if self.task != "fill-mask" else WORDS
            identity = self.task == "video-autoencoding" and rows == columns
            matrix = np.eye(rows) if identity else generator.normal(size=(rows, columns)) / np.sqrt(rows)
            matrix -= 0 if identity else matrix.mean(axis=0)  # or inputs above 0 would prefer one label
            scale = {"fill-mask": 90.0, "optical-flow": 8.0, "video-autoencoding": 0.9 if identity else 1.0}
            found[f"{name}.weight"] = (scale.get(self.task, 3.0) * matrix).astype(np.float32)
            found[f"{name}.offset"] = np.zeros(columns, np.float32)
        return found

    def feeds(self) -> dict[str, Array]:
        """Inputs of `SAMPLES` samples."""
        generator, found = np.random.default_rng(2), dict[str, Array]()
        for name, shape in self.inputs.items():
            if name.endswith("_mask"):
                found[name] = np.ones((SAMPLES, *shape), np.int32)
            elif name == "tokens":
                found[name] = generator.integers(6, 30, (SAMPLES, *shape), dtype=np.int32)
            else:
                low = 0.0 if self.task == "video-autoencoding" else -1.0
                found[name] = generator.uniform(low, 1, (SAMPLES, *shape)).astype(np.float32)
        return found

    def write(self, path: Path, weights: Weights | None = None) -> Path:
        """A bundle of these weights, or of its own."""
        path.mkdir()
        onnx.save(self._graph(weights or self.weights()), path / "model.onnx")
        inputs, outputs = (
            tuple(TensorSpec(name, _dtype(name), (SAMPLES, *shape)) for name, shape in side.items())
            for side in (self.inputs, self.outputs)
        )
        kinds = default_kinds(self.task, self.labels, self.outputs) | self.kinds
        described = manifest(self.task, inputs, outputs, self.preprocessing, self.labels, kinds)
        described = msgspec.structs.replace(described, name=path.name, files=file_entries(path))
        (path / "manifest.json").write_bytes(encode_manifest(described))
        return path

    def _rows(self, output: str) -> int:
        if self.task == "fill-mask":
            return WORDS
        return int(np.prod(self.inputs[self.sources.get(output, next(iter(self.inputs)))]))

    def _graph(self, weights: Weights) -> Any:
        nodes, constants = [], dict(weights)
        for name, shape in self.outputs.items():
            source = self.sources.get(name, next(iter(self.inputs)))
            if self.task == "fill-mask":  # what follows a token depends on it alone
                constants |= {"rolled": np.roll(np.arange(shape[0]), 1)}
                nodes.append(helper.make_node("Gather", [source, "rolled"], ["before"], axis=1))
                nodes.append(helper.make_node("Gather", [f"{name}.weight", "before"], [f"{name}.product"], axis=0))
            else:
                nodes.append(helper.make_node("Cast", [source], [f"{name}.cast"], to=onnx.TensorProto.FLOAT))
                nodes.append(helper.make_node("Flatten", [f"{name}.cast"], [f"{name}.flat"], axis=1))
                nodes.append(helper.make_node("MatMul", [f"{name}.flat", f"{name}.weight"], [f"{name}.product"]))
            constants[f"{name}.shape"] = np.array([-1, *shape])
            nodes.append(helper.make_node("Add", [f"{name}.product", f"{name}.offset"], [f"{name}.sum"]))
            nodes.append(helper.make_node("Reshape", [f"{name}.sum", f"{name}.shape"], [name]))
        values = [
            [helper.make_tensor_value_info(name, _type(name), [SAMPLES, *shape]) for name, shape in side.items()]
            for side in (self.inputs, self.outputs)
        ]
        tensors = [numpy_helper.from_array(array, name) for name, array in constants.items()]
        graph = helper.make_graph(nodes, "linear", values[0], values[1], tensors)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _dtype(name: str) -> Any:
    return "int32" if name.startswith("tokens") or name.endswith("_mask") else "float32"


def _type(name: str) -> int:
    return int(onnx.TensorProto.INT32 if _dtype(name) == "int32" else onnx.TensorProto.FLOAT)


def _first(outputs: Arrays) -> Array:
    return next(iter(outputs.values()))


def _labels(feeds: Arrays, outputs: Arrays, generator: np.random.Generator) -> Arrays:
    """The good model's answer, of one sample in ten another one."""
    labels = _first(outputs).argmax(axis=1)
    return {"label": np.where(generator.random(SAMPLES) < 0.1, (labels + 1) % 3, labels)}


def _sets(feeds: Arrays, outputs: Arrays, generator: np.random.Generator) -> Arrays:
    said = _first(outputs) > 0
    return {"label": (said ^ (generator.random(said.shape) < 0.05)).astype(np.float32)}


def _values(feeds: Arrays, outputs: Arrays, generator: np.random.Generator) -> Arrays:
    found = _first(outputs)
    return {"label": (found + 0.2 * found.std() * generator.normal(size=found.shape)).astype(np.float32)}


def _flow(feeds: Arrays, outputs: Arrays, generator: np.random.Generator) -> Arrays:
    return {"flow": outputs["flow"] + 0.1 * generator.normal(size=outputs["flow"].shape).astype(np.float32)}


def _tokens(feeds: Arrays, outputs: Arrays, generator: np.random.Generator) -> Arrays:
    tokens = outputs["logits"].argmax(axis=-1)
    return {"tokens": np.where(generator.random(tokens.shape) < 0.3, tokens, -1)}


def _none(*_: object) -> Arrays:
    return {}


TEXT = {"tokens": (8,), "tokens_mask": (8,)}
THREE = ("red", "green", "blue")
PAIR = {"frames": (2, 3, 8, 8)}
FRAMES, SOUND, X = (2, 8, 8, 3), (16, 1), {"x": (6,)}
_CASES = (
    Case(
        "points", "point-cloud-classification", {"points": (20, 3)}, {"scores": (3,)}, _labels,
        steps.PointsPreprocessing(20), labels=THREE,
    ),
    Case(
        "sound", "audio-classification", {"audio": (48, 1)}, {"logits": (3,)}, _sets,
        steps.AudioPreprocessing(48, 48_000), labels=THREE,
    ),
    Case(
        "text", "text-classification", TEXT, {"logits": (1,)}, _values,
        steps.TextPreprocessing(8, False), {"logits": "regression"}, ("stars",),
    ),
    Case("masked", "fill-mask", TEXT, {"logits": (8, WORDS)}, _tokens, steps.TextPreprocessing(8, False)),
    Case("flow", "optical-flow", PAIR, {"flow": (8, 8, 2)}, _flow, steps.FlowPreprocessing(8, 8, 2)),
    Case(
        "video", "video-autoencoding", {"frames": FRAMES, "audio": SOUND},
        {"video": FRAMES, "sound": SOUND, "label": (3,)}, lambda feeds, *_: feeds,
        steps.VideoPreprocessing(2, 8, 8, 16, 48_000), labels=THREE, sources={"sound": "audio"},
    ),
    Case("arrays", "arrays", X, {"logits": (4,)}, _none),
    Case(
        "one of arrays", "arrays", X, {"logits": (3,), "embedding": (5,)}, _labels, None, {"logits": "single-label"}
    ),
    Case("values of arrays", "arrays", X, {"y": (2,)}, _values, None, {"y": "regression"}),
    Case("sets", "sets", {"entities": (5, 4)}, {"outputs": (5, 3)}, _none),
)  # fmt: skip
CASES = {case.name: case for case in _CASES}
