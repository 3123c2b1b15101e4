# SPDX-License-Identifier: Apache-2.0
"""The README's parity table: largest difference of our torch models from transformers', as a share of the scale.

python tests/benchmarks/parity.py
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from perceiver_export.exporter import load_model
from tests.exporter.conftest import make_transformers_model
from tests.exporter.test_huggingface_parity import SIZES, VARIANTS


def difference(kind: str, variant: str, dtype: torch.dtype) -> float:
    with tempfile.TemporaryDirectory() as directory:
        with contextlib.redirect_stderr(open(os.devnull, "w", encoding="utf-8")):
            make_transformers_model(kind, **VARIANTS[variant]).save_pretrained(directory)
        ours = load_model(directory, shape={"image": (3, *SIZES[kind])}).model.to(dtype)
    theirs = make_transformers_model(kind, **VARIANTS[variant]).to(dtype)
    image = torch.randn(2, 3, *SIZES[kind], dtype=dtype, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected, found = theirs(image).logits, ours(image)
    return float((found - expected).abs().max() / expected.abs().max())


def main() -> None:
    print("| | float32 | float64 |\n|---|---|---|")
    for kind in SIZES:
        worst = [
            max(difference(kind, variant, dtype) for variant in VARIANTS) for dtype in (torch.float32, torch.float64)
        ]
        print(f"| {kind} | {worst[0]:.1e} | {worst[1]:.1e} |")


if __name__ == "__main__":
    main()
