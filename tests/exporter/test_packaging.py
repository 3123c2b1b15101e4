# SPDX-License-Identifier: Apache-2.0
"""Model repositories for servers, held to Triton's own protobuf and to what the other servers' documentation asks.

No server runs here. OVMS_CONFIG is the part of OpenVINO Model Server's configuration schema (its docs, "Model Server
Parameters") that we write, with everything else forbidden; V2_METADATA is the Open Inference Protocol's.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
import yaml
from google.protobuf import text_format

from perceiver_export.calibration.lowering.tensorrt_bundle import lower_bundle
from perceiver_export.exporter import export, package
from perceiver_export.runtimes import load, load_onnx
from perceiver_export.runtimes.errors import BundleError, BundleExistsError, UsageError
from perceiver_export.runtimes.report import update_report
from tests.cli import small_models
from tests.conftest import FASHION

OVMS_CONFIG = {
    "type": "object",
    "required": ["model_config_list"],
    "additionalProperties": False,
    "properties": {
        "model_config_list": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["config"],
                "additionalProperties": False,
                "properties": {
                    "config": {
                        "type": "object",
                        "required": ["name", "base_path"],
                        "additionalProperties": False,
                        "properties": {
                            "name": {"type": "string", "minLength": 1},
                            "base_path": {"type": "string", "pattern": "^/"},
                            "target_device": {"enum": ["CPU", "GPU", "NPU", "AUTO"]},
                            "nireq": {"type": "integer", "minimum": 1},
                            "plugin_config": {"type": "object", "additionalProperties": {"type": "string"}},
                        },
                    }
                },
            },
        }
    },
}
_TENSORS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["name", "datatype", "shape"],
        "additionalProperties": False,
        "properties": {
            "name": {"type": "string"},
            "datatype": {"enum": ["BOOL", "UINT8", "INT32", "INT64", "FP16", "FP32", "FP64", "BYTES"]},
            "shape": {"type": "array", "items": {"type": "integer"}},
        },
    },
}
V2_METADATA = {
    "type": "object",
    "required": ["name", "platform", "inputs", "outputs"],
    "additionalProperties": False,
    "properties": {
        "name": {"type": "string"},
        "versions": {"type": "array", "items": {"type": "string"}},
        "platform": {"type": "string"},
        "inputs": _TENSORS,
        "outputs": _TENSORS,
    },
}


def triton_config(path: Path) -> Any:
    """Parsed by the protobuf that tritonclient ships, found without importing its gRPC client."""
    (package_directory,) = importlib.util.find_spec("tritonclient").submodule_search_locations  # type: ignore[union-attr,misc]
    place = Path(package_directory) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("model_config_pb2", place)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return text_format.Parse(path.read_text(encoding="utf-8"), module.ModelConfig())


@pytest.fixture(scope="module")
def batched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(FASHION / "checkpoint", tmp_path_factory.mktemp("batched") / "Fashion v2", batch="1:4:16").path


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(small_models.language(), tmp_path_factory.mktemp("split") / "language", split=True).path


def test_a_fixed_batch_is_part_of_tritons_shape(fashion_bundle: Path, tmp_path: Path) -> None:
    path = package(fashion_bundle, "triton", tmp_path / "repository")
    config = triton_config(path / "fashion" / "config.pbtxt")

    assert (config.name, config.backend, config.max_batch_size) == ("fashion", "onnxruntime", 0)
    assert [(tensor.name, list(tensor.dims)) for tensor in config.input] == [("image", [1, 3, 28, 28])]
    assert [(tensor.name, list(tensor.dims), tensor.label_filename) for tensor in config.output] == [
        ("logits", [1, 10], "labels.txt")
    ]
    assert not config.HasField("dynamic_batching")
    labels = (path / "fashion" / "labels.txt").read_text(encoding="utf-8").splitlines()
    assert len(labels) == 10
    assert sorted(file.name for file in (path / "fashion" / "1").iterdir()) == ["model.onnx", "model.weights"]


def test_the_model_in_a_repository_is_the_bundles(fashion_bundle: Path, tmp_path: Path) -> None:
    path = package(fashion_bundle, "triton", tmp_path / "repository")
    feeds = {"image": np.ones((1, 3, 28, 28), np.float32)}

    with load(fashion_bundle, "ort-cpu") as ours, load_onnx(path / "fashion" / "1" / "model.onnx") as theirs:
        np.testing.assert_array_equal(ours.run(feeds)["logits"], theirs.run(feeds)["logits"])


def test_weights_of_other_targets_stay_behind(copied_bundle: Path, tmp_path: Path) -> None:
    lower_bundle(copied_bundle, "tensorrt-rtx", "fp16")
    path = package(copied_bundle, "triton", tmp_path / "repository")

    assert (copied_bundle / "tensorrt-fp16.weights").is_file()
    (model,) = path.rglob("model.onnx")
    assert sorted(file.name for file in model.parent.iterdir()) == ["model.onnx", "model.weights"]


def test_a_range_of_batches_is_left_to_tritons_batcher_as_the_bench_says(batched: Path, tmp_path: Path) -> None:
    config = triton_config(package(batched, "triton", tmp_path / "first") / "fashion-v2" / "config.pbtxt")

    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (16, [3, 28, 28], [10])
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert (config.dynamic_batching.max_queue_delay_microseconds, config.instance_group[0].count) == (2000, 1)

    update_report(batched, "bench", {"a CPU": {"ort-cpu": {"p50": 8.0, "throughput": 240.0, "batch": 1}}})
    measured = package(batched, "triton", tmp_path / "second") / "fashion-v2" / "config.pbtxt"
    config = triton_config(measured)
    assert (config.dynamic_batching.max_queue_delay_microseconds, config.instance_group[0].count) == (4000, 2)
    assert "8.00 ms a call on a CPU" in measured.read_text(encoding="utf-8")
    config = triton_config(package(batched, "triton", tmp_path / "gpu", target="ort-cuda") / "fashion-v2/config.pbtxt")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_the_parts_of_a_split_bundle_are_served_apart(split: Path, tmp_path: Path) -> None:
    path = package(split, "triton", tmp_path / "repository")

    assert sorted(entry.name for entry in path.iterdir()) == ["language-decoder", "language-encoder"]
    decoder = triton_config(path / "language-decoder" / "config.pbtxt")
    assert {tensor.name for tensor in decoder.input} == {"latents", "queries"}


def test_ovms_has_a_configuration_that_its_schema_takes_and_computes_in_fp32(
    fashion_bundle: Path, tmp_path: Path
) -> None:
    path = package(fashion_bundle, "ovms", tmp_path / "repository")
    document = json.loads((path / "config.json").read_bytes())

    jsonschema.validate(document, OVMS_CONFIG)
    (entry,) = document["model_config_list"]
    assert entry["config"]["base_path"] == "/models/fashion"
    assert entry["config"]["plugin_config"] == {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    assert (path / "fashion" / "1" / "model.onnx").is_file()
    gpu = json.loads(
        (package(fashion_bundle, "ovms", tmp_path / "gpu", target="openvino-gpu") / "config.json").read_bytes()
    )
    assert gpu["model_config_list"][0]["config"]["target_device"] == "GPU"


def test_kserve_has_a_runtime_a_service_and_metadata_of_the_protocol(batched: Path, tmp_path: Path) -> None:
    path = package(batched, "kserve", tmp_path / "kserve", target="ort-cuda")
    runtime = yaml.safe_load((path / "servingruntime.yaml").read_text(encoding="utf-8"))
    service = yaml.safe_load((path / "inferenceservice.yaml").read_text(encoding="utf-8"))
    metadata = json.loads((path / "fashion-v2.metadata.json").read_bytes())

    jsonschema.validate(metadata, V2_METADATA)
    assert metadata["inputs"] == [{"name": "image", "datatype": "FP32", "shape": [-1, 3, 28, 28]}]
    assert (runtime["kind"], service["kind"]) == ("ServingRuntime", "InferenceService")
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    assert model["protocolVersion"] in runtime["spec"]["protocolVersions"]
    assert model["resources"] == {"limits": {"nvidia.com/gpu": "1"}}
    triton_config(path / "repository" / "fashion-v2" / "config.pbtxt")


def test_what_cannot_be_packaged_is_refused_and_leaves_nothing(fashion_bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="the server is 'torchserve'"):
        package(fashion_bundle, "torchserve", tmp_path / "out")
    with pytest.raises(UsageError, match="the target for ovms is 'ort-cpu'"):
        package(fashion_bundle, "ovms", tmp_path / "out", target="ort-cpu")
    with pytest.raises(BundleError, match="does not exist"):
        package(tmp_path / "none", "triton", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(BundleExistsError, match="is there already"):
        package(fashion_bundle, "triton", tmp_path / "full")
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]
