# SPDX-License-Identifier: Apache-2.0
"""From a torch module to an ONNX graph, and random inputs for both."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import logging
import os
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

from perceiver_export.exporter.fold.dynamic import make_dynamic, stand_ins
from perceiver_export.exporter.fold.engine import fold as fold_graph
from perceiver_export.exporter.fold.latents import QUERIES, latents_of, mark, own_outputs
from perceiver_export.exporter.fold.nodes import Sizes
from perceiver_export.exporter.fold.normalize import normalize, settle
from perceiver_export.exporter.fold.plan import plan
from perceiver_export.exporter.graphs import ByPosition, GraphPart, Split, cut_parts
from perceiver_export.exporter.model.config import ArrayInput, PerceiverConfig
from perceiver_export.exporter.onnx_files import OPSET, OnnxFile, refuse, vocabularies
from perceiver_export.exporter.own import NamedModule, repeated
from perceiver_export.exporter.simplify import number_folds, simplify, without_metadata, without_sequences
from perceiver_export.runtimes.errors import ExportError
from perceiver_export.runtimes.manifest import FoldDecision, MemoryPlan, TensorSpec
from perceiver_export.runtimes.runtime import Array

IR_VERSION = 10  # onnxruntime 1.23, the newest for Python 3.10, refuses 12 and above
_DATA_DEPENDENT = re.compile(r"data.?dependent|unbacked|Dynamic control flow|nonzero", re.IGNORECASE)
_UNSUPPORTED = re.compile(r"No ONNX function|UnsupportedOperator|not supported|Unsupported")
_ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")  # colors
_CONSTANT = ("ones_like", "zeros_like", "full_like", "empty_like", "new_ones", "new_zeros", "new_full", "new_empty")
_READS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


@contextlib.contextmanager
def unlogged() -> Iterator[None]:
    """Silence onnx-ir, which logs a traceback at each node whose shape it cannot infer."""
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, ("onnx_ir", "onnxscript")):
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL + 1)
        yield


def sample_inputs(
    part: GraphPart, config: PerceiverConfig | None, sizes: dict[str, int], seed: int, scale: float = 1.0
) -> dict[str, Array]:
    """Random arrays for every input of ``part``; ``sizes`` sets each dynamic dimension.

    Floats are normally distributed, times ``scale``. Coordinates of points lie between -1 and 1: the model sees only
    their Fourier features, which mean nothing beyond. Tokens and query indices take any valid value. Masks leave out
    the last elements, a random number of them in each sample. If the part has examples, seed 0 gives these, and other
    seeds draw similar values.
    """
    rng = np.random.default_rng(seed)

    def sample(spec: TensorSpec) -> Array:
        shape = tuple(sizes[dim] if isinstance(dim, str) else dim for dim in spec.shape)
        if spec.name in part.examples:
            return _like(part.examples[spec.name], spec, shape, rng if seed else None, scale)
        one = None if config is None else config.inputs.get(spec.name)
        if isinstance(one, ArrayInput) and one.value_positions is not None:
            return rng.uniform(-1, 1, shape).astype(np.float32)
        if spec.dtype == "int32" and spec.name.endswith("_mask"):
            there = rng.integers(1, shape[1], shape[0], endpoint=True)
            return (np.arange(shape[1]) < there[:, None]).astype(np.int32)
        if spec.values is not None:
            return rng.integers(*spec.values, shape, dtype=np.int32, endpoint=True)
        return (rng.normal(size=shape) * scale).astype(np.float32)

    return {spec.name: sample(spec) for spec in part.inputs}


def _like(
    example: Array, spec: TensorSpec, shape: tuple[int, ...], rng: np.random.Generator | None, scale: float
) -> Array:
    """The example, repeated to fill ``shape``, or with ``rng`` random numbers of its mean and spread."""
    if rng is None:
        return repeated(example, shape[0]) if example.shape != shape else example
    if example.dtype.kind == "f":
        spread = rng.normal(size=shape) * (scale * example.std() or scale)
        like: Array = (example.mean() + spread).astype(example.dtype)
        return like
    least, most = spec.values or (example.min(initial=0), example.max(initial=1))
    drawn: Array = rng.integers(int(least), int(most), shape, endpoint=True).astype(example.dtype)
    return drawn


@dataclass(frozen=True)
class FoldedGraph:
    """A part's graph, the decision at each site, and the memory plan; the last two are empty without folding."""

    part: GraphPart
    model: ir.Model
    folds: tuple[FoldDecision, ...] = ()
    plan: MemoryPlan | None = None


@unlogged()
def folded_graph(part: GraphPart, config: PerceiverConfig | None, fold: bool, budget: int) -> FoldedGraph:
    """The graph of a part, with constants computed and weights stored once, folded, and cut to fit ``budget`` bytes.

    Dynamic dimensions are traced and folded as prime numbers, see `fold.dynamic`. Raises ExportError; UsageError if the
    budget is too small.
    """
    primes = _stand_ins(part, list(part.typical))
    return _folded(part, _plain(part, config, primes), primes, fold, budget)


@unlogged()
def folded_parts(source: GraphPart, split: Split, fold: bool, budget: int) -> list[FoldedGraph]:
    """`folded_graph` for an encoder and one decoder per output, cut from the graph of ``source``.

    Raises UsageError or UnsupportedModelError if it cannot be cut, or not as ``split`` asks.
    """
    primes = _stand_ins(source, [*source.typical, *([QUERIES] if split.dynamic else [])])
    model, first = _plain(source, None, primes, split.latents), source.outputs[0].shape[0]
    normalize(model, _counted(source, primes))
    samples = primes[first] if isinstance(first, str) else first
    latents = latents_of(model.graph, split.latents, samples)
    parts = cut_parts(source, model, latents, split, primes.get(QUERIES))
    for part, graph in parts:
        simplify(graph, _counted(part, primes).planned)
    return [_folded(part, graph, primes, fold, budget) for part, graph in parts]


def _plain(
    part: GraphPart, config: PerceiverConfig | None, primes: dict[str, int], latents: str | None = None
) -> ir.Model:
    """The graph as traced or read, simplified; the tensor or module named ``latents`` becomes its last output."""
    examples, real = sample_inputs(part, config, primes, seed=0), _counted(part, primes)
    if isinstance(part.module, OnnxFile):
        model = part.module.graph({name: array.shape for name, array in examples.items()})
    else:
        model = _traced(part, examples)
    if latents is not None:
        mark(model.graph, latents)
    if isinstance(part.module, OnnxFile):
        settle(model, real)
    with quiet():
        without_sequences(model)
    refuse(model.graph)
    simplify(model, real.planned)
    return model


def _counted(part: GraphPart, primes: dict[str, int]) -> Sizes:
    return Sizes({primes[name]: part.planned(name) for name in part.typical})


def _folded(part: GraphPart, model: ir.Model, primes: dict[str, int], fold: bool, budget: int) -> FoldedGraph:
    decisions: tuple[FoldDecision, ...] = ()
    planned, real = None, _counted(part, primes)
    if fold:
        decisions = fold_graph(model, real, part.samples)
        model, planned = plan(model, budget, real)
        simplify(model, real.planned)
    make_dynamic(model, primes)
    without_metadata(model)
    number_folds(model.graph, [spec.name for spec in (*part.inputs, *part.outputs)])
    own_outputs(model.graph, [spec.name for spec in part.outputs])
    return FoldedGraph(_with_vocabularies(part, model.graph), model, decisions, planned)


def _stand_ins(part: GraphPart, names: list[str]) -> dict[str, int]:
    """A prime for each name, none of which divides a size of an input, a weight, or a tensor in your own module."""
    if not names:
        return {}
    fixed = [size for spec in (*part.inputs, *part.outputs) for size in spec.shape if isinstance(size, int)]
    examples = [size for array in part.examples.values() for size in array.shape]
    weights = [*part.module.parameters(), *part.module.buffers()] if isinstance(part.module, nn.Module) else []
    found = fixed + examples + [size for weight in weights for size in weight.shape]
    if isinstance(part.module, NamedModule):
        found += _watched(part).sizes
    if isinstance(part.module, OnnxFile):
        found += part.module.sizes()
    return stand_ins(names, found)


class _Watch(TorchDispatchMode):
    """Watches the calls within it: ``sizes`` collects the sizes of tensors and the integers that operators take;
    ``reads`` becomes true if Python reads a number that depends on ``inputs``, as a branch or `.item()` does.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.sizes: set[int] = set()
        self.reads = False
        self._dependent = WeakTensorKeyDictionary(dict.fromkeys(inputs))

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        given, made = tree_leaves((args, kwargs)), [one for one in tree_leaves(found) if isinstance(one, Tensor)]
        self.sizes.update(one for one in given if isinstance(one, int))
        self.sizes.update(size for tensor in made for size in tensor.shape)
        if any(isinstance(one, Tensor) and one in self._dependent for one in given):
            self.reads = self.reads or function in _READS
            if function.overloadpacket.__name__ not in _CONSTANT:
                self._dependent.update(dict.fromkeys(made))
        return found


def _watched(part: GraphPart) -> _Watch:
    """Watch a call of the module with inputs of typical size; if it fails, up to the failure."""
    given = [torch.from_numpy(array) for array in sample_inputs(part, None, part.typical, seed=0).values()]
    watch = _Watch(given)
    # Errors of the user's own code are reported by tracing.
    with quiet(), contextlib.suppress(Exception, SystemExit), torch.no_grad(), watch:
        _module(part)(*given)
    return watch


def _with_vocabularies(part: GraphPart, graph: ir.Graph) -> GraphPart:
    """The part, with the range of integer inputs that index a table; a part without examples has its ranges already."""
    known = vocabularies(graph) if part.examples else {}
    inputs = tuple(
        msgspec.structs.replace(spec, values=(0, known[spec.name] - 1)) if spec.name in known else spec
        for spec in part.inputs
    )
    return dataclasses.replace(part, inputs=inputs)


def _traced(part: GraphPart, examples: dict[str, Array]) -> ir.Model:
    """Trace with torch.export, else with TorchScript. Raises ExportError with the reasons of both."""
    try:
        return _exported(part, examples)
    except (Exception, SystemExit) as error:  # tracing runs the user's own code
        first = error
    dependent = _DATA_DEPENDENT.search(_everything(first))
    if dependent or _watched(part).reads:
        # TorchScript would silently keep the branch that the examples take.
        reason = _reason(first) if dependent else "forward reads the values of tensors"
        raise ExportError(
            f"the model's graph depends on the values of its inputs: {reason}",
            "replace branches on tensors with torch.where, and .item() and sizes from data with fixed values",
        ) from first
    try:
        return _scripted(part, examples)
    except (Exception, SystemExit) as error:
        reasons = f"{_reason(first)}; nor can TorchScript: {_reason(error)}"
        hint = "remove branches, sizes and .item() that depend on the values of tensors"
        if _UNSUPPORTED.search(reasons):
            first_call = "torch.nn.utils.parametrize.remove_parametrizations"
            hint = f"replace that operator; for a parametrization, call {first_call} first"
        raise ExportError(f"torch.export cannot trace this model: {reasons}", hint) from error


def _exported(part: GraphPart, examples: dict[str, Array]) -> ir.Model:
    program = _export(part, examples, None, dynamo=True, optimize=False, verbose=False)
    assert program is not None
    program.model.ir_version = IR_VERSION
    for value, spec in zip(program.model.graph.inputs, part.inputs, strict=True):
        value.name = spec.name  # torch renames an input that is returned as an output
    return program.model


def _everything(error: BaseException) -> str:
    """The text of an error and of all its causes."""
    return str(error) + ("" if error.__cause__ is None else _everything(error.__cause__))


def _scripted(part: GraphPart, examples: dict[str, Array]) -> ir.Model:
    import onnx

    written = io.BytesIO()
    with _nowhere():  # here only, since it hides progress bars too
        _export(part, examples, written, dynamo=False)
    return ir.from_proto(onnx.load_from_string(written.getvalue()))


def _export(part: GraphPart, examples: dict[str, Array], file: Any, **how: Any) -> torch.onnx.ONNXProgram | None:
    """Export, to an open ``file`` if one is given: torch accepts it, though its types do not say so."""
    with torch.no_grad(), quiet():
        return torch.onnx.export(
            _module(part),
            tuple(torch.from_numpy(array) for array in examples.values()),
            file,
            opset_version=OPSET,
            input_names=[spec.name for spec in part.inputs],
            output_names=[spec.name for spec in part.outputs],
            **how,
        )


def _module(part: GraphPart) -> nn.Module:
    module: nn.Module = part.module
    if not isinstance(module, NamedModule):
        return module
    # Only its model is registered, or the weights would have two names.
    return ByPosition(module.model, part.inputs, lambda _, feeds: list(module(feeds).values()))


def _reason(error: BaseException) -> str:
    """The root cause in one line: torch surrounds it with a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in _ESCAPES.sub("", str(error)).splitlines() if line.strip()]
    return ": ".join((type(error).__name__, *lines[:1]))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter: progress, notes about torchvision, its own deprecations, tracebacks."""
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
        contextlib.ExitStack() as stack,
    ):
        warnings.simplefilter("ignore")
        stack.callback(logging.disable, logging.root.manager.disable)
        logging.disable(logging.CRITICAL)  # handlers of torch's loggers keep the stderr that they were made with
        yield


@contextlib.contextmanager
def _nowhere() -> Iterator[None]:
    """Discard what C++ code writes directly to the process's standard output and error."""
    with contextlib.ExitStack() as stack:
        for stream in (sys.stdout, sys.__stdout__, sys.stderr, sys.__stderr__):
            with contextlib.suppress(Exception):  # closed, detached, or None
                stream.flush()  # type: ignore[union-attr]
        null = os.open(os.devnull, os.O_WRONLY)
        stack.callback(os.close, null)
        for descriptor in (1, 2):
            with contextlib.suppress(OSError):  # closed
                kept = os.dup(descriptor)
                stack.callback(os.close, kept)
                stack.callback(os.dup2, kept, descriptor)
                os.dup2(null, descriptor)
        yield
