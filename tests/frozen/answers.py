# SPDX-License-Identifier: Apache-2.0
"""What the commands say and write of six small models, without what another run or machine may change.

`python -m tests.frozen.answers` writes `answers.json`; do so only where an answer is meant to change, and say why in
the commit.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from PIL import Image
from typer.testing import CliRunner

from perceiver_export.exporter.cli.main import app
from perceiver_export.runtimes import open_bundle
from tests.cli.input_files import write_inputs

HERE = Path(__file__).parent
ANSWERS = HERE / "answers.json"
SAMPLES = 40
SYSTEMS = {
    "pictures": "frames/frame0.png",
    "sentiment": "text.txt",
    "language": "text.txt",
    "flow": "frames",
    "mel": "sound.wav",
    "points": "cloud.xyz",
}
# What another run, machine or version changes: only that it is there is kept.
MEASURED = {
    "bytes", "certified_on", "cpu", "cpu_features", "created", "date", "device", "difference", "digest", "effects",
    "engine_version", "files", "graph_sha256", "graphs", "instruction_set", "machine", "median_ms", "memory",
    "milliseconds", "notes", "onnxruntime", "path", "performance", "platform", "resident_memory", "seconds", "size",
    "speed", "speeds", "target", "temporary", "threads", "time", "tools", "version", "versions", "warnings",
    "worst_samples",
}  # fmt: skip


def answer(system: str, folder: Path) -> dict[str, Any]:
    """All answers of a system, made in ``folder``."""
    write_inputs(folder)
    bundle, quantized = folder / system, folder / f"{system}-int8"
    found: dict[str, Any] = {"export": call("export", f"tests.cli.small_models:{system}", "-o", bundle, "--json")}
    data = _data(bundle, folder)
    found["inspect"] = call("inspect", bundle, "--json")
    found["lint"] = call("lint", bundle, "--json")
    given = sorted((folder / SYSTEMS[system]).iterdir()) if system == "flow" else [folder / SYSTEMS[system]]
    found["run"] = call("run", bundle, *given, "--json")
    found["quantize"] = call("quantize", bundle, "--data", data, "--weight-bits", "8", "-o", quantized, "--json")
    asked: list[str | Path] = ["--against", bundle, "--max-metric-change", "1", "--device", "ort-cpu", "--json"]
    found["validate"] = call("validate", quantized, "--data", data, *asked)
    found["inspect int8"] = call("inspect", quantized, "--json")
    found["graphs"] = {path.name: _graph(path) for path in sorted(quantized.glob("*.onnx"))}
    with np.load(bundle / "golden.npz") as golden:
        found["golden"] = {name: _summary(golden[name]) for name in sorted(golden)}
    return found


def call(*arguments: str | Path) -> Any:
    """The command's JSON, with exit code and messages where it fails, stripped."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if not done.stdout.startswith(("{", "[")):
        return {"exit": done.exit_code, "error": type(done.exception).__name__, "says": str(done.exception)}
    return {"exit": done.exit_code, "json": _stripped(json.loads(done.stdout))}


def _stripped(value: Any) -> Any:
    """Sentences may be worded anew, and paths are of this run; sizes of the model are said by its digest."""
    if isinstance(value, Mapping):
        return {key: _kept(key, inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_stripped(inner) for inner in value]
    if isinstance(value, str) and (" " in value or "/" in value):
        return "a text"
    return value


def _kept(key: str, value: Any) -> Any:
    if key in MEASURED:
        return "measured"
    if key == "architecture":
        return digest(value)
    return _stripped(value)


def _graph(path: Path) -> dict[str, Any]:
    """Nodes by type; of each type of initializer how many there are, with how many elements, and their mean size."""
    graph = onnx.load(path).graph
    types = [node.op_type for node in graph.node]
    kinds: dict[str, list[Any]] = {}
    for initializer in graph.initializer:
        array = numpy_helper.to_array(initializer)
        kinds.setdefault(str(array.dtype), []).append(np.asarray(array, np.float64).ravel())
    return {
        "nodes": {name: types.count(name) for name in sorted(set(types))},
        "initializers": {
            kind: [len(arrays), *_summary(np.concatenate(arrays))[1:]] for kind, arrays in sorted(kinds.items())
        },
    }


def _summary(array: Any) -> list[Any]:
    numbers = np.asarray(array, np.float64)
    return [str(array.dtype), list(array.shape), float(np.abs(numbers).mean()) if array.size else 0.0]


def _data(bundle: Path, folder: Path) -> Path:
    """Samples for calibration and validation: lines of text, a folder of images, or arrays by input."""
    manifest, generator = open_bundle(bundle).manifest, np.random.default_rng(1)
    if manifest.task in ("text-classification", "fill-mask"):
        lines = [{"text": f"line {index} of {index * 7919 % 97}", "label": index % 2} for index in range(SAMPLES)]
        path = folder / f"{manifest.task}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return path
    if manifest.task == "image-classification":
        for index in range(SAMPLES):
            directory = folder / "images" / manifest.labels[index % 3]
            directory.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (30, 28, 3), dtype=np.uint8)).save(directory / f"{index}.png")
        return folder / "images"
    arrays: dict[str, Any] = {}
    for spec in manifest.parts["model"].inputs:
        shape = (SAMPLES, *(size for size in spec.shape[1:] if isinstance(size, int)))
        least, most = spec.values or (0, 1)
        whole = spec.dtype.startswith("int")
        drawn = generator.integers(least, most + 1, shape) if whole else generator.normal(size=shape)
        arrays[spec.name] = drawn.astype(spec.dtype)
    if manifest.labels:
        arrays["label"] = np.arange(SAMPLES) % len(manifest.labels)
    np.savez(folder / f"{manifest.task}.npz", **arrays)
    return folder / f"{manifest.task}.npz"


def digest(value: Any) -> str:
    """Of JSON, for people who compare two runs."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        made = {system: answer(system, Path(temporary)) for system in SYSTEMS}
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ANSWERS
    lines = [
        f"{json.dumps(system)}: {{\n"
        + ",\n".join(f" {json.dumps(command)}: {json.dumps(answer)}" for command, answer in commands.items())
        + "}"
        for system, commands in made.items()
    ]
    target.write_text("{" + ",\n".join(lines) + "}\n", encoding="utf-8")
    print({system: digest(answer) for system, answer in made.items()})
