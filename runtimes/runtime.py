# SPDX-License-Identifier: Apache-2.0
"""What an app holds: a loaded part of a bundle that takes arrays and gives arrays."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from perceiver_export.runtimes.errors import InputError, RuntimeClosedError
from perceiver_export.runtimes.manifest import TensorSpec

if TYPE_CHECKING:
    from concurrent.futures import Future, ThreadPoolExecutor

Array = npt.NDArray[Any]
Feeds = Mapping[str, Array]


class Engine(Protocol):
    """What a backend gives: one compiled graph. `run` is called from several threads at once."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def run(self, feeds: Feeds) -> dict[str, Array]:
        """Run on checked feeds; the arrays returned are the caller's."""

    def run_into(self, feeds: Feeds, out: Mapping[str, Array]) -> None:
        """Run on checked feeds and leave the outputs in ``out``."""

    def describe(self) -> dict[str, Any]:
        """Target, device, engine and version, threads."""


class Runtime:
    """A loaded graph. Safe to use from several threads; several runtimes may live in one process.

    Use it as a context manager, or call `close`.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        precision: str,
        num_queries: int | None = None,
        certificates: tuple[str, ...] = (),
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.num_queries = num_queries  # of a decoder: how many queries there are to choose from
        self._precision = precision
        self._certificates = certificates
        self._engine: Engine | None = engine
        self._input_checks = tuple((spec.name, np.dtype(spec.dtype), spec) for spec in inputs)
        self._fixed = {spec.name: spec.shape for spec in (*inputs, *outputs) if not spec.ranges}
        self._lock = threading.Lock()
        self._pool: ThreadPoolExecutor | None = None

    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Outputs by name for inputs by name; the arrays returned are the caller's to keep.

        With ``out`` (every output by name: right dtype and shape, C-contiguous, writeable) the outputs are written
        there without allocating, and the same arrays are returned.

        Raises InputError: a missing or unknown name, wrong dtype or shape; RuntimeClosedError after `close`.
        """
        return self._run(self._open_engine(), feeds, out)

    def _run(self, engine: Engine, feeds: Feeds, out: Mapping[str, Array] | None) -> dict[str, Array]:
        feeds = self._checked(feeds)
        if out is None:
            return engine.run(feeds)
        engine.run_into(feeds, self._checked_out(feeds, out))
        return dict(out)

    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        """`run` in the background; the arrays in ``feeds`` must not change until the future is done."""
        from concurrent.futures import ThreadPoolExecutor

        with self._lock:
            engine = self._open_engine()
            if self._pool is None:
                self._pool = ThreadPoolExecutor(max_workers=2, thread_name_prefix="perceiver-export")
            # The engine goes along: `close` lets what was submitted finish.
            return self._pool.submit(self._run, engine, feeds, None)

    def describe(self) -> dict[str, Any]:
        """What it really runs on: target, device, engine, versions, threads, precision; certificates that hold here."""
        described = {**self._open_engine().describe(), "precision": self._precision}
        return {**described, "certificates": self._certificates} if self._certificates else described

    def close(self) -> None:
        """Finish what was submitted and let go of the engine. May be called twice."""
        with self._lock:
            self._engine = None
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True)

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None:
            raise RuntimeClosedError("this runtime is closed", "call load() again")
        return engine

    def __enter__(self) -> Runtime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _checked(self, feeds: Feeds) -> Feeds:
        """The feeds if they fit, native and contiguous (copied only where they are not)."""
        checked = {}
        sizes: dict[str, int] = {}
        for name, dtype, spec in self._input_checks:
            array = feeds.get(name)
            if array is None:
                raise InputError(
                    f"input {name!r} is missing, there is {', '.join(map(repr, feeds)) or 'nothing'}",
                    f"the model takes {_names(self.inputs)}",
                )
            if not isinstance(array, np.ndarray):
                raise InputError(f"input {name!r} is a {type(array).__name__}", "give a numpy array")
            if array.dtype != dtype:
                if array.dtype.newbyteorder("=") != dtype:
                    raise InputError(
                        f"input {name!r} has dtype {array.dtype}, the model takes {dtype}",
                        f"convert it: array.astype(numpy.{dtype})",
                    )
                array = array.astype(dtype)
            if array.shape != self._fixed.get(name):
                _check_shape(spec, array.shape, sizes)
            if name == "queries" and self.num_queries is not None:
                _check_queries(array, self.num_queries)
            checked[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        if len(feeds) != len(checked):
            unknown = sorted(set(feeds) - set(checked))
            raise InputError(f"unknown input {unknown[0]!r}", f"the model takes {_names(self.inputs)}")
        return checked

    def _checked_out(self, feeds: Feeds, out: Mapping[str, Array]) -> Mapping[str, Array]:
        if set(out) != {spec.name for spec in self.outputs}:
            raise InputError(f"`out` has {', '.join(sorted(out)) or 'nothing'}", f"it must have {_names(self.outputs)}")
        sizes: dict[str, int] = {}
        for spec in self.inputs:
            if spec.ranges:
                _check_shape(spec, feeds[spec.name].shape, sizes)
        for spec in self.outputs:
            array = out[spec.name]
            if not isinstance(array, np.ndarray) or array.dtype != np.dtype(spec.dtype):
                raise InputError(
                    f"`out` for {spec.name!r} is not an array of {spec.dtype}", "allocate it with that dtype"
                )
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InputError(
                    f"`out` for {spec.name!r} is not contiguous and writeable", "allocate it with numpy.empty"
                )
            _check_shape(spec, array.shape, sizes)
        return out


def _names(specs: tuple[TensorSpec, ...]) -> str:
    return ", ".join(f"{spec.name} ({spec.dtype} {list(spec.shape)})" for spec in specs)


def _check_queries(queries: Array, count: int) -> None:
    """An engine would read beside the table, or from its end."""
    if queries.size and not 0 <= int(queries.min()) <= int(queries.max()) < count:
        wrong = int(queries.min()) if queries.min() < 0 else int(queries.max())
        raise InputError(f"query {wrong} is out of range", f"the model has {count} queries, counted from 0")


def _check_shape(spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Raise InputError unless ``shape`` fits; ``sizes`` collects what the named dimensions are in this call."""
    fits = len(shape) == len(spec.shape)
    for expected, found in zip(spec.shape, shape, strict=False):
        if isinstance(expected, int):
            fits = fits and expected == found
        else:
            least, most = spec.ranges.get(expected, (0, found))
            fits = fits and least <= found <= most and sizes.setdefault(expected, found) == found
    if not fits:
        ranges = "".join(f", {name} from {least} to {most}" for name, (least, most) in spec.ranges.items())
        raise InputError(
            f"{spec.name!r} has shape {list(shape)}, the model takes {list(spec.shape)}{ranges}",
            "shapes are fixed at export: see --batch and --shape of `perceiver-export export`",
        )
