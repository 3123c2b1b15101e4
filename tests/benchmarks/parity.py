# SPDX-License-Identifier: Apache-2.0
"""docs/results/parity.md: largest difference of our torch models from transformers', as a share of the scale.

python -m tests.benchmarks.parity
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from tests.benchmarks.harness import Row, command
from tests.exporter.conftest import KINDS, PICTURES
from tests.exporter.test_huggingface_parity import TEXT_VARIANTS, VARIANTS
from tests.exporter.transformers_reference import differences


def measure(work: Path) -> Iterator[Row]:
    for kind, (name, _) in KINDS.items():
        variants = list(VARIANTS.values()) if kind in PICTURES else TEXT_VARIANTS
        with contextlib.redirect_stderr(open(os.devnull, "w", encoding="utf-8")):
            found = [differences(kind, **variant) for variant in variants]
        worst = {str(dtype).removeprefix("torch."): max(one[dtype] for one in found) for dtype in found[0]}
        yield {"transformers class": f"`{name}`", **worst}


if __name__ == "__main__":
    command(measure)
