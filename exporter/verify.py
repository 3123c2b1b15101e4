# SPDX-License-Identifier: Apache-2.0
"""Does an exported graph give what torch gives? Run both, on inputs that are easy and on inputs that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch

from perceiver_export.exporter.parts import GraphPart
from perceiver_export.exporter.perceiver.config import PerceiverConfig
from perceiver_export.exporter.sample_inputs import sample_inputs
from perceiver_export.runtimes.comparison import compare
from perceiver_export.runtimes.errors import VerificationError
from perceiver_export.runtimes.manifest import Check
from perceiver_export.runtimes.runtime import Array, Runtime

# Two float32 implementations of a 50-layer model differ by about 1e-6 of the output's scale.
TOLERANCE = 1e-4
# A model with very sharp attention multiplies rounding errors. Where torch in float32 is itself further than this from
# torch in float64, the graph may differ from it by so many times torch's own error: another order of sums is no bug.
_TIMES_TORCHS_OWN = 10
_LARGE = 100.0


def verify(
    part: GraphPart, config: PerceiverConfig, load: Callable[[], Runtime], progress: Callable[[int, int], None]
) -> tuple[tuple[Check, ...], dict[str, Array]]:
    """Compare a graph with torch on three seeds; the checks, and its arrays for golden.npz.

    The arrays are ``input/NAME`` and ``output/NAME`` of the first seed. torch is done before ``load`` is called: of a
    large model both at once need not fit into memory.

    Raises VerificationError: a difference above `TOLERANCE` of the output's scale (above ten times torch's own rounding
    error, where that is more), or a NaN or infinity.
    """
    checks: list[Check] = []
    cases = list(_cases(part, config))
    references = []
    for index, (_, feeds) in enumerate(cases):
        progress(index, 2 * len(cases))
        references.append(_in_torch(part, feeds))
    with load() as runtime:
        for index, ((description, feeds), reference) in enumerate(zip(cases, references, strict=True)):
            progress(len(cases) + index, 2 * len(cases))
            found = runtime.run(feeds)
            checks += [_check(part, name, description, feeds, found[name], reference[name]) for name in reference]
    golden = {f"input/{name}": array for name, array in cases[0][1].items()}
    golden |= {f"output/{name}": array for name, array in references[0].items()}
    return tuple(checks), golden


def _check(
    part: GraphPart, output: str, description: str, feeds: dict[str, Array], found: Array, reference: Array
) -> Check:
    if not (np.isfinite(reference).all() and np.isfinite(found).all()):
        side = "torch" if not np.isfinite(reference).all() else "the exported graph"
        raise VerificationError(
            f"{side} gives NaN or infinite values for {description}",
            "the checkpoint overflows float32; check its training before exporting it",
        )
    comparison = compare(found, reference, TOLERANCE)
    if not comparison:
        own = compare(reference, _in_float64(part, feeds)[output], TOLERANCE).difference
        comparison = compare(found, reference, max(TOLERANCE, _TIMES_TORCHS_OWN * own))
    if not comparison:
        raise VerificationError(
            f"{output} for {description}: the exported graph {comparison}",
            "report it: this is a bug; a graph exported with --no-fold may hold meanwhile",
        )
    return Check(output, description, comparison.difference, comparison.tolerance, comparison.scale)


def _in_torch(part: GraphPart, feeds: dict[str, Array]) -> dict[str, Array]:
    with torch.no_grad():
        outputs = part.module(*(torch.from_numpy(array) for array in feeds.values()))
    return {spec.name: output.numpy() for spec, output in zip(part.outputs, outputs, strict=True)}


def _in_float64(part: GraphPart, feeds: dict[str, Array]) -> dict[str, Array]:
    tensors = [torch.from_numpy(array) for array in feeds.values()]
    with torch.no_grad():
        module = copy.deepcopy(part.module).double()
        outputs = module(*(tensor.double() if tensor.is_floating_point() else tensor for tensor in tensors))
    return {spec.name: output.numpy() for spec, output in zip(part.outputs, outputs, strict=True)}


def _cases(part: GraphPart, config: PerceiverConfig) -> Iterator[tuple[str, dict[str, Array]]]:
    """Three seeds, the last with large inputs; dynamic dimensions are tried as usual, at least and at most."""
    ranges = {name: limits for spec in part.inputs for name, limits in spec.ranges.items()}
    least, most = ({name: limits[end] for name, limits in ranges.items()} for end in (0, 1))
    for seed, (sizes, scale) in enumerate(zip((part.typical, least, most), (1.0, 1.0, _LARGE), strict=True)):
        shown = "".join(f", {name} {size}" for name, size in sizes.items())
        yield f"seed {seed}, normal values × {scale:g}{shown}", sample_inputs(part, config, sizes, seed, scale)
