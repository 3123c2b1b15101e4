# SPDX-License-Identifier: Apache-2.0
"""What int8 costs the Fashion-MNIST model, with the bounds that a certificate rests on: W8A8, 10,000 test pictures.

    python tests/benchmarks/int8_drop.py [--plain] [--samples 10000] [--json]

As a user does it: `export`, `quantize` with its defaults on pictures held out of training, `validate` on every engine
that is here against the fp32 bundle on the first of them. ``--plain`` exports without folds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from perceiver_export.calibration.pipeline import quantize
from perceiver_export.calibration.targets import validate_targets
from perceiver_export.calibration.validated import Validation
from perceiver_export.exporter import export

FASHION = Path(__file__).resolve().parents[2] / "examples" / "fashion_mnist"
MAX_DROP, MIN_AGREEMENT = 0.6, 97.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--samples", type=int, default=10_000)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        exact = export(FASHION / "checkpoint", Path(folder) / "fp32", fold=not options.plain)
        made = quantize(exact, FASHION / "held_out.npz", Path(folder) / "int8")
        gates: dict[str, Any] = {"max_drop": MAX_DROP, "min_agreement": MIN_AGREEMENT}
        results = validate_targets(
            made, FASHION / "test.npz", against=exact, samples=options.samples, allow_overlap=False, **gates
        )
    found = [row(result) for result in results]
    if options.json:
        json.dump(found, sys.stdout, indent=2)
        return
    for one in found:
        print(
            f"{one['target']}: top-1 {one['top-1']:.2f} %, fp32 {one['fp32']:.2f} %; drop {one['drop']:+.2f} points"
            f" ({one['lost']} lost, {one['gained']} gained), 95 % upper bound {one['upper bound']:.3f}"
            f" ({one['outcome']}: at most {MAX_DROP});"
            f" agreement {one['agreement']:.2f} %, lower bound {one['its lower bound']:.2f} %"
        )


def row(result: Validation) -> dict[str, Any]:
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
        "upper bound": drop.upper,
        "outcome": drop.outcome,
        "agreement": agreement.measured,
        "its lower bound": agreement.lower,
    }


if __name__ == "__main__":
    main()
