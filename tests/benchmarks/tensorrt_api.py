# SPDX-License-Identifier: Apache-2.0
"""The names in TensorRT's Python API, in each version that we support, from the real bindings.

    python -m tests.benchmarks.tensorrt_api [--write]

The bindings' wheels (1 MB each) are downloaded into a temporary directory, get empty libraries in place of TensorRT's
own, and are imported in a separate process. This needs neither a GPU nor TensorRT. For TensorRT for RTX, the installed
package is used. `--write` replaces tests/runtimes/tensorrt_api.json, the source of the tests' fake TensorRT; without it
the two are compared.
"""

from __future__ import annotations

import importlib.metadata
import json
import re
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.benchmarks.harness import Row, command

VERSIONS = {
    "10.3.0": "tensorrt-cu12-bindings==10.3.0",
    "10.13.3.9": "tensorrt-cu12-bindings==10.13.3.9",
    "10.16.1.11": "tensorrt-cu12-bindings==10.16.1.11",
    "11.4.0.106": "tensorrt-cu13-bindings==11.4.0.106",
}
RTX = "1.7.1.116"
CLASSES = (
    *("Builder", "BuilderFlag", "DataType", "EngineInspector", "IBuilderConfig", "ICudaEngine", "IExecutionContext"),
    *("IHostMemory", "ILayer", "ILogger", "IMatrixMultiplyLayer", "INetworkDefinition", "INormalizationLayer"),
    *("IOptimizationProfile", "IProgressMonitor", "ITensor", "ITimingCache", "LayerInformationFormat", "LayerType"),
    *("IRuntimeCache", "IRuntimeConfig", "MemoryPoolType", "NetworkDefinitionCreationFlag", "OnnxParser"),
    *("ParserError", "ProfilingVerbosity", "Runtime"),
)
STORED = Path(__file__).parent.parent / "runtimes" / "tensorrt_api.json"

_TAKEN = (
    *("getNvOnnxParserVersion", "getPluginRegistry", "getBuilderPluginRegistry", "initLibNvInferPlugins"),
    *("_ZN14nvcaffeparser117createCaffeParserEv", "_ZN14nvcaffeparser123shutdownProtobufLibraryEv"),
    "_ZN11nvuffparser15createUffParserEv",
)

# Runs in a separate process and prints the names of the module and of each class.
_DUMP = """
import importlib, json, os, sys, warnings
sys.setdlopenflags(os.RTLD_LAZY)  # the rest of TensorRT would be looked up when called, which never happens
warnings.simplefilter("ignore")
sys.path.insert(0, sys.argv[1])
module = importlib.import_module(sys.argv[2])
public = lambda thing: sorted(name for name in dir(thing) if not name.startswith("_"))
classes = {name: public(getattr(module, name)) for name in sys.argv[3:] if hasattr(module, name)}
print(json.dumps({"module": public(module) + ["__version__"], **classes}))
"""


def measure(work: Path, write: bool = False) -> Iterator[Row]:
    """Compare with the stored names, or replace them."""
    found = {version: attributes(requirement, work / version) for version, requirement in VERSIONS.items()}
    assert importlib.metadata.version("tensorrt-rtx") == RTX
    found[RTX] = _dumped("", "tensorrt_rtx")
    if write:
        lines = (f"{json.dumps(version)}: {json.dumps(names)}" for version, names in found.items())
        STORED.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    for version, names in found.items():
        yield {"version": version, "names": sum(map(len, names.values())), "held": stored.get(version) == names}


def attributes(requirement: str, place: Path) -> dict[str, Any]:
    """The names of one version's bindings."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", str(place)]
    subprocess.run([*pip, requirement], check=True, stderr=subprocess.DEVNULL)
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place)
    (library,) = place.glob("*/tensorrt.so")
    for needed in _needed(library):
        _make_empty(place / needed)
    return _dumped(str(place), library.parent.name)


def _dumped(directory: str, module: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", "-c", _DUMP, directory, module, *CLASSES]
    done = subprocess.run(command, check=True, env={"LD_LIBRARY_PATH": directory}, capture_output=True, text=True)
    names: dict[str, Any] = json.loads(done.stdout)
    return names


def _needed(library: Path) -> list[str]:
    """The libraries of TensorRT that a binding links to."""
    return sorted({found.decode() for found in re.findall(rb"libnv[a-z_]+[.]so[.][0-9]+", library.read_bytes())})


def _make_empty(path: Path) -> None:
    """Write a library of empty functions: those whose addresses the bindings take when they are imported."""
    code = "\n".join(f"void* {name}(void) {{ return 0; }}" for name in _TAKEN)
    subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=code.encode(), check=True)


if __name__ == "__main__":
    command(measure)
