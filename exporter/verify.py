# SPDX-License-Identifier: Apache-2.0
"""Does the exported graph give what torch gives? Run both, on inputs that are easy and on inputs that are not."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import numpy as np
import torch

from perceiver_export.exporter.batch import Batch
from perceiver_export.exporter.perceiver.model import PerceiverIO
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
    model: PerceiverIO, runtime: Runtime, batch: Batch, progress: Callable[[int, int], None]
) -> tuple[tuple[Check, ...], dict[str, Array]]:
    """Compare the loaded graph with torch on three seeds; the checks, and the arrays of golden.npz.

    golden.npz holds ``input/NAME`` and ``output/NAME`` of the first seed.

    Raises VerificationError: a difference above `TOLERANCE` of the output's scale (above ten times torch's own rounding
    error, where that is more), or a NaN or infinity.
    """
    checks: list[Check] = []
    golden: dict[str, Array] = {}
    cases = list(_cases(model, batch))
    for index, (description, image) in enumerate(cases):
        progress(index, len(cases))
        with torch.no_grad():
            reference = model(torch.from_numpy(image)).numpy()
        found = runtime.run({"image": image})["logits"]
        if not (np.isfinite(reference).all() and np.isfinite(found).all()):
            side = "torch" if not np.isfinite(reference).all() else "the exported graph"
            raise VerificationError(
                f"{side} gives NaN or infinite values for {description}",
                "the checkpoint overflows float32; check its training before exporting it",
            )
        comparison = compare(found, reference, TOLERANCE)
        if not comparison:
            own = compare(reference, _in_float64(model, image), TOLERANCE).difference
            comparison = compare(found, reference, max(TOLERANCE, _TIMES_TORCHS_OWN * own))
        if not comparison:
            raise VerificationError(f"for {description} the exported graph {comparison}", "report it: this is a bug")
        checks.append(Check("logits", description, comparison.difference, comparison.tolerance, comparison.scale))
        if not golden:
            golden = {"input/image": image, "output/logits": reference}
    progress(len(cases), len(cases))
    return tuple(checks), golden


def _in_float64(model: PerceiverIO, image: Array) -> Array:
    with torch.no_grad():
        exact: Array = copy.deepcopy(model).double()(torch.from_numpy(image).double()).numpy()
    return exact


def _cases(model: PerceiverIO, batch: Batch) -> Iterator[tuple[str, Array]]:
    """Three seeds, the last with large inputs; a dynamic batch is tried at its three sizes."""
    sizes = (batch.typical, batch.least, batch.most)
    for seed, (size, scale) in enumerate(zip(sizes, (1.0, 1.0, _LARGE), strict=True)):
        image = np.random.default_rng(seed).normal(size=(size, *model.input_adapter.shape)) * scale
        yield f"seed {seed}, normal values × {scale:g}, batch {size}", image.astype(np.float32)
