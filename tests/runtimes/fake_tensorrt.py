# SPDX-License-Identifier: Apache-2.0
"""TensorRT as its bindings are, without TensorRT: whatever a version's API has not raises AttributeError.

Names come from tensorrt_api.json, which `tests/benchmarks/tensorrt_api.py` makes from the real bindings. Networks are
lists of layers that a test describes; engines double their one input. Every call is written down.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

API: dict[str, dict[str, list[str]]] = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())


class Fake:
    """An object of one of TensorRT's classes: public names outside of the class's API are not there."""

    def __init__(self, module: FakeModule, kind: str, **values: Any) -> None:
        object.__setattr__(self, "_kind", kind)
        object.__setattr__(self, "_names", set(module._api.get(kind, ())))
        object.__setattr__(self, "_calls", module._calls)
        object.__setattr__(self, "_values", values)
        assert kind in module._api, f"{module.__version__} has no {kind}"

    def __getattr__(self, name: str) -> Any:
        if name not in self._names:
            raise AttributeError(f"{self._kind} has no {name}")
        self._calls.append(f"{self._kind}.{name}")
        return self._values[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in self._names:
            raise AttributeError(f"{self._kind} has no {name}")
        self._calls.append(f"{self._kind}.{name} = {value}")
        if "name" in self._values:
            self._calls.append(f"{self._values['name']} has {name} {value}")
        self._values[name] = value


class Enum:
    """Members as strings; only those that the version has."""

    def __init__(self, name: str, members: list[str]) -> None:
        self._name, self._members = name, members

    def __getattr__(self, name: str) -> Any:
        if name not in self._members:
            raise AttributeError(f"{self._name} has no {name}")
        return Member(f"{self._name}.{name}")


class Member(str):
    """One member of an enum; `int` gives its place, as creation flags need it."""

    def __int__(self) -> int:
        return sum(map(ord, self)) % 5


class FakeModule:
    """`tensorrt` of one version. ``layers``: what every network has; ``report``: what every engine's inspector says."""

    def __init__(
        self,
        version: str,
        layers: Callable[[FakeModule], list[Fake]],
        report: str,
        problems: tuple[str, ...] = (),
        build: Callable[[Any], bytes | None] = lambda config: b"engine",
        memory: FakeMemory | None = None,
    ) -> None:
        self._api, self._calls = API[version], []
        self._layers, self._report, self._problems, self._build = layers, report, problems, build
        self._memory = memory
        self.__version__ = version

    _calls: list[str]

    def __getattr__(self, name: str) -> Any:
        if name not in self._api["module"]:
            raise AttributeError(f"tensorrt {self.__version__} has no {name}")
        if name in ("ILogger", "IProgressMonitor"):
            return type(name, (), {"__init__": lambda one: None})
        made = _FACTORIES.get(name)
        if made is not None:
            return lambda *arguments: made(self, *arguments)
        if name in ("float32", "float16", "bfloat16", "int8"):
            return Member(name)
        return Enum(name, self._api[name])


def tensor(module: FakeModule, name: str, dtype: str) -> Fake:
    return Fake(module, "ITensor", name=name, dtype=Member(dtype))


def layer(module: FakeModule, kind: str, name: str, inputs: list[Fake], output: Fake, **values: Any) -> Fake:
    own = {"LayerType.NORMALIZATION": "INormalizationLayer"}.get(f"LayerType.{kind}", "ILayer")
    return Fake(
        module,
        own,
        type=getattr(module.LayerType, kind),
        name=name,
        metadata=f"[ONNX Layer: {name}]",
        num_inputs=len(inputs),
        num_outputs=1,
        get_input=lambda index: inputs[index],
        get_output=lambda index: output,
        set_output_type=lambda index, dtype: module._calls.append(f"{name} gives {dtype}"),
        **values,
    )


def _builder(module: FakeModule, logger: Any) -> Fake:
    return Fake(
        module,
        "Builder",
        create_network=lambda flags: _network(module, flags),
        create_builder_config=lambda: _config(module),
        create_optimization_profile=lambda: Fake(
            module,
            "IOptimizationProfile",
            set_shape=lambda name, *sizes: module._calls.append(f"profile {name} {sizes}"),
        ),
        build_serialized_network=lambda network, config: _built(module, logger, config),
    )


def _built(module: FakeModule, logger: Any, config: Fake) -> bytes | None:
    for problem in module._problems:
        logger.log(1, problem)
    return module._build(config)


def _network(module: FakeModule, flags: int) -> Fake:
    module._calls.append(f"create_network({flags})")
    layers = module._layers(module)
    return Fake(module, "INetworkDefinition", num_layers=len(layers), get_layer=lambda index: layers[index])


def _config(module: FakeModule) -> Fake:
    def note(what: str) -> Callable[..., None]:
        return lambda *values: module._calls.append(f"{what}{values}")

    def cache(content: bytes) -> Fake | None:
        module._calls.append(f"timing cache of {len(content)} bytes")
        return None if content == b"damaged" else Fake(module, "ITimingCache", serialize=lambda: b"measured")

    return Fake(
        module,
        "IBuilderConfig",
        set_flag=note("set_flag"),
        clear_flag=note("clear_flag"),
        set_memory_pool_limit=note("set_memory_pool_limit"),
        add_optimization_profile=note("add_optimization_profile"),
        create_timing_cache=cache,
        set_timing_cache=note("set_timing_cache"),
        get_timing_cache=lambda: cache(b""),
    )


def _parser(module: FakeModule, network: Fake, logger: Any) -> Fake:
    error = Fake(
        module,
        "ParserError",
        desc=lambda: "No importer registered for op: Gelu",
        node=lambda: 7,
        node_name=lambda: "mlp/Gelu_1",
        node_operator=lambda: "Gelu",
    )
    bad = any(one.name == "unreadable" for one in module._layers(module))
    return Fake(
        module,
        "OnnxParser",
        parse_from_file=lambda path: not bad,
        num_errors=int(bad),
        get_error=lambda index: error,
    )


def _runtime(module: FakeModule, logger: Any) -> Fake:
    def deserialize(content: bytes) -> Fake | None:
        if content != b"engine":
            logger.log(1, "Serialization assertion magicTagRead == kMAGIC_TAG failed.Magic tag does not match")
            return None
        inspector = Fake(module, "EngineInspector", get_engine_information=lambda form: module._report)
        names = ["x", "y"]
        return Fake(
            module,
            "ICudaEngine",
            create_engine_inspector=lambda: inspector,
            num_io_tensors=len(names),
            get_tensor_name=lambda index: names[index],
            create_execution_context=lambda: _context(module),
        )

    return Fake(module, "Runtime", deserialize_cuda_engine=deserialize)


def _context(module: FakeModule) -> Fake:
    """y = 2 x, on the device's side of the memory."""
    addresses: dict[str, int] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def execute(stream: int) -> bool:
        memory = module._memory
        assert memory is not None
        module._calls.append(f"execute on {stream}")
        memory.work(lambda: double(memory))
        return True

    def double(memory: FakeMemory) -> None:
        x, y = (memory.floats(addresses[name]) for name in ("x", "y"))
        size = int(np.prod(shapes.get("x", x.shape)))
        y[:size] = 2 * x[:size]

    return Fake(
        module,
        "IExecutionContext",
        set_tensor_address=lambda name, address: addresses.update({name: address}),
        set_input_shape=lambda name, shape: shapes.update({name: tuple(shape)}) or True,
        execute_async_v3=execute,
    )


_FACTORIES: dict[str, Callable[..., Fake]] = {"Builder": _builder, "OnnxParser": _parser, "Runtime": _runtime}


class FakeMemory:
    """A CUDA driver over numpy arrays: host and device sides apart, or one where ``shared``.

    ``capacity`` is in bytes; a graph that is captured is the list of calls that were made.
    """

    def __init__(self, shared: bool = False, capacity: int = 1 << 20, graphs: bool = True) -> None:
        self.shared, self.capacity, self.graphs = shared, capacity, graphs
        self.blocks: dict[int, np.ndarray[Any, Any]] = {}
        self.calls: list[str] = []
        self.threads: set[int] = set()
        self.running = threading.Event()  # cleared by a test that wants work to take long
        self.running.set()
        self._streams = 0
        self._recording: list[Callable[[], None]] | None = None
        self._graphs: list[list[Callable[[], None]]] = []

    def floats(self, address: int) -> np.ndarray[Any, Any]:
        return self.blocks[address].view(np.float32)

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("cu"):
            raise AttributeError(name)
        own = getattr(type(self), f"_{name}", None)

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            self.threads.add(threading.get_ident())
            return 0 if own is None else int(own(self, *arguments) or 0)

        return call

    def _cuDeviceGetAttribute(self, result: Any, attribute: int, device: Any) -> None:  # noqa: N802
        result._obj.value = int(self.shared)

    def _cuMemHostAlloc(self, result: Any, nbytes: Any, flags: int) -> int:  # noqa: N802
        return self._allocate(result, nbytes.value)

    def _cuMemAlloc_v2(self, result: Any, nbytes: Any) -> int:  # noqa: N802
        return self._allocate(result, nbytes.value)

    def _allocate(self, result: Any, nbytes: int) -> int:
        if nbytes > self.capacity:
            return 2
        block = np.zeros(-(-nbytes // 4) * 4, np.uint8)
        self.blocks[block.ctypes.data] = block
        result._obj.value = block.ctypes.data
        return 0

    def _cuMemHostGetDevicePointer_v2(self, result: Any, host: Any, flags: int) -> None:  # noqa: N802
        result._obj.value = host.value

    def _cuMemcpyHtoDAsync_v2(self, device: Any, host: Any, nbytes: Any, stream: Any) -> None:  # noqa: N802
        self.work(lambda: self._copy(device.value, host.value, nbytes.value))

    def _cuMemcpyDtoHAsync_v2(self, host: Any, device: Any, nbytes: Any, stream: Any) -> None:  # noqa: N802
        self.work(lambda: self._copy(host.value, device.value, nbytes.value))

    def work(self, job: Callable[[], None]) -> None:
        """Do it, or write it down where a graph is being recorded: then nothing is done yet."""
        if self._recording is None:
            job()
        else:
            self._recording.append(job)

    def _copy(self, target: int, source: int, nbytes: int) -> None:
        self.blocks[target][:nbytes] = self.blocks[source][:nbytes]

    def _cuStreamCreate(self, result: Any, flags: int) -> None:  # noqa: N802
        self._streams += 1
        result._obj.value = self._streams

    def _cuStreamSynchronize(self, stream: Any) -> None:  # noqa: N802
        assert self.running.wait(60)

    def _cuStreamBeginCapture_v2(self, stream: Any, mode: int) -> int:  # noqa: N802
        self._recording = [] if self.graphs else None
        return 0 if self.graphs else 900

    def _cuStreamEndCapture(self, stream: Any, result: Any) -> None:  # noqa: N802
        assert self._recording is not None
        self._graphs.append(self._recording)
        result._obj.value = len(self._graphs)
        self._recording = None

    def _cuGraphInstantiateWithFlags(self, result: Any, graph: Any, flags: Any) -> None:  # noqa: N802
        result._obj.value = graph.value

    def _cuGraphLaunch(self, graph: Any, stream: Any) -> None:  # noqa: N802
        for job in self._graphs[graph.value - 1]:
            job()

    def _cuGetErrorString(self, code: int, result: Any) -> None:  # noqa: N802
        result._obj.value = {2: b"out of memory"}.get(code, b"operation not permitted")
