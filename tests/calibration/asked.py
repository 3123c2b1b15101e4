# SPDX-License-Identifier: Apache-2.0
"""Options with gates from flat keywords, as tests write them; and pictures of the demo's test set as DATA."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_export.calibration import Gates, QuantizeOptions, ValidateOptions, Validation, validate
from tests.conftest import FASHION

TEST, HELD_OUT = FASHION / "test.npz", FASHION / "held_out.npz"
_GATES = {field.name for field in dataclasses.fields(Gates)}


def _nested(given: dict[str, Any]) -> dict[str, Any]:
    gates = {name: given.pop(name) for name in _GATES & given.keys()}
    return {"gates": Gates(**gates), **given}


def asked(**given: Any) -> ValidateOptions:
    return ValidateOptions(**_nested(given))


def quantizing(**given: Any) -> QuantizeOptions:
    return QuantizeOptions(**_nested(given))


def judged(bundle: Any, data: Any, **given: Any) -> Validation:
    return validate(bundle, data, asked(**given))


def value(result: Validation, name: str) -> float:
    """The candidate's, which must have been measured."""
    metric = result.metric(name)
    assert metric is not None
    return metric.candidate.value


def pictures(
    path: Path, rows: Any = slice(None), of_class: int | None = None, shift: int = 0, source: Path = TEST
) -> Path:
    """An .npz of some test pictures, or those of ``source``; of all classes or of one, labels ``shift`` too high."""
    with np.load(source) as data:
        images, labels = data["image"], data["labels"].astype(int)
    chosen = np.flatnonzero(labels == of_class) if of_class is not None else np.arange(len(labels))
    np.savez(path, image=images[chosen[rows]], labels=(labels[chosen[rows]] + shift) % 10)
    return path
