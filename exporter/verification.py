# SPDX-License-Identifier: Apache-2.0
"""The comparison of exported graphs with their source on random inputs."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import NoneType

import numpy as np
import torch

from perceiver_export.calibration.graphs import node_flops
from perceiver_export.exporter.graphs import GraphPart
from perceiver_export.exporter.model.config import GivenQueries, PerceiverConfig, QueryDecoder
from perceiver_export.exporter.model.perceiver import PerceiverIO
from perceiver_export.exporter.onnx_files import OnnxFile
from perceiver_export.exporter.own import NamedModule, repeated
from perceiver_export.exporter.trace import FoldedGraph, sample_inputs
from perceiver_export.runtimes.errors import (
    BundleError,
    DeviceError,
    PerceiverExportError,
    UnsupportedModelError,
    VerificationError,
)
from perceiver_export.runtimes.manifest import Check, index_input
from perceiver_export.runtimes.opening import open_engine
from perceiver_export.runtimes.runtime import Array, Runtime, compare

# Two float32 implementations of a 50-layer model differ by about 1e-6 of the output's scale.
TOLERANCE = 1e-4
# Very sharp attention multiplies rounding errors. If torch in float32 differs from torch in float64 by more than the
# tolerance, the graph may differ by this many times torch's own error: another order of sums is not a bug.
_TIMES_TORCHS_OWN = 10
_MOST_TOLERANCE = 1e-2
# Scales of the third case: the next one is drawn if torch in float32 is too far from float64 for a comparison.
_LARGE_VALUES = (100.0, 10.0, 1.0)
LARGE_MODEL = 500e9  # FLOPs per call: optical flow has 790e9, which take torch 30 s of a core's time
_STEP = 17  # on a large model's second input, one query in this many is compared


class _LargeValuesError(VerificationError):
    """On large values, torch in float32 is itself so far from torch in float64 that a comparison proves nothing."""


@dataclass(frozen=True)
class _Case:
    """Inputs, and the source's outputs for them, for one query in ``step``.

    ``first`` and ``shuffled``: the inputs are the source's examples, unchanged or in another order. ``large``: the
    inputs may be drawn again with smaller values.
    """

    feeds: dict[str, Array]
    outputs: dict[str, Array]
    step: int = 1
    first: bool = False
    shuffled: bool = False
    large: bool = False


def verify(
    source: GraphPart,
    parts: Sequence[FoldedGraph],
    config: PerceiverConfig | None,
    directory: Path,
    progress: Callable[[int, int], None],
) -> tuple[list[Check], dict[str, dict[str, Array]]]:
    """Compare the graphs in ``directory`` with torch on the random inputs of `_seeds`: every element of each output,
    but on a large model's second input only one query in `_STEP`. ``parts``: the parts of ``source``, encoder first, or
    ``source`` itself.

    Returns the checks, and ``input/NAME`` and ``output/NAME`` of each part's first case for golden.npz. torch finishes
    before the graphs are loaded, so that a large model need not fit into memory twice.

    Raises VerificationError for a NaN, an infinity (unless your own model returns it at the same place), or a
    difference above `TOLERANCE` of the output's scale; if ten times torch's own rounding error is more, that is the
    limit, up to `_MOST_TOLERANCE`. Raises UnsupportedModelError if your own model fails on random inputs.
    """
    *larger, least = _LARGE_VALUES
    for largest in larger:
        with contextlib.suppress(_LargeValuesError):
            return _verified(source, parts, config, directory, progress, largest)
    return _verified(source, parts, config, directory, progress, least)


def _verified(
    source: GraphPart,
    parts: Sequence[FoldedGraph],
    config: PerceiverConfig | None,
    directory: Path,
    progress: Callable[[int, int], None],
    largest: float,
) -> tuple[list[Check], dict[str, dict[str, Array]]]:
    """`verify` with a third case of ``largest`` times the usual values."""
    seeds = _seeds(source, parts)
    cases: list[_Case] = []
    for _, feeds in _drawn(source, config, seeds, largest):
        progress(len(cases), 2 * len(seeds))
        step = _STEP if cases and len(seeds) == 2 and _chooses_queries(source, config) else 1
        case = _own_case(source, feeds, cases) if source.examples else None
        cases.append(case or _Case(feeds, _reference(source, feeds, step=step), step))
    can_shrink = not cases[-1].shuffled and any(one.dtype.kind == "f" for one in cases[-1].feeds.values())
    cases[-1] = dataclasses.replace(cases[-1], large=can_shrink)
    known = [dict(case.feeds) for case in cases]
    checks: list[Check] = []
    golden: dict[str, dict[str, Array]] = {}
    for made in parts:
        part = made.part
        with _running(source, directory, made) as runtime:
            for index, (description, drawn) in enumerate(_drawn(part, config, seeds, largest)):
                progress(len(cases) + index, 2 * len(cases))
                given = {name: known[index].get(name, array) for name, array in drawn.items()}
                found, case = runtime.run(given), cases[index]
                expected = _expected(source, part, found, case.outputs, given)
                compared = [name for name in found if name in case.outputs]
                checks += [_check(source, case, one, found[one], expected[one], description) for one in compared]
                known[index] |= found
                own = {f"input/{name}": array for name, array in given.items()}
                golden.setdefault(part.name, own | {f"output/{name}": array for name, array in expected.items()})
    return checks, golden


@contextlib.contextmanager
def _running(source: GraphPart, directory: Path, made: FoldedGraph) -> Iterator[Runtime]:
    """A part's graph on ONNX Runtime. Raises VerificationError if it does not run."""
    part = made.part
    try:
        engine = open_engine(directory / part.file, "ort-cpu", threads=None, plan=made.plan)
        with Runtime(engine, part.inputs, part.outputs, "fp32") as runtime:
            yield runtime
    except (BundleError, DeviceError) as error:
        # Not the graph's fault: too little memory, or a path or file that cannot be read.
        if isinstance(error.__cause__, (NoneType, PerceiverExportError, OSError)) or "memory" in error.hint:
            raise
        raise VerificationError(f"the exported graph does not run: {error.message}", _cause(source)) from error


def _cause(source: GraphPart) -> str:
    """The likely cause of a wrong graph, as a hint."""
    weights = source.module.state_dict().values() if isinstance(source.module, torch.nn.Module) else ()
    if any(getattr(one, "dtype", None) in (torch.float16, torch.bfloat16) for one in weights):
        return "convert the whole module with .float(), without .half() in it: engines round 16 bits differently"
    if source.examples and source.ranges:
        return "give one number as --batch: the model may compute with the number of samples"
    return "report this bug; meanwhile, a graph exported with --no-fold may pass"


def _seeds(source: GraphPart, parts: Sequence[FoldedGraph]) -> tuple[int, ...]:
    """Three seeds. The second draws other sizes, tokens and masks than the first. A large model without any of these
    skips it: only the random values would differ.
    """
    flops = sum(node_flops(node) for one in parts for node in one.model.graph)
    alike = all(spec.dtype == "float32" and not spec.ranges for spec in source.inputs) and not source.examples
    return (0, 2) if alike and flops >= LARGE_MODEL else (0, 1, 2)


def _expected(
    source: GraphPart, part: GraphPart, found: dict[str, Array], reference: dict[str, Array], given: dict[str, Array]
) -> dict[str, Array]:
    """A part's outputs as ``source`` computes them; latents, which ``source`` does not return, stay the part's own."""
    expected = {name: reference.get(name, array) for name, array in found.items()}
    index = index_input(part.inputs)
    if source is part or index is None or part.num_queries is None:
        return expected
    (rows,) = given[index.name]
    return {
        name: array.reshape(len(array), part.num_queries, -1)[:, rows].reshape(found[name].shape)
        for name, array in expected.items()
    }


def _own_case(source: GraphPart, feeds: dict[str, Array], cases: Sequence[_Case]) -> _Case:
    """A case of a model with examples; the first case is the examples. If the model is not defined for the random
    inputs, the elements of each row of the examples are shuffled instead: a mask keeps its number of ones.
    """
    if not cases:
        return _Case(feeds, _reference(source, feeds), first=True)
    usual = all(np.isfinite(array).all() for array in cases[0].outputs.values())
    with contextlib.suppress(UnsupportedModelError):
        outputs = _reference(source, feeds)
        if not any((~np.isfinite(array) if usual else np.isnan(array)).any() for array in outputs.values()):
            return _Case(feeds, outputs)
    rng, examples = np.random.default_rng(len(cases)), source.examples
    feeds = {name: rng.permuted(repeated(examples[name], len(array)), axis=-1) for name, array in feeds.items()}
    try:
        return _Case(feeds, _reference(source, feeds), shuffled=True)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"on random inputs, {error.message}", error.hint) from error


def _check(source: GraphPart, case: _Case, output: str, found: Array, reference: Array, description: str) -> Check:
    given = "the examples" if isinstance(source.module, NamedModule) and case.first else "random inputs"
    if case.shuffled:
        description += ", of the examples in another order"
    for side, array in (("torch", reference), ("the exported graph", found)):
        if (np.isnan(array) if source.examples else ~np.isfinite(array)).any():
            raise VerificationError(
                f"on {given}, {side} returns NaN or infinite values ({description})",
                "check that the model does not overflow float32, and is defined for all such inputs",
            )
    if case.step > 1:
        description += f", one query in {case.step}"
        config = source.module.model.config.decoder.outputs[output]
        found = found.reshape(len(found), config.queries.num_queries, -1)[:, :: case.step]
    comparison = compare(found, reference, TOLERANCE)
    if not comparison:
        own = _rounding(source, case, output)
        most = _MOST_TOLERANCE if reference.dtype.kind == "f" else 1.0  # among few integers, one tie is a large share
        comparison = compare(found, reference, min(max(TOLERANCE, _TIMES_TORCHS_OWN * own), most))
        if not comparison and _TIMES_TORCHS_OWN * own > most:
            kind = _LargeValuesError if case.large else VerificationError
            raise kind(
                f"{output} for {description}: torch in float32 differs from torch in float64 by {own:.1g}, so the"
                f" exported graph, which {comparison}, cannot be judged",
                "look for very sharp attention or canceling sums: the model is not exact in float32",
            )
    if not comparison:
        raise VerificationError(f"{output} for {description}: the exported graph {comparison}", _cause(source))
    return Check(output, description, comparison.difference, comparison.tolerance, comparison.scale)


def _rounding(source: GraphPart, case: _Case, output: str) -> float:
    """How far torch in float32 is from torch in float64; 0 for a model that fails in float64."""
    try:
        exact = _reference(source, case.feeds, double=True, step=case.step)[output]
    except Exception:  # the user's own code
        return 0.0
    return compare(case.outputs[output], exact, TOLERANCE).difference


def _chooses_queries(part: GraphPart, config: PerceiverConfig | None) -> bool:
    """Whether torch can decode a subset of the queries of each output: of a whole `PerceiverIO` with many queries."""
    if part.name != "model" or config is None or not isinstance(config.decoder, QueryDecoder):
        return False
    queries = [output.queries for output in config.decoder.outputs.values()]
    return not any(isinstance(one, GivenQueries) or one.num_queries <= _STEP for one in queries)


def _reference(part: GraphPart, feeds: dict[str, Array], double: bool = False, step: int = 1) -> dict[str, Array]:
    """The source's own outputs, in float64 with ``double`` (but not of an ONNX file), for one query in ``step``."""
    module = part.module
    if double and not isinstance(module, OnnxFile):
        module = copy.deepcopy(module).double()
        feeds = {name: array.astype(np.float64) if array.dtype.kind == "f" else array for name, array in feeds.items()}
    if isinstance(module, (OnnxFile, NamedModule)):
        return module.run(feeds)
    tensors = {name: torch.from_numpy(array) for name, array in feeds.items()}
    with torch.no_grad():
        if step > 1:
            return {name: rows.numpy() for name, rows in _some_rows(module.model, tensors, step)}
        outputs = module(*tensors.values())
    return {spec.name: output.numpy() for spec, output in zip(part.outputs, outputs, strict=True)}


def _some_rows(model: PerceiverIO, feeds: dict[str, torch.Tensor], step: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows (B, Q, E) of one query in ``step`` of each output."""
    inputs, mask = model.embed(feeds)
    latents = model.encoder(inputs, mask)
    assert isinstance(model.config.decoder, QueryDecoder)
    for name, output in model.config.decoder.outputs.items():
        indices = torch.arange(0, output.queries.num_queries, step).expand(len(latents), -1)
        yield name, model.decode(name, latents, indices, feeds, inputs, mask)


def _drawn(
    part: GraphPart, config: PerceiverConfig | None, seeds: Sequence[int], largest: float
) -> Iterator[tuple[str, dict[str, Array]]]:
    """Inputs of each seed, the third with large values; dynamic dimensions have their usual, least and largest size."""
    least, most = ({name: limits[end] for name, limits in part.ranges.items()} for end in (0, 1))
    of_seed = ((part.typical, 1.0), (least, 1.0), (most, largest))
    for seed in seeds:
        sizes, scale = of_seed[seed]
        shown = "".join(f", {name} {size}" for name, size in sizes.items())
        yield f"seed {seed}, normal values × {scale:g}{shown}", sample_inputs(part, config, sizes, seed, scale)
