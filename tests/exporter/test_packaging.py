# SPDX-License-Identifier: Apache-2.0
"""Model repositories for servers, compared with Triton's own protobuf and OpenVINO Model Server's documentation.

No server runs here. OVMS_CONFIG is the part of OpenVINO Model Server's configuration schema (its docs, "Model Server
Parameters") that we write, with everything else forbidden.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest
from google.protobuf import text_format

from perceiver_export.calibration.lowering.tensorrt import lower_bundle
from perceiver_export.exporter import package
from perceiver_export.runtimes import load, load_onnx
from perceiver_export.runtimes.bundle import change_report
from perceiver_export.runtimes.errors import BundleError, BundleExistsError, UsageError
from tests.conftest import SmallBundle


def closed(*required: str, **properties: Any) -> dict[str, Any]:
    """The schema of an object with these properties and no others."""
    return {"type": "object", "required": list(required), "additionalProperties": False, "properties": properties}


OVMS_MODEL = closed(
    "name",
    "base_path",
    name={"type": "string", "minLength": 1},
    base_path={"type": "string", "pattern": "^/"},
    target_device={"enum": ["CPU", "GPU", "NPU", "AUTO"]},
    nireq={"type": "integer", "minimum": 1},
    plugin_config={"type": "object", "additionalProperties": {"type": "string"}},
)
MODELS = {"type": "array", "items": closed("config", config=OVMS_MODEL)}
OVMS_CONFIG = closed("model_config_list", model_config_list=MODELS)


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


def test_a_fixed_batch_is_part_of_tritons_shape_and_the_model_is_the_bundles(
    fashion_bundle: Path, tmp_path: Path
) -> None:
    path = package(fashion_bundle, "triton", tmp_path / "repository") / "fashion"
    config = triton_config(path / "config.pbtxt")

    assert (config.name, config.backend, config.max_batch_size) == ("fashion", "onnxruntime", 0)
    found = [(one.name, list(one.dims)) for one in (*config.input, *config.output)]
    assert found == [("image", [1, 3, 28, 28]), ("logits", [1, 10])]
    assert config.output[0].label_filename == "labels.txt"
    assert not config.HasField("dynamic_batching")
    assert len((path / "labels.txt").read_text(encoding="utf-8").splitlines()) == 10
    assert sorted(file.name for file in (path / "1").iterdir()) == ["model.onnx", "model.weights"]
    feeds = {"image": np.ones((1, 3, 28, 28), np.float32)}
    with load(fashion_bundle, "ort-cpu") as ours, load_onnx(path / "1" / "model.onnx") as theirs:
        np.testing.assert_array_equal(ours.run(feeds)["logits"], theirs.run(feeds)["logits"])


def test_weights_of_other_targets_stay_behind(copied_bundle: Path, tmp_path: Path) -> None:
    lower_bundle(copied_bundle, "fp16")
    path = package(copied_bundle, "triton", tmp_path / "repository")

    assert (copied_bundle / "tensorrt-fp16.weights").is_file()
    (model,) = path.rglob("model.onnx")
    assert sorted(file.name for file in model.parent.iterdir()) == ["model.onnx", "model.weights"]


def test_a_range_of_batches_is_left_to_tritons_batcher_as_the_bench_says(batched_bundle: Path, tmp_path: Path) -> None:
    batched = shutil.copytree(batched_bundle, tmp_path / "Fashion v2")
    config = triton_config(package(batched, "triton", tmp_path / "first") / "fashion-v2" / "config.pbtxt")

    assert (config.max_batch_size, list(config.input[0].dims), list(config.output[0].dims)) == (16, [3, 28, 28], [10])
    assert list(config.dynamic_batching.preferred_batch_size) == [16]
    assert (config.dynamic_batching.max_queue_delay_microseconds, config.instance_group[0].count) == (2000, 1)

    change_report(batched, "bench", lambda _: {"a CPU": {"ort-cpu": {"p50": 8.0, "throughput": 240.0, "batch": 1}}})
    measured = package(batched, "triton", tmp_path / "second") / "fashion-v2" / "config.pbtxt"
    config = triton_config(measured)
    assert (config.dynamic_batching.max_queue_delay_microseconds, config.instance_group[0].count) == (4000, 2)
    assert "8.00 ms per call on a CPU" in measured.read_text(encoding="utf-8")
    config = triton_config(package(batched, "triton", tmp_path / "gpu", target="ort-cuda") / "fashion-v2/config.pbtxt")
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU


def test_the_parts_of_a_split_bundle_are_served_apart(small_bundle: SmallBundle, tmp_path: Path) -> None:
    path = package(small_bundle("language", split=True), "triton", tmp_path / "repository")

    assert sorted(entry.name for entry in path.iterdir()) == ["language-split-decoder", "language-split-encoder"]
    decoder = triton_config(path / "language-split-decoder" / "config.pbtxt")
    assert {tensor.name for tensor in decoder.input} == {"latents", "queries"}


@pytest.mark.parametrize(("target", "device"), [(None, "CPU"), ("openvino-gpu", "GPU")])
def test_ovms_has_a_configuration_that_its_schema_takes_and_computes_in_fp32(
    target: str | None, device: str, fashion_bundle: Path, tmp_path: Path
) -> None:
    path = package(fashion_bundle, "ovms", tmp_path / "repository", target=target)
    document = json.loads((path / "config.json").read_bytes())
    fp32 = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"} if device == "CPU" else {}

    jsonschema.validate(document, OVMS_CONFIG)
    (entry,) = document["model_config_list"]
    assert (entry["config"]["base_path"], entry["config"]["target_device"]) == ("/models/fashion", device)
    assert entry["config"]["plugin_config"] == {"PERFORMANCE_HINT": "LATENCY", **fp32}
    assert (path / "fashion" / "1" / "model.onnx").is_file()


@pytest.mark.parametrize(
    ("bundle", "server", "out", "target", "error"),
    [
        (None, "kserve", "out", None, UsageError),
        (None, "ovms", "out", "ort-cpu", UsageError),
        ("none", "triton", "out", None, BundleError),
        (None, "triton", "full", None, BundleExistsError),
    ],
)
def test_what_cannot_be_packaged_is_refused_and_leaves_nothing(
    bundle: str | None, server: str, out: str, target: Any, error: type, fashion_bundle: Path, tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(error):
        package(fashion_bundle if bundle is None else tmp_path / bundle, server, tmp_path / out, target=target)
    assert [entry.name for entry in tmp_path.iterdir()] == ["full"]
