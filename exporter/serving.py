# SPDX-License-Identifier: Apache-2.0
"""`package`: a bundle as a model repository of NVIDIA Triton or OpenVINO Model Server.

Each part of the bundle becomes a model of one version. The number of instances and the time that a batch waits to fill
come from the figures that `bench --save` stored in the bundle.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import NamedTuple

from perceiver_export.calibration.bundles import absolute_place, new_bundle
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.engines.backend import EngineOptions
from perceiver_export.runtimes.engines.cache import make_source
from perceiver_export.runtimes.engines.openvino import CPU_ARITHMETIC
from perceiver_export.runtimes.errors import BundleExistsError, UsageError, check_choice, printable
from perceiver_export.runtimes.external_data import external_files
from perceiver_export.runtimes.figures import measurements
from perceiver_export.runtimes.files import encode_json, inside
from perceiver_export.runtimes.manifest import Part, TensorSpec
from perceiver_export.runtimes.preprocessing import TextPreprocessing

_QUEUE_DELAY = 2000  # microseconds that a request waits for others if nothing was measured
_WORTH_IT = 1.1  # throughput gain of two concurrent requests that justifies a second instance
_LABELS = "labels.txt"
# Targets by server, the default first.
_TARGETS = {"triton": ("ort-cpu", "ort-cuda"), "ovms": ("openvino-cpu", "openvino-gpu", "openvino-npu")}


def package(
    bundle: str | os.PathLike[str] | Bundle,
    server: str,
    out: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
) -> Path:
    """Write a model repository at ``out`` (by default BUNDLE-SERVER beside the bundle), whole or not at all.

    ``server``: triton or ovms. ``target``: the server's target, by default its CPU. Triton takes the result as
    ``--model-repository``; OpenVINO Model Server reads config.json in it, mounted as /models.

    Raises UsageError for an unknown server or a target that it lacks; BundleError; BundleExistsError; ExportError.
    """
    check_choice("the server", server, tuple(_TARGETS))
    target = _TARGETS[server][0] if target is None else target
    check_choice(f"the target for {server}", target, _TARGETS[server])
    opened = open_bundle(bundle)
    for part in opened.manifest.parts.values():
        make_source(opened, part, target, EngineOptions())  # refuses a quantized bundle without a graph for this target
    path = absolute_place(f"{opened.path.absolute()}-{server}" if out is None else out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BundleExistsError(f"{path} already exists", "choose another place with -o, or remove it")
    settings = _settings(opened, target)
    with new_bundle(path, overwrite=False) as directory:
        models = _names(opened)
        for name, part in models.items():
            _copy_files(opened, part.graph_for(target), directory / name)
            if server == "triton":
                _write_triton(opened, name, part, settings, directory / name)
        if server == "ovms":
            configs = [{"config": _ovms_config(name, settings)} for name in models]
            (directory / "config.json").write_bytes(encode_json({"model_config_list": configs}))
    return path


class _Settings(NamedTuple):
    """``delay``: microseconds that a batch waits to fill. ``origin``: where the figures come from."""

    target: str
    instances: int
    delay: int
    origin: str


def _settings(bundle: Bundle, target: str) -> _Settings:
    """From the bundle's report, measured on any machine, or conservative defaults."""
    for machine, targets in measurements(bundle.path).items():
        measured = targets.get(target)
        if measured is not None and measured.throughput > 0 and measured.p50 > 0:
            alone = 1e3 * measured.batch / measured.p50
            instances = 2 if measured.throughput >= _WORTH_IT * alone else 1
            delay = int(min(max(measured.p50 * 1e3 / 2, 100), 20_000))
            origin = f"report.json: {measured.p50:.2f} ms per call on {printable(machine)}"
            return _Settings(target, instances, delay, origin)
    origin = "not measured: run `perceiver-export bench BUNDLE --save` on the serving machine"
    return _Settings(target, 1, _QUEUE_DELAY, origin)


def _names(bundle: Bundle) -> dict[str, Part]:
    """Every part under a name that file systems, URLs and Kubernetes accept. Raises UsageError if there is none."""
    name, parts = bundle.manifest.name, bundle.manifest.parts
    base = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:40].strip("-")
    if not base:
        raise UsageError(f"{name!r} cannot name a served model", "export to a directory named in a-z, 0-9, -")
    return {base if len(parts) == 1 else f"{base}-{key.replace('_', '-')}": part for key, part in parts.items()}


def _copy_files(bundle: Bundle, graph: str, directory: Path) -> None:
    """The graph, its weights under the names in the graph, and a tokenizer's files for clients."""
    version = directory / "1"
    version.mkdir(parents=True)
    shutil.copyfile(bundle.file(graph), version / "model.onnx")
    for name in external_files(version / "model.onnx"):
        shutil.copyfile(bundle.file(name), inside(version, name))
    steps = bundle.manifest.preprocessing
    if isinstance(steps, TextPreprocessing) and steps.tokenizer is not None:  # `open_tokenizer` reads both
        for name in ("manifest.json", steps.tokenizer.file):
            shutil.copyfile(bundle.file(name), directory / Path(name).name)


def _ovms_config(name: str, settings: _Settings) -> dict[str, object]:
    plugin = {"PERFORMANCE_HINT": "THROUGHPUT" if settings.instances > 1 else "LATENCY"}
    if settings.target == "openvino-cpu":
        plugin |= {key: str(value) for key, value in CPU_ARITHMETIC.items()}
    return {
        "name": name,
        "base_path": f"/models/{name}",
        "target_device": settings.target.removeprefix("openvino-").upper(),
        "nireq": settings.instances,
        "plugin_config": plugin,
    }


def _write_triton(bundle: Bundle, name: str, part: Part, settings: _Settings, directory: Path) -> None:
    """config.pbtxt, in the fields of Triton's model_config.proto (message ModelConfig), and the labels of scores.

    Triton batches only models that take any batch size from 1; any other batch is part of the shape.
    """
    labels, most = bundle.manifest.labels, _most_batched(part)
    if len(part.outputs) != 1 or part.outputs[0].shape[-1:] != (len(labels),):
        labels = ()
    inputs = ",\n".join(_tensor(spec, most > 0) for spec in part.inputs)
    outputs = ",\n".join(_tensor(spec, most > 0, bool(labels)) for spec in part.outputs)
    kind = "KIND_GPU" if settings.target == "ort-cuda" else "KIND_CPU"
    lines = [
        f"# {settings.origin}",
        f'name: "{name}"',
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {most}",
        f"input [\n{inputs}\n]",
        f"output [\n{outputs}\n]",
        f"instance_group [ {{ count: {settings.instances} kind: {kind} }} ]",
    ]
    if most > 1:
        delay = f"max_queue_delay_microseconds: {settings.delay}"
        lines.append(f"dynamic_batching {{ preferred_batch_size: [ {most} ] {delay} }}")
    (directory / "config.pbtxt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    if labels:
        names = (printable(" ".join(label.split())) for label in labels)
        (directory / _LABELS).write_text("".join(f"{label}\n" for label in names), encoding="utf-8")


def _tensor(spec: TensorSpec, batched: bool, labels: bool = False) -> str:
    dims = [dim if isinstance(dim, int) else -1 for dim in spec.shape][batched:]
    # Triton has no scalars: a tensor of the batch alone is one number per sample.
    reshape = "" if dims else " reshape { shape: [ ] }"
    label = f' label_filename: "{_LABELS}"' if labels else ""
    dtype = spec.dtype.upper().replace("FLOAT", "FP")
    shape = ", ".join(map(str, dims or [1]))
    return f'  {{ name: "{spec.name}" data_type: TYPE_{dtype} dims: [ {shape} ]{reshape}{label} }}'


def _most_batched(part: Part) -> int:
    """The largest batch if all tensors share a batch dimension of any size from 1, else 0."""
    specs = (*part.inputs, *part.outputs)
    names = {spec.shape[0] if spec.shape else None for spec in specs}
    least, most = specs[0].ranges.get(str(specs[0].shape[0]), (0, 0)) if len(names) == 1 else (0, 0)
    return most if least == 1 else 0
