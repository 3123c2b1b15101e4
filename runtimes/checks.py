# SPDX-License-Identifier: Apache-2.0
"""Do arrays fit a model? Asked of every call, so that no engine ever sees what it would crash on or misread."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from perceiver_export.runtimes.engines.backend import Array, Feeds
from perceiver_export.runtimes.errors import DeviceError, InputError
from perceiver_export.runtimes.manifest import TensorSpec

_FIXED = "shapes are fixed at export: see --batch and --shape of `perceiver-export export`"
_RANGES = "give sizes within, the same for all inputs; `perceiver-export export --batch` says which they are"


class FeedChecks:
    """The checks of one graph, prepared once."""

    def __init__(
        self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], num_queries: int | None
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self.num_queries = num_queries
        self._prepared = tuple((spec.name, np.dtype(spec.dtype), spec) for spec in inputs)
        self._out = tuple((spec.name, np.dtype(spec.dtype), spec) for spec in outputs)
        self._fixed = {spec.name: spec.shape for spec in (*inputs, *outputs) if not spec.ranges}
        self._any_range = any(spec.ranges for spec in inputs)

    def feeds(self, feeds: Feeds) -> Feeds:
        """The feeds if they fit, native and contiguous (copied only where they are not). Raises InputError."""
        if not isinstance(feeds, Mapping):
            raise InputError(
                f"the inputs are a {type(feeds).__name__}, not arrays by name",
                f"give {{name: array}}; the model takes {names(self.inputs)}",
            )
        checked = {}
        sizes: dict[str, int] = {}
        for name, dtype, spec in self._prepared:
            array = feeds.get(name)
            if array is None:
                there = f"input {name!r} is missing, there is {', '.join(map(repr, feeds))}"
                raise InputError(there if feeds else "no inputs were given", f"the model takes {names(self.inputs)}")
            if not isinstance(array, np.ndarray):
                raise InputError(f"input {name!r} is a {type(array).__name__}", "give a numpy array")
            if array.dtype != dtype:
                array = _native(name, array, dtype)
            if array.shape != self._fixed.get(name):
                check_shape(spec, array.shape, sizes)
            if name == "queries" and self.num_queries is not None:
                _check_queries(array, self.num_queries)
            checked[name] = array if array.flags.c_contiguous else np.ascontiguousarray(array)
        if len(feeds) != len(checked):
            unknown = sorted(set(feeds) - set(checked))
            raise InputError(f"unknown input {unknown[0]!r}", f"the model takes {names(self.inputs)}")
        return checked

    def out(self, feeds: Feeds, out: Mapping[str, Array]) -> Mapping[str, Array]:
        """``out`` if outputs for these feeds can be written there. Raises InputError."""
        if not isinstance(out, Mapping):
            raise InputError(f"`out` is a {type(out).__name__}, not arrays by name", "give {name: array}")
        if len(out) != len(self._out) or any(name not in out for name, _, _ in self._out):
            raise InputError(f"`out` has {', '.join(sorted(out)) or 'nothing'}", f"it must have {names(self.outputs)}")
        sizes: dict[str, int] = {}
        if self._any_range:
            for spec in self.inputs:
                check_shape(spec, feeds[spec.name].shape, sizes)
        for name, dtype, spec in self._out:
            array = out[name]
            if not isinstance(array, np.ndarray) or array.dtype != dtype:
                raise InputError(f"`out` for {name!r} is not an array of {dtype}", "allocate it with that dtype")
            if not (array.flags.c_contiguous and array.flags.writeable):
                raise InputError(f"`out` for {name!r} is not contiguous and writeable", "allocate it with numpy.empty")
            if array.shape != self._fixed.get(name):
                check_shape(spec, array.shape, sizes, f"allocate `out` for {name!r} with that shape", "gives")
            if any(np.may_share_memory(array, feed) for feed in feeds.values()):
                raise InputError(
                    f"`out` for {name!r} shares memory with an input",
                    "give it memory of its own",
                )
        return out


def check_finite_inputs(feeds: Feeds) -> None:
    """Raise InputError where there is a NaN or an infinity."""
    for name, array in feeds.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            count = int(array.size - np.isfinite(array).sum())
            raise InputError(
                f"input {name!r} has {count} values that are not finite", "find out where NaN or infinity comes from"
            )


def check_finite_outputs(outputs: Mapping[str, Array]) -> None:
    """Raise DeviceError where there is a NaN or an infinity."""
    for name, array in outputs.items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise DeviceError(
                f"output {name!r} is not finite, though every input is", "it may overflow: build with fp32 or bf16"
            )


def check_shape(
    spec: TensorSpec, shape: tuple[int, ...], sizes: dict[str, int], hint: str = "", verb: str = "takes"
) -> None:
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
            f"{spec.name!r} has shape {list(shape)}, the model {verb} {list(spec.shape)}{ranges}",
            hint or (_RANGES if ranges else _FIXED),
        )


def names(specs: tuple[TensorSpec, ...]) -> str:
    """Tensors as a message lists them."""
    return ", ".join(f"{spec.name} ({spec.dtype} {list(spec.shape)})" for spec in specs)


def _native(name: str, array: Array, dtype: np.dtype[np.generic]) -> Array:
    """Big-endian arrays are turned round; any other dtype is refused."""
    if array.dtype.newbyteorder("=") != dtype:
        raise InputError(
            f"input {name!r} has dtype {array.dtype}, the model takes {dtype}",
            f"convert it: array.astype(numpy.{dtype})",
        )
    return array.astype(dtype)


def _check_queries(queries: Array, count: int) -> None:
    """An engine would read beside the table, or from its end."""
    if queries.size and not 0 <= int(queries.min()) <= int(queries.max()) < count:
        wrong = int(queries.min()) if queries.min() < 0 else int(queries.max())
        raise InputError(f"query {wrong} is out of range", f"the model has {count} queries, counted from 0")
