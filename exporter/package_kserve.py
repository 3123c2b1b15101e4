# SPDX-License-Identifier: Apache-2.0
"""For KServe: Triton's repository, a ServingRuntime and an InferenceService for it, and the V2 metadata of each part.

Metadata is what ``GET v2/models/NAME`` answers in the Open Inference Protocol (V2).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.exporter.package_triton import write_triton
from perceiver_export.exporter.serving import ServedPart, served_name, served_parts
from perceiver_export.runtimes.bundle import Bundle
from perceiver_export.runtimes.manifest import TensorSpec

_DATATYPES = {"float32": "FP32", "int32": "INT32", "int64": "INT64", "uint8": "UINT8", "bool": "BOOL"}
_RUNTIME = "perceiver-triton"
_IMAGE = "nvcr.io/nvidia/tritonserver:25.10-py3"


def write_kserve(bundle: Bundle, directory: Path, target: str) -> None:
    """Fill ``directory``: what is in ``repository/`` goes to where storageUri in inferenceservice.yaml points."""
    (directory / "repository").mkdir()
    write_triton(bundle, directory / "repository", target)
    (directory / "servingruntime.yaml").write_text(_serving_runtime(), encoding="utf-8")
    service = _inference_service(served_name(bundle), target == "ort-cuda")
    (directory / "inferenceservice.yaml").write_text(service, encoding="utf-8")
    for one in served_parts(bundle, target):
        content = msgspec.json.format(msgspec.json.encode(metadata(one)), indent=2)
        (directory / f"{one.name}.metadata.json").write_bytes(content + b"\n")


def metadata(served: ServedPart) -> dict[str, Any]:
    """V2 metadata of one part; -1 is a dynamic dimension."""

    def tensor(spec: TensorSpec) -> dict[str, Any]:
        return {"name": spec.name, "datatype": _DATATYPES[spec.dtype], "shape": served.dims(spec)}

    return {
        "name": served.name,
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [tensor(spec) for spec in served.part.inputs],
        "outputs": [tensor(spec) for spec in served.part.outputs],
    }


def _serving_runtime() -> str:
    return f"""\
apiVersion: serving.kserve.io/v1alpha1
kind: ServingRuntime
metadata:
  name: {_RUNTIME}
spec:
  supportedModelFormats:
    - name: onnx
      version: "1"
  protocolVersions:
    - v2
    - grpc-v2
  containers:
    - name: kserve-container
      image: {_IMAGE}
      args:
        - tritonserver
        - --model-store=/mnt/models
        - --http-port=8080
        - --grpc-port=9000
        - --allow-http=true
        - --allow-grpc=true
"""


def _inference_service(name: str, gpu: bool) -> str:
    resources = '\n      resources:\n        limits:\n          nvidia.com/gpu: "1"' if gpu else ""
    return f"""\
apiVersion: serving.kserve.io/v1beta1
kind: InferenceService
metadata:
  name: {name}
spec:
  predictor:
    model:
      modelFormat:
        name: onnx
        version: "1"
      protocolVersion: v2
      runtime: {_RUNTIME}
      storageUri: pvc://models/{name}  # a volume claim `models`, with what is in repository/ below {name}{resources}
"""
