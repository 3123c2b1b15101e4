# SPDX-License-Identifier: Apache-2.0
"""Samples that two sets share, found by the digests of their inputs: what a model was tuned on proves nothing of it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Sequence

from perceiver_export.calibration.record import read_calibration
from perceiver_export.runtimes.bundle import Bundle, open_bundle
from perceiver_export.runtimes.errors import DataError


def fingerprint(digests: Sequence[str]) -> str:
    """One hash of a set of samples, by a digest of each, whatever their order."""
    return hashlib.sha256("".join(sorted(digests)).encode()).hexdigest()


def calibrated_on(bundle: str | os.PathLike[str] | Bundle) -> frozenset[str]:
    """Digests of the samples that a bundle's ranges and precisions come from; none of one that is not quantized."""
    record = read_calibration(open_bundle(bundle, "never"))
    return frozenset(() if record is None else (*record.data.digests, *record.searched))


def check_overlap(digests: Sequence[str], used: Collection[str], data: str, allowed: bool) -> dict[str, str]:
    """Warnings by kind: where samples were used before, and where some are repeated. Raises DataError unless
    ``allowed``.
    """
    again = sum(digest in used for digest in digests)
    found = {}
    if again:
        said = f"{again:,} of {len(digests):,} samples of {data} were calibrated or searched on"
        if not allowed:
            raise DataError(
                said, "certify on samples that nothing was chosen by; --allow-overlap certifies all the same"
            )
        found["overlap"] = f"{said}: what is measured on them is too good"
    repeated = len(digests) - len(set(digests))
    if repeated:
        said = f"{repeated:,} of {len(digests):,} samples of {data} are repeated, so the bounds are too narrow"
        if not allowed:
            raise DataError(said, "give each sample once, or allow it: --allow-overlap")
        found["repeated"] = said
    return found
