# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime: the CPU, CUDA, and by name (``ort-NAME``) any execution provider that is installed.

What is compiled is the graph as its optimizer leaves it, with the weights beside it. A session whose provider would
leave nodes to the CPU is refused: onnxruntime alone would run them there without a word.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.engines.backend import Array, EngineOptions, Feeds, Platform, Progress, Source, exact
from perceiver_export.runtimes.engines.cuda_driver import cuda_gpus, driver_version
from perceiver_export.runtimes.engines.targets import find_target
from perceiver_export.runtimes.errors import BuildError, BundleError, DeviceError, EngineError, MissingDependencyError
from perceiver_export.runtimes.machine import cpu_features, cpu_name
from perceiver_export.runtimes.manifest import DType, TensorSpec

differences = exact

_CPU = "CPUExecutionProvider"
_GRAPH, _WEIGHTS = "model.onnx", "model.weights"
_CONFIG = ("session.", "optimization.", "ep.", "mlas.")  # how the names of its session config entries begin
# Bytes of activations from which memory counts. A memory pattern saves 10 µs a call, and lays out one block for all of
# a run beside what the first run took; arrays that are reused live as long as the last that reuses them. ImageNet's
# Fourier model peaked at 620 MiB, at 422 without patterns, and at 330, which loading takes, without reuse; optical flow
# at 616 and 413 above its weights. Neither is slower: the arena gives freed arrays back at once.
_LARGE = 2**24
_SILENT = 4  # fatal only: an error comes back as an exception, printing it too would say it twice
_NO_MEMORY = ("allocate", "bad_alloc", "bad allocation", "out of memory")  # in the words of allocators
_DAMAGED = ("Fail", "InvalidArgument", "InvalidProtobuf", "NoSuchFile", "InvalidGraph", "NoModel", "RuntimeException")
_DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def platform(target: str, options: EngineOptions) -> Platform:
    """What is here. Raises MissingDependencyError; DeviceError: no such provider, or nothing for it to run on."""
    onnxruntime = _import(target)
    provider = _provider(onnxruntime, target)
    if options.precision != "fp32":
        raise DeviceError(
            f"{target} runs a graph in the precision that it is in, not in {options.precision}",
            "leave --precision out; openvino and tensorrt targets choose one",
        )
    unknown = [name for name in options.flags if not name.startswith(_CONFIG)]
    if unknown:
        raise DeviceError(f"{unknown[0]!r} is no setting of onnxruntime's", f"they begin with {', '.join(_CONFIG)}")
    if provider == "CUDAExecutionProvider":
        gpus = cuda_gpus()
        if not gpus:
            raise DeviceError(
                f"{target} needs an NVIDIA GPU with its driver, and there is none", "see `perceiver-export doctor`"
            )
        return Platform("onnxruntime", onnxruntime.__version__, gpus[0].name, driver_version())
    return Platform("onnxruntime", onnxruntime.__version__, cpu_name(), features=cpu_features())


def compile(source: Source, directory: Path, progress: Progress) -> None:
    """Save the optimized graph. Raises BundleError (not a usable graph), BuildError, DeviceError."""
    onnxruntime = _import(source.target)
    if source.target not in ("ort-cpu", "ort-cuda"):
        raise BuildError(
            f"{source.target} keeps nothing that was compiled: its provider compiles at each load",
            "there is nothing to build; load it",
        )
    progress("optimizing the graph", 0, None)
    options = _session_options(onnxruntime, source, None)
    options.optimized_model_filepath = str(directory / _GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        _session(onnxruntime, source, source.graph, options)
    except BundleError as error:
        said = str(error.__cause__)
        for path in (source.graph, source.graph.parent, directory):  # whose names may say anything
            said = said.replace(str(path), "")
        if "write" not in said:
            raise
        place = directory.parent
        raise BuildError(f"onnxruntime cannot write an engine to {place}", "is the disk full? free space") from error


def open(source: Source, directory: Path | None, threads: int | None) -> OrtEngine:
    """A session. Raises BundleError (not a usable graph), EngineError, MissingDependencyError, DeviceError."""
    onnxruntime = _import(source.target)
    options = _session_options(onnxruntime, source, threads)
    if directory is None:
        session = _session(onnxruntime, source, source.graph, options)
    else:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = _session(onnxruntime, source, directory / _GRAPH, options)
        except BundleError as error:
            raise EngineError(
                f"the engine in {directory} cannot be opened: {error.message}",
                f"rebuild it: perceiver-export build BUNDLE --target {source.target} --force",
            ) from error
    return OrtEngine(session, source.target, threads, onnxruntime.__version__)


class OrtEngine:
    """One session. onnxruntime allows concurrent `run` calls on it."""

    def __init__(self, session: Any, target: str, threads: int | None, version: str) -> None:
        self._session = session
        self._target = target
        self._threads = threads
        self._version = version
        self.inputs = tuple(_spec(node) for node in session.get_inputs())
        self.outputs = tuple(_spec(node) for node in session.get_outputs())
        self._output_names = [spec.name for spec in self.outputs]
        self._single_threaded = threads == 1  # then there is no thread of the session's own to run on
        self._in_flight, self._idle = 0, threading.Condition()
        self._calling: set[int] = set()  # threads that are in a caller's callback

    def run(self, feeds: Feeds) -> dict[str, Array]:
        try:
            values = self._session.run(self._output_names, feeds)
        except Exception as error:
            raise _ours(error) from error
        return dict(zip(self._output_names, values, strict=True))

    def run_into(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        binding = self._session.io_binding()
        try:
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name in self._output_names:
                array = out[name]
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise _ours(error) from error

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]] | None:
        if self._single_threaded:
            return None
        future: Future[dict[str, Array]] = Future()
        future.set_running_or_notify_cancel()
        with self._idle:
            self._in_flight += 1

        def done(values: Any, held: Any, error: str) -> None:
            thread = threading.get_ident()
            self._calling.add(thread)
            if error:
                future.set_exception(_failed("inference failed", error.splitlines()[0]))
            else:
                future.set_result(dict(zip(self._output_names, values, strict=True)))
            with self._idle:
                self._calling.discard(thread)
                self._in_flight -= 1
                self._idle.notify_all()

        try:
            self._session.run_async(self._output_names, feeds, done, feeds)  # which are held until then
        except Exception as error:
            with self._idle:
                self._in_flight -= 1
            if "thread pool" not in str(error):
                raise _ours(error) from error
            self._single_threaded = True  # a machine of one core
            return None
        return future

    def in_callback(self) -> bool:
        return threading.get_ident() in self._calling

    def close(self) -> None:
        if self.in_callback():  # a callback does not wait for itself; the interpreter's exit does
            threading.Thread(target=self.close, name="perceiver-export-close", daemon=False).start()
            return
        with self._idle:
            self._idle.wait_for(lambda: not self._in_flight)

    def describe(self) -> dict[str, Any]:
        provider = self._session.get_providers()[0]
        return {
            "target": self._target,
            "device": provider.removesuffix("ExecutionProvider"),
            "engine": "onnxruntime",
            "version": self._version,
            "provider": provider,
            "threads": self._threads or "all cores",
        }


def _import(target: str) -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            f"target {target} needs onnxruntime, which is not installed", find_target("ort-cpu").install
        ) from error
    return onnxruntime


def _provider(onnxruntime: Any, target: str) -> str:
    """onnxruntime's name of the target's execution provider. Raises DeviceError."""
    here = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    wanted = target.removeprefix("ort-")
    if wanted in _plugins(onnxruntime):
        raise DeviceError(
            f"{wanted!r} is a plugin of onnxruntime's, which this runtime does not run",
            f"use an execution provider that is compiled into it: {', '.join(sorted(here))}",
        )
    if wanted not in here:
        raise DeviceError(
            f"this onnxruntime has no execution provider {wanted!r}, it has {', '.join(sorted(here))}",
            "pip install onnxruntime-gpu, in place of onnxruntime"
            if wanted == "cuda"
            else "install an onnxruntime that was built with it; see `perceiver-export doctor`",
        )
    return str(here[wanted])


def _plugins(onnxruntime: Any) -> set[str]:
    """Execution providers that an app registered with `register_execution_provider_library`, from 1.23 on."""
    found = {device.ep_name for device in getattr(onnxruntime, "get_ep_devices", list)()}
    return {name.removesuffix("ExecutionProvider").lower() for name in found - {*onnxruntime.get_available_providers()}}


def _session_options(onnxruntime: Any, source: Source, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    if source.options.hint == "throughput":
        # Threads that spin while they wait steal the cores from the requests beside.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if source.plan is not None and source.plan.peak >= _LARGE:
        options.enable_mem_pattern = options.enable_mem_reuse = False
    for name, value in source.options.flags.items():
        options.add_session_config_entry(name, value)
    if source.target != "ort-cpu":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    return options


def _session(onnxruntime: Any, source: Source, graph: Path, options: Any) -> Any:
    provider = _provider(onnxruntime, source.target)
    try:  # without its own fallback, which prints that it tries again with another provider, and may take that
        session = onnxruntime.InferenceSession(str(graph), options, providers=[provider], enable_fallback=0)
    except Exception as error:
        raise _ours(error, graph, source.options.flags) from error
    if session.get_providers()[0] != provider:
        raise DeviceError(
            f"onnxruntime took {session.get_providers()[0]} instead of {provider}",
            "its libraries do not load here: see `perceiver-export doctor`",
        )
    return session


def _spec(node: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else dim or f"dim{axis}" for axis, dim in enumerate(node.shape))
    if node.type not in _DTYPES:
        raise DeviceError(
            f"{node.name!r} is a {node.type}, which this runtime does not carry", "export with float32 or int32"
        )
    return TensorSpec(name=node.name, dtype=_DTYPES[node.type], shape=shape)


def _ours(error: Exception, loading: Path | None = None, flags: Mapping[str, str] | None = None) -> Exception:
    """onnxruntime's exceptions as ours, of a graph that is loaded or else of a run; anything else as it is."""
    module, name = type(error).__module__, type(error).__name__
    if not module.startswith("onnxruntime") and type(error) is not RuntimeError:  # what run_with_iobinding raises
        return error
    what = "inference failed" if loading is None else f"{loading} cannot be loaded"
    first_line = str(error).splitlines()[0] if str(error) else name
    if "disable_cpu_ep_fallback" in first_line or "fallback to CPU" in first_line:
        return DeviceError(
            f"{what}: the provider leaves some of the graph to the CPU", "use ort-cpu, or a provider that takes it all"
        )
    if loading is None or any(words in first_line for words in _NO_MEMORY):
        return _failed(what, first_line)
    if flags:
        return DeviceError(f"{what}: {first_line}", f"leave --flag {', --flag '.join(flags)} out")
    if name in _DAMAGED:
        return BundleError(
            f"{what}: {first_line}", "the file is damaged, or its engine too old: copy or export it again"
        )
    return DeviceError(f"{what}: {first_line}", "see `perceiver-export doctor`; a newer onnxruntime may be needed")


def _failed(what: str, message: str) -> DeviceError:
    """What the device could not do with a graph that is whole."""
    if any(words in message for words in _NO_MEMORY):
        return DeviceError(f"{what}: {message}", "free memory, or export with a smaller --memory-budget")
    return DeviceError(f"{what}: {message}", "see `perceiver-export doctor`")
