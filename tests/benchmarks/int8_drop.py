# SPDX-License-Identifier: Apache-2.0
"""The loss of the Fashion-MNIST model in int8, with the bounds behind a certificate: W8A8, 10,000 test images.

    python -m tests.benchmarks.int8_drop [--no-fold] [--samples 10000]

The steps are those of a user: `export`, `quantize` with its defaults on images held out of training, and `validate`
against the fp32 bundle on every engine here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from perceiver_export.calibration.quantization.pipeline import quantize
from perceiver_export.calibration.validation.results import Validation
from perceiver_export.calibration.validation.validation import validate_targets
from perceiver_export.exporter import ExportOptions, export
from tests.benchmarks.harness import FASHION, Row, command
from tests.calibration.asked import asked


def measure(work: Path, fold: bool = True, samples: int = 10_000) -> Iterator[Row]:
    """A row per target: top-1 in percent, drops in points."""
    exact = export(FASHION / "checkpoint", work / "fp32", ExportOptions(fold=fold))
    made = quantize(exact, FASHION / "held_out.npz", work / "int8")
    options = asked(device="all", against=exact, samples=samples, certify=True, max_drop=0.6, min_agreement=97.0)
    yield from map(row, validate_targets(made, FASHION / "test.npz", options))


def row(result: Validation) -> Row:
    drop, agreement = result.gates
    top1 = result.metric("top-1")
    assert top1 is not None
    assert top1.reference is not None
    return {
        "target": result.candidate["target"],
        "top-1": top1.candidate.value,
        "fp32": top1.reference.value,
        "lost": top1.lost,
        "gained": top1.gained,
        "drop": drop.measured,
        "95 % upper bound": drop.upper,
        "outcome": drop.outcome,
        "agreement": agreement.measured,
        "95 % lower bound": agreement.lower,
    }


if __name__ == "__main__":
    command(measure)
