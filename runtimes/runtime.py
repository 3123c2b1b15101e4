# SPDX-License-Identifier: Apache-2.0
"""A loaded part of a bundle: arrays in, arrays out, with all inputs checked in every call."""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from typing import Any

import msgspec
import numpy as np

from perceiver_export.runtimes import exits
from perceiver_export.runtimes.engines.backend import Array, Engine, Feeds
from perceiver_export.runtimes.errors import DeviceError, InputError, RuntimeClosedError, check_kind, check_whole
from perceiver_export.runtimes.manifest import TensorSpec

__all__ = ["Array", "Engine", "Feeds", "Runtime"]

IN_FLIGHT = 2  # one runs while the next is prepared
_FIXED = "give that shape, or export again with --batch or --shape"
_BATCH = "add the batch as the first dimension: array[None]"
_RANGES = "give sizes in that range, the same for all inputs, or export again with another --batch"
_HUGE = 1e8  # fill values of masks have at least this magnitude, and would dwarf all others
_STEADY = 0.25  # the largest interquartile range of steady times, as a share of the median


class FeedChecks:
    """The checks of one graph's inputs and outputs, prepared once. ``check_finite`` also rejects NaN and infinity."""

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], *, check_finite: bool = False
    ) -> None:
        self._check_finite = check_finite
        self._inputs, self._outputs = (
            tuple((spec, np.dtype(spec.dtype), None if spec.ranges else spec.shape) for spec in specs)
            for specs in (inputs, outputs)
        )
        self._hint, self._out_hint = (
            f"give {{name: array}}: {', '.join(f'{one.name} ({one.dtype} {list(one.shape)})' for one in specs)}"
            for specs in (inputs, outputs)
        )

    def feeds(self, feeds: Feeds) -> Feeds:
        """The checked feeds in native byte order and contiguous, copied only if necessary. Raises InputError."""
        if not isinstance(feeds, Mapping):
            raise InputError(f"the inputs are of type {type(feeds).__name__}, not arrays by name", self._hint)
        checked = {}
        sizes: dict[str, int] = {}
        for spec, dtype, fixed in self._inputs:
            name = spec.name
            array = feeds.get(name)
            if not isinstance(array, np.ndarray):
                found = f"is of type {type(array).__name__}" if name in feeds else "is missing"
                given = ", ".join(map(repr, feeds)) or "nothing"
                raise InputError(f"input {name!r} {found}; given: {given}", self._hint)
            if array.dtype != dtype:
                if array.dtype.newbyteorder("=") != dtype:
                    raise InputError(f"input {name!r} has dtype {array.dtype}, but the model takes {dtype}", self._hint)
                array = array.astype(dtype)
            if array.shape != fixed:
                check_shape(spec, array.shape, sizes)
            check_values(array, spec)
            checked[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        if len(feeds) != len(checked):
            raise InputError(f"unknown input {min(map(repr, feeds.keys() - checked.keys()))}", self._hint)
        if self._check_finite:
            _check_finite(checked, "input", InputError, "find their source")
        return checked

    def out(self, feeds: Feeds, out: Mapping[str, Array]) -> Mapping[str, Array]:
        """``out`` if the outputs for these feeds can be written to it. Raises InputError."""
        if not isinstance(out, Mapping) or out.keys() != {spec.name for spec, _, _ in self._outputs}:
            found = ", ".join(map(repr, out)) if isinstance(out, Mapping) else type(out).__name__
            raise InputError(f"`out` is {found or 'empty'}", self._out_hint)
        sizes: dict[str, int] = {}
        for spec, _, _ in self._inputs:
            if spec.ranges:
                check_shape(spec, feeds[spec.name].shape, sizes)
        for spec, dtype, fixed in self._outputs:
            name, array = spec.name, out[spec.name]
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise InputError(f"`out` for {name!r} is not an array of {dtype}", "allocate it with that dtype")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InputError(f"`out` for {name!r} is not contiguous and writeable", "allocate it with numpy.empty")
            if array.shape != fixed:
                check_shape(spec, array.shape, sizes, f"allocate `out` for {name!r} with that shape", "gives")
            if any(np.may_share_memory(array, feed) for feed in feeds.values()):
                raise InputError(f"`out` for {name!r} shares memory with an input", "allocate separate memory for it")
        return out


def _check_finite(arrays: Mapping[str, Array], what: str, error: type[DeviceError | InputError], hint: str) -> None:
    """Raise ``error`` for NaN or infinity."""
    for name, array in arrays.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int(array.size - np.isfinite(array).sum())
            raise error(f"{what} {name!r} has {count} NaN or infinite values", hint)


def check_shape(
    spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int], hint: str = "", verb: str = "takes"
) -> None:
    """Raise InputError unless ``shape`` fits; ``sizes`` collects the named dimensions of this call."""
    fits, ranged = len(shape) == len(spec.shape), False
    for expected, found in zip(spec.shape, shape, strict=False):
        if isinstance(expected, int):
            fits = fits and expected == found
        else:
            least, most = spec.ranges.get(expected, (0, found))
            ranged = ranged or not (least <= found <= most and sizes.setdefault(expected, found) == found)
    if ranged or not fits:
        ranges = "".join(f", {name} from {least} to {most}" for name, (least, most) in spec.ranges.items())
        said = f"{spec.name!r} has shape {list(shape)}, but the model {verb} {list(spec.shape)}{ranges}"
        alone = len(shape) + 1 == len(spec.shape)
        raise InputError(said, hint or (_BATCH if alone else _RANGES if ranged and fits else _FIXED))


def check_values(array: Array, spec: TensorSpec) -> None:
    """Raise InputError for an integer outside the input's range.

    An engine would silently read outside a table, or from its end.
    """
    if spec.values is None or not array.size:
        return
    least, most = spec.values
    low, high = int(array.min()), int(array.max())
    if low < least or high > most:
        wrong = low if low < least else high
        hint = "give 1 to keep a position, 0 to mask it" if spec.name.endswith("_mask") else "count from 0"
        raise InputError(f"{spec.name!r} contains {wrong}, but the model takes {least} to {most}", hint)


_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


def _keep_engines() -> None:
    """Never free engines in a forked child: their destructors would wait for threads that do not exist there."""
    import ctypes

    for engine in _engines:
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(engine))


os.register_at_fork(after_in_child=_keep_engines)


class Runtime:
    """A loaded graph. It is thread-safe, and a process may have several. Use it as a context manager, or call `close`.

    It belongs to the process that loaded it. In a forked child its calls raise RuntimeClosedError, because the engine's
    threads do not exist there. A `multiprocessing` child may load its own. With ONNX Runtime, a child of a bare
    `os.fork` must end with `os._exit`, because onnxruntime's exit handler would wait forever.
    """

    def __init__(
        self,
        engine: Engine,
        inputs: tuple[TensorSpec, ...],
        outputs: tuple[TensorSpec, ...],
        precision: str,
        num_queries: int | None = None,
        *,
        compiled: str = "at load",
        check_finite: bool = False,
        certificates: tuple[str, ...] = (),
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.num_queries = num_queries  # in a decoder: the number of queries to choose from
        self._described: dict[str, Any] = {"precision": precision, "compiled": compiled}
        if certificates:
            self._described["certificates"] = certificates
        self.check_finite = check_finite
        self._engine: Engine | None = engine
        self._checks = FeedChecks(inputs, outputs, check_finite=check_finite)
        self._process = os.getpid()
        self._closed = False
        self._lock = threading.Lock()
        self._workers: exits.Workers | None = None
        _engines.add(engine)
        exits.arm()

    @exits.awaited
    def run(self, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """Outputs by name for inputs by name. The caller owns the returned arrays.

        ``out`` has an array for every output, with the right dtype and shape, C-contiguous, writeable, and sharing no
        memory with the inputs. The outputs are written to these arrays without allocating, and the same arrays are
        returned. The joined parts of a split bundle allocate intermediate arrays and copy the result to ``out``.

        Raises InputError: a missing or unknown name, or a wrong dtype or shape; RuntimeClosedError: after `close`, or
        in a forked child; DeviceError: the device failed.
        """
        exits.enter()
        return self._run(self._open_engine(), self._checks.feeds(feeds), out)

    def _run(self, engine: Engine, feeds: Feeds, out: Mapping[str, Array] | None = None) -> dict[str, Array]:
        outputs = engine.run(feeds, None if out is None else self._checks.out(feeds, out))
        if self.check_finite:
            _check_finite(outputs, "output", DeviceError, "build with fp32: the engine's precision may overflow")
        return outputs

    @exits.awaited
    def submit(self, feeds: Feeds) -> Future[dict[str, Array]]:
        """`run` in the background. The arrays in ``feeds`` must not change until the future is done.

        It runs in a pool of two threads, or of as many as the device recommends. The future raises what `run` would
        raise; only RuntimeClosedError is raised here. A future's callback may submit and close, but must not wait for
        another future, because its thread also finishes the others.
        """
        if exits.ending and not exits.hold():
            return Future()  # in a callback at exit: nothing waits for this future
        self._open_engine()  # before the lock, which may be held forever in a forked child
        try:
            feeds = self._checks.feeds(feeds)
        except InputError as error:
            (future := Future[dict[str, Array]]()).set_exception(error)
            return future
        with self._lock:
            engine = self._open_engine()
            if self._workers is None:
                self._workers = exits.Workers(getattr(engine, "in_flight", IN_FLIGHT))
            # The call keeps the engine alive, so that submitted calls finish after `close`.
            return self._workers.submit(lambda: self._run(engine, feeds))

    def stream(self, feeds: Iterable[Feeds], in_flight: int = IN_FLIGHT) -> Iterator[dict[str, Array]]:
        """Outputs for an iterable of feeds, in its order, with at most ``in_flight`` submitted at any time.

        The iterable is read only as fast as outputs are consumed, so a camera or a file never runs ahead of the device.
        A call's error is raised at its place in the order and ends the stream. Raises UsageError: ``in_flight`` below
        1, or ``feeds`` is not iterable.
        """
        check_whole("in_flight", in_flight, 1, None, "give 1 or more; 2 keeps the device busy")
        check_kind("the stream's input", feeds, Iterable, "an iterable of {name: array}")
        return self._stream(iter(feeds), in_flight)

    def _stream(self, feeds: Iterator[Feeds], in_flight: int) -> Iterator[dict[str, Array]]:
        self._open_engine()
        started: deque[Future[dict[str, Array]]] = deque()
        try:
            for one in feeds:
                started.append(self.submit(one))
                if len(started) >= in_flight:
                    yield started.popleft().result()
            while started:
                yield started.popleft().result()
        finally:
            for future in started:  # the stream was abandoned, but running calls still read the caller's arrays
                if not future.cancel() and not (self._workers and self._workers.in_callback()):
                    future.exception()

    @exits.awaited
    def describe(self) -> dict[str, Any]:
        """Target, device, engine, versions, threads, precision, the compiled engine's place, and valid certificates."""
        exits.enter()
        return {**self._described, **self._open_engine().describe()}

    def close(self) -> None:
        """Finish submitted calls and release the engine. May be called twice; does nothing in a forked child.

        In a future's callback it returns at once, and submitted calls finish in the background.
        """
        if os.getpid() != self._process:
            return
        self._closed = True  # before taking the lock, which a thread that keeps submitting would rarely release
        with self._lock:
            self._engine = None
        if self._workers is not None:
            self._workers.close()

    def _open_engine(self) -> Engine:
        engine = self._engine
        if engine is None or self._closed:
            raise RuntimeClosedError("this runtime is closed", "call load() again")
        if os.getpid() != self._process:
            raise RuntimeClosedError("this runtime belongs to the parent process", "call load() in the child, or spawn")
        return engine

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def count_samples(feeds: Feeds) -> int:
    """The number of samples. Raises InputError: none, or not the same number in each feed."""
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        found = ", ".join(f"{name!r} has {count}" for name, count in counts.items())
        raise InputError(f"the numbers of samples differ or are 0: {found}", "give every input the same number, not 0")
    return next(iter(counts.values()))


def pad_batch(runtime: Runtime, feeds: Feeds) -> dict[str, Array]:
    """The feeds, with the last sample repeated up to the graph's smallest batch."""
    missing = runtime.inputs[0].limits(0)[0] - count_samples(feeds)
    if missing <= 0:
        return dict(feeds)
    return {name: np.concatenate([array, np.repeat(array[-1:], missing, axis=0)]) for name, array in feeds.items()}


class Comparison(msgspec.Struct, frozen=True):
    """The largest absolute difference, as a share of the reference's largest absolute value (``scale``).

    Fill values of masks (all of similar magnitude, 1e8 or more) do not count in the scale; their differences are
    relative to themselves. For integers, the difference is the share of unequal ones, and ``scale`` is their number.

    It is true if the difference is within the tolerance. NaN never is; infinity is only if both arrays have the same.
    """

    difference: float
    tolerance: float
    scale: float

    def __bool__(self) -> bool:
        return bool(np.isfinite(self.difference)) and self.difference <= self.tolerance

    def __str__(self) -> str:
        return f"differs by {self.difference:.1e} of its scale, {self.scale:.3g}; {self.tolerance:.0e} is allowed"


def compare(found: Array, reference: Array, tolerance: float) -> Comparison:
    """Compare two arrays of the same shape. For different shapes the difference is NaN."""
    if found.shape != reference.shape:
        return Comparison(float("nan"), tolerance, float("nan"))
    if reference.dtype.kind in "biu":
        unequal = float(np.count_nonzero(found != reference))
        return Comparison(unequal / max(1, reference.size), tolerance, float(reference.size))
    exact, given = reference.astype(np.float64), found.astype(np.float64)
    size = np.abs(exact)
    finite, huge = np.isfinite(size), size >= _HUGE
    fills = size[huge & finite]
    alike = fills.size == 0 or fills.max() <= 4 * fills.min()  # otherwise they are results
    usual = finite & ~huge if alike else finite
    scale = float(np.max(size, initial=0.0, where=usual))
    with np.errstate(invalid="ignore"):  # between infinities
        shares = np.abs(given - exact) / np.where(usual, scale or 1.0, size)
    largest = float(np.max(np.where(given == exact, 0.0, shares), initial=0.0))
    return Comparison(largest, tolerance, scale or float(np.max(size, initial=0.0, where=finite)))


def quartiles(values: Array) -> tuple[float, float, float]:
    """The 25 %, 50 % and 75 % quantiles."""
    low, median, high = map(float, np.quantile(values, [0.25, 0.5, 0.75]))
    return low, median, high


def fastest(times: Array) -> tuple[int, ...]:
    """The indices of the row of ``times`` (sides, rounds) with the smallest median, and of the rows that tie with it.

    A side ties if its ratio to the fastest, round by round, is 1 or less in a quarter of the rounds.
    """
    best = times[np.argmin(np.median(times, axis=1))]
    return tuple(index for index, own in enumerate(times) if quartiles(own / best)[0] <= 1)


def scattered(where: str, low: float, median: float, high: float) -> str:
    """Why times with these quartiles (in milliseconds) are too unsteady to compare; empty if they are steady."""
    found = f"half of the times of {where} lie between {low:.3f} and {high:.3f} ms; measure again on a quiet machine"
    return found * (high - low > _STEADY * median)
