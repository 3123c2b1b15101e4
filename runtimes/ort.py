# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.errors import BundleError, DeviceError, MissingDependencyError
from perceiver_export.runtimes.manifest import DType, TensorSpec
from perceiver_export.runtimes.runtime import Array, Feeds

TARGET = "ort-cpu"
_PROVIDER = "CPUExecutionProvider"
_SILENT = 4  # fatal only: an error comes back as an exception, printing it too would say it twice
_DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def open(path: Path, threads: int | None) -> OrtEngine:
    """Compile an ONNX file. Raises BundleError (not a usable graph), MissingDependencyError, DeviceError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"target {TARGET} needs onnxruntime, which is not installed", "pip install 'perceiver-export[ort]'"
        ) from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    with _translated(f"{path} cannot be loaded"):
        session = onnxruntime.InferenceSession(str(path), options, providers=[_PROVIDER])
    if session.get_providers() != [_PROVIDER]:
        raise DeviceError(
            f"onnxruntime took {session.get_providers()} instead of {_PROVIDER}", "use a plain onnxruntime"
        )
    return OrtEngine(session, threads, onnxruntime.__version__)


class OrtEngine:
    """One session. onnxruntime allows concurrent `run` calls on it."""

    def __init__(self, session: Any, threads: int | None, version: str) -> None:
        self._session = session
        self._threads = threads
        self._version = version
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            values = self._session.run(self._output_names, feeds)
        except Exception as error:
            raise _ours(error, "inference failed") from error
        return dict(zip(self._output_names, values, strict=True))

    def run_into(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        with _translated("inference failed"):
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name in self._output_names:
                array = out[name]
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)

    def describe(self) -> dict[str, Any]:
        return {
            "target": TARGET,
            "device": "CPU",
            "engine": "onnxruntime",
            "version": self._version,
            "provider": self._session.get_providers()[0],
            "threads": self._threads or "all cores",
        }


def _spec(node: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else dim or f"dim{axis}" for axis, dim in enumerate(node.shape))
    if node.type not in _DTYPES:
        raise DeviceError(
            f"{node.name!r} is a {node.type}, which this runtime does not carry", "export with float32 or int32"
        )
    return TensorSpec(name=node.name, dtype=_DTYPES[node.type], shape=shape)


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise _ours(error, what) from error


def _ours(error: Exception, what: str) -> Exception:
    """onnxruntime's exceptions as ours; anything else as it is."""
    module, name = type(error).__module__, type(error).__name__
    if not module.startswith("onnxruntime") and type(error) is not RuntimeError:  # what run_with_iobinding raises
        return error
    first_line = str(error).splitlines()[0] if str(error) else name
    if name in (
        "Fail",
        "InvalidArgument",
        "InvalidProtobuf",
        "NoSuchFile",
        "InvalidGraph",
        "NoModel",
        "RuntimeException",
    ):
        return BundleError(
            f"{what}: {first_line}", "the file is damaged, or its engine too old: copy or export it again"
        )
    return DeviceError(f"{what}: {first_line}", "see `perceiver-export doctor`; a newer onnxruntime may be needed")
