# SPDX-License-Identifier: Apache-2.0
"""What a bundle may be held against: warnings where a reference shows little, refusal where it is to certify."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from perceiver_export.runtimes.certificates import engine_of
from perceiver_export.runtimes.errors import UsageError

Described = Mapping[str, Any]  # `sides.Side.engine`

_HINT = "give the fp32 bundle that it was made from, or the checkpoint: --against BUNDLE or --against CHECKPOINT"


def doubts(candidate: Described, reference: Described | None) -> dict[str, str]:
    """Warnings by kind: ``itself`` where both sides are one and the same, ``quantized`` where the reference is not what
    was trained either, so that its own loss is in no number.
    """
    found = {}
    if reference is not None and _is_same(candidate, reference):
        found["itself"] = (
            f"the reference is the candidate itself, the same graphs on {candidate['target']}: nothing was compared"
        )
    elif reference is not None and reference.get("quantization"):
        found["quantized"] = (
            f"the reference is quantized itself ({reference['quantization']}): what that cost is in none of the numbers"
        )
    return found


def check_reference(candidate: Described, reference: Described | None) -> None:
    """Raise UsageError where no certificate can rest on this reference: there is none, it is the candidate itself, it
    is quantized, or a function of which nothing is known.

    Float graphs of other targets and in fp16 or bf16 may be references; the certificate says which it was.
    """
    if reference is None:
        raise UsageError("a certificate says what a bundle was held against, and there is no reference", _HINT)
    for doubt in doubts(candidate, reference).values():
        raise UsageError(f"nothing can be certified: {doubt}", _HINT)
    if not reference.get("graphs"):
        raise UsageError(
            f"nothing can be certified: the reference is {reference.get('target')}, and no hash tells which",
            "give a bundle, or a checkpoint: --against CHECKPOINT, and in Python what exporter.load_reference gives",
        )


def _is_same(one: Described, other: Described) -> bool:
    """Whether both run the same graphs, whatever their files are called, on the same target and engine."""
    places = [(side.get("target"), engine_of(side), sorted(side.get("graphs", {}).values())) for side in (one, other)]
    return bool(places[0][2]) and places[0] == places[1]
