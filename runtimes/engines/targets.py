# SPDX-License-Identifier: Apache-2.0
"""The table of targets: what each runs on, whose engine it is, and how to install that."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
from dataclasses import dataclass, replace
from typing import cast

from perceiver_export.runtimes.engines.backend import Backend
from perceiver_export.runtimes.errors import DeviceError

_ENGINES = "perceiver_export.runtimes.engines"


@dataclass(frozen=True)
class Target:
    """Where an engine runs. ``distributions``: any of them brings the library; ``extra`` installs the first."""

    name: str
    module: str
    distributions: tuple[str, ...]
    extra: str
    hardware: str
    needs_engine: bool = False  # compiling takes minutes, so `load` never does it
    index: str = ""  # where the distributions are, if not where pip looks by itself

    @property
    def install(self) -> str:
        """The command that brings the engine's library."""
        return f"pip install 'perceiver-export[{self.extra}]'{self.from_index}"

    @property
    def from_index(self) -> str:
        """What `pip install` is to be told of the index."""
        return f" --extra-index-url {self.index}" if self.index else ""

    def lowering(self, precision: str) -> str:
        """The name under which a bundle has the graph for this target: TensorRT has one for each precision, and others
        for version 8, which takes precision from flags.
        """
        if self.module != "tensorrt":
            return self.name
        return f"{'tensorrt8' if self.version().startswith('8.') else 'tensorrt'}-{precision}"

    def backend(self) -> Backend:
        """The module that runs it."""
        return cast(Backend, importlib.import_module(f"{_ENGINES}.{self.module}"))

    def version(self) -> str:
        """Of the installed library; empty where there is none. Nothing is imported."""
        for name in self.distributions:
            try:
                return importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return ""


_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
_ORT = ("onnxruntime", "onnxruntime-gpu")
_TABLE = (
    Target("tensorrt", "tensorrt", _TENSORRT, "tensorrt", "NVIDIA GPU", True, "https://pypi.nvidia.com"),
    Target("tensorrt-rtx", "tensorrt", ("tensorrt-rtx",), "tensorrt-rtx", "NVIDIA GPU", needs_engine=True),
    Target("ort-cuda", "ort", ("onnxruntime-gpu",), "ort", "NVIDIA GPU"),
    Target("openvino-gpu", "openvino", ("openvino",), "openvino", "Intel GPU"),
    Target("openvino-npu", "openvino", ("openvino",), "openvino", "Intel NPU"),
    Target("ort-cpu", "ort", _ORT, "ort", "CPU"),
    Target("openvino-cpu", "openvino", ("openvino",), "openvino", "CPU"),
)

# In the order in which `device="auto"` looks at them.
TARGETS = {target.name: target for target in _TABLE}


def find_target(name: str) -> Target:
    """The target of that name; ``ort-NAME`` is ONNX Runtime with the execution provider of that name.

    Raises DeviceError: there is no such target.
    """
    if name in TARGETS:
        return TARGETS[name]
    if re.fullmatch(r"ort-[a-z0-9]+", name):
        return replace(TARGETS["ort-cpu"], name=name, hardware="whatever its execution provider runs on")
    import difflib

    close = difflib.get_close_matches(name.lower(), TARGETS)
    near = [target for target in TARGETS if target in close]
    raise DeviceError(
        f"there is no target {name!r}",
        (f"did you mean {' or '.join(near)}? " if near else "")
        + f"the targets are {', '.join(TARGETS)}, and ort-NAME for an execution provider of onnxruntime's, in small "
        "letters; auto, where one is loaded, takes the first that is present",
    )
