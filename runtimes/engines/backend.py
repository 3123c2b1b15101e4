# SPDX-License-Identifier: Apache-2.0
"""What a backend gives: four functions in one module, named in the table of targets.

    platform      what an engine of this target depends on beside its model: library, device, driver
    differences   why an engine that was built on one platform is not for another
    compile       a graph -> engine files in a directory
    open          those files, or the graph itself where compiling takes seconds -> an `Engine`

A backend imports its library inside these functions, and turns its exceptions into ours there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import msgspec
import numpy.typing as npt

from perceiver_export.runtimes.manifest import MemoryPlan, TensorSpec

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]
Precision = Literal["fp32", "fp16", "bf16"]
Hint = Literal["latency", "throughput"]
Progress = Callable[[str, int, int | None], None]  # what is being done, steps done, steps in all if known


class Platform(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an engine depends on beside its model. Empty strings where a target has no such thing."""

    library: str  # onnxruntime
    version: str
    device: str  # its name, with what decides about kernels: "NVIDIA Orin (sm_87)"
    driver: str = ""
    features: tuple[str, ...] = ()  # instruction sets


class EngineOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a user may choose for a compiled engine. All of it is in the engine's key.

    ``shapes`` has, for each named dimension, the least, the best and the largest size; ``flags`` are a backend's own.
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
    def compiled_precision(self) -> str:
        """What the engine computes in: `fp16`, or of a quantized bundle `int8 with fp16`."""
        asked = self.options.precision
        return asked if self.precision == "fp32" else f"{self.precision} with {asked}"


class Engine(Protocol):
    """One compiled graph. All of it is called from several threads at once.

    It is closed by dropping the last reference to it, which happens when no call is in flight.
    """

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run on checked feeds; the arrays returned are the caller's."""

    def run_into(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        """Run on checked feeds and leave the outputs in ``out``."""

    def describe(self) -> dict[str, Any]:
        """Target, device, engine (its library), version, threads; precision where it is not the bundle's."""


@runtime_checkable
class AsyncEngine(Engine, Protocol):
    """An engine with asynchronous requests of its own; others are called from two threads."""

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]] | None:
        """Start on checked feeds and return at once. The feeds are kept until the future is done.

        None: it cannot, as it was opened; it is called from two threads then.
        """

    def in_callback(self) -> bool:
        """Whether a future's callback runs in this thread: to wait for another future there may be for ever."""

    def close(self) -> None:
        """Return when all that was submitted is done; at once in a future's callback, and what is left is finished.

        Nothing is submitted after it.
        """


class Backend(Protocol):
    """A module with these functions. Each raises MissingDependencyError (with the extra) and DeviceError."""

    def platform(self, target: str, options: EngineOptions) -> Platform:
        """What is here. Cheap: no graph is loaded. Raises where the target cannot run (or be built for) here."""

    def differences(self, built: Platform, here: Platform) -> tuple[str, ...]:
        """Why an engine built there is not for here, one phrase each; empty where it is. `exact` asks for equality."""

    def compile(self, source: Source, directory: Path, progress: Progress) -> None:
        """Write engine files into ``directory``, which is empty. Raises BuildError, BundleError."""

    def open(self, source: Source, directory: Path | None, threads: int | None) -> Engine:
        """Open what `compile` wrote; None: compile the graph now. Raises EngineError, BundleError.

        A target that the table says ``needs_engine`` is never opened with None.
        """


def exact(built: Platform, here: Platform) -> tuple[str, ...]:
    """`differences` of backends whose engines run only on the very platform that they were built on."""
    found = []
    if (built.library, built.version) != (here.library, here.version):
        found.append(f"it was built with {built.library} {built.version}, here is {here.library} {here.version}")
    for what in ("device", "driver"):
        ours, theirs = getattr(here, what), getattr(built, what)
        if ours != theirs:
            found.append(f"it was built for the {what} {theirs or 'none'}, here is {ours or 'none'}")
    if built.features != here.features:
        ours, theirs = " ".join(here.features), " ".join(built.features)
        found.append(f"it was built for the instruction sets {theirs or 'none'}, here are {ours or 'none'}")
    return tuple(found)
