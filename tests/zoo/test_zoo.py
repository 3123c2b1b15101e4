# SPDX-License-Identifier: Apache-2.0
"""Every model of the zoo is exported, gives what torch gives, and is folded where that pays."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from perceiver_export.exporter import OwnModel, export
from perceiver_export.runtimes import load
from tests.zoo.models import ZOO

# Folding would cost more than it saves: their attention has many heads over few tokens.
UNPROFITABLE = ("blip2_qformer", "sam_two_way")


@pytest.mark.parametrize("name", ZOO)
def test_a_model_that_nobody_here_wrote(name: str, tmp_path: Path) -> None:
    module, inputs = ZOO[name]()
    bundle = export(OwnModel(module, inputs), tmp_path / "b")
    folds = bundle.manifest.parts["model"].folds

    assert folds, "no product was recognised"
    assert any(one.chosen == "folded" for one in folds) == (name not in UNPROFITABLE)
    assert all(one.why for one in folds)
    with torch.no_grad():
        expected = module(**inputs).numpy()
    with load(bundle) as runtime:
        (found,) = runtime.run({key: value.numpy() for key, value in inputs.items()}).values()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
