# SPDX-License-Identifier: Apache-2.0
"""A bundle as a model repository of an inference server: NVIDIA Triton, OpenVINO Model Server, KServe."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from perceiver_export.calibration.write import new_bundle
from perceiver_export.exporter.package_kserve import write_kserve
from perceiver_export.exporter.package_ovms import write_ovms
from perceiver_export.exporter.package_triton import write_triton
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.engines.backend import EngineOptions
from perceiver_export.runtimes.engines.records import make_source
from perceiver_export.runtimes.errors import BundleExistsError, check_choice

_Writer = Callable[[Bundle, Path, str], None]

# Of each server: what writes its repository, and the targets whose graph it can serve, the default first.
SERVERS: dict[str, tuple[_Writer, tuple[str, ...]]] = {
    "triton": (write_triton, ("ort-cpu", "ort-cuda")),
    "ovms": (write_ovms, ("openvino-cpu", "openvino-gpu", "openvino-npu")),
    "kserve": (write_kserve, ("ort-cpu", "ort-cuda")),
}


def package(
    bundle: str | os.PathLike[str] | Bundle,
    server: str,
    out: str | os.PathLike[str] | None = None,
    *,
    target: str | None = None,
) -> Path:
    """Write a model repository for a server at ``out`` (BUNDLE-SERVER beside the bundle), whole or not at all.

    ``target`` is what the server is to run it on, by default its CPU. How many instances there are and how long a batch
    waits to fill comes from the bundle's report.json, where `bench --save` left figures. The parts of a split bundle
    are served apart.

    Raises UsageError: no such server, or a target that it cannot serve; BundleError; BundleExistsError; ExportError.
    """
    check_choice("the server", server, tuple(SERVERS))
    write, targets = SERVERS[server]
    target = targets[0] if target is None else target
    check_choice(f"the target for {server}", target, targets)
    opened = open_bundle(bundle)
    for part in opened.manifest.parts.values():
        make_source(opened, part, target, EngineOptions())  # refuses a quantized bundle without a graph for this target
    path = opened.path.absolute().with_name(f"{opened.path.absolute().name}-{server}") if out is None else Path(out)
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise BundleExistsError(f"{path} is there already", "choose another place with -o, or remove it")
    with new_bundle(path, overwrite=False) as directory:
        write(opened, directory, target)
    return path
