# SPDX-License-Identifier: Apache-2.0
"""The README's parity table: largest difference of our torch models from transformers', as a share of the scale.

python tests/benchmarks/parity.py
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.exporter.conftest import KINDS
from tests.exporter.test_huggingface_parity import TEXT_VARIANTS, VARIANTS
from tests.exporter.transformers_reference import SIZES, difference


def main() -> None:
    print("| transformers class | float32 | float64 |\n|---|---|---|")
    for kind, (name, _) in KINDS.items():
        variants = list(VARIANTS.values()) if kind in SIZES else TEXT_VARIANTS
        with contextlib.redirect_stderr(open(os.devnull, "w", encoding="utf-8")):
            worst = [
                max(difference(kind, dtype, **variant) for variant in variants)
                for dtype in (torch.float32, torch.float64)
            ]
        print(f"| `{name}` | {worst[0]:.1e} | {worst[1]:.1e} |")


if __name__ == "__main__":
    main()
