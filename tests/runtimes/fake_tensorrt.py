# SPDX-License-Identifier: Apache-2.0
"""TensorRT as its bindings are, without TensorRT: whatever a version's API has not raises AttributeError.

Names come from tensorrt_api.json, which `tests/benchmarks/tensorrt_api.py` makes from the real bindings. Networks are
lists of layers that a test describes; engines double their one input. Every call is written down.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.runtimes.fake_cuda import FakeMemory

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
    """One member of an enum; `int` gives its place, as creation flags need it, and types have a size."""

    def __int__(self) -> int:
        return sum(map(ord, self)) % 5

    @property
    def itemsize(self) -> int:
        return {"float16": 2, "int8": 1}.get(self, 4)


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
    return Fake(module, "ITensor", name=name, dtype=Member(dtype), shape=(8, 8))


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
        module, "OnnxParser", parse_from_file=lambda path: not bad, num_errors=int(bad), get_error=lambda index: error
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
            create_execution_context=lambda runtime_config=None: _context(module),
            create_runtime_config=lambda: _runtime_config(module),
        )

    return Fake(module, "Runtime", deserialize_cuda_engine=deserialize)


def _runtime_config(module: FakeModule) -> Fake:
    """Kernels that were compiled for another GPU are refused; a run compiles some where none are there."""

    def deserialize(content: bytes) -> bool:
        module._calls.append(f"kernels of {len(content)} bytes")
        return content == b"kernels"

    cache = Fake(module, "IRuntimeCache", deserialize=deserialize, serialize=lambda: b"kernels")
    return Fake(
        module, "IRuntimeConfig", create_runtime_cache=lambda: cache, set_runtime_cache=lambda given: given is cache
    )


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
