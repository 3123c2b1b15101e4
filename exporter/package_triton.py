# SPDX-License-Identifier: Apache-2.0
"""A model repository for NVIDIA Triton: config.pbtxt beside a numbered version of each part.

Fields are those of Triton's model_config.proto (message ModelConfig).
"""

from __future__ import annotations

from pathlib import Path

from perceiver_export.exporter.serving import ServedPart, Settings, copy_graph, served_parts, settings
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.manifest import TensorSpec

_TYPES = {
    "float32": "TYPE_FP32",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "uint8": "TYPE_UINT8",
    "bool": "TYPE_BOOL",
}
_LABELS = "labels.txt"


def write_triton(bundle: Bundle, directory: Path, target: str) -> None:
    """Fill ``directory``; Triton takes it as ``--model-repository``."""
    for served in served_parts(bundle, target):
        copy_graph(bundle, served, directory / served.name / "1")
        labels = bundle.manifest.labels if _scores(bundle, served) else ()
        if labels:
            lines = "\n".join(" ".join(label.split()) for label in labels)
            (directory / served.name / _LABELS).write_text(f"{lines}\n", encoding="utf-8")
        text = config(served, settings(bundle, target), target, bool(labels))
        (directory / served.name / "config.pbtxt").write_text(text, encoding="utf-8")


def config(served: ServedPart, chosen: Settings, target: str, labels: bool = False) -> str:
    """config.pbtxt of one part.

    Only a batch that may be of any size from 1 is left to Triton's batcher; a fixed one is part of the shape.
    """
    batched = served.batch is not None and served.batch[0] == 1
    most = served.batch[1] if batched and served.batch is not None else 0
    inputs = ",\n".join(_tensor(served, spec, batched) for spec in served.part.inputs)
    outputs = ",\n".join(_tensor(served, spec, batched, labels) for spec in served.part.outputs)
    kind = "KIND_GPU" if target == "ort-cuda" else "KIND_CPU"
    lines = [
        f"# {chosen.source}",
        f'name: "{served.name}"',
        'backend: "onnxruntime"',
        'default_model_filename: "model.onnx"',
        f"max_batch_size: {most}",
        f"input [\n{inputs}\n]",
        f"output [\n{outputs}\n]",
        f"instance_group [ {{ count: {chosen.instances} kind: {kind} }} ]",
    ]
    if batched and most > 1:
        lines.append(
            f"dynamic_batching {{ preferred_batch_size: [ {most} ] max_queue_delay_microseconds: {chosen.delay} }}"
        )
    return "\n".join(lines) + "\n"


def _tensor(served: ServedPart, spec: TensorSpec, batched: bool, labels: bool = False) -> str:
    dims = served.dims(spec)[1:] if batched else served.dims(spec)
    # Triton knows no scalars: a tensor of the batch alone is one number a sample.
    reshape = "" if dims else " reshape { shape: [ ] }"
    label = f' label_filename: "{_LABELS}"' if labels else ""
    shape = ", ".join(map(str, dims or [1]))
    return f'  {{ name: "{spec.name}" data_type: {_TYPES[spec.dtype]} dims: [ {shape} ]{reshape}{label} }}'


def _scores(bundle: Bundle, served: ServedPart) -> bool:
    """Whether this part's one output holds a score for each label."""
    outputs = served.part.outputs
    return len(outputs) == 1 and bool(outputs[0].shape) and outputs[0].shape[-1] == len(bundle.manifest.labels)
