# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime on the CPU, on CUDA, and by name (``ort-NAME``) on any installed execution provider.

The engine is the graph after onnxruntime's optimizer, with its weights in a second file. onnxruntime silently runs
operators that a provider does not support on the CPU. Here that is an error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from perceiver_export.runtimes.engines.backend import (
    Array,
    EngineOptions,
    Feeds,
    Platform,
    Precision,
    Progress,
    Source,
    exact,
)
from perceiver_export.runtimes.engines.cuda import cuda_gpus, driver_version
from perceiver_export.runtimes.engines.flags import BIT, MICROSECONDS, NUMBER, Flags, Values, check_onnxruntimes, one_of
from perceiver_export.runtimes.errors import BuildError, BundleError, DeviceError, EngineError, require
from perceiver_export.runtimes.machine import cpu_features, cpu_name
from perceiver_export.runtimes.manifest import DType, TensorSpec

differences = exact

_CPU = "CPUExecutionProvider"
_GRAPH, _WEIGHTS = "model.onnx", "model.weights"
# Session config entries of onnxruntime 1.22 to 1.32. Older versions ignore entries that they do not know.
_FLAGS: Flags = {
    "session.intra_op.allow_spinning": BIT,
    "session.inter_op.allow_spinning": BIT,
    "session.intra_op.spin_duration_us": MICROSECONDS,
    "session.inter_op.spin_duration_us": MICROSECONDS,
    "session.force_spinning_stop": BIT,
    "session.intra_op_thread_affinities": Values(r"[0-9,;-]{1,1000}", "processor numbers such as 1,2;3,4"),
    "session.dynamic_block_base": NUMBER,
    "session.set_denormal_as_zero": BIT,
    "session.disable_prepacking": BIT,
    "session.disable_quant_qdq": BIT,
    "session.disable_double_qdq_remover": BIT,
    "session.enable_quant_qdq_cleanup": BIT,
    "session.qdq_matmulnbits_accuracy_level": one_of("0", "1", "2", "3", "4"),
    "session.x64quantprecision": BIT,
    "optimization.enable_gelu_approximation": BIT,
    "optimization.enable_cast_chain_elimination": BIT,
    "optimization.disable_specified_optimizers": Values(r"[A-Za-z0-9_;]{1,1000}", "names of optimizers such as A;B"),
    "mlas.disable_kleidiai": BIT,
    "mlas.use_lut_gemm": BIT,
}
# From this many bytes of activations, saving memory matters. A memory pattern saves 10 µs a call, but allocates one
# block for a whole run in addition to the first run's memory. Reused arrays live until their last user has run.
# ImageNet's Fourier model peaked at 620 MiB, at 422 without patterns, and at 330 (the peak of loading) also without
# reuse; optical flow at 616 and 413 above its weights. Neither became slower: the arena reuses freed arrays at once.
_LARGE = 2**24
_SILENT = 4  # fatal only: otherwise onnxruntime also prints the errors that it raises
_NO_MEMORY = ("allocate", "bad_alloc", "bad allocation", "out of memory")  # in allocators' messages
_DAMAGED = ("Fail", "InvalidArgument", "InvalidProtobuf", "NoSuchFile", "InvalidGraph", "NoModel", "RuntimeException")
_DTYPES: dict[str, DType] = {
    "tensor(float)": "float32",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}


def platform(target: str, options: EngineOptions) -> Platform:
    """This machine's platform. Raises MissingDependencyError; DeviceError: no such provider, or no device for it."""
    onnxruntime = _import(target)
    provider = _provider(onnxruntime, target)
    if options.precision != "fp32":
        hint = "omit --precision; only openvino and tensorrt targets can change it"
        raise DeviceError(f"{target} runs a graph in the graph's own precision, not in {options.precision}", hint)
    if provider != "CUDAExecutionProvider":
        return Platform("onnxruntime", onnxruntime.__version__, cpu_name(), features=cpu_features())
    if not cuda_gpus():
        raise DeviceError(f"{target} needs an NVIDIA GPU and its driver", "run `perceiver-export doctor`")
    return Platform("onnxruntime", onnxruntime.__version__, cuda_gpus()[0].name, driver_version())


def flags(target: str) -> Flags:
    """Session config entries."""
    return _FLAGS


def precisions(target: str) -> tuple[Precision, ...]:
    """Empty, because a graph has its own precision."""
    return ()


def compile(source: Source, directory: Path, progress: Progress) -> None:
    """Save the optimized graph. Raises BundleError (the graph is unusable), BuildError, DeviceError."""
    onnxruntime = _import(source.target)
    if source.target not in ("ort-cpu", "ort-cuda"):
        said = f"{source.target} keeps no engine: its execution provider compiles at each load"
        raise BuildError(said, "load the bundle without building")
    progress("optimizing the graph", 0, None)
    options = _session_options(onnxruntime, source, None)
    options.optimized_model_filepath = utf8(directory / _GRAPH)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        _session(onnxruntime, source, source.graph, options)
    except BundleError as error:
        said = str(error.__cause__)
        for path in (source.graph, source.graph.parent, directory):  # a path may itself contain "write"
            said = said.replace(str(path), "")
        if "write" not in said:
            raise
        raise BuildError(f"onnxruntime cannot write an engine to {directory.parent}", "free disk space") from error


def open(source: Source, directory: Path | None, threads: int | None) -> OrtEngine:
    """Open a session. Raises BundleError (the graph is unusable), EngineError, MissingDependencyError, DeviceError."""
    onnxruntime = _import(source.target)
    options = _session_options(onnxruntime, source, threads)
    graph = source.graph
    if directory is not None:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        graph = Path(utf8(directory)) / _GRAPH
    try:
        session = _session(onnxruntime, source, graph, options)
    except BundleError as error:
        if directory is None:
            raise
        raise EngineError(
            f"the engine in {directory} cannot be opened: {error.message}",
            f"rebuild it: perceiver-export build BUNDLE --target {source.target} --force",
        ) from error
    return OrtEngine(session, source, threads, onnxruntime.__version__)


class OrtEngine:
    """One session. onnxruntime allows concurrent `run` calls on it."""

    def __init__(self, session: Any, source: Source, threads: int | None, version: str) -> None:
        self._session = session
        self._source = source
        self._threads = threads
        self._version = version
        self.inputs = tuple(map(_spec, session.get_inputs()))
        self.outputs = tuple(map(_spec, session.get_outputs()))
        self._output_names = [spec.name for spec in self.outputs]

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        try:
            if out is None:
                return dict(zip(self._output_names, self._session.run(self._output_names, feeds), strict=True))
            binding = self._session.io_binding()
            for name, array in feeds.items():
                binding.bind_cpu_input(name, array)
            for name in self._output_names:
                array = out[name]
                binding.bind_output(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
            self._session.run_with_iobinding(binding)
            return dict(out)
        except Exception as error:
            raise _ours(error) from error

    def describe(self) -> dict[str, Any]:
        provider = self._session.get_providers()[0]
        # CPU kernels compute in the types of the graph's tensors (a test checks this); with flags they may not.
        in_fp32 = provider == _CPU and self._source.precision == "fp32" and not self._source.options.flags
        device, threads = provider.removesuffix("ExecutionProvider"), self._threads or "all cores"
        described = self._source.described(device, "onnxruntime", self._version, threads)
        return {**described, "provider": provider, **({"arithmetic": "fp32"} if in_fp32 else {})}


def utf8(path: Path) -> str:
    """A path as onnxruntime expects it. Raises BundleError: the path is not valid UTF-8."""
    try:
        return path.as_posix().encode().decode()
    except UnicodeEncodeError as error:
        raise BundleError(f"onnxruntime cannot open {path}: it is not valid UTF-8", "rename the directory") from error


def _import(target: str) -> Any:
    onnxruntime = require("onnxruntime", f"target {target}", "ort")
    check_onnxruntimes(onnxruntime)
    return onnxruntime


def _provider(onnxruntime: Any, target: str) -> str:
    """onnxruntime's name for the target's execution provider. Raises DeviceError: it is not available."""
    here = {name.removesuffix("ExecutionProvider").lower(): name for name in onnxruntime.get_available_providers()}
    wanted = target.removeprefix("ort-")
    if wanted not in here:
        hint = "install an onnxruntime built with it; plugin providers are not supported"
        raise DeviceError(
            f"this onnxruntime has no execution provider {wanted!r}; it has {', '.join(sorted(here))}",
            "replace onnxruntime with onnxruntime-gpu" if wanted == "cuda" else hint,
        )
    return str(here[wanted])


def _session_options(onnxruntime: Any, source: Source, threads: int | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = _SILENT
    if threads is not None:
        options.intra_op_num_threads = threads
    entries = dict(source.options.flags)
    if source.options.hint == "throughput":  # spinning threads would take cores from other requests
        entries = {"session.intra_op.allow_spinning": "0", **entries}
    if source.target != "ort-cpu":
        entries["session.disable_cpu_ep_fallback"] = "1"
    for name, value in entries.items():
        options.add_session_config_entry(name, value)
    if source.plan is not None and source.plan.peak >= _LARGE:
        options.enable_mem_pattern = options.enable_mem_reuse = False
    return options


def _session(onnxruntime: Any, source: Source, graph: Path, options: Any) -> Any:
    provider = _provider(onnxruntime, source.target)
    # CUDA computes fp32 products in TF32 by default, which has the 10 bits of fp16.
    exact = [{"use_tf32": "0"}] if provider == "CUDAExecutionProvider" else None
    try:  # without onnxruntime's fallback, which prints a message and may switch to another provider
        session = onnxruntime.InferenceSession(utf8(graph), options, [provider], exact, enable_fallback=0)
    except Exception as error:
        raise _ours(error, graph, source.options.flags) from error
    if session.get_providers()[0] != provider:
        used = session.get_providers()[0]
        said = f"onnxruntime used {used} because the libraries of {provider} do not load"
        raise DeviceError(said, "run `perceiver-export doctor`")
    return session


def _spec(node: Any) -> TensorSpec:
    shape = tuple(dim if isinstance(dim, int) else dim or f"dim{axis}" for axis, dim in enumerate(node.shape))
    if node.type not in _DTYPES:
        raise DeviceError(f"{node.name!r} is {node.type}, which is not supported", "export with float32 or int32")
    return TensorSpec(name=node.name, dtype=_DTYPES[node.type], shape=shape)


def _ours(error: Exception, loading: Path | None = None, flags: Iterable[str] = ()) -> Exception:
    """Turn an onnxruntime exception, from loading a graph or from a run, into ours; leave others unchanged."""
    name = type(error).__name__
    if isinstance(error, UnicodeDecodeError):  # the message quotes names from a damaged graph
        said = error.object.decode(errors="replace")
    elif type(error).__module__.startswith("onnxruntime") or type(error) is RuntimeError:  # from run_with_iobinding
        said = str(error)
    else:
        return error
    said = said.splitlines()[0] if said else name
    kind: type[BundleError | DeviceError] = DeviceError
    hint = "run `perceiver-export doctor`; you may need a newer onnxruntime"
    if "disable_cpu_ep_fallback" in said or "fallback to CPU" in said:
        said = "the execution provider does not support all operators of the graph"
        hint = "use ort-cpu, or a provider that supports them all"
    elif any(words in said for words in _NO_MEMORY):
        hint = "free memory, or export with a smaller --memory-budget"
    elif loading is not None and list(flags):
        hint = f"omit --flag {', --flag '.join(flags)}"
    elif loading is not None and name in (*_DAMAGED, "UnicodeDecodeError"):
        kind, hint = BundleError, "copy or export the file again: it is damaged, or onnxruntime is too old for it"
    return kind(f"{loading} cannot be loaded: {said}" if loading else f"inference failed: {said}", hint)
