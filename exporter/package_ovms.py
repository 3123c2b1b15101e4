# SPDX-License-Identifier: Apache-2.0
"""A model repository for OpenVINO Model Server: config.json, and a numbered version of each part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from perceiver_export.exporter.serving import ServedPart, Settings, copy_graph, served_parts, settings
from perceiver_export.runtimes.bundle import Bundle

_MOUNT = "/models"  # where the server's container is told to look
_DEVICES = {"openvino-cpu": "CPU", "openvino-gpu": "GPU", "openvino-npu": "NPU"}


def write_ovms(bundle: Bundle, directory: Path, target: str) -> None:
    """Fill ``directory``, to be mounted as /models: ``ovms --config_path /models/config.json``."""
    chosen = settings(bundle, target)
    served = served_parts(bundle, target)
    for one in served:
        copy_graph(bundle, one, directory / one.name / "1")
    document = {"model_config_list": [{"config": _config(one, chosen, target)} for one in served]}
    content = msgspec.json.format(msgspec.json.encode(document), indent=2)
    (directory / "config.json").write_bytes(content + b"\n")


def _config(served: ServedPart, chosen: Settings, target: str) -> dict[str, Any]:
    plugin = {"PERFORMANCE_HINT": "THROUGHPUT" if chosen.instances > 1 else "LATENCY"}
    if target == "openvino-cpu":
        plugin["INFERENCE_PRECISION_HINT"] = "f32"  # else it computes in bf16 where the CPU has it
    return {
        "name": served.name,
        "base_path": f"{_MOUNT}/{served.name}",
        "target_device": _DEVICES[target],
        "nireq": chosen.instances,
        "plugin_config": plugin,
    }
