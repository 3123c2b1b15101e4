# SPDX-License-Identifier: Apache-2.0
"""The interface of a backend: six functions in one module, named in the table of targets.

    platform      everything besides the model on which an engine of this target depends: library, device, driver
    differences   why an engine that was built on one platform cannot be used on another
    flags         the settings of its library that a user may choose
    precisions    the types in which the device computes
    compile       a graph -> engine files in a directory
    open          those files, or the graph itself if compiling takes seconds -> an `Engine`

A backend imports its library inside these functions, and turns the library's exceptions into ours there. The table of
targets lists the hardware and the library of each, and how to install the library.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, cast

import msgspec
import numpy.typing as npt

from perceiver_export.runtimes.engines.flags import Flags
from perceiver_export.runtimes.errors import DeviceError, check_kind, install_command
from perceiver_export.runtimes.manifest import MemoryPlan, TensorSpec

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Precision = Literal["fp32", "fp16", "bf16"]
PrecisionChoice = Literal["fp32", "fp16", "bf16", "auto"]  # auto: see `choose_precision`
Hint = Literal["latency", "throughput"]
Progress = Callable[[str, int, int | None], None]  # description, steps done, steps in all if known


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Everything besides the model on which an engine depends. Strings that do not apply to a target are empty."""

    library: str  # onnxruntime
    version: str
    device: str  # its name, with the architecture that selects kernels: "NVIDIA Orin (sm_87)"
    driver: str = ""
    features: tuple[str, ...] = ()  # instruction sets


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A user's choices for a compiled engine. All are in the engine's key.

    ``shapes`` has the smallest, best and largest size of each named dimension; ``flags`` are a backend's own.
    """

    precision: Precision = "fp32"
    hint: Hint = "latency"
    shapes: dict[str, tuple[int, int, int]] = {}
    flags: dict[str, str] = {}


class Source(msgspec.Struct, frozen=True):
    """The graph of a part, as a backend compiles or opens it."""

    target: str
    graph: Path
    options: EngineOptions = EngineOptions()
    precision: str = "fp32"  # of the bundle: fp32, or the name of a quantization scheme
    inputs: tuple[TensorSpec, ...] = ()
    outputs: tuple[TensorSpec, ...] = ()
    plan: MemoryPlan | None = None

    @property
    def engine_precision(self) -> Precision:
        """The requested precision, or the only one in which the target computes."""
        return find_target(self.target).computes or self.options.precision

    @property
    def compiled_precision(self) -> str:
        """The precision of the build: `fp16`, or for a quantized bundle `int8 with fp16`."""
        asked = self.engine_precision
        return asked if self.precision == "fp32" else f"{self.precision} with {asked}"

    def described(self, device: str, library: str, version: str, threads: int | str) -> dict[str, Any]:
        """The entries of every `Engine.describe`: with flags, also these, because they may change outputs."""
        facts = {"target": self.target, "device": device, "engine": library, "version": version, "threads": threads}
        return {**facts, "flags": self.options.flags} if self.options.flags else facts


class Kernel(NamedTuple):
    """A kernel of an engine. ``names``: the graph's nodes and tensors that it computes; ``precision``: the type that
    it reads; ``num_bytes``: the bytes that it reads and writes; ``times``: milliseconds of each call.
    """

    names: tuple[str, ...]
    kernel: str
    precision: str
    product: bool
    num_bytes: int
    times: tuple[float, ...] = ()


class Engine(Protocol):
    """One compiled graph. Several threads may call it at once.

    It is closed by dropping the last reference to it, which happens when no call is in flight.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Run on checked feeds. The outputs are the arrays in ``out``, or new ones; the caller owns them."""

    def describe(self) -> dict[str, Any]:
        """Target, device, engine (its library), version, threads; precision if it is not the bundle's, and ``flags`` if
        there are any. ``arithmetic`` has the types in which the engine says that it computes, if it can say.
        """


class Backend(Protocol):
    """A module with these functions. Each raises MissingDependencyError (with the extra) and DeviceError."""

    def platform(self, target: str, options: EngineOptions) -> Platform:
        """This machine's platform. Cheap: it loads no graph. Raises if the target cannot run (or be built for) here."""

    def differences(self, built: Platform, here: Platform) -> tuple[str, ...]:
        """Why an engine built there cannot be used here, one phrase per reason; empty if it can. See `exact`."""

    def flags(self, target: str) -> Flags:
        """The library's settings that a user may choose, with the accepted values. See `flags.py`."""

    def precisions(self, target: str) -> tuple[Precision, ...]:
        """Precisions below fp32 that `compile` accepts and in which the device computes, not only stores.

        Raises as `platform` does.
        """

    def compile(self, source: Source, directory: Path, progress: Progress) -> None:
        """Write engine files into ``directory``, which is empty. Raises BuildError, BundleError."""

    def open(self, source: Source, directory: Path | None, threads: int | None) -> Engine:
        """Open the files that `compile` wrote; with None, compile the graph now. Raises EngineError, BundleError.

        A target that ``needs_engine`` is never opened with None.
        """


def exact(built: Platform, here: Platform) -> tuple[str, ...]:
    """`differences` for engines that run only on exactly the platform on which they were built."""
    facts = (
        ("library", f"{built.library} {built.version}", f"{here.library} {here.version}"),
        ("device", built.device, here.device),
        ("driver", built.driver, here.driver),
        ("instruction sets", " ".join(built.features), " ".join(here.features)),
    )
    return tuple(
        f"it was built for the {what} {theirs or 'none'}, but this machine has {ours or 'none'}"
        for what, theirs, ours in facts
        if theirs != ours
    )


class Target(msgspec.Struct, frozen=True):
    """Where an engine runs. Any of ``distributions`` contains the library; ``extra`` installs the first."""

    name: str
    module: str
    distributions: tuple[str, ...]
    extra: str
    hardware: str
    needs_engine: bool = False  # compiling takes minutes, so `load` never does it
    computes: Precision | None = None  # its only precision; None: the requested one
    index: str = ""  # the package index of the distributions, if it is not pip's default

    @property
    def install(self) -> str:
        """The command that installs the engine's library."""
        return install_command(self.extra) + self.from_index

    @property
    def from_index(self) -> str:
        """The option of `pip install` for the index."""
        return f" --extra-index-url {self.index}" if self.index else ""

    def lowering(self, precision: str) -> str:
        """The name under which a bundle has the graph for this target. TensorRT has one graph per precision."""
        return f"tensorrt-{precision}" if self.module == "tensorrt" else self.name

    def backend(self) -> Backend:
        """The module that runs it."""
        return cast(Backend, importlib.import_module(f"{__package__}.{self.module}"))

    def version(self) -> str:
        """The installed library's version, empty if it is missing. Nothing is imported."""
        return installed_version(*self.distributions)


def installed_version(*distributions: str) -> str:
    """The version of the first distribution that is installed; empty if none is."""
    from importlib.metadata import PackageNotFoundError, version

    for name in distributions:
        with suppress(PackageNotFoundError):
            return version(name)
    return ""


_TENSORRT = ("tensorrt", "tensorrt-cu12", "tensorrt-cu13")
_ORT = ("onnxruntime", "onnxruntime-gpu")
_TABLE = (
    Target("tensorrt", "tensorrt", _TENSORRT, "tensorrt", "NVIDIA GPU", True, index="https://pypi.nvidia.com"),
    Target("tensorrt-rtx", "tensorrt", ("tensorrt-rtx",), "tensorrt-rtx", "NVIDIA GPU", needs_engine=True),
    Target("ort-cuda", "ort", ("onnxruntime-gpu",), "ort", "NVIDIA GPU"),
    Target("openvino-gpu", "openvino", ("openvino",), "openvino", "Intel GPU"),
    Target("openvino-npu", "openvino", ("openvino",), "openvino", "Intel NPU", computes="fp16"),
    Target("ort-cpu", "ort", _ORT, "ort", "CPU"),
    Target("openvino-cpu", "openvino", ("openvino",), "openvino", "CPU"),
)

# In the order in which `device="auto"` tries them.
TARGETS = {target.name: target for target in _TABLE}


def find_target(name: str) -> Target:
    """The target of that name; ``ort-NAME`` is ONNX Runtime with the execution provider of that name.

    Raises DeviceError: there is no such target; UsageError: it is not text.
    """
    check_kind("a target", name, str, f"one of {', '.join(TARGETS)}")
    if name in TARGETS:
        return TARGETS[name]
    if re.fullmatch(r"ort-[a-z0-9]+", name):
        return msgspec.structs.replace(TARGETS["ort-cpu"], name=name, hardware="its execution provider's device")
    import difflib

    close = difflib.get_close_matches(name.lower(), TARGETS)
    near = [target for target in TARGETS if target in close]
    raise DeviceError(
        f"there is no target {name!r}",
        (f"did you mean {' or '.join(near)}? " if near else "")
        + f"give one of {', '.join(TARGETS)}, or ort-NAME for another execution provider of ONNX Runtime, such as "
        "ort-dnnl; `auto` chooses one, a certified target first",
    )
